"""Arguments that have no option's name, as `--help` calls them."""

from typing import Annotated

from tyro.conf import Positional, arg

Cache = Annotated[Positional[str], arg(metavar="CACHE")]
Folder = Annotated[Positional[str], arg(metavar="FOLDER")]
Images = Annotated[Positional[list[str]], arg(metavar="IMAGE ...")]
Job = Annotated[Positional[str], arg(metavar="JOB")]
Manifest = Annotated[Positional[str], arg(metavar="MANIFEST")]
Name = Annotated[Positional[str], arg(metavar="NAME")]
Names = Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME ...]")]
Recipe = Annotated[Positional[str], arg(metavar="RECIPE")]
Run = Annotated[Positional[str], arg(metavar="RUN")]
Runs = Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...")]
Shards = Annotated[Positional[list[str]], arg(metavar="SHARDS ...")]
Source = Annotated[Positional[str], arg(metavar="SOURCE")]
