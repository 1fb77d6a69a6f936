import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.tracker.spool import ARTIFACTS, RECORDS, Entry, Spool, adopt, copy_into, fill, unsent

ROOT = Path(__file__).parents[3]


def metrics(step: int) -> Entry:
    return {"kind": "metrics", "metrics": {"loss": 1.0 / step}, "step": step}


def add_image(spool: Spool, step: int, num_bytes: int) -> None:
    def write(path: Path) -> None:
        path.write_bytes(bytes(num_bytes))

    name = fill(spool, write)
    spool.add(ARTIFACTS, {"kind": "image", "file": name, "step": step}, num_bytes)


def files_of(spool: Spool) -> set[str]:
    return {path.name for path in (spool.folder / "files").iterdir()}


def test_entries_leave_in_the_order_they_came_and_only_when_they_are_settled(
    tmp_path: Path,
) -> None:
    spool = Spool.create(tmp_path, 10_000)
    entries = [metrics(step) for step in range(1, 6)]
    for entry in entries:
        spool.add(RECORDS, entry)
    assert spool.head(RECORDS, 2) == entries[:2]
    assert spool.waiting(RECORDS) == entries, "looking at them does not remove them"
    spool.settle(RECORDS, spool.head(RECORDS, 2))
    assert spool.waiting(RECORDS) == entries[2:]
    assert list(unsent(tmp_path))[-3:] == entries[2:]
    spool.settle(RECORDS, spool.head(RECORDS, 10))
    assert list(unsent(tmp_path)) == []
    spool.add(RECORDS, entries[0])
    assert list(unsent(tmp_path)) == entries[:1]


def test_living_writer_keeps_its_spool_and_a_closed_one_leaves_what_waits(tmp_path: Path) -> None:
    spool, empty = Spool.create(tmp_path, 10_000), Spool.create(tmp_path, 10_000)
    spool.add(RECORDS, metrics(1))
    add_image(spool, 2, 10)
    assert adopt(tmp_path, 10_000) == []
    empty.close()
    assert [path.name for path in tmp_path.iterdir()] == [spool.folder.name]
    spool.close()
    (adopted,) = adopt(tmp_path, 10_000)
    assert adopted.waiting(RECORDS) == [metrics(1)]
    (image,) = adopted.waiting(ARTIFACTS)
    assert adopted.file_of(image).stat().st_size == 10
    assert adopt(tmp_path, 10_000) == [], "one adopter each"


def test_killed_writers_are_adopted_oldest_first_but_for_a_line_cut_in_half(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from pipelines.tracker.spool import RECORDS, Spool
spool = Spool.create(Path(sys.argv[1]), 10_000)
spool.add(RECORDS, {"step": int(sys.argv[2])})
with (spool.folder / "records.jsonl").open("a") as file:
    file.write('{"step": 1')
os.kill(os.getpid(), signal.SIGKILL)
"""
    for step in (5, 4):
        command = [sys.executable, "-c", script, str(tmp_path), str(step)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert [spool.waiting(RECORDS) for spool in adopt(tmp_path, 10_000)] == [
        [{"step": 5}],
        [{"step": 4}],
    ]
    assert caplog.records == []


def test_damaged_line_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool.create(tmp_path, 10_000)
    spool.add(RECORDS, metrics(1))
    with (spool.folder / "records.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n" + json.dumps(metrics(3)).encode() + b"\n")
    spool.close()
    with caplog.at_level(logging.WARNING):
        (adopted,) = adopt(tmp_path, 10_000)
    assert adopted.waiting(RECORDS) == [metrics(1), metrics(3)]
    assert "records.jsonl: line 2 is damaged" in caplog.text


def test_oldest_images_give_way_then_files_and_metrics_last(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "run", 10_000)
    source = tmp_path / "report.txt"
    source.write_bytes(bytes(2000))
    spool.add(ARTIFACTS, {"kind": "files", "file": copy_into(spool, source)}, 2000)
    for step in range(1, 6):
        spool.add(RECORDS, metrics(step))
        add_image(spool, step, 3000)
    kept = [entry.get("step") for entry in spool.waiting(ARTIFACTS)]
    assert kept == [None, 4, 5]
    assert spool.dropped == {"image": 3}
    assert files_of(spool) == {entry["file"] for entry in spool.waiting(ARTIFACTS)}
    assert len(spool.waiting(RECORDS)) == 5

    num_steps = 5
    while not spool.dropped.get("metrics"):
        num_steps += 1
        spool.add(RECORDS, metrics(num_steps))
    assert spool.dropped == {"image": 5, "files": 1, "metrics": 1}
    assert [e["step"] for e in spool.waiting(RECORDS)] == list(range(1, num_steps))
    total = sum(path.stat().st_size for path in spool.folder.rglob("*") if path.is_file())
    assert 9_000 < total <= 10_000


def test_image_that_is_dropped_while_it_is_sent_disturbs_nothing(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, 5000)
    add_image(spool, 1, 3000)
    sending = spool.head(ARTIFACTS, 1)
    add_image(spool, 2, 3000)
    spool.settle(ARTIFACTS, sending)
    assert [entry["step"] for entry in spool.waiting(ARTIFACTS)] == [2]


def test_disk_that_takes_no_files_leaves_entries_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    spool = Spool.create(tmp_path / "file" / "run", 10_000)
    spool.add(RECORDS, metrics(1))
    assert spool.waiting(RECORDS) == [metrics(1)]
    assert spool.unsafe == 1
    with pytest.raises(OSError, match="cannot be written"):
        fill(spool, lambda path: None)
    spool.close()
