import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

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


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()
