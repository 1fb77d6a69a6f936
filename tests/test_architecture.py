"""The direction of imports, and what no source file may do; read from the sources themselves."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vitok", "pipelines", "jobs", "cluster")
FORBIDDEN_IMPORTS = {
    "vitok": {"ray", "mlflow", "pipelines", "jobs", "cluster"},
    "pipelines": {"jobs", "cluster"},
}
# Formats that run code when they are read.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}


def sources(package: str) -> dict[str, ast.Module]:
    """Parse every file of a package, by its path."""
    paths = sorted((ROOT / package).rglob("*.py"))
    assert len(paths) >= 2, f"{package} has only {len(paths)} source files"
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            # Of a name that is put together, the beginning must be there to read.
            name = node.args[0]
            yield ast.literal_eval(name.values[0] if isinstance(name, ast.JoinedStr) else name)


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Yield the calls that can run what they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "builtins.eval", "builtins.exec", "torch.load"):
            yield name
        yield from (
            "allow_pickle"
            for keyword in node.keywords
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
        )


def test_processes_that_read_images_never_import_the_compiler() -> None:
    # Ray starts many of them, and it takes seconds.
    code = "import sys, pipelines.ingest; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = found.stdout.split()
    assert "torch" in imported
    assert "torch._dynamo" not in imported


def test_the_package_gives_what_it_promises() -> None:
    import vitok

    for name in vitok.__all__:
        assert getattr(vitok, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'vitok' has no attribute 'nothing'"):
        _ = vitok.nothing


@pytest.mark.parametrize("package", FORBIDDEN_IMPORTS)
def test_imports_point_one_way(package: str) -> None:
    for path, tree in sources(package).items():
        imported = {name.split(".")[0] for name in imported_names(tree)}
        assert not imported & FORBIDDEN_IMPORTS[package], path


def test_the_layers_do_use_each_other():
    """Otherwise the test above could not fail."""

    def imported(package: str) -> set[str]:
        trees = sources(package).values()
        return {name.split(".")[0] for tree in trees for name in imported_names(tree)}

    assert {"torch", "vitok"} <= imported("vitok")
    assert {"ray", "vitok", "pipelines"} <= imported("pipelines")
    assert {"pipelines"} <= imported("jobs")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_reads_a_format_that_runs_code(package: str) -> None:
    for path, tree in sources(package).items():
        names = set(imported_names(tree))
        assert not {name.split(".")[0] for name in names} & UNSAFE_MODULES, path
        assert "torch.load" not in names, path
        assert not list(unsafe_calls(tree)), path


def test_unsafe_calls_are_recognised_and_harmless_ones_are_not():
    unsafe = "eval('1')\nexec('2')\ntorch.load(f)\nnp.load(f, allow_pickle=True)"
    assert list(unsafe_calls(ast.parse(unsafe))) == ["eval", "exec", "torch.load", "allow_pickle"]
    harmless = "model.eval()\njson.load(f)\nnp.load(f, allow_pickle=False)\nself.load(f)"
    assert not list(unsafe_calls(ast.parse(harmless)))
    nested = "def f():\n    from torch import load, nn\n    import pickle as p\n"
    assert list(imported_names(ast.parse(nested))) == ["torch.load", "torch.nn", "pickle"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path, tree in sources(package).items():
        assert (ast.get_docstring(tree) or "").strip().endswith((".", ":", "`", "'")), path


def test_vitok_is_a_library_on_its_own():
    """Nothing that vitok imports is a module of this project outside vitok."""
    own = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert set(PACKAGES) <= own
    for path, tree in sources("vitok").items():
        imported = {name.split(".")[0] for name in imported_names(tree)}
        assert imported & own <= {"vitok"}, path


def files_of_the_architecture() -> Iterator[str]:
    """Yield what docs/architecture.md lists under "Files": paths, and patterns of them."""
    block = (ROOT / "docs" / "architecture.md").read_text().split("## Files")[1].split("```")[1]
    folder = ""
    for line in block.splitlines():
        if not line.startswith(" "):
            folder = line.split(" ")[0]
        yield from (folder + name for name in re.findall(r"[\w*]+\.py", line))


def test_every_source_file_is_where_the_architecture_says_what_it_is_for() -> None:
    files = {path for package in PACKAGES for path in sources(package)}
    files = {path for path in files if not path.endswith("__init__.py")}
    listed = set(files_of_the_architecture())
    assert len(files) > 100
    assert not [path for path in files if not any(fnmatch(path, name) for name in listed)]
    assert not [name for name in listed if not any(fnmatch(path, name) for path in files)]
