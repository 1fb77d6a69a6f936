import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.vitok.ranks import run_on_ranks
from vitok.autoencoder import Autoencoder
from vitok.checkpoint import TrainState, load_weights
from vitok.ema import Ema
from vitok.initialize import start_at_random
from vitok.optim import OptimConfig, build_optimizer
from vitok.parallel import shard_model
from vitok.variants import AutoencoderConfig

# Widths that three ranks cannot share evenly.
MODEL = AutoencoderConfig(
    patch_size=4,
    latent_channels=5,
    encoder_width=32,
    encoder_depth=1,
    encoder_heads=2,
    decoder_width=32,
    decoder_depth=2,
    decoder_heads=2,
)
OPTIM = OptimConfig(algorithm="muon", lr=1e-2, ema_decay=0.5)
PROGRESS = {"step": 3, "corpus": "abc"}


def trained_state(seed: int) -> TrainState:
    """Return a sharded model after two steps on gradients that depend on the seed alone."""
    with torch.device("meta"):
        model = Autoencoder(MODEL)
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    start_at_random(model.to_empty(device="cpu"), seed)
    optimizer = build_optimizer(model, OPTIM)
    ema = Ema(model, OPTIM.ema_decay)
    state = TrainState(model, optimizer, ema)
    for step in range(2):
        take_step(state, seed + step)
    return state


def take_step(state: TrainState, seed: int) -> None:
    for index, parameter in enumerate(state.model.parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        gradient = torch.randn(parameter.shape, generator=generator)
        assert isinstance(parameter, DTensor)
        parameter.grad = torch.distributed.tensor.distribute_tensor(
            gradient, parameter.device_mesh, parameter.placements
        )
    state.optimizer.step()
    state.ema.update(state.model)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Return weights, averages and the optimizers' tensors, whole, by name."""
    found = {f"weight.{name}": p.detach() for name, p in state.model.named_parameters()}
    found |= {f"average.{name}": x for name, x in state.ema.state_dict()["average"].items()}
    names = {p: name for name, p in state.model.named_parameters()}
    for optimizer in state.optimizer:
        for parameter, tensors in optimizer.state.items():
            found |= {f"{names[parameter]}.{name}": x for name, x in tensors.items()}
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).clone()
        for name, x in found.items()
    }


def save_and_go_on(folder: Path) -> None:
    state = trained_state(seed=1)
    saved = everything(state)
    saving = state.save(folder / "checkpoint", PROGRESS)
    # The training goes on at once: what is written must be what was there at the call.
    for step in range(3):
        take_step(state, seed=50 + step)
    saving.result()
    if dist.get_rank() == 0:
        torch.save(saved, folder / "saved.pt")


def load_on_others(folder: Path) -> None:
    state = trained_state(seed=7)
    assert state.load(folder / "checkpoint") == PROGRESS
    loaded = everything(state)
    if dist.get_rank() == 0:
        torch.save(loaded, folder / "loaded.pt")


def test_checkpoint_holds_the_moment_of_the_save_and_loads_on_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    run_on_ranks(save_and_go_on, 3, tmp_path)
    (tmp_path / "store").unlink()
    run_on_ranks(load_on_others, 2, tmp_path)
    saved, loaded = torch.load(tmp_path / "saved.pt"), torch.load(tmp_path / "loaded.pt")
    assert saved.keys() == loaded.keys()
    assert {"momentum", "exp_avg_sq", "step"} <= {name.rpartition(".")[2] for name in saved}
    for name, tensor in saved.items():
        assert torch.equal(tensor, loaded[name]), name
    assert json.loads((tmp_path / "checkpoint" / "progress.json").read_text()) == PROGRESS

    for average, prefix in ((False, "weight."), (True, "average.")):
        model = Autoencoder(MODEL)
        load_weights(model, tmp_path / "checkpoint", average=average)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, saved[prefix + name]), name
    weights = [name for name in saved if name.startswith("weight.")]
    assert not any(
        torch.equal(saved[name], saved[name.replace("weight.", "average.", 1)]) for name in weights
    )
