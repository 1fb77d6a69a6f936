"""Mutations of the core arithmetic, each of which a test must catch.

A mutation changes one expression of the sources into one that looks as plausible, and names the
tests that are there to notice. `python -m tests.mutations [NAME...]` makes the changes one by one
in a copy of the sources, runs the named tests there, and fails if a change goes unnoticed.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COPIED = ("vitok", "pipelines", "jobs", "cluster", "tests")
# Imported once, for all runs.
_LIBRARIES = ("hypothesis", "pytest", "ray.train.torch", "torch", "torch._dynamo")
_PASSED, _FAILED = 0, 1  # exit codes of pytest; all others mean that no test was run to its end


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


def _transformer(name: str, source: str, changed: str, test: str) -> Mutation:
    test = f"vitok/test_transformer.py::test_{test}"
    return Mutation(name, "vitok/transformer.py", source, changed, (test,))


def _patches(name: str, source: str, changed: str, test: str) -> Mutation:
    return Mutation(
        name, "vitok/patches.py", source, changed, (f"vitok/test_patches.py::test_{test}",)
    )


def _flow(name: str, source: str, changed: str, *tests: str) -> Mutation:
    of_flow = tuple(f"vitok/test_flow.py::test_{test}" for test in tests)
    return Mutation(name, "vitok/flow.py", source, changed, of_flow)


def _losses(name: str, source: str, changed: str, test: str) -> Mutation:
    return Mutation(
        name, "vitok/losses.py", source, changed, (f"vitok/test_losses.py::test_{test}",)
    )


def _optim(name: str, source: str, changed: str, test: str) -> Mutation:
    return Mutation(name, "vitok/optim.py", source, changed, (f"vitok/test_optim.py::test_{test}",))


def _pipelines(name: str, file: str, source: str, changed: str, test: str) -> Mutation:
    return Mutation(name, f"pipelines/{file}", source, changed, (f"pipelines/{test}",))


_STEP = "test_plan.py::test_a_step_is_shuffled_cropped_and_packed_by_keys"

MUTATIONS = (
    # The transformer.
    _transformer(
        "RoPE turns the other way",
        "even * cosine - odd * sine, even * sine + odd * cosine",
        "even * cosine + odd * sine, odd * cosine - even * sine",
        "rope_equals_its_definition",
    ),
    _transformer(
        "RoPE pairs the halves of a head",
        "x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)",
        "x_THD.float().unflatten(-1, (2, -1)).unbind(-2)",
        "rope_equals_its_definition",
    ),
    _transformer(
        "RoPE takes the column for the row",
        "patch_coord.float()[:, :, None]",
        "patch_coord.float().flip(1)[:, :, None]",
        "rope_equals_its_definition",
    ),
    _transformer(
        "RoPE has another base",
        "ROPE_THETA = 10_000.0",
        "ROPE_THETA = 1_000.0",
        "rope_equals_its_definition",
    ),
    _transformer(
        "RoPE has frequencies of one dimension",
        "(-2 * step / (head_dim / 2))",
        "(-2 * step / head_dim)",
        "rope_equals_its_definition",
    ),
    _transformer(
        "RMSNorm drops its gain",
        "self.weight.shape, self.weight.float(), NORM_EPS",
        "self.weight.shape, None, NORM_EPS",
        "rms_norm_equals_its_definition_at_every_scale",
    ),
    _transformer(
        "queries have no norm",
        "q_THD = apply_rope(self.norm_q(q_THD), rotation)",
        "q_THD = apply_rope(q_THD, rotation)",
        "attention_equals_its_definition",
    ),
    _transformer(
        "keys have no norm",
        "k_THD = apply_rope(self.norm_k(k_THD), rotation)",
        "k_THD = apply_rope(k_THD, rotation)",
        "attention_equals_its_definition",
    ),
    _transformer(
        "SwiGLU takes the gate first",
        "value, gate = self.fc1(x_TW)",
        "gate, value = self.fc1(x_TW)",
        "swiglu_takes_the_value_first_and_the_gate_second",
    ),
    _transformer(
        "LayerScale scales nothing",
        "return x_TW * self.gamma",
        "return x_TW + 0 * self.gamma",
        "block_is_parallel_and_has_one_gain",
    ),
    _transformer(
        "a block in chunks has no LayerScale",
        "torch.add(x_TW[part], self.layer_scale(branches_TW), out=out_TW[part])",
        "torch.add(x_TW[part], branches_TW, out=out_TW[part])",
        "a_block_in_chunks_equals_the_block_at_once",
    ),
    Mutation(
        "latents have the usual epsilon of LayerNorm",
        "vitok/bottleneck.py",
        "eps=1e-6",
        "eps=1e-5",
        ("vitok/test_autoencoder.py::test_latents_are_normalised_with_a_tiny_epsilon",),
    ),
    Mutation(
        "KL latents spread by their variance",
        "vitok/bottleneck.py",
        "std=(0.5 * log_variance).exp()",
        "std=log_variance.exp()",
        (
            "vitok/test_autoencoder.py::"
            "test_noise_moves_tanh_and_kl_latents_by_their_spread_and_layernorm_latents_not_at_all",
        ),
    ),
    Mutation(
        "the divergence forgets the 1",
        "vitok/bottleneck.py",
        "log_variance.exp() - 1 - log_variance",
        "log_variance.exp() - log_variance",
        ("vitok/test_losses.py::test_kl_loss_equals_its_closed_form_by_loops",),
    ),
    Mutation(
        "the time of a DiT scales around 0",
        "vitok/dit.py",
        "self.norm1(x_TW) * (1 + scale1) + shift1",
        "self.norm1(x_TW) * scale1 + shift1",
        ("vitok/test_dit.py::test_velocity_is_that_of_a_plain_reading_of_the_formula",),
    ),
    # Attention and its masks.
    Mutation(
        "attention reaches other images of the row",
        "vitok/attention.py",
        "_attention(q_HnD, k_HnD, v_HnD)\n        if layout",
        "_attention(q_HnD, k_THD.transpose(0, 1), v_THD.transpose(0, 1))\n        if layout",
        (
            "vitok/test_attention.py::"
            "test_packed_attention_equals_dense_attention_under_a_block_mask",
        ),
    ),
    Mutation(
        "images take each other's conditions",
        "vitok/attention.py",
        "used = keys.lengths[: len(lengths)]",
        "used = keys.lengths[: len(lengths)][::-1]",
        ("vitok/test_dit.py::test_packed_velocity_equals_each_latent_alone",),
    ),
    Mutation(
        "a window is a patch smaller",
        "vitok/window.py",
        "(query[:, None] - key).abs() > radius",
        "(query[:, None] - key).abs() >= radius",
        ("vitok/test_window.py::test_halo_equals_attention_under_a_dense_mask",),
    ),
    Mutation(
        "a window ends before its last rows",
        "vitok/window.py",
        "min(stop + radius, size)",
        "min(stop + radius - 1, size)",
        ("vitok/test_window.py::test_halo_equals_attention_under_a_dense_mask",),
    ),
    Mutation(
        "a window of FlexAttention is a patch smaller",
        "vitok/window.py",
        "(row_distance <= reach)",
        "(row_distance < reach)",
        ("vitok/test_window.py::test_block_mask_equals_the_dense_mask",),
    ),
    # Patches and their layout.
    _patches(
        "patches have the channel fastest",
        "patches.permute(1, 3, 0, 2, 4)",
        "patches.permute(1, 3, 2, 4, 0)",
        "patches_hold_channel_then_row_then_column",
    ),
    _patches(
        "unpatchify turns patches over",
        "patch_size, patch_size).permute(2, 0, 3, 1, 4)",
        "patch_size, patch_size).permute(2, 0, 4, 1, 3)",
        "unpatchify_inverts_patchify_at_any_size",
    ),
    _patches(
        "coordinates begin at 1",
        "row = torch.arange(rows, dtype=torch.int32, device=device)",
        "row = torch.arange(1, rows + 1, dtype=torch.int32, device=device)",
        "grid_coordinates_are_row_major",
    ),
    _patches(
        "the size rule rounds down",
        "(2 * side * numerator + denominator) // (2 * denominator)",
        "side * numerator // denominator",
        "size_rule_equals_a_search_over_all_scales",
    ),
    _patches(
        "the size rule takes the smaller scale",
        "scale = max(by_rows, by_columns",
        "scale = min(by_rows, by_columns",
        "size_rule_equals_a_search_over_all_scales",
    ),
    _patches(
        "white is not 1",
        ".div_(127.5).sub_(1.0)",
        ".div_(128.0).sub_(1.0)",
        "normalized_patches_are_exact_inside_the_image_and_gray_outside",
    ),
    Mutation(
        "coordinates of a packed image begin at 1",
        "vitok/packed.py",
        "place % columns",
        "place % columns + 1",
        ("vitok/test_packed.py::test_layout_equals_one_made_by_loops",),
    ),
    Mutation(
        "a tile never reaches the last patches",
        "vitok/tiles.py",
        "position * (slack_S2 + 1)",
        "position * slack_S2",
        ("vitok/test_tiles.py",),
    ),
    # Losses and metrics.
    _losses(
        "Charbonnier has another epsilon",
        "CHARBONNIER_EPS = 1e-6",
        "CHARBONNIER_EPS = 1e-3",
        "charbonnier_of_equal_images_is_a_thousandth_each",
    ),
    _losses(
        "Charbonnier takes no root",
        ".sqrt().mean(dim=-1)",
        ".mean(dim=-1)",
        "charbonnier_is_the_mean_of_each_image_summed_over_images",
    ),
    _losses(
        "a loss is the mean over the tokens of all images",
        "real_T / lengths_S[packed.segment_ids.clamp(min=0)]",
        "real_T * packed.num_images() / packed.num_tokens().clamp(min=1)",
        "charbonnier_is_the_mean_of_each_image_summed_over_images",
    ),
    _losses(
        "SSIM has no weight",
        'self.config.ssim * terms["ssim_loss"]',
        'terms["ssim_loss"]',
        "loss_is_the_weighted_sum_of_its_terms",
    ),
    _losses(
        "SSIM has another weight than the paper's",
        "ssim: float = 0.1",
        "ssim: float = 0.2",
        "default_weights_are_those_of_the_paper",
    ),
    _losses(
        "SSIM has the data range of [0, 1]",
        "(0.01 * 2) ** 2, (0.03 * 2) ** 2",
        "0.01**2, 0.03**2",
        "ssim_map_averages_to_pytorch_msssim",
    ),
    Mutation(
        "PSNR has the data range of [0, 1]",
        "vitok/metrics.py",
        "torch.log10(4 / error)",
        "torch.log10(1 / error)",
        ("vitok/test_metrics.py::test_psnr_equals_scikit_image",),
    ),
    Mutation(
        "the Fréchet distance counts the overlap once",
        "vitok/frechet.py",
        "traces - 2 * overlap.sum()",
        "traces - overlap.sum()",
        ("vitok/test_frechet.py::test_known_gaussians_have_the_distance_that_follows_by_hand",),
    ),
    Mutation(
        "covariances are biased",
        "vitok/frechet.py",
        "scatter / (self.count - 1)",
        "scatter / self.count",
        ("vitok/test_frechet.py::test_moments_are_those_of_numpy",),
    ),
    # Flow matching.
    _flow(
        "the velocity points to the noise",
        "target = latents.tokens - draws.noise",
        "target = draws.noise - latents.tokens",
        "loss_of_the_true_velocity_of_a_gaussian_is_its_conditional_variance",
    ),
    _flow(
        "the path begins at the data",
        "(1 - time_T1) * draws.noise + time_T1 * latents.tokens",
        "time_T1 * draws.noise + (1 - time_T1) * latents.tokens",
        "loss_of_the_true_velocity_of_a_gaussian_is_its_conditional_variance",
    ),
    _flow(
        "larger latents are given times with less noise",
        "time_S / (time_S + factor_S * (1 - time_S))",
        "factor_S * time_S / (factor_S * time_S + 1 - time_S)",
        "larger_latents_are_given_times_with_more_noise",
    ),
    _flow(
        "guidance goes through the null condition",
        "torch.lerp(null, conditional,",
        "torch.lerp(conditional, null,",
        "guidance_goes_from_the_null_condition_through_the_condition",
    ),
    _flow(
        "guidance adds to the condition",
        "torch.where(inside_S, sampler.guidance, 1.0)",
        "torch.where(inside_S, 1 + sampler.guidance, 1.0)",
        "guidance_goes_from_the_null_condition_through_the_condition",
    ),
    _flow(
        "Euler goes half a step",
        "x_TC = x_TC + step_T1 * first_TC\n",
        "x_TC = x_TC + step_T1 * first_TC / 2\n",
        "samples_of_a_gaussian_have_its_moments",
    ),
    _flow(
        "Heun takes the second velocity alone",
        "step_T1 * (first_TC + second_TC) / 2",
        "step_T1 * second_TC",
        "errors_of_a_sampler_fall_with_its_order",
    ),
    _flow(
        "midpoint looks at the end of a step",
        "middle_TC = x_TC + step_T1 / 2 * first_TC",
        "middle_TC = x_TC + step_T1 * first_TC",
        "errors_of_a_sampler_fall_with_its_order",
    ),
    _flow(
        "dropout keeps what it should drop",
        "condition.where(draws.keep >= dropout)",
        "condition.where(draws.keep < dropout)",
        "dropped_images_train_the_null_condition",
    ),
    # Optimization.
    _optim(
        "AdamW decays norms and biases",
        'if p.ndim < 2], "weight_decay": 0.0}',
        'if p.ndim < 2], "weight_decay": config.weight_decay}',
        "weight_decay_shrinks_matrices_and_nothing_else",
    ),
    _optim(
        "the learning rate falls in a line",
        "0.5 * (1 + cos(pi * done))",
        "1 - done",
        "learning_rate_rises_in_a_line_and_falls_as_a_cosine",
    ),
    _optim(
        "the cosine begins with the run",
        "(progress - config.warmup) / (1 - config.warmup)",
        "progress",
        "learning_rate_rises_in_a_line_and_falls_as_a_cosine",
    ),
    _optim(
        "Muon scales by the shorter side",
        "max(shape[1:]) ** 0.5",
        "min(shape[1:]) ** 0.5",
        "muon_steps_as_torch_does_on_each_stacked_matrix_alone",
    ),
    Mutation(
        "the average keeps what it should give away",
        "vitok/ema.py",
        "torch._foreach_lerp_(averages, weights, 1 - decay)",
        "torch._foreach_lerp_(averages, weights, decay)",
        ("vitok/test_ema.py::test_average_is_that_of_the_plain_formula",),
    ),
    _pipelines(
        "gradients are those of the mean over ranks",
        "loop.py",
        "dist.get_world_size() / num_images",
        "1 / num_images",
        "test_loop.py::test_losses_and_weights_do_not_depend_on_how_many_ranks_share_the_rows",
    ),
    _pipelines(
        "the gradient is clipped by its unscaled norm",
        "loop.py",
        "(norm.full_tensor() if isinstance(norm, DTensor) else norm) * scale",
        "(norm.full_tensor() if isinstance(norm, DTensor) else norm)",
        "test_loop.py::test_losses_and_weights_do_not_depend_on_how_many_ranks_share_the_rows",
    ),
    # The order of samples, and their place in rows.
    _pipelines(
        "the permutation has a round less",
        "order.py",
        "range(_FEISTEL_ROUNDS)",
        "range(_FEISTEL_ROUNDS - 1)",
        "test_order.py::test_permute_equals_the_cipher_on_python_integers",
    ),
    _pipelines(
        "every epoch has the order of the first",
        "order.py",
        "key = hash_of(seed, _PURPOSE_CHUNKS, source, epoch)",
        "key = hash_of(seed, _PURPOSE_CHUNKS, source, 0 * epoch)",
        "test_order.py::test_sample_order_at_any_place_equals_the_epoch_written_out",
    ),
    _pipelines(
        "the cursor is a step ahead",
        "plan.py",
        '{"step": step, "images": self.images_before(step)}',
        '{"step": step, "images": self.images_before(step + 1)}',
        "test_plan.py::test_the_cursor_says_where_the_stream_stands",
    ),
    _pipelines(
        "a stage takes the first step of the next one",
        "plan.py",
        "if step < end:",
        "if step <= end:",
        "test_plan.py::test_steps_use_every_sample_once_an_epoch_and_continue_over_stages",
    ),
    _pipelines(
        "a stage begins a step early in the stream",
        "plan.py",
        "step = max(0, step - stage.steps)",
        "step = max(0, step - stage.steps - 1)",
        "test_plan.py::test_steps_use_every_sample_once_an_epoch_and_continue_over_stages",
    ),
    _pipelines(
        "a crop never reaches the bottom",
        "plan.py",
        "top = int(draws[2] * (height - crop_height + 1))",
        "top = int(draws[2] * (height - crop_height))",
        _STEP,
    ),
    _pipelines(
        "a crop draws area and place from one number",
        "plan.py",
        "left = int(draws[3] *",
        "left = int(draws[0] *",
        _STEP,
    ),
    _pipelines(
        "an even row holds a token too many",
        "packing.py",
        "if tokens > row_tokens:",
        "if tokens > row_tokens + 1:",
        "test_packing.py::"
        "test_even_rows_hold_every_image_once_within_limits_and_differ_by_one_image_at_most",
    ),
    _pipelines(
        "a row takes an image that is a token too long",
        "packing.py",
        "bisect_left(open_rows, (length, -1))",
        "bisect_left(open_rows, (length - 1, -1))",
        "test_packing.py::test_packing_equals_a_search_through_all_rows",
    ),
    _pipelines(
        "pixels of a patch are turned over",
        "views.py",
        "grid.transpose(0, 2, 4, 1, 3)",
        "grid.transpose(0, 2, 4, 3, 1)",
        "test_ingest.py::test_packed_pixels_are_the_planned_crops",
    ),
    _pipelines(
        "a crop is a pixel to the right",
        "reading/decode.py",
        "pixels[int(y0) : int(y1), int(x0) : int(x1)]",
        "pixels[int(y0) : int(y1), int(x0) + 1 : int(x1) + 1]",
        "reading/test_decode.py::test_jpegs_are_decoded_as_pillow_decodes_them",
    ),
    # Latents.
    _pipelines(
        "the deviation is around 0",
        "caching/manifest.py",
        "squares / num_tokens - mean**2",
        "squares / num_tokens",
        "test_latents.py::test_statistics_are_those_of_all_stored_values_in_float64",
    ),
    _pipelines(
        "the mean is over images",
        "caching/manifest.py",
        "mean, std = _statistics(records, num_tokens,",
        "mean, std = _statistics(records, sum(record.num_images for record in records),",
        "test_latents.py::test_statistics_are_those_of_all_stored_values_in_float64",
    ),
    _pipelines(
        "latents come back around 0",
        "latents.py",
        "return latent.float() * std + mean",
        "return latent.float() * std",
        "test_latents.py::test_normalized_latents_have_mean_0_and_variance_1",
    ),
    _pipelines(
        "a cache is the same whatever its transform",
        "caching/units.py",
        "json.dumps(to_dict(self), sort_keys=True)",
        'json.dumps(to_dict(self) | {"transforms": []}, sort_keys=True)',
        "test_latents.py::test_unit_name_depends_on_everything_that_its_bytes_depend_on",
    ),
    _pipelines(
        "a stream goes on a batch later",
        "latents.py",
        "self._first + num_batches * self._batch_size * self._world_size",
        "self._first + (num_batches + 1) * self._batch_size * self._world_size",
        "test_latents.py::test_stream_has_one_order_for_any_number_of_ranks_and_processes",
    ),
)


def main(names: list[str]) -> int:
    """Make every mutation, or those named; returns the exit status.

    Raises:
        ValueError: there is no mutation of a name.
    """
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    if unknown := set(names) - {mutation.name for mutation in chosen}:
        raise ValueError(f"no mutation {unknown.pop()!r}; tests/mutations.py has their names")
    for library in _LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="vitok-mutations-") as folder:
        copy = Path(folder)
        for package in _COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, copy / package, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        tests = {test: None for mutation in chosen for test in mutation.tests}
        # What this run compiles stays valid for all files but the one that is changed.
        status, output = _run(copy, tests, writes_bytecode=True)
        if status != _PASSED:
            print(output)
            print("the tests fail without any mutation; mend them first")
            return 1
        survived = [mutation.name for mutation in chosen if not _is_caught(copy, mutation)]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations caught")
    return 1 if survived else 0


def _is_caught(copy: Path, mutation: Mutation) -> bool:
    """Make a mutation in a copy of the repository, test it, and take it back."""
    path = copy / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.source, mutation.changed))
    start = time.perf_counter()
    status, output = _run(copy, mutation.tests)
    path.write_text(original)
    if status not in (_PASSED, _FAILED):
        raise RuntimeError(f"{mutation.name}: pytest ended with {status}\n{output}")
    verdict = "caught" if status == _FAILED else "SURVIVED"
    print(f"{verdict:8} {time.perf_counter() - start:4.0f} s  {mutation.name}", flush=True)
    return status == _FAILED


def _run(copy: Path, tests: Iterable[str], writes_bytecode: bool = False) -> tuple[int, str]:
    """Run tests of the copy in a process that has the libraries already, and nothing of ours."""
    log = copy / "pytest.log"
    process = multiprocessing.get_context("fork").Process(
        target=_test, args=(copy, list(tests), writes_bytecode, log)
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


def _test(copy: Path, tests: list[str], writes_bytecode: bool, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode = not writes_bytecode
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for processes that tests start
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for package in _COPIED:
        sys.modules.pop(package, None)
    import pytest

    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    sys.exit(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
