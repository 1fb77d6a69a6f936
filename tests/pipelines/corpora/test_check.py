from pathlib import Path

import numpy as np
import pytest

from pipelines.corpora import check as module
from pipelines.corpora.check import check_corpus
from pipelines.corpus import Manifest, build_manifest, write_shards
from tests.noise import jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def corpus(tmp_path: Path) -> Manifest:
    """Three shards of four samples."""
    samples = [{"__key__": f"k{i:02d}", "jpg": jpeg(40 + i, 50, i)} for i in range(12)]
    shards = write_shards(samples, tmp_path / "shards", "s", 4)
    return build_manifest(shards, tmp_path / "m")


def overwrite(manifest: Manifest, sample: int, position: int, data: bytes) -> None:
    """Write over bytes of an image inside its shard."""
    record = manifest.records(np.array([sample]))
    with Path(manifest.uris[record.shard[0]]).open("r+b") as stream:
        stream.seek(int(record.offset[0]) + position)
        stream.write(data)


def test_a_good_corpus_passes_and_every_image_was_decoded(corpus: Manifest) -> None:
    report = check_corpus(corpus.path)
    assert report.bad == []
    assert (report.num_shards, report.num_samples, report.num_decoded) == (3, 12, 12)
    assert report.num_bytes == sum(Path(uri).stat().st_size for uri in corpus.uris)


def test_one_flipped_bit_is_found_even_where_no_image_is(corpus: Manifest) -> None:
    content = bytearray(Path(corpus.uris[1]).read_bytes())
    content[-1] ^= 1
    Path(corpus.uris[1]).write_bytes(content)
    for decode, num_decoded in ((True, 12), (False, 0)):
        report = check_corpus(corpus.path, decode=decode)
        [(shard, key, reason)] = report.bad
        assert (shard, key) == (corpus.uris[1], "")
        assert reason.startswith("sha256 ")
        assert f"the manifest says {corpus.shard_digests[1]}" in reason
        assert report.num_decoded == num_decoded


def test_undecodable_images_are_named_with_shard_key_and_reason(corpus: Manifest) -> None:
    overwrite(corpus, 5, 0, b"no image")
    overwrite(corpus, 7, 0, jpeg(20, 20, 0))
    report = check_corpus(corpus.path)
    shard = corpus.uris[1]
    assert [(finding.shard, finding.key) for finding in report.bad] == [
        (shard, ""),
        (shard, "k05"),
        (shard, "k07"),
    ]
    assert report.bad[1].reason.startswith("not an image with an intact header")
    assert report.bad[2].reason == "20x20 pixels, the manifest says 47x50"
    assert report.num_decoded == 10


def test_an_image_that_was_undecodable_when_it_was_indexed_is_found(tmp_path: Path) -> None:
    whole = jpeg(64, 64, 0)
    samples = [
        {"__key__": "good", "jpg": whole},
        {"__key__": "cut", "jpg": whole[: len(whole) // 2]},
    ]
    manifest = build_manifest(write_shards(samples, tmp_path / "s", "s", 2), tmp_path / "m")
    assert manifest.num_samples == 2, "the header is intact, and an index looks no further"
    [finding] = check_corpus(manifest.path).bad
    assert (finding.shard, finding.key) == (manifest.uris[0], "cut")
    assert finding.reason.startswith("truncated image")
    assert check_corpus(manifest.path, decode=False).bad == []


def test_a_truncated_and_a_missing_shard_are_one_finding_each(corpus: Manifest) -> None:
    end = int(corpus.records(np.array([1])).offset[0]) + 10
    content = Path(corpus.uris[0]).read_bytes()
    Path(corpus.uris[0]).write_bytes(content[:end])
    Path(corpus.uris[2]).unlink()
    for decode in (True, False):
        report = check_corpus(corpus.path, decode=decode)
        cut, missing = report.bad
        assert (cut.shard, cut.key) == (corpus.uris[0], "")
        assert cut.reason == (
            f"{end} bytes, the manifest says {len(content)}: none of its 4 samples is read, "
            "3 of them are not whole"
        )
        assert (missing.shard, missing.key) == (corpus.uris[2], "")
        assert "this shard cannot be opened" in missing.reason
        assert report.num_decoded == (4 if decode else 0)


def test_one_sample_that_cannot_be_read_does_not_hide_the_others(
    corpus: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_samples = module.read_samples

    def fail_at_one(manifest: Manifest, records: object) -> list[bytes]:
        if "k01" in records.key:
            raise OSError("the store went away")
        return read_samples(manifest, records)

    monkeypatch.setattr(module, "read_samples", fail_at_one)
    size = int(corpus.num_bytes_per_shard[0])
    report = module._check_shard(corpus, 0, size, True)
    assert report.bad == [(corpus.uris[0], "k01", "the store went away")]
    assert report.num_decoded == 3


def test_samples_are_read_in_runs_of_bounded_size(
    corpus: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = corpus.records(np.arange(12))
    limit = int(records.length[:3].sum())
    monkeypatch.setattr(module, "_MAX_READ_BYTES", limit)
    runs = list(module._reads(records))
    assert [row for run in runs for row in run] == list(range(12))
    assert all(records.length[run].sum() <= limit for run in runs)
    assert len(runs) < 12
    monkeypatch.setattr(module, "_MAX_READ_BYTES", 1)
    assert list(module._reads(records)) == [[row] for row in range(12)]
    monkeypatch.setattr(module, "_MAX_READ_BYTES", 2**30)
    monkeypatch.setattr(module, "_MAX_READ_SAMPLES", 5)
    assert [len(run) for run in module._reads(records)] == [5, 5, 2]


def test_what_cannot_be_checked_is_named(corpus: Manifest, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no manifest in this folder"):
        check_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cpus_per_task=0 must be above 0"):
        check_corpus(corpus.path, cpus_per_task=0)
    with pytest.raises(RuntimeError, match="asks for 1000 CPUs, the cluster has 4; lower cpus_per"):
        check_corpus(corpus.path, cpus_per_task=1000)
