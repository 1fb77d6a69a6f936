import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from pipelines import train_flow
from pipelines.failures import Unrecoverable
from pipelines.generation.sampling import load_dit, sample_requests
from pipelines.ingest import load_share, load_step, shares_of_step
from pipelines.packed_rows import iterate_steps, record_of
from pipelines.runs import RunConfig, latest_checkpoint, next_step
from pipelines.tracking import metric_history, tracking_uri
from pipelines.train_flow import (
    FlowTraining,
    build_model,
    corpus_of,
    flow_step,
    plan_of,
    prepare,
    read_settings,
    read_statistics,
    run_training,
    sample_on_all_ranks,
    shown_requests,
)
from tests.pipelines.flow_runs import flow_training, train_plainly
from tests.pipelines.recorded_runs import check_order, note_row
from tests.pipelines.small_caches import TEXT
from tests.vitok.ranks import run_on_ranks
from vitok.config import read_config, write_config
from vitok.dit import DiT
from vitok.ema import Ema
from vitok.initialize import start_at_random
from vitok.parallel import shard_model

CPU = torch.device("cpu")
TIMEOUT_S = 60


@pytest.fixture
def settings(tmp_path: Path) -> FlowTraining:
    return flow_training(tmp_path)


def test_rows_hold_the_latents_of_the_cache_normalised_with_their_classes(settings) -> None:
    corpus, plan = corpus_of(settings), plan_of(settings)
    by_key = {row.key: row for row in corpus}
    seen = []
    for step in range(3):
        for row in load_step(plan, step):
            packed = corpus.to_packed(row, CPU)
            bounds = packed.cu_seqlens.tolist()
            assert packed.tokens.dtype == torch.float32
            assert not packed.tokens[bounds[-1] :].any()
            for slot, key in enumerate(row.keys):
                found = by_key[key]
                expected = corpus.normalize(found.latent)
                assert torch.equal(packed.tokens[bounds[slot] : bounds[slot + 1]], expected)
                assert tuple(packed.grid[slot].tolist()) == found.grid
                assert row.label[slot] == found.label
                seen.append(key)
            assert (row.label[len(row.keys) :] == -1).all()
    assert len(seen) == 30 > len(set(seen)) == len(by_key) == 28


def test_normalised_latents_have_mean_0_and_variance_1_and_come_back(settings) -> None:
    corpus = corpus_of(settings)
    normalised = torch.cat([corpus.normalize(row.latent) for row in corpus])
    torch.testing.assert_close(normalised.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.var(0, correction=0), torch.ones(5))
    back = corpus.statistics.denormalize(normalised)
    torch.testing.assert_close(back, torch.cat([row.latent.float() for row in corpus]))


def test_a_step_takes_as_many_rows_as_its_latents_need_and_shrinks_none(settings) -> None:
    plan = plan_of(replace(settings, row_tokens=16, steps=20))
    counts = set()
    for step in range(20):
        planned = plan.step(step)
        counts.add(len(planned.rows))
        sizes = dict(
            zip(
                planned.records.sample_id.tolist(),
                zip(planned.records.height.tolist(), planned.records.width.tolist(), strict=True),
                strict=True,
            )
        )
        views = [view for row in planned.rows for view in row]
        assert len(views) == 10
        assert all(view.size == sizes[view.sample_id] for view in views)
        assert all(sum(view.num_tokens(16) for view in row) <= 16 for row in planned.rows)
    assert max(counts) <= plan.row_shapes[0].num_rows + 1
    # Fewer rows than the fullest step needs: the others still get all of theirs.
    few = replace(plan, stages=(replace(plan.stages[0], rows_per_step=1),))
    assert all(sum(map(len, few.step(step).rows)) == 10 for step in range(20))
    assert {len(few.step(step).rows) for step in range(20)} >= {max(counts)}


def test_rows_survive_their_way_through_records(settings) -> None:
    plan = plan_of(settings)
    rows = load_step(plan, 0)
    (step,) = iterate_steps([record_of(rows, {"timeout": 2})], 0)
    assert step.retries == {"timeout": 2} and len(step.rows) == len(rows)
    for row, wanted in zip(step.rows, rows, strict=True):
        assert row.tokens.dtype == np.uint16
        for name in ("tokens", "image_size", "label", "tile_position"):
            assert np.array_equal(getattr(row, name), getattr(wanted, name)), name
        assert (row.keys, row.patch_size, row.max_seqlen) == (wanted.keys, 16, 16)


def test_loss_of_a_step_is_the_same_for_any_number_of_workers(settings) -> None:
    corpus, plan = corpus_of(settings), plan_of(settings)
    model = DiT(settings.model)
    start_at_random(model, seed=1)
    torch.nn.init.normal_(model.to_velocity.weight, std=0.3)
    losses = []
    for num_workers in (1, 2, 3):
        rows = [
            row for share in shares_of_step(plan, 1, num_workers) for row in load_share(plan, share)
        ]
        assert len(rows) % num_workers == 0
        with torch.no_grad():
            terms = [flow_step(settings, corpus, model, row, CPU)["loss"] for row in rows]
        losses.append(sum(term.item() for term in terms))
    assert losses[0] > 1
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def sample_and_note(folder: Path) -> None:
    """Sample what an evaluation shows, with a model that is sharded over the ranks."""
    settings = read_config(folder / "config.json", FlowTraining)
    model = build_model(settings)
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    start_at_random(model.to_empty(device="cpu"), seed=3)
    velocity = model.to_velocity.weight
    with torch.no_grad():
        velocity.copy_(distribute_tensor(VELOCITY, velocity.device_mesh, velocity.placements))
    ema = Ema(model, 0.9)
    with ema.applied_to(model):
        corpus = corpus_of(settings)
        requests = shown_requests(settings, corpus)
        latents = sample_on_all_ranks(model, settings, requests, corpus.statistics, CPU)
    torch.save([latent.tokens for latent in latents], folder / f"{dist.get_rank()}.pt")


VELOCITY = torch.linspace(-1, 1, 5 * 16).sin().view(5, 16)


def test_shown_samples_of_a_sharded_model_are_those_of_the_whole_one(
    settings, tmp_path: Path
) -> None:
    write_config(tmp_path / "config.json", settings)
    run_on_ranks(sample_and_note, 2, tmp_path)
    model = DiT(settings.model)
    start_at_random(model, seed=3)
    model.to_velocity.weight.data.copy_(VELOCITY)
    expected = sample_requests(
        model,
        shown_requests(settings, corpus_of(settings)),
        corpus_of(settings).statistics,
        CPU,
        sampler=settings.sampler,
        times=settings.times,
        row_tokens=64,
    )
    assert len(expected) == 3
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for tokens, latent in zip(found, expected, strict=True):
            assert tokens.shape == (6, 5)
            torch.testing.assert_close(tokens, latent.tokens, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0].tokens, expected[1].tokens)


def test_a_class_that_the_model_does_not_have_ends_the_run(settings) -> None:
    few = replace(settings, model=replace(settings.model, num_classes=2))
    corpus, plan = corpus_of(few), plan_of(few)
    with pytest.raises(Unrecoverable, match=r"an image of class \d, but model.num_classes=2"):
        for row in load_step(plan, 0):
            flow_step(few, corpus, DiT(few.model), row, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": ""}, "cache is empty; make one with `vitok encode`"),
        ({"label_dropout": 1.5}, "label_dropout=1.5 must be from 0 to 1"),
        ({"eval_images": 0}, "eval_images=0"),
        ({"row_tokens": 8}, r"token_budgets=\(16,\) exceed row_tokens=8"),
    ],
)
def test_settings_that_cannot_run_are_refused(settings, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(settings, **change))


def test_cache_of_another_shape_or_another_encoder_is_refused(settings, tiny_weights) -> None:
    with pytest.raises(ValueError, match="latent_channels=8, but the latents of .* have 5"):
        prepare(replace(settings, model=replace(settings.model, latent_channels=8)))
    with pytest.raises(ValueError, match=r"holds latents of the encoder \w{12}, not of"):
        prepare(replace(settings, autoencoder=str(tiny_weights)))
    assert not settings.run.folder.exists("config.json")


def wait_for_checkpoint(run: RunConfig, step: int) -> None:
    """Wait until what would be continued holds so many steps."""
    deadline = time.monotonic() + TIMEOUT_S
    while next_step(run.folder) < step and time.monotonic() < deadline:
        time.sleep(0.02)


def test_killed_run_goes_on_on_fewer_workers_with_the_samples_and_losses_of_one_never_killed(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = flow_training(tmp_path, text=TEXT)
    settings = prepare(replace(settings, run=replace(settings.run, max_failures=1)))
    notes = tmp_path / "notes"
    notes.mkdir()

    def fatal_worker(given: dict[str, Any]) -> None:
        from pipelines import train_flow

        original = train_flow.flow_step

        def step(settings: FlowTraining, corpus: Any, model: Any, row: Any, device: Any) -> Any:
            marker = notes / f"killed-{row.step}"
            if dist.get_rank() == 1 and row.step in (3, 5) and not marker.exists():
                marker.touch()
                wait_for_checkpoint(settings.run, row.step - 1)
                os.kill(os.getpid(), signal.SIGKILL)
            note_row(notes, row)
            return original(settings, corpus, model, row, device)

        train_flow.flow_step = step
        train_flow._worker(given)

    monkeypatch.setattr(train_flow, "_worker", fatal_worker)
    with pytest.raises(RuntimeError, match="stopped after step 4"):
        run_training(settings)
    run = run_training(prepare(replace(settings, run=replace(settings.run, num_workers=1))))
    assert next_step(run) == settings.steps
    assert read_settings(run) == settings
    attempts = check_order(notes, plan_of(settings))
    assert [attempt.world_size for attempt in attempts] == [2, 2, 1]
    assert [attempt.first_step for attempt in attempts] == [0, 2, 4]
    assert read_statistics(run) == corpus_of(settings).statistics

    client = MlflowClient(tracking_uri(settings.run.tracking, settings.run.storage))
    record = json.loads(run.read_text("mlflow.json") or "")["run_id"]
    shown = [image.path for image in client.list_artifacts(record, "images")]
    assert len([path for path in shown if "samples" in path and path.endswith(".png")]) == 2

    losses, weights = train_plainly(settings)
    recorded = metric_history(run, "loss")
    assert [step for step, _ in recorded] == list(range(1, 9)), "once a step"
    torch.testing.assert_close([value for _, value in recorded], losses, rtol=2e-4, atol=0)
    latest = latest_checkpoint(run)
    assert latest is not None
    averaged = load_dit(latest[0], settings.model).state_dict()
    # The average of the last weights is near them, and is not them.
    distance = [(averaged[name] - weight).norm() for name, weight in weights.items()]
    length = [weight.norm() for weight in weights.values()]
    assert 0 < sum(distance) < 0.3 * sum(length)
