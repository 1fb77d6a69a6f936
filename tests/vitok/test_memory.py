from dataclasses import replace

import pytest
import torch

from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.memory import TrainingMemory, training_memory
from vitok.optim import OptimConfig, build_optimizer
from vitok.packed import pack_images
from vitok.parallel import ParallelConfig, prepare_blocks
from vitok.variants import AutoencoderConfig

MODEL = AutoencoderConfig(
    patch_size=16,
    latent_channels=16,
    encoder_width=192,
    encoder_depth=3,
    encoder_heads=4,
    decoder_width=256,
    decoder_depth=4,
    decoder_heads=4,
)
LOSS = LossConfig(ssim_tile=64)
IMAGE_TOKENS, NUM_IMAGES = 64, 4


def planned(**changes: object) -> TrainingMemory:
    given = {
        "model": MODEL,
        "row_tokens": IMAGE_TOKENS * NUM_IMAGES,
        "image_tokens": IMAGE_TOKENS,
        "num_workers": 1,
        "optim": OptimConfig(),
        "parallel": ParallelConfig(),
        "loss": LOSS,
        "on_cuda": False,
    }
    return training_memory(**(given | changes))


def kept_in_a_training_step(parallel: ParallelConfig, frozen: bool = False) -> tuple[int, int]:
    """Run a step, and count: bytes that autograd keeps; bytes of float32 states."""
    model = Autoencoder(MODEL)
    start_at_random(model, seed=0)
    model.bfloat16()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("patch_embed", "encoder", "to_code")))
    prepare_blocks(model, parallel)
    side = int(IMAGE_TOKENS**0.5) * MODEL.patch_size
    packed = pack_images([torch.rand(3, side, side)] * NUM_IMAGES, patch_size=MODEL.patch_size)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms = ReconstructionLoss(LOSS)(model(packed), packed, torch.full((NUM_IMAGES, 2), 0.5))
    in_forward = sum(kept.values())
    terms["loss"].backward()
    model.float()
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [*model.parameters()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for part in optimizer:
        tensors += [v for state in part.state.values() for v in state.values() if v.ndim]
    return in_forward, sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("parallel", "frozen"),
    [
        (ParallelConfig(), False),
        (ParallelConfig(checkpoint_every=2), False),
        (ParallelConfig(), True),
    ],
    ids=["plain", "checkpointed", "frozen encoder"],
)
def test_planned_memory_is_what_a_step_keeps(parallel: ParallelConfig, frozen: bool) -> None:
    activations, states = kept_in_a_training_step(parallel, frozen)
    plan = planned(parallel=parallel, frozen_encoder=frozen)
    assert plan.states == pytest.approx(states, rel=0.01)
    # A checkpointed block that is computed again is not among what the forward pass keeps.
    deeper = replace(MODEL, decoder_depth=MODEL.decoder_depth + 1)
    block = planned(model=deeper).activations - planned().activations
    again = block if parallel.checkpoint_every else 0
    # Inputs of checkpointed blocks are held by the checkpoint itself, not through the hooks.
    inputs = 2 * (2 * 256 + 192) * IMAGE_TOKENS * NUM_IMAGES if parallel.checkpoint_every else 0
    assert plan.activations - again == pytest.approx(activations + inputs, rel=0.05)


def test_planned_memory_follows_what_it_is_planned_for() -> None:
    plan = planned()
    assert planned(num_workers=8).states == pytest.approx(plan.states / 8)
    assert planned(num_workers=8).activations == plan.activations
    assert planned(row_tokens=1024).activations == pytest.approx(4 * plan.activations)
    pixel = LossConfig(ssim=0)
    explicit, fused = (
        [planned(on_cuda=c, image_tokens=n, loss=pixel).activations for n in (64, 256)]
        for c in (False, True)
    )
    assert fused[0] == fused[1] < explicit[0] < explicit[1], "scores of explicit attention"
    assert planned(loss=pixel).activations < plan.activations
    weights = planned(optim=replace(OptimConfig(), ema_decay=0.99)).states - plan.states
    assert weights == pytest.approx(plan.states / 4)
    muon = planned(optim=replace(OptimConfig(), algorithm="muon")).states
    assert plan.states - weights < muon < plan.states
    assert plan.total == plan.states + plan.gathered + plan.activations
