import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.bench import BENCHMARKS
from jobs.bench import all as bench_all
from jobs.bench.inference import Case, growth
from jobs.bench.ingest import utilisation
from jobs.cli import main
from pipelines.corpus import Manifest
from pipelines.evaluation.baselines import SHAPES, random_baseline
from pipelines.mixture import Corpus
from pipelines.plan import DataConfig, Plan, Stage
from vitok import flops


def test_attention_benchmark_ends_with_its_figures_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    sizes = {"row-tokens": 70, "tokens-per-image": 16, "num-heads": 2, "head-dim": 8}
    sizes |= {"repeats": 1, "threads": 1}
    try:
        arguments = [text for name, n in sizes.items() for text in (f"--{name}", str(n))]
        assert main(["bench", "attention", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.pop("benchmark") == "attention"
    assert figures.pop("threads") == 1
    assert figures.pop("torch") == torch.__version__
    assert figures.pop("device")
    assert set(figures) == {
        f"{candidate}_{part}_ms"
        for candidate in (
            "per_image_explicit",
            "per_image_sdpa",
            "length_groups_sdpa",
            "padded_sdpa",
        )
        for part in ("forward", "backward")
    }
    assert all(milliseconds > 0 for milliseconds in figures.values())


def test_evaluation_benchmark_compares_a_worker_with_its_parts(
    capsys: pytest.CaptureFixture[str],
    sample_manifests: tuple[Path, Path],
    tiny_dino: nn.Module,
    tmp_path: Path,
) -> None:
    tiny_dino.save_pretrained(tmp_path / "dino")
    shards = Manifest.load(sample_manifests[0]).uris
    threads = torch.get_num_threads()
    command = ["bench", "evaluate", "--model", "linear-Bd1/16x64", "--dino", str(tmp_path / "dino")]
    command += ["--shards", *shards, "--side", "32", "--num-images", "40", "--features", "50"]
    try:
        assert main([*command, "--threads", "1", "--repeats", "1", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = ("reading", "bare_model", "psnr_and_ssim", "features")
    rates = [figures[f"{name}_images_per_s"] for name in parts]
    whole = figures["end_to_end_images_per_s"]
    assert min(rates) > 0
    assert figures["over_bare_model"] == pytest.approx(whole / rates[1], rel=0.01)
    in_turn = 1 / sum(1 / rate for rate in rates)
    assert figures["over_parts_in_turn"] == pytest.approx(whole / in_turn, rel=0.01)
    assert figures["images"] == 40
    assert figures["frechet_distance_s"] > 0


def run_inference(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    threads = torch.get_num_threads()
    try:
        given = [str(argument) for argument in ("--threads", 1, "--repeats", 1, *arguments)]
        assert main(["bench", "inference", *given]) == 0
    finally:
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_inference_benchmark_has_a_case_for_every_subject_and_resolution(
    capsys: pytest.CaptureFixture[str], tiny_weights: Path
) -> None:
    pytest.importorskip("diffusers")
    figures = run_inference(
        capsys,
        *("--model", tiny_weights, "--windows", 1, "full", "--resolutions", 96, 64),
        *("--baselines", "sd-vae"),
    )
    cases = figures["cases"]
    assert [(case["subject"], case["window"], case["resolution"]) for case in cases] == [
        *((str(tiny_weights), window, side) for window in ("1", "full") for side in (64, 96)),
        *(("sd-vae", "", side) for side in (64, 96)),
    ]
    for case in cases:
        assert case["seconds"] > 0
        assert case["process_mb"] > case["peak_mb"] >= 0
        assert case["skipped"] == ""
        assert (case["psnr"] is None) == (case["subject"] == "sd-vae")
    assert figures["time_per_pixel_4096_over_1024"] == {}


def test_a_model_by_name_reconstructs_from_a_pca_of_the_photograph(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = run_inference(capsys, "--model", "linear-Bd1/16x64", "--resolutions", 128, "--json")
    assert [case["window"] for case in figures["cases"]] == ["8", "full"]
    for case in figures["cases"]:
        assert case["psnr"] > 20


def test_a_case_that_would_take_too_long_or_too_much_memory_is_left_out_and_says_so(
    capsys: pytest.CaptureFixture[str], tiny_weights: Path
) -> None:
    common = ("--model", tiny_weights, "--windows", 1, "--resolutions", 64, 512)
    for limit, sentence in (
        (("--limit-s", 0), "s expected, more than --limit-s 0"),
        (("--limit-gb", -1), "GB expected, more than --limit-gb -1"),
    ):
        first, second = run_inference(capsys, *common, *limit)["cases"]
        assert not first["skipped"]
        assert sentence in second["skipped"]
        assert second["seconds"] is None


def test_growth_compares_figures_per_pixel_of_the_same_window() -> None:
    def case(window: str, side: int, seconds: float) -> Case:
        return Case("m", window, side, seconds=seconds, peak_mb=seconds * 100)

    cases = [case("8", 1024, 2.0), case("8", 4096, 40.0), case("full", 4096, 1e6)]
    cases += [case("16", 4096, 64.0), case("16", 1024, 4.0), case("", 1024, 1.0)]
    for figure in ("seconds", "peak_mb"):
        assert growth(cases, figure) == pytest.approx({"8": 1.25, "16": 1.0})
    assert growth(cases[:1], "seconds") == {}


@pytest.mark.parametrize(("name", "millions"), [("sd-vae", 83.7), ("flux", 83.8), ("dc-ae", 312.3)])
def test_baselines_have_the_size_of_the_published_models(name: str, millions: float) -> None:
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = random_baseline(name, torch.float32)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_baseline_that_is_not_there_is_named() -> None:
    assert len(SHAPES) == 3
    with pytest.raises(ValueError, match="no baseline 'sdvae', only sd-vae, flux, dc-ae"):
        random_baseline("sdvae", torch.float32)


def test_ingest_benchmark_ends_with_its_figures_as_json(
    ray_cluster: None, capsys: pytest.CaptureFixture[str], sample_manifests: tuple[Path, Path]
) -> None:
    threads = torch.get_num_threads()
    shards = sample_manifests[0].parent / "shards" / "train-000000.tar"
    sizes = {"images-per-step": 16, "row-tokens": 512, "ray-images": 64, "repeats": 1}
    sizes |= {"packed-images": 64, "token-budgets": 64, "packed-budgets": 100}
    arguments = [text for name, n in sizes.items() for text in (f"--{name}", str(n))]
    try:
        assert main(["bench", "ingest", "--shards", str(shards), *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.pop("benchmark") == "ingest"
    assert figures.pop("images") == 48, "the whole steps of an epoch of 60 images"
    for name in ("decode", "pillow_decode", "resize", "pipeline", "ray"):
        assert figures.pop(f"{name}_images_per_s") > 0
    assert figures["pipeline_over_decode"] > 0
    assert 0.3 < figures["padded_utilisation"] < figures["token_utilisation"] <= 1


def test_utilisation_counts_real_tokens_of_rows_and_of_padded_batches(
    sample_manifests: tuple[Path, Path],
) -> None:
    plan = Plan(
        corpus=Corpus.of(Manifest.load(sample_manifests[0])),
        data=DataConfig(row_tokens=128),
        stages=(Stage(steps=3, images_per_step=20, token_budgets=(64, 16)),),
        patch_size=16,
        seed=0,
    )
    tokens, padded, rows = 0, 0, 0
    for step in range(3):
        for row in plan.step(step).rows:
            rows += 1
            for view in row:
                height, width = view.size
                length = -(-height // 16) * -(-width // 16)
                tokens += length
                padded += 16 if length <= 16 else 64
    found = utilisation(plan)
    assert found.packed == pytest.approx(tokens / (128 * rows))
    assert found.padded == pytest.approx(tokens / padded)


def test_training_benchmark_measures_the_step_in_memory_and_through_ray(
    ray_cluster: None,
    sample_manifests: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flops, "_MEASURED_S", 0.05)  # it is measured a dozen times
    threads = torch.get_num_threads()
    shards = [uri for uri in Manifest.load(sample_manifests[0]).uris]
    sizes = {"row-tokens": 64, "token-budget": 16, "steps": 3, "ray-steps": 4, "threads": 1}
    try:
        arguments = [text for name, n in sizes.items() for text in (f"--{name}", str(n))]
        arguments += ["--model", "Bd1-Bd1/16x16", "--compile", "False", "--shards", *shards]
        assert main(["bench", "train", "--json", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["best"] == "eager"
    assert figures["tokens_per_s"] == figures["eager_tokens_per_s"] > 0
    assert figures["peak_flops"] > 1e9
    assert figures["peak"] == "measured bf16 matmul, 1 thread"
    assert 0 < figures["mfu"] < 2  # of a peak that is measured beside other work
    assert figures["ray_overhead"] > -1
    parts = ("to_device", "forward", "losses", "backward", "optimizer")
    assert sum(figures[f"eager_{part}_share"] for part in parts) == pytest.approx(1, abs=1e-3)
    assert figures["eager_backward_share"] > figures["eager_to_device_share"]
    assert 0 < figures["eager_communication_share"] < 1
    # As many images as fill a row of 64 tokens, at 16 tokens at most.
    assert figures["images_per_step"] >= 4
    assert 0.5 < figures["token_utilisation"] <= 1


def test_all_benchmarks_are_run_judged_and_one_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {aim.run for aim in bench_all.AIMS} <= set(bench_all.RUNS)
    assert {command[0] for command in bench_all.RUNS.values()} == set(BENCHMARKS) - {"all"}

    small = ("--row-tokens", "70", "--tokens-per-image", "16", "--repeats", "1", "--threads", "1")
    runs = {"broken": ("attention", "--model", "none"), "small": ("attention", *small)}
    figure = "per_image_explicit_forward_ms"
    aims = (
        bench_all.Aim("small", "a time", figure, "at least", 0.0),
        bench_all.Aim("small", "the same", figure, "at most", 0.0),
        bench_all.Aim("small", "of a part", f"{figure}.part", "at most", 1.0),
        bench_all.Aim("broken", "of nothing", figure, "at most", 1.0),
        bench_all.Aim("elsewhere", "not run", figure, "at most", 1.0),
    )
    monkeypatch.setattr(bench_all, "RUNS", runs)
    monkeypatch.setattr(bench_all, "AIMS", aims)
    assert main(["bench", "all"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["benchmark"] == "all"
    assert "failed" in found["runs"]["broken"]
    assert found["runs"]["small"]["benchmark"] == "attention"
    assert [(row["meaning"], row["met"]) for row in found["aims"]] == [
        ("a time", True),
        ("the same", False),
        ("of a part", None),
        ("of nothing", None),
    ]
    assert re.search(r"the same .* at most 0 +missed", said)
    assert main(["bench", "all", "small", "smal"]) == 1
    assert "no benchmark 'smal'; there are: broken, small" in capsys.readouterr().err
