import json
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.cli import main
from jobs.evaluations import EVALUATIONS
from pipelines.evaluation.baselines import REPOSITORIES, random_baseline
from tests.vitok.random_inception import write_inception
from vitok.variants import RELEASED


@pytest.fixture
def baselines(tmp_path: Path) -> list[str]:
    """Two autoencoders of diffusers as they are published, but for random weights."""
    pytest.importorskip("diffusers")
    for name in ("sd-vae", "flux"):
        random_baseline(name, torch.bfloat16).save_pretrained(tmp_path / name)
    return [f"diffusers:{tmp_path / name},name={name}" for name in ("sd-vae", "flux")]


def test_the_whole_command_judges_ours_baselines_and_codecs_by_all_metrics(
    tiny_weights: Path,
    tiny_dino: nn.Module,
    baselines: list[str],
    sample_manifests: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inception, digest = write_inception(tmp_path / "inception.pt")
    tiny_dino.save_pretrained(tmp_path / "dino")
    command = ["evaluate", "imagenet-256p", "--data", str(sample_manifests[1]), "--json"]
    command += ["--subjects", f"{tiny_weights},name=tiny", *baselines, "jpeg,bits_per_pixel=9"]
    command += ["--square", "24", "32", "--max-images", "3", "--out", str(tmp_path / "out")]
    command += ["--networks.inception", str(inception), "--networks.inception-digest", digest]
    command += ["--networks.dino", str(tmp_path / "dino")]
    command += ["--num-workers", "0", "--no-use-gpu", "--num-pictures", "1"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(score["subject"], score["resolution"]) for score in scores] == [
        (name, f"square {side}") for name in ("tiny", "sd-vae", "flux", "jpeg") for side in (24, 32)
    ]
    for score in scores:
        assert score["num_images"] == 3
        for name in ("psnr", "ssim", "rfid", "rfdd", "seconds"):
            assert score[name] is not None, (score["subject"], name)
    assert [score["compression_ratio"] for score in scores[::2]] == [48, 48, 12, None]
    assert scores[6]["rfid"] < scores[0]["rfid"], "JPEG is nearer to the image than noise"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "SD-VAE f8x4 (published)" in report


def test_weights_that_are_missing_are_named_with_where_they_are(
    tiny_weights: Path,
    sample_manifests: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", "quickstart", "--data", str(sample_manifests[1])]
    command += ["--out", str(tmp_path / "out"), "--subjects", str(tiny_weights)]
    for options, expected in (
        (["--networks.inception", "nowhere.pt"], "download https://nvlabs-fi-cdn.nvidia.com"),
        (["--networks.dino", "nowhere"], "set networks.dino to FOLDER"),
        (["--inception-reference", "x.npz"], "inception_reference needs the network"),
        (["flux2-vae"], "hf download black-forest-labs/FLUX.2-dev"),
    ):
        assert main([*command, *options]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error


@pytest.mark.parametrize("name", EVALUATIONS)
def test_recipes_name_what_there_is(name: str) -> None:
    settings = EVALUATIONS[name]()
    for spec in settings.specs():
        assert spec.is_codec or spec.location in REPOSITORIES or spec.location in RELEASED, (
            spec.title
        )
    assert settings.use_gpu == (settings.num_workers > 0)
    assert settings.data == ""
    assert (EVALUATIONS[name].__doc__ or "").splitlines()[0].endswith(".")
