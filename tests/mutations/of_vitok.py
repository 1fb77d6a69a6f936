from tests.mutations.mutation import Mutation


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


OF_VITOK = (
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
)
