import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.plan import SampleView
from pipelines.reading.decode import decode_adm_square, decode_rgb
from pipelines.whole_images import Transform, iterate_rows
from vitok.config import to_dict
from vitok.packed import unpack_images
from vitok.patches import bucket_sizes, fit_to_budget

PATCH = 16
COUNT = 23


@pytest.fixture
def source(sample_manifests: tuple[Path, Path]) -> Manifest:
    return Manifest.load(sample_manifests[0])


def rows_of(source: Manifest, views: list[SampleView], row_tokens: int) -> list[PackedRow]:
    ids = sorted({view.sample_id for view in views})
    records = source.records(np.array(ids))
    rows = iterate_rows(Corpus.of(source), records, views, patch_size=PATCH, row_tokens=row_tokens)
    return list(rows)


def pixels_of(rows: list[PackedRow]) -> list[tuple[str, torch.Tensor]]:
    """Return key and pixels [3, H, W] of every image of some rows, in their order."""
    return [
        (key, image)
        for row in rows
        for key, image in zip(
            row.keys, unpack_images(row.to_packed(torch.device("cpu"))[0], PATCH), strict=True
        )
    ]


@pytest.mark.parametrize(
    "transform",
    [
        {"token_budget": 20},
        {"longest_side": 70},
        {"square": 48},
        {"square": 48, "adm": True},
        {"bucket": 48},
    ],
)
def test_every_image_comes_once_as_the_transform_shows_it(
    source: Manifest, transform: dict[str, int]
) -> None:
    how = Transform(**transform)
    records = source.records(np.arange(COUNT))
    rows = rows_of(source, how.views(records, PATCH), row_tokens=64)
    found = dict(pixels_of(rows))
    assert len(found) == sum(len(row.keys) for row in rows) == COUNT
    assert len({row.tokens.shape for row in rows}) == len({len(row.image_size) for row in rows})
    assert len(rows) > 1
    for key, data in zip(records.key.tolist(), read_samples(source, records), strict=True):
        whole = decode_rgb(data)
        height, width = whole.shape[:2]
        if how.square:
            side = min(height, width)
            crop = ((height - side) // 2, (width - side) // 2, side, side)
            size = (how.square, how.square)
        elif how.bucket:
            log_aspects = {(h, w): math.log(h / w) for h, w in ((32, 64), (48, 48), (64, 32))}
            size = min(log_aspects, key=lambda s: abs(math.log(height / width) - log_aspects[s]))
            height_of_all, width_of_all = width * size[0] / size[1], height * size[1] / size[0]
            cut = (min(height, int(height_of_all + 0.5)), min(width, int(width_of_all + 0.5)))
            crop = ((height - cut[0]) // 2, (width - cut[1]) // 2, *cut)
        else:
            crop = (0, 0, height, width)
            scale = min(1.0, how.longest_side / max(height, width))
            size = (round(height * scale), round(width * scale))
            if how.token_budget:
                size = fit_to_budget(height, width, patch_size=PATCH, token_budget=20)
        expected = decode_rgb(data, crop=crop, size=size)
        if how.adm:
            assert not np.array_equal(expected, decode_adm_square(data, 48))
            expected = decode_adm_square(data, 48)
        assert found[key].shape[1:] == size
        shown = ((found[key] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(shown, expected)


def test_buckets_hold_what_pillow_fits_into_them(tmp_path: Path) -> None:
    # Sides of which the crop is whole and lies in the very middle: nothing is rounded to pixels.
    sizes = [
        (rows * scale + tall, columns * scale + wide)
        for rows, columns in bucket_sizes(96, PATCH)
        for scale, tall, wide in ((1, 4, 0), (1, 0, 0), (2, 0, 6), (3, 10, 0))
    ]
    sizes += [(24, 72), (130, 34)]  # to be enlarged, and beyond the outermost buckets
    noise = np.random.default_rng(0)
    images = []
    for height, width in sizes:
        coarse = Image.fromarray(noise.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        images.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    samples = []
    for i, image in enumerate(images):
        image.save(stream := io.BytesIO(), "PNG")
        samples.append({"__key__": f"k{i:02d}", "png": stream.getvalue()})
    shards = write_shards(samples, tmp_path / "shards", "s", len(samples))
    source = build_manifest(shards, tmp_path / "manifest")
    views = Transform(bucket=96).views(source.records(np.arange(len(samples))), PATCH)
    found = dict(pixels_of(rows_of(source, views, row_tokens=144)))
    assert len(found) == len(sizes) > 20
    shown = [found[sample["__key__"]].shape[1:] for sample in samples]
    assert set(shown) == set(bucket_sizes(96, PATCH))
    for image, sample, (height, width) in zip(images, samples, shown, strict=True):
        expected = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = ((found[sample["__key__"]] + 1) * 127.5).round().permute(1, 2, 0).numpy()
        # Pillow's own crop is off by rounding errors of 1e-14 pixels.
        np.testing.assert_allclose(pixels, np.asarray(expected), rtol=0, atol=1)


def test_a_flipped_view_is_the_mirrored_image(source: Manifest) -> None:
    records = source.records(np.arange(5))
    views = Transform(token_budget=12).views(records, PATCH)
    both = [replace(view, flip=flip) for view in views for flip in (False, True)]
    found = pixels_of(rows_of(source, both, row_tokens=1000))
    assert len(found) == 10
    for (key, image), (same_key, mirrored) in zip(found[::2], found[1::2], strict=True):
        assert key == same_key
        torch.testing.assert_close(mirrored, image.flip(-1), rtol=0, atol=0)
        assert not torch.equal(mirrored, image)


def test_a_view_larger_than_a_row_gets_a_longer_row(source: Manifest) -> None:
    records = source.records(np.arange(3))
    views = Transform(square=96).views(records, PATCH)
    rows = rows_of(source, views, row_tokens=8)
    assert [len(row.tokens) for row in rows] == [36, 36, 36]
    assert {row.max_seqlen for row in rows} == {36}


def test_the_bound_on_tokens_holds_for_any_shape() -> None:
    for transform in (
        Transform(token_budget=30),
        Transform(longest_side=70),
        Transform(square=48),
        Transform(bucket=48),
    ):
        for height, width in ((1, 4000), (70, 70), (500, 333), (48, 48), (5, 5)):
            view = transform.view(0, height, width, PATCH)
            assert 1 <= view.num_tokens(PATCH) <= transform.max_tokens(PATCH)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"token_budget": 5, "square": 32}, {"longest_side": -1}, {"square": 32, "bucket": 32}],
)
def test_exactly_one_size_is_asked_for(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give one of them, at least 1"):
        Transform(**sizes)
    with pytest.raises(ValueError, match="adm=True says how a square is made; give square"):
        Transform(token_budget=5, adm=True)


def test_a_square_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="square=100 is no multiple .* of 16 pixels; take 96"):
        Transform(square=100).require_patch(PATCH)
    with pytest.raises(ValueError, match="bucket=100 is no multiple .* of 16 pixels; take 96"):
        Transform(bucket=100).require_patch(PATCH)
    Transform(square=96).require_patch(PATCH)
    Transform(bucket=96).require_patch(PATCH)
    Transform(token_budget=100).require_patch(PATCH)


def test_a_transform_survives_json() -> None:
    for transform in (Transform(longest_side=512), Transform(bucket=512)):
        assert Transform(**json.loads(json.dumps(to_dict(transform)))) == transform


def test_what_a_transform_does_not_use_is_not_written_so_that_old_digests_stay() -> None:
    old = {"token_budget": 0, "longest_side": 0, "square": 256}
    assert to_dict(Transform(square=256)) == old
    assert to_dict(Transform(bucket=256)) == old | {"square": 0, "bucket": 256}
