import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.corpora import index as module
from pipelines.corpora.index import index_corpus, unordered
from pipelines.corpora.size_histogram import (
    ASPECT_BOUNDS,
    NUM_AREAS,
    NUM_ASPECTS,
    NUM_CLASSES,
    area_quantiles,
    count_sizes,
    typical_sizes,
)
from pipelines.corpus import (
    Manifest,
    ShardIndex,
    build_manifest,
    read_samples,
    write_manifest,
    write_shards,
)
from tests.noise import jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Seven shards of unequal size, one of them with a sample that cannot be used."""
    samples = [
        {"__key__": f"{i:04d}", "jpg": jpeg(8 + i, 8 + i % 7, i), "cls": i} for i in range(40)
    ]
    samples[9]["jpg"] = b"no image"
    return write_shards(samples, tmp_path / "shards", "s", 6)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def blacken(paths: list[str]) -> None:
    """Overwrite shards with zeros: whoever reads one of them again fails."""
    for path in paths:
        Path(path).write_bytes(bytes(Path(path).stat().st_size))


@pytest.mark.parametrize("cpus_per_task", [4.0, 1.0])
def test_parallel_index_is_the_manifest_of_one_process_byte_for_byte(
    shards: list[str], tmp_path: Path, cpus_per_task: float
) -> None:
    expected = build_manifest(shards, tmp_path / "alone")
    manifest = index_corpus(shards, tmp_path / "parallel", cpus_per_task=cpus_per_task)
    assert contents(manifest.path) == contents(expected.path)
    assert len(contents(manifest.path)) == 7 + 2
    assert manifest.digest == expected.digest
    assert manifest.num_samples == 39
    assert not (tmp_path / "parallel.unfinished").exists()


def test_an_interrupted_index_reads_no_finished_shard_again(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_manifest(shards, tmp_path / "alone")
    path = tmp_path / "m"
    write_whole = module._write_whole

    def interrupt_at_the_fourth(file: Path, data: bytes) -> None:
        if len(list(file.parent.iterdir())) == 3:
            raise KeyboardInterrupt
        write_whole(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_whole", interrupt_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            index_corpus(shards, path)
    assert not path.exists()
    journal = tmp_path / "m.unfinished" / "shards.jsonl"
    finished = [json.loads(line)["uri"] for line in journal.read_text().splitlines()]
    assert len(finished) == 3
    # As a kill in the middle of a line leaves it.
    journal.write_text(journal.read_text() + '{"uri": "/half')

    blacken(finished)
    assert contents(index_corpus(shards, path).path) == contents(expected.path)


def test_a_shard_of_another_size_is_indexed_again(shards: list[str], tmp_path: Path) -> None:
    path = tmp_path / "m"
    Path(shards[6]).rename(tmp_path / "away")
    Path(shards[6]).write_bytes(b"")
    with pytest.raises(RuntimeError, match="1 of 7 shards cannot be indexed"):
        index_corpus(shards, path)
    write_shards([{"__key__": "new", "jpg": jpeg(9, 9, 0)}], tmp_path / "shards", "s", 1)
    (tmp_path / "away").rename(shards[6])
    blacken(shards[1:6])
    manifest = index_corpus(shards, path)
    assert manifest.records(np.array([0])).key.tolist() == ["new"]
    assert manifest.num_samples == 1 + 33
    assert len(list((path / "samples").iterdir())) == 7, "nothing of the shard that is no more"


def test_all_bad_shards_are_named_at_once_and_the_others_are_kept(
    shards: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "m"
    folder = Path(shards[0]).parent
    expected = build_manifest(shards, tmp_path / "alone")
    whole = {shards[i]: Path(shards[i]).read_bytes() for i in (1, 4, 5)}
    Path(shards[1]).write_bytes(whole[shards[1]][:700])
    Path(shards[4]).write_bytes(b"no tar at all" * 100)
    Path(shards[5]).unlink()
    Path(shards[5]).symlink_to(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match=r"^3 of 7 shards .*max_bad_shards=0 .*again") as failure:
        index_corpus([str(folder)], path)
    sentence = str(failure.value)
    assert "\n" not in sentence
    assert sentence.count(f"{shards[1]}: not a readable tar archive") == 1
    assert sentence.count(f"{shards[4]}: not a readable tar archive") == 1
    assert sentence.count(f"{shards[5]}: this shard cannot be opened") == 1
    listed = (tmp_path / "m.unfinished" / "bad_shards.jsonl").read_text().splitlines()
    assert [json.loads(line)["uri"] for line in listed] == list(whole)
    assert not path.exists()

    Path(shards[5]).unlink()
    for shard, data in whole.items():
        Path(shard).write_bytes(data)
    blacken([shard for shard in shards if shard not in whole])
    assert contents(index_corpus([str(folder)], path).path) == contents(expected.path)


def test_a_tolerated_bad_shard_is_left_out_and_listed(shards: list[str], tmp_path: Path) -> None:
    expected = build_manifest([*shards[:2], *shards[3:]], tmp_path / "alone")
    Path(shards[2]).write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"1 of 7 shards .*max_bad_shards=0.14 allows"):
        index_corpus(shards, tmp_path / "m", max_bad_shards=0.14)
    manifest = index_corpus(shards, tmp_path / "m", max_bad_shards=0.15)
    assert manifest.digest == expected.digest
    assert manifest.uris == expected.uris
    (uri, key, reason) = manifest.skipped()[-1]
    assert (uri, key) == (shards[2], "")
    assert "not a readable tar archive" in reason
    assert manifest.skipped()[:-1] == expected.skipped()


def test_too_many_unusable_samples_stop_the_index_but_keep_the_work(
    shards: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"1 of 40 samples cannot be used"):
        index_corpus(shards, tmp_path / "m", max_skipped=0.02)
    blacken(shards)
    assert index_corpus(shards, tmp_path / "m").num_samples == 39


def test_two_processes_do_not_index_into_one_folder(shards: list[str], tmp_path: Path) -> None:
    path = tmp_path / "m"
    with (
        module._journal(tmp_path / "m.unfinished"),
        pytest.raises(FileExistsError, match="another process indexes into this folder"),
    ):
        index_corpus(shards, path)
    index_corpus(shards, path)
    with pytest.raises(FileExistsError, match="m: exists already; remove it"):
        index_corpus(shards, path)


@pytest.mark.parametrize("name", ["max_bad_shards", "max_skipped", "cpus_per_task"])
def test_an_option_outside_its_range_is_named(shards: list[str], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-0.1 must be"):
        index_corpus(shards, tmp_path / "m", **{name: -0.1})
    assert not (tmp_path / "m.unfinished").exists()


def test_so_many_tasks_run_at_once_and_each_result_comes_once() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Meter:
        def __init__(self) -> None:
            self.now = self.most = 0

        def add(self, count: int) -> int:
            self.now += count
            self.most = max(self.most, self.now)
            return self.most

    @ray.remote(num_cpus=0)
    def square(number: int, meter: object) -> int:
        ray.get(meter.add.remote(1))
        ray.get(meter.add.remote(-1))
        return number * number

    meter = Meter.remote()
    arguments = {f"k{i}": (i, meter) for i in range(9)}
    results = {key: ray.get(ref) for key, ref in unordered(square, arguments, 2)}
    assert results == {f"k{i}": i * i for i in range(9)}
    assert ray.get(meter.add.remote(0)) <= 2
    assert list(unordered(square, {}, 2)) == []


def test_neighbouring_samples_can_be_read_without_the_whole_side_index(tmp_path: Path) -> None:
    count = np.arange(2500)
    index = ShardIndex(
        uri="a.tar",
        num_bytes=1,
        digest="d" * 64,
        key=[f"{i:05d}" for i in count],
        offset=count,
        length=count + 1,
        width=(count + 10).astype(np.int32),
        height=(count + 10).astype(np.int32),
        label=count,
        skipped=[],
    )
    manifest = write_manifest([index], tmp_path / "m")
    [file] = (tmp_path / "m" / "samples").iterdir()
    side_index = pq.ParquetFile(file)
    assert [side_index.metadata.row_group(i).num_rows for i in range(3)] == [1024, 1024, 452]
    assert side_index.read_row_group(1)["key"][0].as_py() == "01024"
    assert manifest.records(np.array([2048])).key.tolist() == ["02048"]


def test_size_counts_are_those_of_the_images(shards: list[str], tmp_path: Path) -> None:
    manifest = build_manifest(shards, tmp_path / "m")
    counts = manifest.size_counts
    assert counts.shape == (7, NUM_CLASSES)
    assert counts.sum(axis=1).tolist() == manifest.num_samples_per_shard.tolist()
    assert manifest.num_bytes_per_shard.tolist() == [Path(s).stat().st_size for s in shards]
    assert len(read_samples(manifest, manifest.records(np.arange(3)))) == 3

    rng = np.random.default_rng(0)
    height, width = rng.integers(1, 6000, (2, 500))
    expected = np.zeros(NUM_CLASSES, np.int32)
    for h, w in zip(height.tolist(), width.tolist(), strict=True):
        aspect = sum(max(h, w) / min(h, w) >= bound for bound in ASPECT_BOUNDS)
        area = min(max(round(2 * np.log2(h * w / 4096)), 0), NUM_AREAS - 1)
        expected[area * NUM_ASPECTS + aspect] += 1
    assert count_sizes(height, width).tolist() == expected.tolist()
    assert count_sizes(width, height).tolist() == expected.tolist()
    shares = (0.05, 0.5, 0.95)
    found = area_quantiles(count_sizes(height // 2, width // 2), shares)
    exact = np.quantile((height // 2) * (width // 2), shares)
    assert np.abs(np.log2(found / exact)).max() < 0.5
    typical = typical_sizes()
    assert (count_sizes(typical[:, 0], typical[:, 1]) == 1).all(), "each is in its own class"


def test_manifest_written_in_parallel_is_loaded_like_any_other(
    shards: list[str], tmp_path: Path
) -> None:
    index_corpus(shards, tmp_path / "m")
    manifest = Manifest.load(tmp_path / "m")
    records = manifest.records(np.array([38, 0, 12]))
    assert records.key.tolist() == ["0039", "0000", "0013"]
    assert read_samples(manifest, records) == [jpeg(8 + i, 8 + i % 7, i) for i in (39, 0, 13)]
