"""A joint-scaling study: generators of several sizes on latents of several autoencoders.

    STUDY/latents/AUTOENCODER    the latents of each autoencoder
    STUDY/AUTOENCODER-GENERATOR  a run of each pair
    STUDY/curves.png             the metric of all runs against the operations that they took

Everything continues where it was: what is encoded stays, what is trained is not trained again.
"""

from collections.abc import Iterator
from dataclasses import replace

from pipelines.cache_latents import cache_latents
from pipelines.caching.config import LatentCaching, complete
from pipelines.generation.flow_curves import Curve, curve_of, draw_curves
from pipelines.latents import LatentCache
from pipelines.sweeps.config import parse_point, set_field, trial_name
from pipelines.tracking import tracking_uri
from pipelines.train_flow import FlowTraining, prepare, run_training
from vitok.config import config, parse_config, to_dict
from vitok.storage import Folder, absolute_if_local

CURVES = "curves.png"


@config
class JointScaling:
    """A grid of generators and autoencoders.

    Attributes:
        name: the same name continues the same study; its runs are in the folder of this name, below
            training.run.storage.
        autoencoders: whose latents are generated, as load_autoencoder takes them.
        generators: what differs between generators, each as `FIELD=VALUE FIELD=VALUE` of the
            training, such as `model.depth=12`.
        encoding: how latents are made; model and out are the study's.
        training: of every generator; cache, autoencoder and model.latent_channels are the study's.
        metric: that is drawn, of those that the runs record; lower is better.
        smooth: means over so many neighbouring records.
    """

    name: str
    autoencoders: tuple[str, ...]
    generators: tuple[str, ...]
    encoding: LatentCaching
    training: FlowTraining
    metric: str = "loss"
    smooth: int = 20

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain name: it becomes a folder")
        if not (self.autoencoders and self.generators):
            raise ValueError("autoencoders and generators are lists of at least one each")
        if self.smooth < 1:
            raise ValueError(f"smooth={self.smooth} must be at least 1")

    @property
    def folder(self) -> Folder:
        """The study's folder."""
        return Folder.of(self.training.run.storage, self.name)


def prepare_study(study: JointScaling) -> JointScaling:
    """Check what can be checked before anything starts.

    Returns:
        the study to run, with absolute locations.

    Raises:
        ValueError: the corpus is missing; a generator has a field that is none; two pairs have the
            same name.
    """
    located = tuple(absolute_if_local(autoencoder) for autoencoder in study.autoencoders)
    run = study.training.run
    run = replace(
        run,
        storage=Folder.of(run.storage).uri,
        tracking=replace(run.tracking, uri=tracking_uri(run.tracking, run.storage)),
    )
    study = replace(study, autoencoders=located, training=replace(study.training, run=run))
    for autoencoder in study.autoencoders:
        complete(encoding_of(study, autoencoder))
    names = [pair.run.name for pair in pairs_of(study)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"there is more than one {', '.join(sorted(twice))}; autoencoders are told apart by "
            "the last part of where they lie, generators by what they set"
        )
    return study


def pairs_of(study: JointScaling) -> list[FlowTraining]:
    """Return the trainings of a study, one autoencoder after the other."""
    trainings = []
    for autoencoder in study.autoencoders:
        for point in study.generators:
            values = parse_point(point)
            name = f"{_label(autoencoder)}-{trial_name(values)}"
            fields = to_dict(study.training)
            for field, value in values.items():
                set_field(fields, field, value)
            training = parse_config(FlowTraining, fields, f"generator {point!r}")
            trainings.append(
                replace(
                    training,
                    cache=encoding_of(study, autoencoder).out,
                    autoencoder=autoencoder,
                    run=replace(training.run, name=name, storage=study.folder.uri),
                )
            )
    return trainings


def encoding_of(study: JointScaling, autoencoder: str) -> LatentCaching:
    """Return how the latents of an autoencoder are made."""
    cache = study.folder.child("latents").child(_label(autoencoder))
    return replace(study.encoding, model=autoencoder, out=cache.uri)


def run_study(study: JointScaling) -> Iterator[FlowTraining]:
    """Train what is not trained yet on the connected Ray cluster, pair by pair.

    Args:
        study: as `prepare_study` returned it.

    Yields:
        each training before it begins.

    Raises:
        ValueError, RuntimeError: as for `vitok encode` and `vitok flow`.
    """
    encoded = ""
    for training in pairs_of(study):
        yield training
        if training.cache != encoded:
            cache_latents(encoding_of(study, training.autoencoder))
            encoded = training.cache
        channels = LatentCache(training.cache).identity.channels
        model = replace(training.model, latent_channels=channels)
        run_training(prepare(replace(training, model=model)))


def draw_study(study: JointScaling) -> list[Curve]:
    """Draw what the runs of a finished study recorded into its folder."""
    runs = [training.run.folder for training in pairs_of(study)]
    curves = [curve_of(run, study.metric, study.smooth) for run in runs]
    study.folder.write_bytes(CURVES, draw_curves(curves, study.metric))
    return curves


def _label(autoencoder: str) -> str:
    return autoencoder.rstrip("/").rpartition("/")[2]
