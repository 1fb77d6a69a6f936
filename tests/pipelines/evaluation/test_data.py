from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.evaluation.data import choose_samples, digest_of, open_images, read_keys


@pytest.fixture
def encoded(sample_manifests: tuple[Path, Path]) -> dict[str, bytes]:
    """Eight photographs by name."""
    manifest = Manifest.load(sample_manifests[0])
    records = manifest.records(np.arange(8))
    return {f"n{i}": data for i, data in enumerate(read_samples(manifest, records))}


def images_of(manifest: Manifest) -> dict[str, bytes]:
    records = manifest.records(np.arange(manifest.num_samples))
    return dict(zip(records.key, read_samples(manifest, records), strict=True))


def test_images_are_opened_wherever_they_are(encoded: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in encoded.items():
        (folder / f"{name}.jpg").write_bytes(data)
    table = pa.table({"image": list(encoded.values()), "key": list(encoded)})
    pq.write_table(table, tmp_path / "photos.parquet")
    samples = [{"__key__": key, "jpg": data} for key, data in encoded.items()]
    shards = write_shards(samples, tmp_path / "shards", "s", 3)
    manifest = build_manifest(shards, tmp_path / "manifest")

    for number, location in enumerate(
        (folder, tmp_path / "shards", tmp_path / "shards" / "s-*.tar", shards[0], manifest.path)
    ):
        opened = open_images(str(location), tmp_path / str(number) / "data")
        expected = list(encoded) if location != shards[0] else list(encoded)[:3]
        assert images_of(opened) == {key: encoded[key] for key in expected}, location
    parquet = open_images(str(tmp_path / "photos.parquet"), tmp_path / "5" / "data")
    assert list(images_of(parquet).values()) == list(encoded.values())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_images(str(tmp_path / "nowhere"), tmp_path / "6" / "data")
    assert not (tmp_path / "6").exists(), "nothing was begun"


def test_a_folder_is_copied_again_only_when_it_changes(
    encoded: dict[str, bytes], tmp_path: Path
) -> None:
    folder, scratch = tmp_path / "photos", tmp_path / "out" / "data"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded["n0"])
    written = open_images(str(folder), scratch).path / "shards.parquet"
    before = written.stat().st_mtime_ns
    assert open_images(str(folder), scratch).num_samples == 1
    assert written.stat().st_mtime_ns == before
    (scratch / "manifest" / "shards.parquet").rename(tmp_path / "aside")
    (folder / "b.jpg").write_bytes(encoded["n1"])
    assert images_of(open_images(str(folder), scratch)) == {"a": encoded["n0"], "b": encoded["n1"]}
    (scratch / "source.json").unlink()
    with pytest.raises(FileExistsError, match="was not made by an evaluation"):
        open_images(str(folder), scratch)


def test_samples_are_chosen_by_key_and_seed_alone(tmp_path: Path, encoded: dict) -> None:
    def manifest_of(keys: list[str], name: str) -> Manifest:
        samples = [{"__key__": key, "jpg": encoded["n0"]} for key in keys]
        return build_manifest(
            write_shards(samples, tmp_path / name, "s", 4), tmp_path / f"{name}.m"
        )

    keys = [f"{i:02d}" for i in range(20)]
    ordered, turned = manifest_of(keys, "ordered"), manifest_of(keys[::-1], "turned")
    chosen: dict[int, list[str]] = {}
    for seed in range(3):
        ids, found = choose_samples(ordered, 6, seed)
        other_ids, other = choose_samples(turned, 6, seed)
        assert found == other == sorted(set(found))
        assert len(found) == 6
        assert ordered.records(ids).key.tolist() == found
        assert turned.records(other_ids).key.tolist() == found
        assert set(choose_samples(ordered, 3, seed)[1]) < set(found), "fewer are some of more"
        chosen[seed] = found
    assert len({digest_of(found) for found in chosen.values()}) == 3
    assert choose_samples(ordered)[1] == keys
    assert choose_samples(turned, 2, keys=["07", "03", "05"])[1] == ["03", "05", "07"]
    with pytest.raises(ValueError, match="has no sample 'x', nor 1 others of the list"):
        choose_samples(ordered, keys=["01", "x", "y"])


def test_a_list_of_samples_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "samples.txt"
    with pytest.raises(FileNotFoundError, match=f"no list of samples at {file}; give samples a"):
        read_keys(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="lists no samples"):
        read_keys(str(file))
    file.write_text("b c\na\n")
    assert read_keys(str(file)) == ["b c", "a"]


def test_keys_that_occur_twice_are_refused(tmp_path: Path, encoded: dict[str, bytes]) -> None:
    shards = [
        write_shards([{"__key__": "same", "jpg": encoded[name]}], tmp_path / name, "s", 1)[0]
        for name in ("n0", "n1")
    ]
    with pytest.raises(ValueError, match="the key 'same' occurs twice"):
        choose_samples(build_manifest(shards, tmp_path / "manifest"))
