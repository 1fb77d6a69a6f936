from tests.mutations.mutation import Mutation


def _pipelines(name: str, file: str, source: str, changed: str, test: str) -> Mutation:
    return Mutation(name, f"pipelines/{file}", source, changed, (f"pipelines/{test}",))


_STEP = "test_plan.py::test_a_step_is_shuffled_cropped_and_packed_by_keys"

OF_PIPELINES = (
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
