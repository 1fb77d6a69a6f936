"""Mutations of the core arithmetic, each of which a test must catch.

A mutation changes one expression of the sources into one that looks as plausible, and names the
tests that are there to notice. `python -m tests.mutations [NAME...]` makes the changes one by one
in a copy of the sources, runs the named tests there, and fails if a change goes unnoticed.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.mutations.mutation import Mutation
from tests.mutations.of_pipelines import OF_PIPELINES
from tests.mutations.of_vitok import OF_VITOK

ROOT = Path(__file__).parents[2]
MUTATIONS = OF_VITOK + OF_PIPELINES
_COPIED = ("vitok", "pipelines", "jobs", "cluster", "tests")
# Imported once, for all runs.
_LIBRARIES = ("hypothesis", "pytest", "ray.train.torch", "torch", "torch._dynamo")
_PASSED, _FAILED = 0, 1  # exit codes of pytest; all others mean that no test was run to its end


def main(names: list[str]) -> int:
    """Make every mutation, or those named; returns the exit status."""
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    if unknown := set(names) - {mutation.name for mutation in chosen}:
        print(f"there is no mutation {unknown.pop()!r}; tests/mutations/ has their names")
        return 2
    for library in _LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="vitok-mutations-") as folder:
        copy = Path(folder)
        for package in _COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, copy / package, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        tests = {test: None for mutation in chosen for test in mutation.tests}
        # What this run compiles stays valid for all files but the one that is changed.
        status, output = _run(copy, tests, writes_bytecode=True)
        if status != _PASSED:
            print(output)
            print("the tests fail without any mutation; mend them first")
            return 1
        survived = [mutation.name for mutation in chosen if not _is_caught(copy, mutation)]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations caught")
    return 1 if survived else 0


def _is_caught(copy: Path, mutation: Mutation) -> bool:
    """Make a mutation in a copy of the repository, test it, and take it back."""
    path = copy / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.source, mutation.changed))
    start = time.perf_counter()
    status, output = _run(copy, mutation.tests)
    path.write_text(original)
    if status not in (_PASSED, _FAILED):
        raise RuntimeError(f"{mutation.name}: pytest ended with {status}\n{output}")
    verdict = "caught" if status == _FAILED else "SURVIVED"
    print(f"{verdict:8} {time.perf_counter() - start:4.0f} s  {mutation.name}", flush=True)
    return status == _FAILED


def _run(copy: Path, tests: Iterable[str], writes_bytecode: bool = False) -> tuple[int, str]:
    """Run tests of the copy in a process that has the libraries already, and nothing of ours."""
    log = copy / "pytest.log"
    process = multiprocessing.get_context("fork").Process(
        target=_test, args=(copy, list(tests), writes_bytecode, log)
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


def _test(copy: Path, tests: list[str], writes_bytecode: bool, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode = not writes_bytecode
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for processes that tests start
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in _COPIED]:
        del sys.modules[name]
    import pytest

    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    sys.exit(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
