import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus import Manifest
from pipelines.evaluation import read_ahead
from pipelines.evaluation.read_ahead import RowReader
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.whole_images import PlannedRow, Transform, iterate_rows

PATCH, ROW_TOKENS = 16, 48
TRANSFORM = Transform(token_budget=20)


class Loads:
    """What was loaded, by the keys of the row, and in which thread."""

    def __init__(self, load_row: Callable[..., PackedRow]) -> None:
        self._load_row = load_row
        self._changed = threading.Condition()
        self.keys: list[list[str]] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, corpus: Corpus, planned: PlannedRow, patch_size: int) -> PackedRow:
        row = self._load_row(corpus, planned, patch_size)
        with self._changed:
            self.keys.append(row.keys)
            self.threads.append(threading.current_thread())
            self._changed.notify()
        return row

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.keys) >= count, timeout=20)


@pytest.fixture
def corpus(sample_manifests: tuple[Path, Path]) -> Corpus:
    return Corpus.of(Manifest.load(sample_manifests[0]))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    loads = Loads(read_ahead.load_row)
    monkeypatch.setattr(read_ahead, "load_row", loads)
    return loads


def plain_rows(corpus: Corpus, sample_ids: np.ndarray, transform: Transform) -> list[PackedRow]:
    records = corpus.records(sample_ids)
    views = transform.views(records, PATCH)
    return list(iterate_rows(corpus, records, views, patch_size=PATCH, row_tokens=ROW_TOKENS))


def assert_same(rows: list[PackedRow], expected: list[PackedRow]) -> None:
    assert [row.keys for row in rows] == [row.keys for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert np.array_equal(row.tokens, other.tokens)
        assert np.array_equal(row.image_size, other.image_size)


def test_rows_that_are_read_ahead_are_those_of_a_reader_that_waits(
    corpus: Corpus, loads: Loads
) -> None:
    slices = np.array_split(np.arange(23), 3)
    reader = RowReader(corpus, patch_size=PATCH, row_tokens=ROW_TOKENS)
    total = 0
    for part, following in zip(slices, [*slices[1:], None], strict=True):
        rows = []
        for row in reader.rows(part, TRANSFORM, following):
            rows.append(row)
            reader.read_ahead()
        assert_same(rows, plain_rows(corpus, part, TRANSFORM))
        total += len(rows)
    assert total > 2 * len(slices), "several rows in a slice"
    assert len(loads.keys) == total, "each is read once"


def test_nothing_is_read_before_it_is_asked_for_and_then_one_row(
    corpus: Corpus, loads: Loads
) -> None:
    reader = RowReader(corpus, patch_size=PATCH, row_tokens=ROW_TOKENS)
    expected = [row.keys for row in plain_rows(corpus, np.arange(12), TRANSFORM)]
    rows = reader.rows(np.arange(12), TRANSFORM)
    assert next(rows).keys == expected[0]
    assert loads.keys == expected[:1]
    reader.read_ahead()
    loads.wait_for(2)
    reader.read_ahead()
    assert threading.main_thread() not in loads.threads
    assert next(rows).keys == expected[1]
    assert loads.keys == expected[:2], "asked twice for the same"


def test_a_slice_that_was_not_expected_is_read_all_the_same(corpus: Corpus, loads: Loads) -> None:
    reader = RowReader(corpus, patch_size=PATCH, row_tokens=ROW_TOKENS)
    for _ in reader.rows(np.arange(2), TRANSFORM, following=np.arange(5, 9)):
        pass
    reader.read_ahead()
    others = np.arange(30, 36)
    assert_same(list(reader.rows(others, TRANSFORM)), plain_rows(corpus, others, TRANSFORM))
    larger = Transform(token_budget=40)
    for _ in reader.rows(np.arange(2), TRANSFORM, following=others):
        pass
    reader.read_ahead()
    assert_same(list(reader.rows(others, larger)), plain_rows(corpus, others, larger))


def test_what_goes_wrong_in_the_thread_is_raised_where_the_row_is_used(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> PackedRow:
        raise OSError("the shard is gone")

    reader = RowReader(corpus, patch_size=PATCH, row_tokens=ROW_TOKENS)
    rows = reader.rows(np.arange(12), TRANSFORM)
    next(rows)
    monkeypatch.setattr(read_ahead, "load_row", fail)
    reader.read_ahead()
    with pytest.raises(OSError, match="the shard is gone"):
        next(rows)
