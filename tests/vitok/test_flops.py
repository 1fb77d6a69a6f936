import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitok import flops
from vitok.flops import peak_flops, training_flops
from vitok.packed import layout_of, pack_images
from vitok.variants import AutoencoderConfig

# Wide enough that the first layer, which has no gradient of its input, is a small share.
SHAPE = {"patch_size": 4, "encoder_width": 64, "encoder_depth": 2, "decoder_width": 96}
SIZES = [(24, 40), (16, 16), (4, 36)]


@pytest.mark.parametrize("kernel", ["explicit", "fused"])
def test_training_flops_of_a_row_are_those_that_torch_counts_for_its_images_unpacked(
    kernel: str, make_autoencoder, monkeypatch
) -> None:
    if kernel == "fused":
        monkeypatch.setattr("vitok.attention.MAX_EXPLICIT_TOKENS", 0)
    model = make_autoencoder(**SHAPE)
    counted = 0
    for height, width in SIZES:
        packed = pack_images([torch.randn(3, height, width)], patch_size=4)
        # The fused kernel's backward pass multiplies q and k again; the plain one shows what the
        # model asks for.
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(packed).pixels.tokens.square().mean().backward()
        counted += counter.get_total_flops()

    row = layout_of(SIZES, patch_size=4, row_tokens=200, max_images=5, max_seqlen=60)
    lengths = row.grid.prod(dim=1).tolist()
    assert lengths == [60, 16, 9, 0, 0]
    assert training_flops(model.config, lengths) == pytest.approx(counted, rel=0.01)
    # One image of as many tokens would attend to far more.
    assert training_flops(model.config, [sum(lengths)]) > 1.03 * counted


def test_training_flops_of_the_parts_add_up_and_grow_with_the_square_of_an_image() -> None:
    config = AutoencoderConfig.from_name("Ld4-L/16x64")
    whole = training_flops(config, [256, 1024])
    parts = [training_flops(config, [256, 1024], part) for part in ("encoder", "decoder")]
    assert sum(parts) == pytest.approx(whole)
    assert 0 < parts[0] < parts[1]
    # Scores and their product with v: 4 W operations a pair and layer, forward, and twice back.
    attention = 3 * 4 * 1024 * 28 * (512**2 - 2 * 256**2)
    split = training_flops(config, [512]) - training_flops(config, [256, 256])
    assert split == pytest.approx(attention)
    assert training_flops(config, []) == training_flops(config, [0, 0]) == 0


@pytest.mark.parametrize(
    ("name", "called", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12),
        ("NVIDIA A100 80GB PCIe", "A100", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.5e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5e12),
        ("NVIDIA H200", "H200 SXM", 989.5e12),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5e12),
        ("NVIDIA B200", "B200", 2250e12),
        ("NVIDIA L40S", "L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2e12),
    ],
)
def test_known_gpus_have_the_vendors_peak(name, called, peak, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (peak, f"{called} dense bf16, vendor")


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("NVIDIA L40", torch.bfloat16, "bf16"),
        ("NVIDIA GB200", torch.bfloat16, "bf16"),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, "bf16"),
        ("NVIDIA H200", torch.float32, "float32"),
    ],
)
def test_what_the_vendors_figures_do_not_cover_is_measured(name, dtype, kind, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "_time_products", lambda device, dtype, side: [4.0, 1.0, 2.0])
    peak = peak_flops(torch.device("cuda"), dtype)
    assert peak == (2 * 8192**3 / 2.0, f"measured {kind} matmul, {name}")


def test_peak_of_a_cpu_is_measured_with_the_threads_in_use(monkeypatch) -> None:
    monkeypatch.setattr(flops, "_CPU_SIDE", 64)
    monkeypatch.setattr(flops, "_MEASURED_S", 0.0)
    peak = peak_flops(torch.device("cpu"))
    assert peak.source == "measured bf16 matmul, 1 thread"
    assert 0 < peak.flops_per_s < float("inf")
    torch.set_num_threads(2)
    assert peak_flops(torch.device("cpu")).source == "measured bf16 matmul, 2 threads"
