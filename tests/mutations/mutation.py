from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A wrong change of one place in the sources.

    Attributes:
        name: what is wrong.
        file: path in the repository.
        source: text that occurs once in the file.
        changed: what takes its place.
        tests: of which at least one fails then, as `FILE::FUNCTION` below tests/.
    """

    name: str
    file: str
    source: str
    changed: str
    tests: tuple[str, ...]
