"""How command lines are read: recipes with overrides, families of commands, wrong names."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import tyro


class UsageError(ValueError):
    """A command line that names something that does not exist."""


def read_recipe(
    recipes: dict[str, Callable[[], Any]], arguments: Sequence[str], command: str
) -> Any:
    """Return a recipe's config with the overrides of the command line."""
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: vitok {command} RECIPE [--field value ...]\n\nrecipes:")
        width = max(map(len, recipes))
        family = ""
        for name, recipe in recipes.items():
            if family != (family := name.partition("-")[0]):
                print()
            print(f"  {name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}")
        print(f"\nvitok {command} RECIPE --help shows every field.")
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    recipe = lookup(recipes, arguments[0], "recipe")
    default = recipe()
    return tyro.cli(
        type(default),
        default=default,
        args=arguments[1:],
        prog=f"vitok {command} {arguments[0]}",
        description=inspect.getdoc(recipe),
    )


def sub_command(
    command: str, functions: dict[str, Callable[..., None]], arguments: Sequence[str]
) -> None:
    """Run one of a family of functions by its name; the rest of the command line is its own."""
    summaries = {name: (f.__doc__ or "").splitlines()[0] for name, f in functions.items()}
    name, rest = choose(command, summaries, arguments)
    tyro.cli(functions[name], args=rest, prog=f"vitok {command} {name}")


def choose(
    command: str, summaries: dict[str, str], arguments: Sequence[str]
) -> tuple[str, list[str]]:
    """Return which of a family of commands is meant, and its own arguments; lists them if asked.

    Raises:
        UsageError: there is none of the name; says which is near.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: vitok {command} NAME [ARGUMENTS]\n")
        for name, summary in summaries.items():
            print(f"  {name:<12} {summary}")
        raise SystemExit(0 if arguments else 2)
    name, *rest = arguments
    lookup(summaries, name, f"{command} command")
    return name, rest


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """Return what a table has under a name.

    Raises:
        UsageError: there is no such name; says which is near.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(table)}"
    raise UsageError(f"there is no {kind} {name!r}; {hint}")
