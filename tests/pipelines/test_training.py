import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mlflow.tracking import MlflowClient

from pipelines import train_autoencoder
from pipelines.ingest import load_step
from pipelines.plan import Stage
from pipelines.runs import RunConfig, latest_checkpoint, next_step
from pipelines.tracking import TrackingConfig, metric_history, tracking_uri
from pipelines.train_autoencoder import (
    AutoencoderTraining,
    export_weights,
    initialize,
    latent_noise,
    load_autoencoder,
    plan_of,
    prepare,
    read_settings,
    run_training,
)
from vitok.autoencoder import Autoencoder
from vitok.config import write_config
from vitok.losses import ReconstructionLoss
from vitok.optim import build_optimizer, learning_rate
from vitok.parallel import ParallelConfig

DRIVER = Path(__file__).with_name("recording_training.py")


def train_plainly(settings: AutoencoderTraining) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process without Ray, sharding or accumulation tricks: the reference.

    Returns:
        the mean loss of every step, and the final weights.
    """
    plan = plan_of(settings)
    model = Autoencoder(settings.model)
    initialize(model, settings, plan)
    optimizer = build_optimizer(model, settings.optim)
    loss_of = ReconstructionLoss(settings.loss)
    num_images = sum(stage.steps * stage.images_per_step for stage in plan.stages)
    losses, before = [], 0
    for step in range(plan.num_steps):
        rows = load_step(plan, step)
        images = sum(len(row.keys) for row in rows)
        assert images == plan.stage_of(step).images_per_step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.optim, (before + images / 2) / num_images)
        before += images
        total = torch.zeros(())
        for row in rows:
            packed, position = row.to_packed(torch.device("cpu"))
            noise = latent_noise(settings, row, packed.tokens.device)
            total = total + loss_of(model(packed, noise=noise), packed, position)["loss"]
        (total / images).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / images)
    return losses, model.state_dict()


def start_driver(settings: AutoencoderTraining, notes: Path, *arguments: str) -> subprocess.Popen:
    config = notes / "config.json"
    write_config(config, settings)
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(config), str(notes), *arguments],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=(notes / "driver.log").open("a"),
        stderr=subprocess.STDOUT,
    )


def wait_for_step(driver: subprocess.Popen, run: RunConfig, step: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while next_step(run.folder) < step:
        assert driver.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {timeout_s} s"
        time.sleep(0.05)


def test_killed_run_resumes_with_the_same_samples_and_losses_as_one_never_killed(
    ray_cluster: None, tiny_training: AutoencoderTraining, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    settings = replace(
        tiny_training,
        # KL latents are trained with noise, which must come back too.
        model=replace(tiny_training.model, latent="kl"),
        stages=(replace(tiny_training.stages[0], steps=14), tiny_training.stages[1]),
        run=replace(
            tiny_training.run,
            checkpoint_every=3,
            evaluate_every=100,
            parallel=ParallelConfig(checkpoint_every=2),
        ),
    )
    num_steps = plan_of(settings).num_steps

    first = start_driver(settings, notes, "5")  # a worker dies, its group restarts
    try:
        wait_for_step(first, settings.run, 9, timeout_s=240)
    finally:
        first.kill()  # SIGKILL to the driver
    assert first.wait() == -signal.SIGKILL
    assert (notes / "killed").exists()
    assert 9 <= next_step(settings.run.folder) < num_steps

    last = replace(settings, run=replace(settings.run, num_workers=1))
    assert start_driver(last, notes).wait(timeout=300) == 0, (notes / "driver.log").read_text()
    assert next_step(settings.run.folder) == num_steps

    _check_order(notes, settings)
    losses, weights = train_plainly(settings)
    recorded = metric_history(settings.run.folder, "loss")
    assert [step for step, _ in recorded] == list(range(1, num_steps + 1)), "once a step"
    torch.testing.assert_close([value for _, value in recorded], losses, rtol=2e-4, atol=0)
    trained = load_autoencoder(settings.run.folder.uri).state_dict()
    for name, expected in weights.items():
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=2e-3, msg=name)


def _check_order(notes: Path, settings: AutoencoderTraining) -> None:
    """Compare the ordered keys of every step, in every attempt that ran it, with the plan."""
    plan = plan_of(settings)
    # attempt -> step -> rank -> keys of its rows
    attempts: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    world_sizes: dict[str, int] = {}
    for file in notes.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            note = json.loads(line)
            attempts[note["group"]][note["step"]][note["rank"]].append(note["keys"])
            world_sizes[note["group"]] = note["world_size"]
    assert sorted(world_sizes.values()) == [1, 2, 2], "two groups of two, then one worker"
    complete: set[int] = set()
    repeated = 0
    for group, steps in attempts.items():
        for step, by_rank in steps.items():
            expected = [row.keys for row in load_step(plan, step)]
            passes = -(-len(expected) // world_sizes[group])
            if any(len(by_rank[rank]) < passes for rank in range(world_sizes[group])):
                continue  # killed in the middle of this step
            in_turn = [by_rank[r][i] for i in range(passes) for r in range(world_sizes[group])]
            assert in_turn[: len(expected)] == expected, f"step {step} of attempt {group}"
            repeated += step in complete
            complete.add(step)
    assert complete == set(range(plan.num_steps))
    # Two kills, each of which costs the steps since the newest checkpoint. These steps are so short
    # that the checkpoint before may still be on its way into Ray's record.
    assert repeated <= 2 * 2 * settings.run.checkpoint_every


def test_finished_run_is_recorded_exported_and_not_trained_again(
    ray_cluster: None, tiny_training: AutoencoderTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(upload_weights=True, registered_model="tiny")
    tiny_training = replace(
        tiny_training,
        model=replace(tiny_training.model, latent="tanh"),
        run=replace(tiny_training.run, tracking=tracking),
    )
    prepare(tiny_training)
    export = run_training(tiny_training)
    run = tiny_training.run
    assert next_step(run.folder) == 6
    assert read_settings(run.folder) == tiny_training
    exported, trained = load_autoencoder(export.uri), load_autoencoder(run.folder.uri)
    assert exported.config == tiny_training.model
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, exported.state_dict()[name]), name

    assert [step for step, _ in metric_history(run.folder, "eval_psnr")] == [4, 6]
    assert metric_history(run.folder, "eval_images")[0][1] == 5
    for metric in ("charbonnier", "ssim_loss", "grad_norm", "lr", "tokens_per_s", "data_wait"):
        assert len(metric_history(run.folder, metric)) == 6, metric
    assert all(0 < value <= 1 for _, value in metric_history(run.folder, "token_utilisation"))
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
    assert run_training(tiny_training) == export
    assert len(metric_history(run.folder, "loss")) == 6


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
    settings = replace(settings, data=replace(settings.data, max_unreadable=0.001))
    prepare(settings)
    with pytest.raises(RuntimeError, match=r"samples were unreadable.*max_unreadable=0\.001"):
        run_training(settings)
    assert next_step(settings.run.folder) == 0


def _on_damaged_corpus(settings: AutoencoderTraining, tmp_path: Path) -> AutoencoderTraining:
    manifest = str(_damaged_manifest(settings, tmp_path))
    return replace(
        settings,
        data=replace(settings.data, manifest=manifest, eval_manifest=""),
        run=replace(settings.run, max_failures=0),
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


def test_checkpoint_of_another_architecture_is_refused(
    ray_cluster: None, tiny_training: AutoencoderTraining
) -> None:
    short = replace(tiny_training, stages=(Stage(steps=1, images_per_step=4, token_budgets=(16,)),))
    prepare(short)
    run_training(short)
    other = replace(short, model=replace(short.model, latent_channels=8))
    write_config(Path(short.run.folder.uri) / "config.json", other)
    with pytest.raises(ValueError, match=r"another architecture: .* where the config says \(8"):
        export_weights(other)


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
        run=replace(tiny_training.run, max_failures=0),
    )
    first_keys = load_step(plan_of(settings), 0)[0].keys
    with pytest.raises(RuntimeError, match=r"step 0: the gradient's norm is (nan|inf)") as error:
        run_training(prepare(settings))
    assert "the optimizer has not moved" in str(error.value)
    assert first_keys[0] in str(error.value)
    assert metric_history(settings.run.folder, "loss") == []
