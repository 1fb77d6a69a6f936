import re
import socket
from pathlib import Path

import pytest

from cluster import local
from cluster.stack import CLUSTER_COMMANDS
from jobs.bench import BENCHMARKS
from jobs.cli import COMMANDS
from jobs.corpus import CORPUS_COMMANDS
from jobs.evaluations import EVALUATIONS
from jobs.latents import LATENT_COMMANDS
from jobs.recipes import TRAINING
from jobs.remote import JOBS_COMMANDS
from tests.jobs.command_line import complaint


def test_unknown_command_and_recipe_name_the_nearest(vitok) -> None:
    assert complaint(vitok("trian", "quickstart"), 2) == (
        "there is no command 'trian'; did you mean 'train'?"
    )
    assert complaint(vitok("train", "quickstrat"), 2) == (
        "there is no recipe 'quickstrat'; did you mean 'quickstart'?"
    )
    assert complaint(vitok("corpus", "indx"), 2) == (
        "there is no corpus command 'indx'; did you mean 'index'?"
    )
    sentence = complaint(vitok("zzz"), 2)
    assert all(name in sentence for name in COMMANDS), "nothing is near: all are listed"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "quickstart", "--optim.lrr", "3"], ["--optim.lrr", "--optim.lr"]),
        (["train", "quickstart", "--optim.lr", "much"], ["--optim.lr", "'much'"]),
        (["train", "quickstart", "--optim.lr", "-1"], ["lr=-1.0", "must be positive"]),
        (["train", "quickstart", "--freeze", "magic"], ["--freeze", "none", "encoder"]),
        (["export", "run", "folder", "--averaged"], ["--averaged", "--average"]),
        (["evaluate", "quickstart", "--subject", "m"], ["--subject", "--subjects"]),
        (["encode", "quickstart", "--modle", "m"], ["--modle", "--model"]),
        (["quickstart", "--frehs"], ["--frehs", "--fresh"]),
        (["corpus", "build", "a", "b", "--shard-mbs", "1"], ["--shard-mbs", "--shard-mb"]),
        (["corpus", "index", "a.tar", "--out", "m", "--max-bad-shards", "few"], ["'few'"]),
        (["corpus", "check", "m", "--decoded"], ["--decoded", "--decode"]),
    ],
)
def test_wrong_field_is_named(vitok, arguments: list[str], named: list[str]) -> None:
    outcome = vitok(*arguments)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    for name in named:
        assert name in outcome.err


HELPS = [
    *([name] for name in ("quickstart", "reconstruct", "models", "ui")),
    *([name] for name in ("sample", "generate", "judge", "curves")),
    ["flow", "flow-quickstart"],
    ["joint", "quickstart"],
    ["export"],
    # The other recipes have the same fields.
    *(["train", name] for name in ("quickstart", "finetune-350m-f16x64-decoder")),
    *(["evaluate", name] for name in EVALUATIONS),
    ["sweep", "quickstart"],
    ["sweep", "report"],
    *(["corpus", name] for name in CORPUS_COMMANDS),
    ["encode", "quickstart"],
    *(["latents", name] for name in LATENT_COMMANDS),
    ["submit"],
    ["doctor"],
    *(["jobs", name] for name in JOBS_COMMANDS),
    *(["cluster", name] for name in CLUSTER_COMMANDS),
    *(["bench", name] for name in BENCHMARKS),
]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_explains_every_field(vitok, command: list[str]) -> None:
    outcome = vitok(*command, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"usage: vitok {' '.join(command)}")
    text = re.sub(r"[─│╭╮╰╯]", " ", outcome.out)
    fields = re.split(r"\n\s+(?=-{1,2}[a-z])", text)[1:]
    assert len(fields) >= 1
    for field in fields:
        field = " ".join(field.split())
        explained = re.fullmatch(
            r"(-h, )?--\S+( --no-\S+)? ?"
            r"((\[?[A-Z]+( \[[A-Z]+ \.\.\.\]\])?|\{\S+\}) ?)*(?P<help>.*)",
            field,
        )
        assert explained, field
        assert len(explained["help"].partition("(default")[0]) > 8, f"not explained: {field}"
        assert field.startswith("-h") or re.search(
            r"\((default: .*|required|repeatable)\)", field
        ), field


def test_help_covers_every_command() -> None:
    assert {command[0] for command in HELPS} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(vitok, command: str) -> None:
    outcome = vitok(command, "--help")
    assert outcome.status == 0
    assert f"usage: vitok {command}" in outcome.out


def test_overview_lists_every_command(vitok) -> None:
    asked, empty = vitok("--help"), vitok()
    assert (asked.status, empty.status) == (0, 2)
    assert asked.out == empty.out
    assert all(re.search(rf"^  {name}\b", asked.out, re.MULTILINE) for name in COMMANDS)
    recipes = vitok("train")
    assert recipes.status == 2
    for name in TRAINING:
        assert re.search(rf"^  {name} +\S.*\.$", recipes.out, re.MULTILINE), name
    assert max(map(len, recipes.out.splitlines())) <= 110


def test_busy_port_and_folder_without_runs_are_named(
    vitok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = complaint(vitok("ui", "--storage", tmp_path / "nowhere"))
    assert sentence.startswith(f"{tmp_path}/nowhere holds no mlflow.db; give the folder of the")
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        sentence = complaint(vitok("ui", "--storage", tmp_path, "--port", port))
        assert sentence == f"port {port} is taken; choose another with --port"

    served: list[tuple[str, int]] = []
    # It shows the runs of this machine, whatever server new runs go to.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    monkeypatch.setattr(local, "serve_mlflow", lambda uri, port: served.append((uri, port)))
    assert vitok("ui", "--storage", tmp_path, "--port", port).status == 0
    assert served == [(f"sqlite:///{tmp_path}/mlflow.db", port)]


def test_interrupted_command_says_how_to_go_on(vitok, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "train", interrupted)
    assert "what is finished is kept" in complaint(vitok("train"), status=130)
