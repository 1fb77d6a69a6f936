"""Frozen networks of the transformers library, loaded from what is already on this machine."""

import logging
from pathlib import Path

from torch import nn

_MAX_LISTED = 5


def load_network(
    kind: str, weights: str, *, what: str, remedy: str, is_part: bool = False
) -> nn.Module:
    """Load a network from a folder or a Hugging Face repository; downloads nothing.

    Args:
        kind: name of its class in transformers.
        what: what it is, for the messages.
        remedy: what the user does where it is missing or damaged, for the messages.
        is_part: the weights may be of a larger network, whose other parts are not loaded.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are of another network, or not whole.
    """
    hush_torchao()
    import transformers
    from transformers.utils import logging as transformers_logging

    # The screen belongs to the caller.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        network, report = getattr(transformers, kind).from_pretrained(
            weights,
            local_files_only=is_repository(weights),
            ignore_mismatched_sizes=True,  # or it raises before the report
            output_loading_info=True,
        )
    except OSError as error:
        raise FileNotFoundError(f"no {what} weights at {weights!r}; {remedy}") from error
    complaints = {
        "missing": report["missing_keys"],
        "of another shape": [name for name, *_ in report["mismatched_keys"]],
        "not expected": [] if is_part else report["unexpected_keys"],
    }
    # transformers draws at random what it does not find.
    wrong = [f"{name} {said}" for said, names in complaints.items() for name in sorted(names)]
    if wrong:
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        raise ValueError(
            f"{weights} does not hold a whole {what}: {'; '.join(wrong[:_MAX_LISTED])}{more}; "
            f"{remedy}"
        )
    return network.eval().requires_grad_(False)


def hush_torchao() -> None:
    """Keep torchao, which diffusers and transformers bring, from listing what it cannot load."""
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def is_repository(weights: str) -> bool:
    """Whether a location of weights is no folder: then it is looked for in Hugging Face's cache."""
    return not Path(weights).is_dir()
