import io
import json
import pickle
from collections import Counter
from dataclasses import replace
from math import ceil, log
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import Manifest, build_manifest, write_shards
from pipelines.mixture import Corpus
from pipelines.packing import pack_best_fit, pack_evenly
from pipelines.plan import (
    DataConfig,
    Plan,
    SampleView,
    Stage,
    StepPlan,
)
from tests.pipelines.plain_order import plain_epoch, plain_hash
from vitok.patches import fit_to_budget, grid_size

PATCH = 8
NUM_SAMPLES = 43


def jpeg(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    sizes = [(3, 400), (300, 2), (1, 1)]
    sizes += [tuple(generator.integers(20, 130, 2)) for _ in range(NUM_SAMPLES - 3)]
    samples = [{"__key__": f"{i:03d}", "jpg": jpeg(*size)} for i, size in enumerate(sizes)]
    folder = tmp_path_factory.mktemp("plan") / "shards"
    write_shards(samples, folder, "train", samples_per_shard=16)
    return folder


@pytest.fixture(scope="module")
def manifest(shards: Path) -> Manifest:
    manifest = build_manifest([str(shards)], shards.parent / "manifest")
    assert manifest.num_samples == NUM_SAMPLES
    return manifest


DATA = DataConfig(manifest="unread", row_tokens=128, chunk_samples=4)
STAGE = Stage(steps=20, images_per_step=15, token_budgets=(16, 32, 64))


def make_plan(manifest: Manifest, *stages: Stage, data: DataConfig = DATA, seed: int = 5) -> Plan:
    return Plan(
        corpus=Corpus.of(manifest),
        data=data,
        stages=stages or (STAGE,),
        patch_size=PATCH,
        seed=seed,
    )


def sizes_of(step: StepPlan) -> dict[int, tuple[int, int]]:
    """Give (height, width) of the images of a step."""
    columns = (step.records.sample_id, step.records.height, step.records.width)
    return {int(i): (int(h), int(w)) for i, h, w in zip(*columns, strict=True)}


def views_of(step: StepPlan) -> list[SampleView]:
    return [view for row in step.rows for view in row]


def stream_of(start: int, count: int, seed: int) -> list[tuple[int, int]]:
    """List (epoch, sample) at places of the stream, from epochs written out."""
    places = [divmod(place, NUM_SAMPLES) for place in range(start, start + count)]
    orders = {
        epoch: plain_epoch(NUM_SAMPLES, DATA.chunk_samples, seed, 0, epoch) for epoch, _ in places
    }
    return [(epoch, orders[epoch][place]) for epoch, place in places]


def plain(step: StepPlan) -> tuple:
    """A step as values that compare."""
    records = {name: list(column) for name, column in vars(step.records).items()}
    return step.rows, records


def test_steps_use_every_sample_once_an_epoch_and_continue_over_stages(manifest: Manifest) -> None:
    stages = (
        Stage(steps=7, images_per_step=11, token_budgets=(16,)),
        Stage(steps=5, images_per_step=19, token_budgets=(8, 64)),
    )
    plan = make_plan(manifest, *stages)
    used: list[list[tuple[int, int]]] = [
        [(view.epoch, view.sample_id) for view in views_of(plan.step(step))] for step in range(12)
    ]
    assert [len(images) for images in used] == [11] * 7 + [19] * 5
    assert plan.num_steps == 12

    place = 0
    for step, images in enumerate(used):
        stream = stream_of(place, len(images), seed=5)
        assert sorted(images) == sorted(stream)
        assert plan.images_before(step) == place
        place += len(images)
    counts = Counter(image for images in used for image in images)
    assert place == 172 == 4 * NUM_SAMPLES
    assert counts == {(epoch, i): 1 for epoch in range(4) for i in range(NUM_SAMPLES)}


def test_a_step_is_shuffled_cropped_and_packed_by_keys(manifest: Manifest) -> None:
    plan, seed = make_plan(manifest), 5
    for step in (0, 2, 19):
        planned = plan.step(step)
        place = step * STAGE.images_per_step
        stream = stream_of(place, STAGE.images_per_step, seed)
        shuffled = sorted(stream, key=lambda image: plain_hash(seed, 2, step, *image))
        assert shuffled != stream
        by_use = {(view.epoch, view.sample_id): view for view in views_of(planned)}
        lengths = [by_use[use].num_tokens(PATCH) for use in shuffled]
        shape = plan.row_shapes[0]
        limits = {"row_tokens": DATA.row_tokens, "max_images": shape.max_images}
        rows = pack_evenly(lengths, num_rows=shape.num_rows, **limits)
        rows = rows or pack_best_fit(lengths, **limits)
        uses = [[(view.epoch, view.sample_id) for view in row] for row in planned.rows if row]
        assert uses == [[shuffled[i] for i in row] for row in rows]
        for use, view in by_use.items():
            draws = [(plain_hash(seed, 3, *use, draw) >> 11) / 2**53 for draw in range(7)]
            assert view.tile_position == (draws[5], draws[6])
            height, width = sizes_of(planned)[view.sample_id]
            top, left, crop_height, crop_width = view.crop
            assert top == int(draws[2] * (height - crop_height + 1))
            assert left == int(draws[3] * (width - crop_width + 1))
            if min(crop_height, crop_width) >= 10:
                # Area and aspect are drawn evenly, up to the rounding of the sides.
                area = 0.5 + 0.5 * draws[0]
                rounding = 0.51 * (crop_height + crop_width)
                assert abs(crop_height * crop_width - area * height * width) <= rounding
                stretch = (2 * draws[1] - 1) * min(log(1.2), -log(area))
                change = log(crop_height / crop_width) - log(height / width)
                assert abs(change - stretch) <= 0.51 / crop_height + 0.51 / crop_width
            assert view.size == fit_to_budget(
                *view.crop[2:],
                patch_size=PATCH,
                token_budget=STAGE.token_budgets[int(draws[4] * 3)],
            )
        assert planned.records.sample_id.tolist() == [sample_id for _, sample_id in shuffled]


def test_a_step_does_not_depend_on_what_was_asked_before(manifest: Manifest) -> None:
    stages = (STAGE, Stage(steps=4, images_per_step=9, token_budgets=(100,)))
    plan = make_plan(manifest, *stages)
    forwards = [plain(plan.step(step)) for step in range(24)]
    other = make_plan(manifest, *stages)
    backwards = [plain(other.step(step)) for step in reversed(range(24))]
    assert backwards[::-1] == forwards
    for step in (3, 22):
        assert plain(make_plan(manifest, *stages).step(step)) == forwards[step]
        assert plain(pickle.loads(pickle.dumps(plan)).step(step)) == forwards[step]
        fresh = pickle.loads(pickle.dumps(make_plan(manifest, *stages)))
        assert plain(fresh.step(step)) == forwards[step]


def test_a_plan_depends_on_the_seed_and_not_on_the_place_of_the_manifest(
    manifest: Manifest, shards: Path, tmp_path: Path
) -> None:
    moved = build_manifest([str(shards)], tmp_path / "elsewhere")
    plan = make_plan(manifest)
    assert plain(make_plan(moved).step(3)) == plain(plan.step(3))
    assert plain(make_plan(manifest, seed=6).step(3)) != plain(plan.step(3))


def test_a_view_depends_on_sample_and_epoch_and_not_on_the_step(manifest: Manifest) -> None:
    def views(images_per_step: int) -> dict[tuple[int, int], SampleView]:
        stage = replace(STAGE, steps=1 + 90 // images_per_step, images_per_step=images_per_step)
        plan = make_plan(manifest, stage)
        found = [view for step in range(plan.num_steps) for view in views_of(plan.step(step))]
        return {(view.epoch, view.sample_id): view for view in found}

    few, many = views(10), views(30)
    common = few.keys() & many.keys()
    assert len(common) > 2 * NUM_SAMPLES
    for use in common:
        assert (few[use].crop, few[use].tile_position) == (many[use].crop, many[use].tile_position)
    # The next epoch looks at other parts of the images.
    again = [few[0, i].crop != few[1, i].crop for i in range(NUM_SAMPLES)]
    assert sum(again) > 0.8 * NUM_SAMPLES


@pytest.mark.parametrize(
    ("crop_area", "crop_aspect"), [(0.5, 1.2), (0.1, 2.0), (0.9, 1.5), (1.0, 1.2)]
)
def test_crops_lie_inside_their_images_and_keep_what_they_promise(
    manifest: Manifest, crop_area: float, crop_aspect: float
) -> None:
    data = replace(DATA, crop_area=crop_area, crop_aspect=crop_aspect)
    plan = make_plan(manifest, data=data)
    touched: Counter[str] = Counter()
    for step in range(STAGE.steps):
        planned = plan.step(step)
        sizes = sizes_of(planned)
        for view in views_of(planned):
            height, width = sizes[view.sample_id]
            top, left, crop_height, crop_width = view.crop
            assert 0 <= top <= top + crop_height <= height
            assert 0 <= left <= left + crop_width <= width
            assert min(crop_height, crop_width) >= 1
            # Each side is rounded by at most half a pixel.
            assert (crop_height + 0.5) * (crop_width + 0.5) >= crop_area * height * width
            if min(crop_height, crop_width) >= 20:
                change = abs(log(crop_height / crop_width) - log(height / width))
                assert change <= log(crop_aspect) + 0.5 / crop_height + 0.5 / crop_width + 1e-3
            if crop_area == 1:
                assert view.crop == (0, 0, height, width)
            touched["top"] += top == 0 < height - crop_height
            touched["bottom"] += 0 < top == height - crop_height
            touched["left"] += left == 0 < width - crop_width
            touched["right"] += 0 < left == width - crop_width
    assert crop_area == 1 or min(touched[side] for side in ("top", "bottom", "left", "right")) > 0


def test_rows_hold_their_tokens_and_slots_and_budgets_are_kept(manifest: Manifest) -> None:
    plan = make_plan(manifest, STAGE, replace(STAGE, token_budgets=(100, 128), images_per_step=4))
    slots = [shape.max_images for shape in plan.row_shapes]
    for index, first in enumerate((0, 20)):
        lengths = [v.num_tokens(PATCH) for n in range(4) for v in views_of(plan.step(first + n))]
        assert slots[index] == ceil(1.25 * DATA.row_tokens / (sum(lengths) / len(lengths)))
    seen: Counter[int] = Counter()
    for step in range(plan.num_steps):
        index = plan.stage_index(step)
        assert index == (step >= 20)
        assert plan.stage_of(step) is plan.stages[index]
        rows = plan.step(step).rows
        assert len(rows) == plan.row_shapes[index].num_rows
        for row in rows:
            lengths = [np.prod(grid_size(*view.size, PATCH)) for view in row]
            assert lengths == [view.num_tokens(PATCH) for view in row]
            assert sum(lengths) <= DATA.row_tokens
            assert len(row) <= slots[index]
            assert max(lengths, default=0) <= max(plan.stages[index].token_budgets)
            for view in row:
                assert view.size[0] <= view.crop[2]
                assert view.size[1] <= view.crop[3]
                seen[index] += 1
    assert seen == {0: 300, 1: 80}


def test_budgets_are_drawn_with_equal_chances(manifest: Manifest) -> None:
    stage = Stage(steps=40, images_per_step=30, token_budgets=(2, 8, 16), rows_per_step=6)
    plan = make_plan(manifest, stage)
    drawn: Counter[int] = Counter()
    for step in range(stage.steps):
        for view in views_of(plan.step(step)):
            candidates = [
                budget
                for budget in stage.token_budgets
                if view.size == fit_to_budget(*view.crop[2:], patch_size=PATCH, token_budget=budget)
            ]
            assert candidates
            if len(candidates) == 1:
                drawn[candidates[0]] += 1
    total = drawn.total()
    assert total > 600
    assert all(abs(drawn[budget] / total - 1 / 3) < 0.08 for budget in stage.token_budgets)


def test_fewer_rows_than_needed_lower_the_budgets_and_drop_nothing(manifest: Manifest) -> None:
    free = make_plan(manifest)
    num_needed = free.row_shapes[0].num_rows
    assert num_needed >= 4
    tight = make_plan(manifest, replace(STAGE, rows_per_step=num_needed // 2))
    assert tight.row_shapes[0].num_rows == num_needed // 2
    num_smaller = 0
    for step in range(STAGE.steps):
        before = {(view.epoch, view.sample_id): view for view in views_of(free.step(step))}
        planned = tight.step(step)
        after = {(view.epoch, view.sample_id): view for view in views_of(planned)}
        assert len(planned.rows) == num_needed // 2
        assert after.keys() == before.keys()
        for use, view in after.items():
            assert view.crop == before[use].crop
            assert view.num_tokens(PATCH) <= before[use].num_tokens(PATCH)
            num_smaller += view.num_tokens(PATCH) < before[use].num_tokens(PATCH)
        for row in planned.rows:
            assert sum(view.num_tokens(PATCH) for view in row) <= DATA.row_tokens
    assert num_smaller > STAGE.steps


def test_more_rows_than_needed_share_the_images(manifest: Manifest) -> None:
    for num_rows, num_used in ((9, 9), (20, 15)):
        rows = make_plan(manifest, replace(STAGE, rows_per_step=num_rows)).step(0).rows
        assert len(rows) == num_rows
        assert sum(map(len, rows)) == STAGE.images_per_step
        assert sum(map(bool, rows)) == num_used


def test_a_stage_has_the_number_of_rows_that_wastes_the_fewest_tokens(manifest: Manifest) -> None:
    """Wasted are the tokens of rows left empty, and those that lowered budgets took away."""
    stage = replace(STAGE, steps=4)
    plan = make_plan(manifest, stage, stage, stage)
    for index, steps in enumerate((range(4), range(4, 8), range(8, 12))):

        def packed_tokens(num_rows: int, steps: range = steps) -> int:
            fixed = make_plan(manifest, *([replace(stage, rows_per_step=num_rows)] * 3))
            views = [view for step in steps for view in views_of(fixed.step(step))]
            return sum(view.num_tokens(PATCH) for view in views)

        wanted = packed_tokens(15)  # room for all, with no budget lowered
        waste = {
            num_rows: 4 * num_rows * DATA.row_tokens - packed + wanted - packed
            for num_rows in range(1, 16)
            if (packed := packed_tokens(num_rows))
        }
        assert len(set(waste.values())) > 10
        assert plan.row_shapes[index].num_rows == min(waste, key=waste.__getitem__)


@pytest.mark.parametrize("chunk_samples", [1, NUM_SAMPLES, 1000])
def test_a_plan_works_with_any_chunk(manifest: Manifest, chunk_samples: int) -> None:
    plan = make_plan(
        manifest,
        Stage(steps=1, images_per_step=NUM_SAMPLES, token_budgets=(16,)),
        data=replace(DATA, chunk_samples=chunk_samples),
    )
    ids = [view.sample_id for view in views_of(plan.step(0))]
    assert sorted(ids) == list(range(NUM_SAMPLES))
    assert ids != sorted(ids)


def test_a_step_may_be_larger_than_the_corpus(manifest: Manifest) -> None:
    plan = make_plan(manifest, Stage(steps=2, images_per_step=100, token_budgets=(4,)))
    uses = Counter(
        (view.epoch, view.sample_id) for step in range(2) for view in views_of(plan.step(step))
    )
    assert uses.total() == 200
    assert max(uses.values()) == 1
    assert Counter(epoch for epoch, _ in uses) == {0: 43, 1: 43, 2: 43, 3: 43, 4: 28}


def test_the_cursor_says_where_the_stream_stands(manifest: Manifest) -> None:
    plan = make_plan(manifest)
    for step in range(STAGE.steps + 1):
        cursor = plan.cursor(step)
        assert cursor == {"step": step, "images": step * 15}
        assert len(json.dumps(cursor)) < 1000


def test_impossible_plans_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"token_budgets=\(16, 129\) exceed row_tokens=128"):
        make_plan(manifest, replace(STAGE, token_budgets=(16, 129)))
    with pytest.raises(ValueError, match="the plan has 20 steps, there is no step 20 after them"):
        make_plan(manifest).step(20)
    # A row of 128 tokens, 140 images.
    crowded = Stage(steps=1, images_per_step=140, token_budgets=(1,), rows_per_step=1)
    with pytest.raises(ValueError, match="rows_per_step=1 has no room for images_per_step=140"):
        make_plan(manifest, crowded).step(0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"crop_area": 0.0}, "crop_area=0.0 must be above 0 and at most 1"),
        ({"crop_area": 1.1}, "crop_area=1.1 must be above 0 and at most 1"),
        ({"crop_aspect": 0.9}, "crop_aspect=0.9 must be at least 1"),
        ({"chunk_samples": 0}, "chunk_samples=0 must be at least 1"),
    ],
)
def test_data_config_refuses(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(DATA, **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps=0 and images_per_step=15 must be at least 1"),
        ({"images_per_step": 0}, "steps=20 and images_per_step=0 must be at least 1"),
        ({"token_budgets": ()}, r"token_budgets=\(\) must be positive numbers"),
        ({"token_budgets": (16, 0)}, r"token_budgets=\(16, 0\) must be positive numbers"),
    ],
)
def test_stage_refuses(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(STAGE, **change)


def test_images_of_a_token_or_two_have_room_for_all_of_them(manifest: Manifest) -> None:
    """Fewer rows would waste less, but could not hold every image at one token each."""
    stage = Stage(steps=2, images_per_step=40, token_budgets=(1, 1))
    plan = make_plan(manifest, stage, data=replace(DATA, row_tokens=7))
    assert plan.row_shapes[0].num_rows == 6
    assert len(views_of(plan.step(0))) == 40
