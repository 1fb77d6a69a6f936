from pathlib import Path

import pytest

from jobs.cli import main
from tests.jobs.command_line import Outcome


@pytest.fixture
def vitok(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command line in this process, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # how tyro ends after --help and after a wrong field
            status = leaving.code
        return Outcome(status, *capsys.readouterr())

    return run
