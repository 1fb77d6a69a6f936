from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.vitok.ranks import run_on_ranks
from vitok.autoencoder import Autoencoder
from vitok.ema import Ema
from vitok.packed import PackedTokens, pack_images
from vitok.parallel import shard_model

NUM_UPDATES = 4
DECAY = 0.3  # which the warm-up exceeds from the fourth update on: 4 / 13


@torch.no_grad()
def train(model: nn.Module, step: int) -> None:
    """Set weights as a step might: the same however they are sharded."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
        value = 0.3 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def row() -> PackedTokens:
    generator = torch.Generator().manual_seed(0)
    return pack_images([torch.randn(3, 24, 16, generator=generator)], patch_size=8)


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    return model(row()).pixels.tokens


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_that_of_the_plain_formula(warmup: bool, make_autoencoder) -> None:
    model = make_autoencoder()
    expected = {name: weight.double() for name, weight in weights_of(model).items()}
    ema = Ema(model, DECAY, warmup=warmup)
    decays = []
    for step in range(NUM_UPDATES):
        train(model, step)
        ema.update(model)
        decays.append(min(DECAY, (1 + step) / (10 + step)) if warmup else DECAY)
        for name, weight in weights_of(model).items():
            expected[name] = decays[-1] * expected[name] + (1 - decays[-1]) * weight
    assert decays[-1] == DECAY and (len(set(decays)) == 4) == warmup
    state = ema.state_dict()
    assert state["num_updates"] == NUM_UPDATES
    assert state["average"].keys() == expected.keys()
    for name, average in state["average"].items():
        assert average.dtype == torch.float32
        assert not torch.allclose(average, model.get_parameter(name), atol=1e-3), name
        torch.testing.assert_close(average.double(), expected[name], atol=1e-6, rtol=0)


def test_model_computes_with_the_average_inside_and_gets_its_weights_back(make_autoencoder) -> None:
    model, other = make_autoencoder(), make_autoencoder()
    ema = Ema(model, DECAY)
    train(model, 0)
    ema.update(model)
    before, average = (
        weights_of(model),
        {k: v.clone() for k, v in ema.state_dict()["average"].items()},
    )
    other.load_state_dict(average)
    outside = output_of(model)
    assert not torch.allclose(output_of(other), outside, atol=1e-3)
    with ema.applied_to(model):
        assert torch.equal(output_of(model), output_of(other))
        with pytest.raises(AssertionError, match="the model holds the average"):
            ema.update(model)
    assert torch.equal(output_of(model), outside)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(average[k], v) for k, v in ema.state_dict()["average"].items())


def test_weights_come_back_bit_for_bit_after_an_exception(make_autoencoder) -> None:
    model = make_autoencoder()
    ema = Ema(model, DECAY)
    train(model, 0)
    with torch.no_grad():
        model.to_pixels.bias[:2] = torch.tensor([-0.0, float("nan")])
    before = {name: weight.view(torch.int32) for name, weight in weights_of(model).items()}
    with pytest.raises(KeyError, match="evaluation"), ema.applied_to(model):
        assert not model.to_pixels.bias.isnan().any()
        raise KeyError("evaluation")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().view(torch.int32), before[name]), name
    ema.update(model)


def test_weights_that_do_not_train_are_not_averaged(make_autoencoder) -> None:
    model = make_autoencoder()
    model.encoder_blocks.requires_grad_(False)
    averaged = Ema(model, DECAY).state_dict()["average"].keys()
    assert averaged == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(averaged) < len(list(model.parameters()))


def average_sharded(folder: Path) -> None:
    """Average on this rank; write a checkpoint, and what the model gives before, with and after."""
    model = Autoencoder.from_pretrained(folder / "model")
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    ema = Ema(model, DECAY)
    for step in range(NUM_UPDATES):
        train(model, step)
        ema.update(model)
    # A forward pass without gradients leaves the root's weights gathered.
    outputs = {"before": output_of(model)}
    with ema.applied_to(model):
        outputs["with"] = output_of(model)
    outputs["after"] = output_of(model)
    dcp.save({"ema": ema}, storage_writer=dcp.FileSystemWriter(folder / "checkpoint"))
    assert all(isinstance(v, DTensor) for v in ema.state_dict()["average"].values())
    if dist.get_rank() == 0:
        save_file(outputs, folder / "outputs.safetensors")


def test_sharded_average_is_the_unsharded_one_and_reshards_in_a_checkpoint(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path, one_rank: None
) -> None:
    model = make_autoencoder()
    model.save_pretrained(tmp_path / "model")
    run_on_ranks(average_sharded, 2, tmp_path)

    ema = Ema(model, DECAY)
    for step in range(NUM_UPDATES):
        train(model, step)
        ema.update(model)
    expected = {"before": output_of(model), "after": output_of(model)}
    with ema.applied_to(model):
        expected["with"] = output_of(model)
    assert not torch.allclose(expected["with"], expected["after"], atol=1e-3)
    outputs = load_file(tmp_path / "outputs.safetensors")
    for name, output in expected.items():
        torch.testing.assert_close(outputs[name], output, msg=name)
    assert torch.equal(outputs["before"], outputs["after"])

    restored = Ema(make_autoencoder(seed=1), DECAY)
    reader = dcp.FileSystemReader(tmp_path / "checkpoint")
    dcp.load({"ema": restored}, storage_reader=reader)
    assert restored.state_dict()["num_updates"] == NUM_UPDATES
    for name, average in restored.state_dict()["average"].items():
        torch.testing.assert_close(average, ema.state_dict()["average"][name], atol=1e-6, rtol=0)
    train(model, NUM_UPDATES)
    for one in (ema, restored):
        one.update(model)
    for name, average in restored.state_dict()["average"].items():
        torch.testing.assert_close(average, ema.state_dict()["average"][name], atol=1e-6, rtol=0)


def test_average_refuses_what_it_cannot_average(make_autoencoder) -> None:
    with pytest.raises(ValueError, match=r"decay=1\.0 must be at least 0 and less than 1"):
        Ema(make_autoencoder(), 1.0)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, but an average is of float32"):
        Ema(make_autoencoder().bfloat16(), DECAY)
    other = Ema(make_autoencoder(decoder_depth=1), DECAY)
    with pytest.raises(ValueError, match="averages other weights than this model trains"):
        other.load_state_dict(Ema(make_autoencoder(), DECAY).state_dict())
