"""Packed rows of slices of an evaluation, of which one is read while another is judged."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.whole_images import PlannedRow, Transform, load_row, plan_rows


class RowReader:
    """Reads the rows of slices; the next one early, where its user says so.

    When that is, is left to the user because reading takes cores and memory: a pass that is timed
    should have them to itself. At most one row waits.

    Args:
        patch_size, row_tokens: of all rows, see plan_rows.
    """

    def __init__(self, corpus: Corpus, *, patch_size: int, row_tokens: int) -> None:
        self._corpus, self._patch_size, self._row_tokens = corpus, patch_size, row_tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._next: PlannedRow | None = None
        self._ahead: tuple[PlannedRow, Future[PackedRow]] | None = None

    def rows(
        self,
        sample_ids: NDArray[np.int64],
        transform: Transform,
        following: NDArray[np.int64] | None = None,
    ) -> Iterator[PackedRow]:
        """Yield the rows of a slice.

        Args:
            following: samples of the slice that is expected next, at the same transform.
        """
        here = self._plan(sample_ids, transform)
        after = [None] if following is None else self._plan(following, transform)[:1]
        for row, upcoming in zip(here, [*here[1:], *after], strict=True):
            loaded = self._take(row)
            self._next = upcoming
            yield loaded

    def read_ahead(self) -> None:
        """Begin with the row that comes after the one that was handed out last."""
        if self._next is not None:
            self._ahead = self._next, self._submit(self._next)
            self._next = None

    def _plan(self, sample_ids: NDArray[np.int64], transform: Transform) -> list[PlannedRow]:
        records = self._corpus.records(sample_ids)
        return plan_rows(
            records,
            transform.views(records, self._patch_size),
            patch_size=self._patch_size,
            row_tokens=self._row_tokens,
        )

    def _take(self, row: PlannedRow) -> PackedRow:
        """Return a row, which the thread may have begun with already."""
        ahead, self._ahead = self._ahead, None
        begun = ahead[1] if ahead is not None and ahead[0] == row else self._submit(row)
        return begun.result()

    def _submit(self, row: PlannedRow) -> Future[PackedRow]:
        # One thread for all: what was begun in vain is over before this row is handed out.
        return self._thread.submit(load_row, self._corpus, row, self._patch_size)
