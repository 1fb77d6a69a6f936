"""What defines a training of an autoencoder, and the data plan that follows from it."""

from dataclasses import replace
from typing import Literal

from pipelines.corpus import Manifest
from pipelines.mixture import Corpus
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.runs import RunConfig, read_run
from vitok.config import config, require_choice
from vitok.losses import LossConfig
from vitok.optim import OptimConfig
from vitok.storage import Folder, absolute_if_local
from vitok.variants import AutoencoderConfig

Freeze = Literal["none", "encoder"]

FRESH_STARTS = ("random", "pca")


@config
class AutoencoderTraining:
    """Everything that defines one training of an autoencoder.

    Attributes:
        model: shape of the autoencoder.
        data: training and held-out images.
        stages: schedule of token budgets; the learning rate follows the whole.
        loss: weights of the loss terms.
        optim: optimizer and learning rate.
        run: how and where it runs.
        start: `random` draws all weights; `pca` also sets the linear layers to a PCA of the
            patches; anything else is where weights of the same architecture are, as
            load_autoencoder takes it: a released model, a repository, a folder, a checkpoint, a
            run. The first worker reads them.
        freeze: `encoder` trains the decoder alone; the encoder's weights, and so its latents, stay
            what they are.
        eval_images: held-out images that an evaluation during training looks at.
        seed: of weights, order, crops and tiles.
    """

    model: AutoencoderConfig
    data: DataConfig
    stages: tuple[Stage, ...]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig
    start: str = "random"
    freeze: Freeze = "none"
    eval_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eval_images < 1:
            raise ValueError(f"eval_images={self.eval_images} must be at least 1")
        require_choice("freeze", self.freeze, Freeze)
        if not self.start:
            raise ValueError("start is empty; give random, pca, or where weights are")
        if self.freeze == "encoder" and self.start == "random":
            raise ValueError(
                "freeze='encoder' would keep an encoder of random weights; set start to where "
                "trained weights are, or to pca"
            )


def located(settings: AutoencoderTraining) -> AutoencoderTraining:
    """Return a config with absolute locations."""
    data, loss, run = settings.data, settings.loss, settings.run
    return replace(
        settings,
        data=replace(
            data,
            manifest=_absolute(data.manifest),
            sources=tuple(
                replace(source, manifest=_absolute(source.manifest)) for source in data.sources
            ),
            eval_manifest=_absolute(data.eval_manifest),
        ),
        loss=replace(
            loss,
            dino_weights=absolute_if_local(loss.dino_weights),
            lpips_weights=absolute_if_local(loss.lpips_weights),
        ),
        run=replace(run, storage=_absolute(run.storage)),
        start=settings.start
        if settings.start in FRESH_STARTS
        else absolute_if_local(settings.start),
    )


def _absolute(location: str) -> str:
    return Folder.of(location).uri if location else ""


def read_settings(folder: Folder) -> AutoencoderTraining:
    """Return the config of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is a run of another kind.
    """
    return read_run(folder, AutoencoderTraining)


def plan_of(settings: AutoencoderTraining) -> Plan:
    """Return the data plan of a training."""
    data = settings.data
    if not data.manifest and not data.sources:
        raise ValueError(
            "data.manifest is empty; make one with `vitok corpus index SHARDS --out FOLDER` and "
            "give it as --data.manifest FOLDER"
        )
    single = Corpus.of(Manifest.load(data.manifest)) if data.manifest else None
    return Plan(
        corpus=single or Corpus.mix(data.sources),
        data=data,
        stages=settings.stages,
        patch_size=settings.model.patch_size,
        seed=settings.seed,
    )
