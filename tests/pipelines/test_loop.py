import ctypes
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.autoencoder_weights import initialize
from pipelines.checkpoints import remove_unfinished, unfinished_prefix
from pipelines.failures import Unrecoverable
from pipelines.ingest import load_share, load_step, shares_of_step
from pipelines.loop import Outcome, Recipe, settle, train_step
from pipelines.packed_rows import PackedRow, StepRows
from pipelines.train_autoencoder import build_model, reconstruction_step, row_flops
from tests.vitok.ranks import run_on_ranks
from vitok.config import read_config, write_config
from vitok.losses import ReconstructionLoss
from vitok.optim import Optimizers, build_optimizer
from vitok.parallel import ParallelConfig, prepare_blocks, shard_model
from vitok.storage import Folder

CPU = torch.device("cpu")
SPOILED_STEP = 2


def prepared(
    settings: AutoencoderTraining, spoiled_step: int = -1
) -> tuple[nn.Module, Optimizers, Recipe]:
    plan = plan_of(settings)
    model = build_model(settings)
    prepare_blocks(model, settings.run.parallel)
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    initialize(model.to_empty(device="cpu"), settings, plan)
    loss = ReconstructionLoss(settings.loss)

    def step(model: nn.Module, row: PackedRow, device: torch.device) -> dict[str, Tensor]:
        terms = reconstruction_step(settings, loss, model, row, device)
        if row.step == spoiled_step and dist.get_rank() == 1:
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    recipe = Recipe(
        step=step,
        flops=lambda row: row_flops(settings, row),
        initialize=lambda model: None,
    )
    return model, build_optimizer(model, settings.optim), recipe


def trained(
    settings: AutoencoderTraining, model: nn.Module, optimizer: Optimizers, recipe: Recipe
) -> list[Outcome]:
    """Take all steps of the plan, with this rank's rows of each."""
    plan = plan_of(settings)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    ledger = []
    for step in range(plan.num_steps):
        rows = load_share(plan, shares_of_step(plan, step, num_ranks)[rank])
        batch = StepRows(step, rows, {"timeout": 1})
        ledger.append(train_step(model, optimizer, recipe, batch, 1.0, CPU, leaves=False))
    return ledger


def train_and_note(folder: Path) -> None:
    settings = read_config(folder / "config.json", AutoencoderTraining)
    model, optimizer, recipe = prepared(settings)
    settled = settle(trained(settings, model, optimizer, recipe))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        notes = [{"losses": s.losses, "totals": s.totals, "norm": s.grad_norm} for s in settled]
        (folder / "notes.json").write_text(json.dumps(notes))
        torch.save(whole, folder / "weights.pt")


def spoil_and_note(folder: Path) -> None:
    settings = read_config(folder / "config.json", AutoencoderTraining)
    model, optimizer, recipe = prepared(settings, SPOILED_STEP)
    plan = plan_of(settings)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    ledger, moved = [], []
    for step in range(SPOILED_STEP + 1):
        before = [p.to_local().clone() for p in model.parameters() if isinstance(p, DTensor)]
        rows = load_share(plan, shares_of_step(plan, step, num_ranks)[rank])
        batch = StepRows(step, rows, {})
        ledger.append(train_step(model, optimizer, recipe, batch, 1.0, CPU, leaves=False))
        after = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    message = ""
    try:
        settle(ledger)
    except Unrecoverable as error:
        message = str(error)
    note = {"moved": moved, "message": message}
    (folder / f"note-{rank}.json").write_text(json.dumps(note))


@pytest.fixture
def settings(tiny_training: AutoencoderTraining) -> AutoencoderTraining:
    """A training of four rows a step, with noise in the latents, in float32."""
    (first, second) = tiny_training.stages
    return replace(
        tiny_training,
        model=replace(tiny_training.model, latent="kl"),
        stages=(
            replace(first, steps=3, images_per_step=24, rows_per_step=4),
            replace(second, steps=2, images_per_step=8, rows_per_step=4),
        ),
    )


def test_losses_and_weights_do_not_depend_on_how_many_ranks_share_the_rows(
    settings: AutoencoderTraining, tmp_path: Path
) -> None:
    """One rank accumulates four rows; two take two each; four take one, with recomputed blocks."""
    found = {}
    for num_ranks in (1, 2, 4):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        parallel = ParallelConfig(checkpoint_every=1 if num_ranks == 4 else 0)
        run = replace(settings.run, parallel=parallel)
        write_config(folder / "config.json", replace(settings, run=run))
        run_on_ranks(train_and_note, num_ranks, folder)
        found[num_ranks] = (
            json.loads((folder / "notes.json").read_text()),
            torch.load(folder / "weights.pt"),
        )
    notes, weights = found.pop(1)
    assert [note["totals"]["images"] for note in notes] == [24, 24, 24, 8, 8]
    assert notes[0]["losses"]["loss"] > notes[2]["losses"]["loss"]
    for num_ranks, (others, other_weights) in found.items():
        for note, other in zip(notes, others, strict=True):
            assert other["totals"].pop("store_retries") == num_ranks
            expected = {n: x for n, x in note["totals"].items() if n != "store_retries"}
            assert other["totals"] == pytest.approx(expected)
            assert other["losses"] == pytest.approx(note["losses"], rel=1e-4)
            assert other["norm"] == pytest.approx(note["norm"], rel=1e-3)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_moves_no_weight_and_is_named_by_every_rank(
    settings: AutoencoderTraining, tmp_path: Path, algorithm: str
) -> None:
    settings = replace(settings, optim=replace(settings.optim, algorithm=algorithm))
    write_config(tmp_path / "config.json", settings)
    run_on_ranks(spoil_and_note, 2, tmp_path)
    (of_rank_0, of_rank_1) = shares_of_step(plan_of(settings), SPOILED_STEP, 2)
    for rank in range(2):
        note = json.loads((tmp_path / f"note-{rank}.json").read_text())
        assert note["moved"] == [True, True, False]
        assert note["message"].startswith(f"step {SPOILED_STEP}: the gradient's norm is nan")
        assert str(of_rank_1.records.key[0]) in note["message"]
        assert str(of_rank_0.records.key[0]) not in note["message"]


def test_unfinished_checkpoints_of_a_run_are_deleted_and_those_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run, other = Folder("s3://bucket/runs/a"), Folder("s3://other/runs/a")
    for folder in (run, run, other):
        half_written = Path(tempfile.mkdtemp(prefix=unfinished_prefix(folder)))
        (half_written / "__0_0.distcp").write_bytes(b"half")
    remove_unfinished(run)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(unfinished_prefix(other))
    assert (kept / "__0_0.distcp").exists()


def held_bytes() -> int:
    """Return what this process has taken from malloc and not given back."""

    class Mallinfo(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def repeat_and_note(folder: Path) -> None:
    settings = read_config(folder / "config.json", AutoencoderTraining)
    model, optimizer, recipe = prepared(settings)
    held = []
    # The first rounds meet every shape, for each of which torch's libraries keep kernels.
    for num_rounds in (3, 1, 10):
        for _ in range(num_rounds):
            settle(trained(settings, model, optimizer, recipe))
        held.append(held_bytes())
    rows = load_step(plan_of(settings), 0)
    note = {"held": held, "with_rows": held_bytes(), "rows": len(rows)}
    (folder / "memory.json").write_text(json.dumps(note))


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is held")
def test_steps_of_shapes_that_came_before_take_no_memory(
    settings: AutoencoderTraining, tmp_path: Path
) -> None:
    write_config(tmp_path / "config.json", settings)
    run_on_ranks(repeat_and_note, 1, tmp_path)
    note = json.loads((tmp_path / "memory.json").read_text())
    _, before, after = note["held"]
    num_steps = 10 * plan_of(settings).num_steps
    row_bytes = plan_of(settings).row_bytes
    assert note["with_rows"] - after > note["rows"] * row_bytes * 0.9, "rows that are held show"
    assert after - before < num_steps * row_bytes / 10, "a tenth of a row a step"
