import json
import re
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.encoding import ENCODING
from pipelines.caching.config import complete
from vitok.variants import RELEASED, AutoencoderConfig


@pytest.mark.parametrize("name", ENCODING)
def test_recipe_says_what_it_takes_and_lacks_nothing_but_locations(name: str) -> None:
    recipe = ENCODING[name]
    settings = recipe()
    assert settings.transforms
    assert (settings.manifest, settings.out) == ("", "")
    with pytest.raises(ValueError, match="manifest is empty; set --manifest"):
        complete(settings)
    if name != "quickstart":
        assert settings.model in RELEASED
        assert settings.num_classes == 21_841
        for part in ("Hardware:", "estimated, not measured by us", "TB at most", "Set manifest"):
            assert part in (recipe.__doc__ or "")
        patch = AutoencoderConfig.from_name(settings.model).patch_size
        assert all(transform.max_tokens(patch) == 256 for transform in settings.transforms)


def test_cache_of_imagenet_22k_is_planned_without_its_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["latents", "plan", "imagenet-22k-350m-f16x64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] == 14_200_000
    assert found["num_units"] == 1420 * 20
    assert found["num_bytes"] == 14_200_000 * 256 * 64 * 2  # 0.465 TB
    assert found["num_writes"] == 2 * found["num_units"] + 3
    assert found["planning_mb"] < 1024
    summary = (ENCODING["imagenet-22k-350m-f16x64"].__doc__ or "").replace("\n", " ")
    terabytes = re.search(r"Expected: ([\d.]+) TB", summary)
    assert terabytes is not None
    assert float(terabytes[1]) == pytest.approx(found["num_bytes"] / 1e12, abs=0.01)
    native = ["latents", "plan", "imagenet-22k-350m-f16x64-native", "--shards", "10", "--json"]
    assert main(native) == 0
    few = json.loads(capsys.readouterr().out)
    assert few["num_units"] == 200
    assert 0.8 * 256 < few["num_tokens"] / few["num_images"] <= 256
    assert main(["latents", "plan", "quickstart"]) == 1
    assert "the recipe 'quickstart' names no model" in capsys.readouterr().err


def test_dry_run_says_what_it_will_take_and_writes_nothing(
    ray_cluster: None,
    sample_manifests: tuple[Path, Path],
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["encode", "quickstart", "--manifest", str(sample_manifests[0])]
    given += ["--model", str(tiny_weights), "--out", str(tmp_path / "cache"), "--dry-run"]
    assert main([*given, "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["num_images"] == 60
    assert found["hours"] > 0
    assert out.startswith("60 images in ")
    assert re.search(r"measured here +[\d.,]+ images/s a reader, an encoder [\d.,]+", out)
    assert re.search(r"estimated time +[\d.]+ hours with 2 encoders on 4 cores", out)
    assert not (tmp_path / "cache").exists()
