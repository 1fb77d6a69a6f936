"""The configs that command lines ask for: a recipe's, with the overrides that they give."""

from collections.abc import Callable, Sequence
from typing import Any

import tyro

from jobs.command_lines import read_recipe


def training(arguments: Sequence[str]) -> Any:
    """Return the config of an autoencoder's training."""
    from jobs.recipes import TRAINING

    return read_recipe(TRAINING, arguments, "train")


def encoding(arguments: Sequence[str]) -> Any:
    """Return the config of an encoding; it may lack what only a run needs."""
    from jobs.encoding import ENCODING

    return read_recipe(ENCODING, arguments, "encode")


def caching(arguments: Sequence[str]) -> Any:
    """Return the config of an encoding, complete."""
    from pipelines.caching.config import complete

    return complete(encoding(arguments))


def evaluation(arguments: Sequence[str]) -> Any:
    """Return the config of an evaluation."""
    from jobs.evaluations import EVALUATIONS

    return read_recipe(EVALUATIONS, arguments, "evaluate")


def flow(arguments: Sequence[str]) -> Any:
    """Return the config of a generator's training."""
    from jobs.flow_recipes import FLOWS

    return read_recipe(FLOWS, arguments, "flow")


def joint(arguments: Sequence[str]) -> Any:
    """Return the config of a joint-scaling study."""
    from jobs.flow_recipes import JOINTS

    return read_recipe(JOINTS, arguments, "joint")


def generation(arguments: Sequence[str]) -> Any:
    """Return the config of a set of samples."""
    from pipelines.generation.generate import Generation

    return tyro.cli(
        Generation,
        args=arguments,
        prog="vitok generate",
        description="Sample many images as WebDataset shards on Ray; go on where it was stopped.",
    )


def sweep(arguments: Sequence[str]) -> Any:
    """Return the config of a sweep."""
    from jobs.sweep_recipes import SWEEPS

    return read_recipe(SWEEPS, arguments, "sweep")


# What `vitok submit` takes: the config that a command line asks for.
SUBMITTED: dict[str, Callable[[Sequence[str]], Any]] = {
    "train": training,
    "flow": flow,
    "joint": joint,
    "generate": generation,
    "sweep": sweep,
    "encode": encoding,
    "evaluate": evaluation,
}
