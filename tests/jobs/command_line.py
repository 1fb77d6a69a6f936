import io
import tarfile
from pathlib import Path
from typing import NamedTuple

EVALUATE = ["evaluate", "quickstart", "--subjects"]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def complaint(outcome: Outcome, status: int = 1) -> str:
    """Check that a command failed with one sentence, and return it."""
    assert outcome.status == status
    assert "Traceback" not in outcome.out + outcome.err
    progress = ("build:", "index:", "check:", "evaluate:", "\r")
    lines = [line for line in outcome.err.splitlines() if line and not line.startswith(progress)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("vitok: ")
    return lines[0].removeprefix("vitok: ")


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
