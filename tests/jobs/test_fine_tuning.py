"""Trainings that start from weights, freeze a part, and export what they made."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.cli import main
from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.autoencoder_weights import initialize, load_autoencoder
from pipelines.ingest import load_step
from pipelines.plan import DataConfig, Stage
from pipelines.runs import RunConfig, latest_checkpoint
from pipelines.train_autoencoder import (
    build_model,
    prepare,
    reconstruction_step,
    row_flops,
    run_training,
)
from tests.conftest import tiny_model
from vitok.autoencoder import Autoencoder, part_of
from vitok.checkpoint import load_weights
from vitok.flops import training_flops
from vitok.initialize import start_at_random
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.optim import OptimConfig
from vitok.parallel import ParallelConfig, prepare_blocks
from vitok.pretrained import PARTS, encoder_digest
from vitok.variants import AutoencoderConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fine_tuning(
    sample_manifests: tuple[Path, Path],
    tiny_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AutoencoderTraining:
    """Train the decoder of the tiny weights for three steps in one stage, with a moving average."""
    train, held_out = sample_manifests
    return AutoencoderTraining(
        model=tiny_model(AutoencoderConfig(patch_size=16, latent_channels=16)),
        data=DataConfig(manifest=str(train), eval_manifest=str(held_out), row_tokens=128),
        stages=(Stage(steps=3, images_per_step=8, token_budgets=(36, 64)),),
        loss=LossConfig(ssim_tile=32),
        optim=OptimConfig(lr=3e-3, warmup=0.3, ema_decay=0.9),
        run=RunConfig(
            name="fine-tuning",
            storage=str(tmp_path_factory.mktemp("runs")),
            num_workers=2,
            cpus_per_worker=0.5,
            use_gpu=False,
            compute_dtype="float32",
            parallel=ParallelConfig(checkpoint_every=1),
            mfu=False,
            log_every=1,
            max_failures=0,
        ),
        start=str(tiny_weights),
        freeze="encoder",
    )


@pytest.fixture(scope="module")
def fine_tuned(ray_cluster: None, fine_tuning: AutoencoderTraining) -> AutoencoderTraining:
    """The same, trained by two workers."""
    settings = prepare(fine_tuning)
    run_training(settings)
    return settings


def weights_of(model: Autoencoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def started(settings: AutoencoderTraining) -> Autoencoder:
    model = build_model(settings)
    prepare_blocks(model, settings.run.parallel)
    initialize(model.to_empty(device=CPU), settings, plan_of(settings))
    return model


def test_frozen_encoder_is_the_same_bit_for_bit_after_training(
    fine_tuned: AutoencoderTraining,
) -> None:
    before = load_autoencoder(fine_tuned.start)
    after = load_autoencoder(fine_tuned.run.folder.child("export").uri)
    assert encoder_digest(after) == encoder_digest(before)
    first, last = weights_of(before), weights_of(after)
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {name for name in first if part_of(name) == "decoder"}


def test_nothing_is_kept_for_what_is_frozen(fine_tuned: AutoencoderTraining) -> None:
    """Neither moments of the optimizer nor an average."""
    from torch.distributed.checkpoint import FileSystemReader

    latest = latest_checkpoint(fine_tuned.run.folder)
    assert latest is not None
    names = FileSystemReader(latest[0].uri).read_metadata().state_dict_metadata
    for name in weights_of(build_model(fine_tuned)):
        assert f"model.{name}" in names
        is_trained = part_of(name) == "decoder"
        assert (f"optimizer.state.{name}.exp_avg" in names) == is_trained
        assert (f"ema.average.{name}" in names) == is_trained


def test_frozen_encoder_leaves_the_gradients_of_the_decoder_as_they_are(
    fine_tuning: AutoencoderTraining,
) -> None:
    gradients = {}
    for freeze in ("none", "encoder"):
        settings = replace(fine_tuning, freeze=freeze)
        model = started(settings)
        passes = dict.fromkeys(("encoder_blocks", "decoder_blocks"), 0)
        for part in passes:
            for block in getattr(model, part):
                block.ffn.register_forward_hook(count_into(passes, part))
        row = load_step(plan_of(settings), 0)[0]
        loss = ReconstructionLoss(settings.loss)
        reconstruction_step(settings, loss, model, row, CPU)["loss"].backward()
        gradients[freeze] = {name: parameter.grad for name, parameter in model.named_parameters()}
        # What a block recomputes for the backward pass shows that there is one.
        assert passes == {
            "encoder_blocks": 1 if freeze == "encoder" else 2,
            "decoder_blocks": 2 * settings.model.decoder_depth,
        }
    for name, gradient in gradients["none"].items():
        assert gradient is not None
        frozen = gradients["encoder"][name]
        if part_of(name) == "encoder":
            assert frozen is None
        else:
            assert torch.equal(frozen, gradient), name


def count_into(passes: dict[str, int], part: str):
    def count(_module: nn.Module, _inputs: object, _output: object) -> None:
        passes[part] += 1

    return count


def test_frozen_encoder_counts_as_a_forward_pass(fine_tuning: AutoencoderTraining) -> None:
    row = load_step(plan_of(fine_tuning), 0)[0]
    encoder, decoder = (training_flops(fine_tuning.model, row.image_tokens, p) for p in PARTS)
    assert row_flops(fine_tuning, row) == pytest.approx(encoder / 3 + decoder)
    everything = row_flops(replace(fine_tuning, freeze="none"), row)
    assert everything == pytest.approx(encoder + decoder)


def test_training_starts_from_the_weights_of_a_folder_a_checkpoint_and_a_run(
    fine_tuned: AutoencoderTraining,
) -> None:
    latest = latest_checkpoint(fine_tuned.run.folder)
    assert latest is not None
    average = weights_of(load_autoencoder(fine_tuned.run.folder.uri))
    for location, expected in (
        (fine_tuned.start, weights_of(load_autoencoder(fine_tuned.start))),
        (latest[0].uri, average),
        (fine_tuned.run.folder.uri, average),
        (fine_tuned.run.folder.child("export").uri, average),
    ):
        found = weights_of(started(replace(fine_tuned, start=location, freeze="none")))
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (location, name)
    assert not torch.equal(average["to_pixels.weight"], started(fine_tuned).to_pixels.weight)


@pytest.fixture
def deeper(tmp_path: Path) -> Path:
    """Folder of weights of a deeper decoder."""
    config = tiny_model(AutoencoderConfig(patch_size=16, latent_channels=16))
    model = Autoencoder(replace(config, decoder_depth=3, layer_scale=0.5))
    start_at_random(model, seed=0)
    model.save_pretrained(tmp_path / "deeper")
    return tmp_path / "deeper"


def test_start_that_cannot_be_is_refused_before_anything_begins(
    fine_tuning: AutoencoderTraining, deeper: Path, tmp_path: Path
) -> None:
    settings = replace(fine_tuning, run=replace(fine_tuning.run, storage=str(tmp_path / "runs")))
    (tmp_path / "empty").mkdir()
    no_decoder = tmp_path / "no-decoder"
    no_decoder.mkdir()
    for file in ("config.json", "encoder.safetensors"):
        (no_decoder / file).write_bytes((Path(fine_tuning.start) / file).read_bytes())
    for start, kind, message in (
        ("magic", FileNotFoundError, "start='magic' is neither random nor pca, .* did you mean"),
        (tmp_path / "empty", FileNotFoundError, "neither random nor pca, .*holds no encoder.safe"),
        (no_decoder, FileNotFoundError, "holds no decoder.safetensors"),
        (
            deeper,
            ValueError,
            r"of another architecture \(model.decoder_depth=2 where they have 3\); change the",
        ),
    ):
        with pytest.raises(kind, match=message) as error:
            prepare(replace(settings, start=str(start)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists(), "nothing was begun"
    same = replace(settings.model, decoder_depth=3)
    prepare(replace(settings, model=same, start=str(deeper)))


def test_run_that_goes_on_needs_its_start_no_more(
    fine_tuned: AutoencoderTraining, tmp_path: Path
) -> None:
    gone = replace(fine_tuned, start=str(tmp_path / "gone"))
    gone = replace(gone, run=replace(gone.run, accept_changes=True))
    try:
        assert prepare(gone).start == gone.start
    finally:
        prepare(replace(fine_tuned, run=replace(fine_tuned.run, accept_changes=True)))


def test_location_of_the_start_is_absolute_for_the_workers(
    fine_tuning: AutoencoderTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(fine_tuning, run=replace(fine_tuning.run, storage=str(tmp_path / "runs")))
    weights = Path(fine_tuning.start)
    monkeypatch.chdir(weights.parent)
    assert prepare(replace(settings, start=weights.name)).start == str(weights)
    assert prepare(replace(settings, start="pca")).start == "pca"


def test_encoder_of_random_weights_is_not_frozen(fine_tuning: AutoencoderTraining) -> None:
    with pytest.raises(ValueError, match="freeze='encoder' would keep an encoder of random weigh"):
        replace(fine_tuning, start="random")
    with pytest.raises(ValueError, match="freeze='all' must be one of none, encoder"):
        replace(fine_tuning, freeze="all")
    with pytest.raises(ValueError, match="start is empty; give random, pca, or where weights are"):
        replace(fine_tuning, start="")
    replace(fine_tuning, start="random", freeze="none")


def run_export(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, (captured.err or captured.out).strip()


@pytest.fixture
def unsharded(fine_tuned: AutoencoderTraining) -> Iterator[dict[bool, dict[str, torch.Tensor]]]:
    """Weights of the newest checkpoint, as they are (False) and averaged (True)."""
    latest = latest_checkpoint(fine_tuned.run.folder)
    assert latest is not None
    weights = {}
    for average in (False, True):
        model = Autoencoder(fine_tuned.model)
        load_weights(model, Path(latest[0].uri), average=average)
        weights[average] = weights_of(model)
    assert not torch.equal(weights[False]["to_pixels.bias"], weights[True]["to_pixels.bias"])
    return weights


@pytest.mark.parametrize("average", [True, False])
def test_export_writes_the_average_or_the_weights_as_they_are(
    capsys, fine_tuned: AutoencoderTraining, unsharded, average: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    flags = [] if average else ["--no-average"]
    status, said = run_export(capsys, fine_tuned.run.folder.uri, target, *flags)
    assert (status, said) == (0, f"weights after step 3: {target}")
    model = load_autoencoder(str(target))
    assert model.config == fine_tuned.model
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, unsharded[average][name]), name
    written = {file.name: file.read_bytes() for file in target.iterdir()}
    assert written.keys() == {"config.json", "encoder.safetensors", "decoder.safetensors"}
    at_its_end = Path(fine_tuned.run.folder.child("export").uri)
    assert written["encoder.safetensors"] == (at_its_end / "encoder.safetensors").read_bytes()
    same = written["decoder.safetensors"] == (at_its_end / "decoder.safetensors").read_bytes()
    assert same == average, "what a training exports at its end is the average"


def test_export_refuses_what_it_cannot_do_in_one_sentence(
    capsys, fine_tuned: AutoencoderTraining, tiny_weights: Path, tmp_path: Path
) -> None:
    status, said = run_export(capsys, tiny_weights, tmp_path / "out")
    assert status == 1
    assert f"{tiny_weights} is no run; give the run of an autoencoder" in said
    status, said = run_export(capsys, tmp_path / "nothing", tmp_path / "out")
    assert (status, f"{tmp_path}/nothing holds no run" in said) == (1, True)
    before = (tiny_weights / "decoder.safetensors").read_bytes()
    status, said = run_export(capsys, fine_tuned.run.folder.uri, tiny_weights)
    assert status == 1
    assert f"{tiny_weights} holds encoder.safetensors already; give another folder" in said
    assert (tiny_weights / "decoder.safetensors").read_bytes() == before

    begun = tmp_path / "begun"
    begun.mkdir()
    config = json.loads(fine_tuned.run.folder.read_text("config.json") or "")
    (begun / "config.json").write_text(json.dumps(config))
    status, said = run_export(capsys, begun, tmp_path / "out")
    assert (status, "has no complete checkpoint yet" in said) == (1, True)
    assert not (tmp_path / "out").exists()
