import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import cos, pi
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import vitok.optim
from tests.vitok.ranks import run_on_ranks
from vitok.autoencoder import Autoencoder
from vitok.checkpoint import TrainState
from vitok.optim import (
    OptimConfig,
    Optimizers,
    build_optimizer,
    learning_rate,
    orthogonalize,
)
from vitok.parallel import shard_model

MUON = OptimConfig(algorithm="muon", lr=0.03, weight_decay=0.5)
NUM_STEPS, CHECKPOINT_STEP = 5, 3
# Neither the rows of most matrices nor the number of matrices is a multiple of 3.
NUM_RANKS = 3
SHAPE = {"encoder_depth": 1, "decoder_depth": 1, "encoder_width": 16, "decoder_width": 32}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_of(name: str, parameter: Tensor, step: int) -> Tensor:
    """Draw the same gradient for a parameter however it is sharded."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    gradient = torch.randn(parameter.shape, generator=generator)
    if isinstance(parameter, DTensor):
        return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    return gradient


def take_step(model: nn.Module, optimizer: Optimizers, step: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradient_of(name, parameter, step)
    for group in optimizer.param_groups:
        group["lr"] = MUON.lr / (1 + step)
    optimizer.step()
    optimizer.zero_grad()


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    return "_blocks." in name and parameter.ndim == 2


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weight_decay_shrinks_matrices_and_nothing_else(make_autoencoder):
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    model = make_autoencoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    num_vectors = 0
    for name, parameter in model.named_parameters():
        is_vector = name.endswith(("bias", "gamma")) or "norm" in name
        num_vectors += is_vector
        kept = before[name] if is_vector else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), kept, msg=name)
    assert 0 < num_vectors < len(before)


def test_every_trained_parameter_is_in_exactly_one_group(make_autoencoder):
    model = make_autoencoder()
    model.patch_embed.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=3e-4, betas=(0.8, 0.9)))

    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len(trained) == len(list(model.parameters())) - 2
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    config = OptimConfig(lr=2.0, warmup=0.1, final_lr=0.25)
    for tenth_of_percent in range(1001):
        progress = tenth_of_percent / 1000
        if progress < 0.1:
            expected = 20 * progress
        else:
            # Half a turn of the cosine over the remaining 90%, from 2 down to a quarter of it.
            expected = 1.25 + 0.75 * cos(pi * (progress - 0.1) / 0.9)
        assert learning_rate(config, progress) == pytest.approx(expected, abs=1e-9)
    assert learning_rate(config, 0.0) == 0
    assert learning_rate(config, 0.1) == pytest.approx(2.0)
    assert learning_rate(config, 1.0) == pytest.approx(0.5)
    assert learning_rate(config, 1.2) == pytest.approx(0.5)


def test_learning_rate_without_warmup_starts_at_its_peak():
    assert learning_rate(OptimConfig(lr=0.3, warmup=0.0), 0.0) == pytest.approx(0.3)
    assert learning_rate(OptimConfig(lr=0.3, warmup=0.0), 1.0) == pytest.approx(0.0)


def test_defaults_are_the_published_ones():
    config = OptimConfig()
    assert config.algorithm == "adamw"
    assert (config.lr, config.betas, config.weight_decay) == (5e-4, (0.9, 0.95), 0.05)
    assert config.clip_norm == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.0}, "lr=0.0 and clip_norm=1.0 must be positive"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be positive"),
        ({"warmup": 1.0}, "warmup=1.0 is a fraction of the run"),
        ({"warmup": -0.1}, "warmup=-0.1 is a fraction of the run"),
        ({"algorithm": "lion"}, "algorithm='lion' must be one of adamw, muon"),
    ],
)
def test_optim_config_refuses(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(OptimConfig(), **change)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(make_autoencoder) -> None:
    model = make_autoencoder()
    model.decoder_blocks[0].requires_grad_(False)
    muon, adamw = build_optimizer(model, MUON)
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon, of_adamw = (
        {names[id(p)] for group in one.param_groups for p in group["params"]}
        for one in (muon, adamw)
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert of_muon == {name for name, p in trained.items() if is_block_matrix(name, p)}
    assert of_adamw == trained.keys() - of_muon
    assert len(of_muon) == 2 * 4
    assert {"patch_embed.weight", "to_code.weight", "to_pixels.weight"} <= of_adamw
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["fused"]
    decayed = {
        names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]
    }
    assert decayed == {name: 0.5 if trained[name].ndim == 2 else 0.0 for name in of_adamw}
    assert {group["lr"] for group in muon.param_groups + adamw.param_groups} == {MUON.lr}


def test_muon_refuses_a_model_of_which_no_block_trains(make_autoencoder) -> None:
    model = make_autoencoder(encoder_depth=0)
    model.decoder_blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="none of this model trains; choose algorithm='adamw'"):
        build_optimizer(model, MUON)


def test_muon_steps_as_torch_does_on_each_stacked_matrix_alone(make_autoencoder) -> None:
    model = make_autoencoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pieces, references = {}, []
    for name, start in before.items():
        if is_block_matrix(name, start):
            number = 3 if "qkv_proj" in name else 2 if "fc1" in name else 1
            pieces[name] = [nn.Parameter(x.clone()) for x in start.chunk(number)]
            kind, options = torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}
        else:
            pieces[name] = [nn.Parameter(start.clone())]
            kind, options = torch.optim.AdamW, {"betas": MUON.betas, "fused": False}
        decay = MUON.weight_decay if start.ndim == 2 else 0.0
        references.append(kind(pieces[name], lr=MUON.lr, weight_decay=decay, **options))

    optimizer = build_optimizer(model, MUON)
    for step in range(NUM_STEPS):
        for name, parts in pieces.items():
            gradients = gradient_of(name, before[name], step).chunk(len(parts))
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
        for reference in references:
            for group in reference.param_groups:
                group["lr"] = MUON.lr / (1 + step)
            reference.step()
        take_step(model, optimizer, step)
    for name, parameter in model.named_parameters():
        wanted = torch.cat([part.detach() for part in pieces[name]])
        moved = (wanted - before[name]).abs().max()
        assert moved > 0.5 * MUON.lr * 0.2, name
        # The iteration is in bfloat16, and torch's does its sums in another order.
        tolerance = 0.01 * float(moved) if is_block_matrix(name, parameter) else 1e-6
        torch.testing.assert_close(parameter.detach(), wanted, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("shape", [(2, 24, 64), (3, 64, 24), (1, 96, 16)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_scales(shape) -> None:
    stack = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    values = u.mT @ orthogonalize(stack).float() @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert not orthogonalize(torch.zeros(shape)).any()


def train_sharded(folder: Path) -> None:
    """Train on this rank; write the weights, a checkpoint on the way, and who did what."""
    orthogonalized: list[tuple[int, ...]] = []

    def counting(stack: Tensor) -> Tensor:
        orthogonalized.append(tuple(stack.shape))
        return orthogonalize(stack)

    vitok.optim.orthogonalize = counting
    model = Autoencoder.from_pretrained(folder / "model")
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    optimizer = build_optimizer(model, MUON)
    for step in range(NUM_STEPS):
        if step == CHECKPOINT_STEP:
            TrainState(model, optimizer).save(folder / "checkpoint", {"step": step}).result()
        take_step(model, optimizer, step)
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    rank = dist.get_rank()
    (folder / f"work-{rank}.json").write_text(json.dumps(orthogonalized))
    if rank == 0:
        save_file(weights, folder / "trained.safetensors")


def test_muon_on_shards_steps_as_on_whole_matrices_and_continues_from_a_checkpoint(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path, one_rank: None
) -> None:
    model = make_autoencoder(**SHAPE, decoder_heads=2)
    matrices = [p for name, p in model.named_parameters() if is_block_matrix(name, p)]
    assert len(matrices) % NUM_RANKS and sum(len(p) % NUM_RANKS > 0 for p in matrices) > 4
    model.save_pretrained(tmp_path / "model")
    run_on_ranks(train_sharded, NUM_RANKS, tmp_path)
    trained = load_file(tmp_path / "trained.safetensors")

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, MUON)
    for step in range(NUM_STEPS):
        take_step(model, optimizer, step)
    for name, parameter in model.named_parameters():
        assert not torch.allclose(before[name], parameter, atol=1e-3), name
        torch.testing.assert_close(trained[name], parameter.detach(), atol=1e-6, rtol=0, msg=name)

    # No matrix was done twice, and every rank had its share.
    work = [json.loads((tmp_path / f"work-{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    assert sum(map(len, work)) == NUM_STEPS * len(matrices)
    assert max(map(len, work)) - min(map(len, work)) <= NUM_STEPS

    resumed = make_autoencoder(seed=1, **SHAPE, decoder_heads=2)
    optimizer = build_optimizer(resumed, MUON)
    assert TrainState(resumed, optimizer).load(tmp_path / "checkpoint") == {"step": CHECKPOINT_STEP}
    for step in range(CHECKPOINT_STEP, NUM_STEPS):
        take_step(resumed, optimizer, step)
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=1e-6, rtol=0, msg=name)
