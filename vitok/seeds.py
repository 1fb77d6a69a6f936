"""Random numbers that depend on what they are for, never on what was drawn before them."""

import hashlib

import torch


def keyed_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that follows from its key alone: a seed, a step, a sample.

    Packing, the number of workers and a resume change nothing in what it gives.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator(device)
    return generator.manual_seed(int.from_bytes(digest[:8], "little"))
