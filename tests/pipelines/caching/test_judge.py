from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.caching.config import LatentCaching
from pipelines.caching.judge import judge_latents
from pipelines.latents import LatentCache
from tests.conftest import tiny_model
from tests.pipelines.encoding_process import encode_all
from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.pretrained import save_pretrained
from vitok.variants import AutoencoderConfig


@pytest.fixture
def exact_weights(tmp_path: Path) -> Path:
    """Folder of a model that gives back its input: pixels in, the same pixels out."""
    config = replace(
        tiny_model(AutoencoderConfig(patch_size=2, latent_channels=12, latent="tanh")),
        encoder_width=0,
        encoder_depth=0,
        encoder_heads=0,
        decoder_depth=0,
    )
    model = Autoencoder(config)
    start_at_random(model, seed=0)
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    # tanh is nearly linear this close to 0.
    weights["to_code.weight"] = torch.eye(12) * 1e-2
    weights["decoder_embed.weight"][:12] = torch.eye(12) * 1e2
    weights["to_pixels.weight"][:, :12] = torch.eye(12)
    save_pretrained(tmp_path / "exact", config, weights)
    return tmp_path / "exact"


def test_latents_decode_to_the_very_images_they_are_of(
    sample_manifests: tuple[Path, Path], exact_weights: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    settings = LatentCaching(
        manifest=str(sample_manifests[1]),
        model=str(exact_weights),
        out=str(tmp_path / "cache"),
        token_budgets=(300,),
        squares=(24,),
        buckets=(24,),
        flip=True,
        dtype="float32",
        compute_dtype="float32",
        use_gpu=False,
        unit_samples=3,
    )
    encode_all(settings)
    torch.set_num_threads(threads)
    cache, model = LatentCache(settings.out), load_autoencoder(str(exact_weights))
    results = judge_latents(cache, model, settings.manifest, num_images=1000)
    assert [result.key for result in results] == [row.key for row in cache]
    assert len(results) == 5 * 6
    # Another crop, or the image the other way round, would give 10 to 20 dB.
    assert min(result.metrics.psnr for result in results) > 60
    assert len(judge_latents(cache, model, settings.manifest, num_images=3)) == 3
    with pytest.raises(ValueError, match=r"has no shard of the digest \w+, of which .* is; give"):
        judge_latents(cache, model, str(sample_manifests[0]), num_images=3)
