import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from pipelines import train_autoencoder
from pipelines.autoencoder_training import AutoencoderTraining, plan_of, read_settings
from pipelines.autoencoder_weights import export_weights, load_autoencoder
from pipelines.ingest import load_step
from pipelines.runs import latest_checkpoint, next_step
from pipelines.tracking import TrackingConfig, metric_history, tracking_uri
from pipelines.train_autoencoder import prepare, run_training
from tests.conftest import make_tiny_training
from vitok.config import write_config


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None,
    sample_manifests: tuple[Path, Path],
    tiny_dino: nn.Module,
    tmp_path_factory: pytest.TempPathFactory,
) -> AutoencoderTraining:
    """A training of two workers that has come to its end."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_dino.save_pretrained(folder / "dino")
    settings = make_tiny_training(sample_manifests, folder)
    settings = replace(
        settings,
        model=replace(settings.model, latent="tanh"),
        loss=replace(settings.loss, dino=2.0, dino_weights=str(folder / "dino")),
        run=replace(
            settings.run,
            mfu=True,
            tracking=TrackingConfig(upload_weights=True, registered_model="tiny"),
        ),
    )
    settings = prepare(settings)
    run_training(settings)
    return settings


def test_finished_run_is_recorded_exported_and_not_trained_again(
    finished: AutoencoderTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished.run
    assert next_step(run.folder) == 6
    assert read_settings(run.folder) == finished
    export = run.folder.child("export")
    exported, trained = load_autoencoder(export.uri), load_autoencoder(run.folder.uri)
    assert exported.config == finished.model
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, exported.state_dict()[name]), name

    assert [step for step, _ in metric_history(run.folder, "eval_psnr")] == [4, 6]
    assert metric_history(run.folder, "eval_images")[0][1] == 5
    for metric in ("grad_norm", "lr", "tokens_per_s", "mfu", "data_wait"):
        assert len(metric_history(run.folder, metric)) == 6, metric
    assert all(0 < value <= 1 for _, value in metric_history(run.folder, "token_utilisation"))
    terms = {"loss": 1.0, "charbonnier": 1.0, "ssim_loss": 0.1, "dino": 2.0}
    points = {name: [value for _, value in metric_history(run.folder, name)] for name in terms}
    assert min(map(min, points.values())) > 0
    for loss, *values in zip(*points.values(), strict=True):
        weighted = [weight * x for weight, x in zip(list(terms.values())[1:], values, strict=True)]
        assert loss == pytest.approx(sum(weighted), rel=1e-4)
    client = MlflowClient(tracking_uri(run.tracking, run.storage))
    record = client.get_run(json.loads(run.folder.read_text("mlflow.json") or "")["run_id"])
    assert record.info.status == "FINISHED"
    assert record.data.params["model.encoder_width"] == "32"
    assert record.data.params["stages.1.token_budgets"] == "[36, 64]"
    (version,) = client.search_model_versions("name='tiny'")
    assert version.run_id == record.info.run_id
    assert version.tags["latent"] == "tanh"
    images = client.list_artifacts(record.info.run_id, "images")
    assert any(image.path.endswith(".png") for image in images)

    monkeypatch.setattr(train_autoencoder, "_worker", None)  # would fail if it were started
    assert run_training(finished) == export
    assert len(metric_history(run.folder, "loss")) == 6


def test_checkpoint_of_another_architecture_is_refused(
    finished: AutoencoderTraining, tmp_path: Path
) -> None:
    shutil.copytree(finished.run.storage, tmp_path / "runs")
    run = replace(finished.run, storage=str(tmp_path / "runs"))
    other = replace(finished, model=replace(finished.model, latent_channels=8), run=run)
    write_config(Path(run.folder.uri) / "config.json", other)
    with pytest.raises(ValueError, match=r"another architecture: .* where the config says \(8"):
        export_weights(other)


def test_run_name_with_another_config_is_refused_with_the_difference(
    tiny_training: AutoencoderTraining,
) -> None:
    prepare(tiny_training)
    _pretend_checkpoint(tiny_training)
    prepare(replace(tiny_training, run=replace(tiny_training.run, num_workers=1)))
    with pytest.raises(ValueError, match=r"has another config \(optim\.lr: 0\.003 -> 0\.1\)"):
        prepare(replace(tiny_training, optim=replace(tiny_training.optim, lr=0.1)))


def _pretend_checkpoint(settings: AutoencoderTraining) -> None:
    latest = {"checkpoint_dir_name": "step-00000002", "metrics": {"cursor": {"step": 2}}}
    record = {"latest_checkpoint_result": latest}
    settings.run.folder.write_text("checkpoint_manager_snapshot.json", json.dumps(record))


def test_too_many_unreadable_samples_stop_the_run_and_are_named(
    ray_cluster: None,
    tiny_training: AutoencoderTraining,
    tmp_path: Path,
) -> None:
    settings = _on_damaged_corpus(tiny_training, tmp_path)
    settings = replace(
        settings,
        data=replace(settings.data, max_unreadable=0.001),
        run=replace(settings.run, max_failures=2),
    )
    prepare(settings)
    with pytest.raises(RuntimeError, match=r"unreadable.*max_unreadable=0\.001") as error:
        run_training(settings)
    assert error.value.__cause__ is None, "not tried again, so no failure of Ray Train"
    assert next_step(settings.run.folder) == 0


def _on_damaged_corpus(settings: AutoencoderTraining, tmp_path: Path) -> AutoencoderTraining:
    manifest = str(_damaged_manifest(settings, tmp_path))
    return replace(
        settings,
        data=replace(settings.data, manifest=manifest, eval_manifest=""),
        run=replace(settings.run, num_workers=1, max_failures=0),
    )


def _damaged_manifest(settings: AutoencoderTraining, tmp_path: Path) -> Path:
    """Copy the corpus with the pixels of every second image cut off, headers intact."""
    from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards

    source = Manifest.load(settings.data.manifest)
    records = source.records(torch.arange(source.num_samples).numpy())
    samples = [
        {"__key__": str(key), "jpg": data[: len(data) // 2] if index % 2 else data}
        for index, (key, data) in enumerate(
            zip(records.key, read_samples(source, records), strict=True)
        )
    ]
    shards = write_shards(samples, tmp_path / "damaged", "damaged", 100)
    return build_manifest(shards, tmp_path / "damaged-manifest").path


def test_half_written_checkpoint_is_never_chosen(tiny_training: AutoencoderTraining) -> None:
    prepare(tiny_training)
    folder = tiny_training.run.folder
    (Path(folder.uri) / "step-00000002").mkdir()
    assert latest_checkpoint(folder) is None
    assert next_step(folder) == 0
    with pytest.raises(FileNotFoundError, match="no complete checkpoint yet"):
        load_autoencoder(folder.uri)


def test_shard_that_is_gone_is_named(
    ray_cluster: None, tiny_training: AutoencoderTraining, tmp_path: Path
) -> None:
    settings = _on_damaged_corpus(tiny_training, tmp_path)
    (shard,) = (tmp_path / "damaged").glob("*.tar")
    shard.unlink()
    with pytest.raises(RuntimeError, match=rf"after step 0: .*{shard.name}"):
        run_training(prepare(settings))


def test_cluster_that_is_too_small_is_refused_at_once(
    ray_cluster: None, tiny_training: AutoencoderTraining
) -> None:
    settings = replace(tiny_training, run=replace(tiny_training.run, cpus_per_worker=50.0))
    with pytest.raises(RuntimeError, match="asks for 101 CPUs, the cluster has 4; lower run"):
        run_training(prepare(settings))


def test_config_may_change_until_there_is_a_checkpoint(tiny_training: AutoencoderTraining) -> None:
    prepare(tiny_training)
    changed = prepare(replace(tiny_training, seed=5))
    assert read_settings(changed.run.folder).seed == 5


def test_gradient_that_is_not_finite_stops_before_the_optimizer_and_names_the_samples(
    ray_cluster: None, tiny_training: AutoencoderTraining
) -> None:
    settings = replace(
        tiny_training,
        # Above the largest float32, the first step's weighted loss is infinite.
        loss=replace(tiny_training.loss, charbonnier=3e38, ssim=3e38),
        run=replace(tiny_training.run, num_workers=1),
    )
    first_keys = load_step(plan_of(settings), 0)[0].keys
    with pytest.raises(RuntimeError, match=r"step 0: the gradient's norm is (nan|inf)") as error:
        run_training(prepare(settings))
    assert error.value.__cause__ is None, "not tried again, so no failure of Ray Train"
    assert "the optimizer has not moved" in str(error.value)
    assert first_keys[0] in str(error.value)
    assert metric_history(settings.run.folder, "loss") == []
