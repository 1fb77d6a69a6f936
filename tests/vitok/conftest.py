from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vitok.autoencoder import Autoencoder
from vitok.variants import AutoencoderConfig


@pytest.fixture(autouse=True)
def one_seed_and_one_thread() -> Iterator[None]:
    """Draw the same numbers in any order of tests; for tensors this small, threads are a cost."""
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile trace and count, but not generate code, which takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A world of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def make_autoencoder() -> Callable[..., Autoencoder]:
    """Build a tiny autoencoder in which no parameter has a value that would hide its absence."""

    def make(seed: int = 0, **shape: Any) -> Autoencoder:
        tiny = {
            "patch_size": 8,
            "latent_channels": 6,
            "encoder_width": 16,
            "encoder_depth": 1,
            "encoder_heads": 2,
            "decoder_width": 24,
            "decoder_depth": 2,
            "decoder_heads": 3,
        }
        model = Autoencoder(AutoencoderConfig(**(tiny | shape)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm = "norm" in name
                parameter.copy_(1 + 0.3 * noise if is_norm else noise * 0.3)
        return model

    return make
