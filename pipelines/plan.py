"""The plan of every step of a training, a pure function of corpus, schedule and seed.

The stream of samples (pipelines.order) is cut into steps; a step's samples are shuffled, cropped
and packed by keys. Nothing is walked through and nothing is stored: any step is found at once, on
any machine, with the same result.
"""

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from math import ceil, floor, log, sqrt
from statistics import fmean

import numpy as np

from pipelines.corpus import SampleRecords
from pipelines.mixture import Source
from pipelines.order import hash_of, uniform
from pipelines.packing import pack_best_fit, pack_evenly
from pipelines.views import Samples, SampleView
from vitok.config import config
from vitok.patches import fit_to_budget

_PURPOSE_SHUFFLE, _PURPOSE_VIEW = 2, 3
# A stage's first steps, with so many images but no more steps than that, shape all of its steps.
_SAMPLED_IMAGES, _SAMPLED_STEPS = 16_384, 64
_SPARE_SLOTS = 1.25  # a row has so many more image slots than images of mean size fill
_SPARE_ROWS = 2  # rows that the packing may need above what the tokens would fill
_SHRINK = 0.995  # budgets of a step that overflows its rows are lowered at least by this


@config
class DataConfig:
    """Which images are used, and how they are cropped.

    Attributes:
        manifest: folder that `vitok corpus index` wrote: the training images.
        sources: several of them with weights, instead of one.
        eval_manifest: the same for held-out images; empty for none.
        row_tokens: tokens of a packed row, the unit of one forward pass.
        crop_area: smallest share of an image's area that a random crop keeps; 1 keeps it whole.
        crop_aspect: a crop's aspect ratio is the image's, changed by at most this factor.
        square: crops are square instead, with crop_area of the largest square, and enlarged where
            they are smaller than their budget: with 256 tokens of 16 pixels all are 256 x 256.
        chunk_samples: neighbouring samples that stay together when an epoch is shuffled, so that
            they are read in one request.
        max_unreadable: a run stops once more than this fraction of its samples was unreadable.
    """

    manifest: str = ""
    sources: tuple[Source, ...] = ()
    eval_manifest: str = ""
    row_tokens: int = 8192
    crop_area: float = 0.5
    crop_aspect: float = 1.2
    square: bool = False
    chunk_samples: int = 16
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        if self.manifest and self.sources:
            raise ValueError(
                f"manifest={self.manifest!r} and sources are both given; leave one of them out"
            )
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area={self.crop_area} must be above 0 and at most 1")
        if self.crop_aspect < 1:
            raise ValueError(f"crop_aspect={self.crop_aspect} must be at least 1")
        if self.chunk_samples < 1:
            raise ValueError(f"chunk_samples={self.chunk_samples} must be at least 1")


@config
class Stage:
    """A part of the schedule with one distribution of token budgets.

    Attributes:
        steps: optimizer steps.
        images_per_step: images of a global step, over all workers.
        token_budgets: every image draws one of these, with equal chances, as its most tokens.
        rows_per_step: packed rows of a global step; 0 takes what the first steps need. A step
            whose images need more lowers its budgets a little.
    """

    steps: int
    images_per_step: int
    token_budgets: tuple[int, ...] = (256,)
    rows_per_step: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.images_per_step < 1:
            raise ValueError(
                f"steps={self.steps} and images_per_step={self.images_per_step} must be at least 1"
            )
        if self.rows_per_step < 0:
            raise ValueError(f"rows_per_step={self.rows_per_step} must be positive, or 0")
        if not self.token_budgets or min(self.token_budgets) < 1:
            raise ValueError(f"token_budgets={self.token_budgets} must be positive numbers")


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The packed rows of every global step of a stage: how many, and with how many image slots."""

    num_rows: int
    max_images: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The packed rows of one global step, before any pixel is read.

    Attributes:
        rows: samples of each row, in the order in which they lie in it.
        records: where the samples lie in the shards, by sample_id.
    """

    rows: list[list[SampleView]]
    records: SampleRecords


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole of a training's data, step by step.

    Raises:
        ValueError: a budget is larger than a row.
    """

    corpus: Samples
    data: DataConfig
    stages: tuple[Stage, ...]
    patch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty; a training needs at least one")
        for stage in self.stages:
            if max(stage.token_budgets) > self.data.row_tokens:
                raise ValueError(
                    f"token_budgets={stage.token_budgets} exceed row_tokens={self.data.row_tokens}"
                )

    @property
    def row_bytes(self) -> int:
        """Bytes of the tokens of a packed row."""
        values, dtype = self.corpus.token_format(self.patch_size)
        return values * dtype.itemsize * self.data.row_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_index(self, step: int) -> int:
        """Return which stage a step belongs to."""
        end = 0
        for index, stage in enumerate(self.stages):
            end += stage.steps
            if step < end:
                return index
        raise ValueError(f"the plan has {self.num_steps} steps, there is no step {step} after them")

    def stage_of(self, step: int) -> Stage:
        """Return the stage that a step belongs to."""
        return self.stages[self.stage_index(step)]

    def images_before(self, step: int) -> int:
        """Return the samples that all steps before this one use: the step's place in the stream."""
        images = 0
        for stage in self.stages:
            images += min(step, stage.steps) * stage.images_per_step
            step = max(0, step - stage.steps)
        return images

    def cursor(self, step: int) -> dict[str, int]:
        """Return where the stream stands before a step: its number, and the images before it."""
        return {"step": step, "images": self.images_before(step)}

    @cached_property
    def row_shapes(self) -> tuple[RowShape, ...]:
        """Shape of a global step, for each stage: what its first steps need on average.

        Independent of the number of workers, and the same whenever and wherever it is asked for.
        """
        return tuple(self._row_shape(index) for index in range(len(self.stages)))

    def _row_shape(self, index: int) -> RowShape:
        stage = self.stages[index]
        first = sum(other.steps for other in self.stages[:index])
        num_steps = min(stage.steps, _SAMPLED_STEPS, ceil(_SAMPLED_IMAGES / stage.images_per_step))
        sampled = [self._samples(step, stage) for step in range(first, first + num_steps)]
        tokens = [self._num_tokens(self._views(samples, 1.0)) for samples in sampled]
        mean_image = sum(tokens) / (len(sampled) * stage.images_per_step)

        def shape(num_rows: int) -> RowShape:
            # A row that has room for every image shrunk to a token must also have slots for them.
            max_images = max(
                ceil(_SPARE_SLOTS * self.data.row_tokens / mean_image),
                ceil(stage.images_per_step / num_rows),
            )
            return RowShape(num_rows=num_rows, max_images=max_images)

        if stage.rows_per_step:
            return shape(stage.rows_per_step)
        if not self.corpus.resizes:
            # Nothing can shrink: room for the largest step, so that rows of most are filled evenly.
            return shape(max(len(self._fit(samples, shape(1))) for samples in sampled))

        def waste(num_rows: int) -> float:
            """Return the tokens of a step left empty, and those lost to lower budgets."""
            rows = [row for samples in sampled for row in self._fit(samples, shape(num_rows))]
            packed = sum(map(self._num_tokens, rows)) / len(sampled)
            return (num_rows * self.data.row_tokens - packed) + (fmean(tokens) - packed)

        # Room for the largest step would be padding in all others, so that some shrink a little.
        # Below the first of these the images would not fit at one token each.
        fewest = max(
            ceil(stage.images_per_step / self.data.row_tokens),
            floor(fmean(tokens) / self.data.row_tokens),
        )
        most = ceil(max(tokens) / self.data.row_tokens) + _SPARE_ROWS
        return shape(min(range(fewest, most + 1), key=waste))

    def _num_tokens(self, views: Iterable[SampleView]) -> int:
        return sum(view.num_tokens(self.patch_size) for view in views)

    def _pack(self, lengths: list[int], shape: RowShape) -> list[list[int]] | None:
        """Pack a step into the rows of its stage, evenly if that fits; None if nothing does.

        What cannot be resized takes more rows then.
        """
        limits = {"row_tokens": self.data.row_tokens, "max_images": shape.max_images}
        rows = pack_evenly(lengths, num_rows=shape.num_rows, **limits)
        if rows is None:
            rows = pack_best_fit(lengths, **limits)
            rows += [[] for _ in range(shape.num_rows - len(rows))]
        return rows if len(rows) == shape.num_rows or not self.corpus.resizes else None

    def step(self, step: int) -> StepPlan:
        """Plan one global step: as many rows as its stage has, all with much the same to do."""
        index = self.stage_index(step)
        stage, shape = self.stages[index], self.row_shapes[index]
        # What fits once every image has shrunk to a single token.
        if shape.num_rows * self.data.row_tokens < stage.images_per_step:
            raise ValueError(
                f"rows_per_step={shape.num_rows} has no room for images_per_step="
                f"{stage.images_per_step}; raise it, or set it to 0"
            )
        samples = self._samples(step, stage)
        return StepPlan(self._fit(samples, shape), samples.records)

    def _fit(self, samples: "_Samples", shape: RowShape) -> list[list[SampleView]]:
        """Pack the samples of a step into its rows, with budgets as low as that takes."""
        shrink = 1.0
        while True:
            views = self._views(samples, shrink)
            rows = self._pack([view.num_tokens(self.patch_size) for view in views], shape)
            if rows is not None:
                return [[views[i] for i in row] for row in rows]
            total = self._num_tokens(views)
            shrink *= min(_SHRINK, shape.num_rows * self.data.row_tokens / total)

    def _samples(self, step: int, stage: Stage) -> "_Samples":
        """Return the samples of a step, shuffled, with the crop and the budget of each."""
        epochs, sample_ids = self.corpus.order(
            self.images_before(step),
            stage.images_per_step,
            chunk_samples=self.data.chunk_samples,
            seed=self.seed,
        )
        shuffle = np.argsort(hash_of(self.seed, _PURPOSE_SHUFFLE, step, epochs, sample_ids))
        epochs, sample_ids = epochs[shuffle], sample_ids[shuffle]
        records = self.corpus.records(sample_ids)
        draws = [
            uniform(hash_of(self.seed, _PURPOSE_VIEW, epochs, sample_ids, draw))
            for draw in range(7)
        ]
        return _Samples(
            records=records,
            epochs=epochs.tolist(),
            crops=[
                _random_crop(height, width, self.data, [float(draw[i]) for draw in draws[:4]])
                if self.corpus.resizes
                else (0, 0, height, width)
                for i, (height, width) in enumerate(
                    zip(records.height.tolist(), records.width.tolist(), strict=True)
                )
            ],
            budgets=[stage.token_budgets[int(d * len(stage.token_budgets))] for d in draws[4]],
            tile_positions=list(zip(draws[5].tolist(), draws[6].tolist(), strict=True)),
        )

    def _views(self, samples: "_Samples", shrink: float) -> list[SampleView]:
        return [
            SampleView(
                sample_id=sample_id,
                epoch=epoch,
                crop=crop,
                size=self._size(crop[2:], max(1, int(budget * shrink))),
                tile_position=tile_position,
            )
            for sample_id, epoch, crop, budget, tile_position in zip(
                samples.records.sample_id.tolist(),
                samples.epochs,
                samples.crops,
                samples.budgets,
                samples.tile_positions,
                strict=True,
            )
        ]

    def _size(self, size: tuple[int, int], token_budget: int) -> tuple[int, int]:
        if not self.corpus.resizes:
            return size
        return fit_to_budget(
            *size,
            patch_size=self.patch_size,
            token_budget=token_budget,
            enlarge=self.data.square,
        )


@dataclasses.dataclass(frozen=True)
class _Samples:
    """The samples of a step before they are packed: lists of one length."""

    records: SampleRecords
    epochs: list[int]
    crops: list[tuple[int, int, int, int]]
    budgets: list[int]
    tile_positions: list[tuple[float, float]]


def _random_crop(
    height: int, width: int, data: DataConfig, draws: list[float]
) -> tuple[int, int, int, int]:
    area = data.crop_area + (1 - data.crop_area) * draws[0]
    if data.square:
        crop_height = crop_width = max(1, round(min(height, width) * sqrt(area)))
    else:
        # Stretched further, a crop of this area would reach over the image.
        most = min(log(data.crop_aspect), -log(area))
        stretch = np.exp((2 * draws[1] - 1) * most)
        crop_height = min(height, max(1, round(height * sqrt(area * stretch))))
        crop_width = min(width, max(1, round(width * sqrt(area / stretch))))
    top = int(draws[2] * (height - crop_height + 1))
    left = int(draws[3] * (width - crop_width + 1))
    return top, left, crop_height, crop_width
