import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from jobs.packages import describe_left_out, pack_working_tree


def git(tree: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a module, a script, ignored data and a module that nobody added."""
    tree = tmp_path / "tree"
    (tree / "package").mkdir(parents=True)
    (tree / "package" / "module.py").write_text("answer = 42\n")
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o755)
    (tree / ".gitignore").write_text("data/\n")
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "all")
    (tree / "data").mkdir()
    (tree / "data" / "large.bin").write_bytes(bytes(1000))
    (tree / "package" / "forgotten.py").write_text("")
    return tree


def test_a_package_is_what_git_tracks_as_it_is_now(tree: Path, tmp_path: Path) -> None:
    (tree / "package" / "module.py").write_text("answer = 43\n")
    package = pack_working_tree(tree, tmp_path / "a.zip", max_bytes=2**20)
    assert package.files == (".gitignore", "package/module.py", "run.sh")
    assert package.revision.endswith("+"), "changed since the commit"
    assert package.left_out == ("package/forgotten.py",)
    assert "package/forgotten.py" in describe_left_out(package)
    with zipfile.ZipFile(package.path) as archive:
        assert archive.read("package/module.py") == b"answer = 43\n"
        assert archive.getinfo("run.sh").external_attr >> 16 & 0o111


def test_the_same_files_are_the_same_bytes_whenever_they_were_written(
    tree: Path, tmp_path: Path
) -> None:
    """Ray names a package by its bytes, and uploads it once."""

    def digest(name: str) -> str:
        package = pack_working_tree(tree, tmp_path / name, max_bytes=2**20)
        return hashlib.sha256(package.path.read_bytes()).hexdigest()

    first = digest("a.zip")
    os.utime(tree / "run.sh", (10**9, 10**9))
    assert digest("b.zip") == first
    (tree / "run.sh").write_text("#!/bin/sh -e\n")
    assert digest("c.zip") != first


def test_a_deleted_file_is_left_out_and_a_clean_tree_has_the_name_of_its_commit(
    tree: Path, tmp_path: Path
) -> None:
    package = pack_working_tree(tree, tmp_path / "a.zip", max_bytes=2**20)
    assert len(package.revision) == 12
    (tree / "run.sh").unlink()
    assert "run.sh" not in pack_working_tree(tree, tmp_path / "b.zip", max_bytes=2**20).files


def test_a_tree_that_is_too_large_is_refused_with_its_largest_files(
    tree: Path, tmp_path: Path
) -> None:
    (tree / "weights.bin").write_bytes(os.urandom(3 * 2**20))
    git(tree, "add", "weights.bin")
    with pytest.raises(ValueError, match=r"packs to 3\.0 MiB.*less than 2 MiB.*weights\.bin"):
        pack_working_tree(tree, tmp_path / "a.zip", max_bytes=2 * 2**20)


def test_a_folder_without_git_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--no-package"):
        pack_working_tree(tmp_path, tmp_path / "a.zip", max_bytes=2**20)
