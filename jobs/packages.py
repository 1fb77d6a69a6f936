"""The working tree as one archive that a job's workers unpack: what git tracks, as it is now."""

import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

# The oldest date that a zip file can hold: the same files are the same bytes, uploaded once.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SOURCES = (".py", ".toml", ".yaml", ".json")
_MAX_LISTED = 5


@dataclass(frozen=True)
class Package:
    """An archive of a working tree.

    Attributes:
        path: the zip file.
        files: names in it, from the root of the tree.
        num_bytes: of the zip file.
        left_out: sources that git does not track, and that are not in it.
        revision: the commit, with `+` where the tree has changed since.
    """

    path: Path
    files: tuple[str, ...]
    num_bytes: int
    left_out: tuple[str, ...]
    revision: str


def pack_working_tree(root: Path, target: Path, max_bytes: int) -> Package:
    """Write what git tracks of a working tree, with the changes that are not committed yet.

    Args:
        max_bytes: of the archive.

    Raises:
        ValueError: it is larger; the largest files are named.
        FileNotFoundError: `root` is no working tree of git.
    """
    try:
        tracked = _git(root, "ls-files", "-z", "--cached")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{root} is no working tree of git, so there is nothing to pack; run the command in a "
            "clone, or give --no-package to run what the nodes have installed"
        ) from error
    files = [name for name in sorted(set(tracked)) if (root / name).is_file()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            mode = 0o755 if (root / name).stat().st_mode & 0o100 else 0o644
            entry.external_attr = mode << 16
            archive.writestr(entry, (root / name).read_bytes())
    num_bytes = target.stat().st_size
    if num_bytes >= max_bytes:
        largest = sorted(files, key=lambda name: (root / name).stat().st_size, reverse=True)
        listed = ", ".join(
            f"{name} ({(root / name).stat().st_size / 2**20:.1f} MiB)" for name in largest[:3]
        )
        raise ValueError(
            f"the working tree packs to {num_bytes / 2**20:.1f} MiB, Ray takes less than "
            f"{max_bytes / 2**20:.0f} MiB; its largest files are {listed}: keep data in an object "
            "store, not in git"
        )
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    return Package(
        path=target,
        files=tuple(files),
        num_bytes=num_bytes,
        left_out=tuple(name for name in sorted(others) if name.endswith(_SOURCES)),
        revision=_revision(root),
    )


def describe_left_out(package: Package) -> str:
    """Say which sources are not sent; empty where all are."""
    if not package.left_out:
        return ""
    listed = ", ".join(package.left_out[:_MAX_LISTED])
    more = " ..." if len(package.left_out) > _MAX_LISTED else ""
    return f"not sent, as git does not track it: {listed}{more} (git add sends it)"


def _revision(root: Path) -> str:
    try:
        (commit,) = _git(root, "rev-parse", "--short=12", "HEAD")
    except subprocess.CalledProcessError:  # nothing is committed yet
        return "+"
    changed = _git(root, "status", "--porcelain", "-z", "--untracked-files=no")
    return commit.strip() + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> list[str]:
    answer = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return [part for part in answer.stdout.split("\0") if part.strip()]
