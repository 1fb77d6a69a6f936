import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import sample_corpus
from jobs.sample_corpus import (
    EVAL_PHOTOGRAPHS,
    TRAIN_PHOTOGRAPHS,
    make_sample_corpus,
    photograph_path,
)
from pipelines.corpus import Manifest, read_samples
from pipelines.reading.decode import decode_rgb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "corpus"
    make_sample_corpus(folder, num_train=80, num_eval=6)
    return folder


def written_crops(folder: Path, split: str) -> list[dict]:
    """What the shards of a split hold, read with tarfile alone."""
    crops: list[dict] = []
    for path in sorted((folder / "shards").glob(f"{split}-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                if not crops or crops[-1]["key"] != key:
                    crops.append({"key": key})
                crops[-1][extension] = archive.extractfile(member).read()
    return crops


def test_manifests_name_every_crop_where_it_lies(folder: Path) -> None:
    for split, num_samples, num_shards in (("train", 80, 2), ("eval", 6, 1)):
        manifest = Manifest.load(folder / split)
        assert (manifest.num_samples, len(manifest.uris)) == (num_samples, num_shards)
        assert {Path(uri).parent for uri in manifest.uris} == {folder / "shards"}
        records = manifest.records(np.arange(num_samples))
        crops = written_crops(folder, split)
        assert records.key.tolist() == [crop["key"] for crop in crops]
        assert records.label.tolist() == [int(crop["cls"]) for crop in crops]
        assert read_samples(manifest, records) == [crop["jpg"] for crop in crops]
        assert manifest.skipped() == []


def test_crops_are_cut_from_the_photographs_of_their_split_alone(folder: Path) -> None:
    names = [Path(name).stem for _, name in TRAIN_PHOTOGRAPHS + EVAL_PHOTOGRAPHS]
    for split, photographs in (("train", TRAIN_PHOTOGRAPHS), ("eval", EVAL_PHOTOGRAPHS)):
        opened = {Path(n).stem: Image.open(photograph_path(p, n)) for p, n in photographs}
        crops = written_crops(folder, split)
        assert {json.loads(crop["json"])["photograph"] for crop in crops} == set(opened)
        for crop in crops:
            origin = json.loads(crop["json"])
            assert names.index(origin["photograph"]) == int(crop["cls"])
            pixels = decode_rgb(crop["jpg"]).astype(int)
            height, width, _ = pixels.shape
            top, left = origin["top"], origin["left"]
            box = (left, top, left + width, top + height)
            expected = np.asarray(opened[origin["photograph"]].crop(box).convert("RGB"))
            if origin["flipped"]:
                expected = expected[:, ::-1]
            assert np.abs(pixels - expected).mean() < 8  # JPEG at quality 90 and chroma halved


def test_crops_have_many_sizes_and_aspect_ratios(folder: Path) -> None:
    records = Manifest.load(folder / "train").records(np.arange(80))
    sides = np.concatenate([records.width, records.height])
    assert sides.min() >= 96 and sides.max() <= 512
    assert sides.min() < 110 and sides.max() > 450
    aspect = records.width / records.height
    assert 1 / 3.05 < aspect.min() < 0.5 and 2 < aspect.max() < 3.05
    assert len(set(zip(records.width, records.height, strict=True))) > 75
    grays = [Image.open(io.BytesIO(c["jpg"])).mode == "L" for c in written_crops(folder, "train")]
    assert 0 < sum(grays) < 40


def test_same_seed_gives_the_same_images_in_another_folder(folder: Path, tmp_path: Path) -> None:
    def digests(path: Path) -> list[str]:
        return [Manifest.load(path / split).digest for split in ("train", "eval")]

    again = make_sample_corpus(tmp_path / "again", num_train=80, num_eval=6)
    assert again == (tmp_path / "again" / "train", tmp_path / "again" / "eval")
    assert digests(tmp_path / "again") == digests(folder)
    make_sample_corpus(tmp_path / "other", num_train=80, num_eval=6, seed=1)
    assert not set(digests(tmp_path / "other")) & set(digests(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_a_finished_corpus_is_used_again_and_anything_else_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_called(*_: object) -> Callable:
        raise AssertionError("the corpus was built again")

    monkeypatch.setattr(sample_corpus, "write_shards", not_called)
    manifests = make_sample_corpus(folder, num_train=80, num_eval=6)
    assert manifests == (folder / "train", folder / "eval")
    with pytest.raises(FileExistsError, match="holds something else than .*'num_train': 81"):
        make_sample_corpus(folder, num_train=81, num_eval=6)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="remove it or choose another folder"):
        make_sample_corpus(tmp_path)


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
        make_sample_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
