"""Seeded mistakes, planted one at a time in a copy of the library, and the quick tests that have to notice each.

``python -m tests.mutations`` runs them all and prints one line of JSON: exit codes by name. Every mistake runs in a
fork of a process that has imported torch but not the library, so that one mistake costs about two seconds.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTATIONS", "Mutation", "apply", "run_all"]

ROOT = Path(__file__).parents[1]
UNTOUCHED = "untouched"
TIMEOUT_S = 120


@dataclass(frozen=True)
class Mutation:
    """One mistake: a fragment that occurs once in a file of the library, what replaces it, and who notices."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ALONE = "tests/nn/test_golden.py::test_published_velocity_of_each_sample_alone"
TOGETHER = "tests/nn/test_golden.py::test_published_velocity_from_tensor_list_and_packed_input"
GRADIENTS = "tests/nn/test_golden.py::test_published_gradients"
RUN = "tests/nn/test_golden.py::test_published_sampling_run"
PARTS = "tests/nn/test_components.py::"
MODEL = "tests/nn/test_transformer.py::"
ATTENTION = "tests/nn/test_attention.py::"
SOFTMAX = ATTENTION + "test_backend_equals_a_written_out_softmax_in_values_and_gradients"
FORWARD_MODE = MODEL + "test_plain_operations_of_forward_mode_equal_the_fused_ones_in_gradients"
PACKED = "tests/test_packed.py::"
PATHS = "tests/test_paths.py::"
SAMPLING = "tests/test_sampling.py"
TIMES = "tests/objectives/test_times.py::"
LOSS = "tests/objectives/test_flow_matching.py::"
SHARDED = "tests/test_sharded.py::"
KERNELS = "tests/sampling/test_kernels.py"
LIKELIHOOD = "tests/sampling/test_likelihood.py"
ROLLOUT = "tests/sampling/test_rollout.py"
ADVANTAGES = "tests/objectives/test_advantages.py"
MATCHING = "tests/objectives/test_matching.py"
RATIO = "tests/objectives/test_ratio.py"
MISSING = "tests/objectives/test_policy_properties.py"

MUTATIONS = [
    # Epsilons
    Mutation("text norm epsilon", "nn/fusion.py", "TEXT_NORM_EPS = 1e-5", "TEXT_NORM_EPS = 1e-6", (ALONE,)),
    Mutation(
        "query and key norm epsilon",
        "nn/blocks.py",
        "JointAttention(dim, num_heads, eps=eps)",
        "JointAttention(dim, num_heads, eps=1e-5)",
        (ALONE,),
    ),
    Mutation(
        "block norm epsilon",
        "nn/blocks.py",
        "self.img_norm1 = RMSNorm(dim, eps=eps)",
        "self.img_norm1 = RMSNorm(dim, eps=1e-5)",
        (ALONE,),
    ),
    Mutation("output norm epsilon", "nn/transformer.py", "OUTPUT_NORM_EPS = 1e-6", "OUTPUT_NORM_EPS = 1e-4", (ALONE,)),
    Mutation(
        "normaliser epsilon",
        "nn/latents.py",
        "(self.var.to(dtype) + self.eps).sqrt()",
        "self.var.to(dtype).sqrt()",
        ("tests/nn/test_latents.py::test_published_latents_decode_to_the_autoencoders",),
    ),
    # Normalisation and modulation
    Mutation(
        "norm without the square root",
        "nn/norm.py",
        "torch.rsqrt(values.square()",
        "torch.reciprocal(values.square()",
        (PARTS + "test_rms_norm_equals_the_reference_at_every_magnitude",),
    ),
    Mutation(
        "norm rounds after the weight",
        "nn/norm.py",
        "values.to(hidden_states.dtype) * weight",
        "(values * weight.float()).to(hidden_states.dtype)",
        (PARTS + "test_rms_norm_in_bf16_rounds_before_the_weight_is_applied",),
    ),
    Mutation(
        "shift and scale swapped",
        "nn/blocks.py",
        "image_mod[0], image_mod[1]",
        "image_mod[1], image_mod[0]",
        (ALONE,),
    ),
    Mutation(
        "attention gate is the MLP's", "nn/blocks.py", "image_out, image_mod[2]", "image_out, image_mod[5]", (ALONE,)
    ),
    Mutation(
        "text MLP gate is the attention's",
        "nn/blocks.py",
        "self.txt_mlp(text_in), text_mod[5]",
        "self.txt_mlp(text_in), text_mod[2]",
        (ALONE,),
    ),
    Mutation("second norm is the first", "nn/blocks.py", "_norm(self.img_norm2", "_norm(self.img_norm1", (ALONE,)),
    Mutation(
        "modulation without SiLU",
        "nn/blocks.py",
        "self.img_mod = nn.Sequential(nn.SiLU(),",
        "self.img_mod = nn.Sequential(nn.Identity(),",
        (ALONE,),
    ),
    Mutation(
        "scale without the one",
        "nn/modulation.py",
        "weight.to(dtype) * (1 + scale.to(dtype))",
        "weight.to(dtype) * scale.to(dtype)",
        (ALONE,),
    ),
    Mutation(
        "traced path: scale without the one",
        "nn/modulation.py",
        "normed * (1 + layout.expand(scale, stream))",
        "normed * layout.expand(scale, stream)",
        (FORWARD_MODE,),
    ),
    Mutation(
        "norm's gradient without its projection",
        "nn/modulation.py",
        "weighted.addcmul_(normed, along, value=-1)",
        "weighted",
        (GRADIENTS,),
    ),
    Mutation(
        "gate's gradient lacks the update",
        "nn/modulation.py",
        "torch.mul(grad_i, update_i, out=grad_update_i)",
        "torch.mul(grad_i, 1, out=grad_update_i)",
        (GRADIENTS,),
    ),
    Mutation(
        "scale's gradient lacks the norm's weight",
        "nn/modulation.py",
        "(grad_gain * weight.to(dtype)).to(scale.dtype)",
        "grad_gain.to(scale.dtype)",
        (GRADIENTS,),
    ),
    Mutation(
        "output shift before scale",
        "nn/transformer.py",
        "scale, shift = modulation.unbind(1)",
        "shift, scale = modulation.unbind(1)",
        (ALONE,),
    ),
    Mutation(
        "output modulation without SiLU",
        "nn/transformer.py",
        "self.linear(F.silu(temb))",
        "self.linear(temb)",
        (ALONE,),
    ),
    # Attention
    Mutation(
        "query, key and value interleaved per head",
        "nn/blocks.py",
        ".unflatten(-1, (3, self.num_heads, -1))",
        ".unflatten(-1, (self.num_heads, 3, -1)).transpose(1, 2)",
        (ALONE,),
    ),
    Mutation(
        "text has the image's query and key norms",
        "nn/blocks.py",
        "(self.norm_added_q, self.norm_added_k)",
        "(self.norm_q, self.norm_k)",
        (ALONE,),
    ),
    Mutation(
        "text is skipped one block early",
        "nn/transformer.py",
        "skip_text = index == last",
        "skip_text = index >= last - 1",
        (ALONE,),
    ),
    Mutation("softmax scale", "nn/attention.py", "query.shape[-1] ** -0.5", "query.shape[-1] ** -1.0", (SOFTMAX,)),
    Mutation(
        "padded keys are not masked",
        "nn/attention.py",
        "(valid | (count == 0)[:, None])[:, None, None] if ragged else None",
        "None",
        (SOFTMAX,),
    ),
    Mutation(
        "samples of a batch see each other",
        "packed.py",
        "joint_offsets=_offsets([n + l for n, l in zip(image_counts, text_counts, strict=True)])",
        "joint_offsets=_offsets([sum(image_counts) + sum(text_counts)] + [0] * (num - 1))",
        (TOGETHER,),
    ),
    Mutation(
        "joined keys are out of step with their samples",
        "nn/heads.py",
        "starts[2] += run.count * whole",
        "starts[2] += run.count * lengths[0]",
        (TOGETHER,),
    ),
    # Positions
    Mutation(
        "odd sides are centred by their floor",
        "nn/rope.py",
        "(height - height // 2)",
        "(height // 2)",
        (PARTS + "test_published_rope_tables_and_rotation",),
    ),
    Mutation(
        "text starts at the shorter side",
        "nn/rope.py",
        "torch.maximum(height // 2, width // 2)",
        "torch.minimum(height // 2, width // 2)",
        (PARTS + "test_published_rope_tables_and_rotation",),
    ),
    Mutation(
        "text starts one later",
        "nn/rope.py",
        "text = start + layout.text_positions",
        "text = start + layout.text_positions + 1",
        (PARTS + "test_published_rope_tables_and_rotation",),
    ),
    Mutation(
        "holes in the mask close up",
        "packed.py",
        "text_samples, text_positions = mask.cpu().nonzero(as_tuple=True)",
        "text_samples = mask.cpu().nonzero(as_tuple=True)[0]; text_positions = (mask.cpu().cumsum(1) - 1)[mask.cpu()]",
        (ALONE,),
    ),
    Mutation(
        "rotation by halves of the head",
        "nn/rope.py",
        "heads.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)",
        "heads.to(dtype).unflatten(-1, (2, -1)).unbind(-2)",
        (PARTS + "test_published_rope_tables_and_rotation",),
    ),
    Mutation(
        "rotation in the other direction",
        "nn/rope.py",
        "[real * cos - imaginary * sin, real * sin + imaginary * cos]",
        "[real * cos + imaginary * sin, imaginary * cos - real * sin]",
        (PARTS + "test_apply_rotary_is_multiplication_of_complex_neighbours",),
    ),
    Mutation(
        "rotation's gradient turns forwards",
        "nn/heads.py",
        "image_cos, -image_sin",
        "image_cos, image_sin",
        (GRADIENTS,),
    ),
    # Time
    Mutation(
        "sine before cosine",
        "nn/embeddings.py",
        "[angles.cos(), angles.sin()]",
        "[angles.sin(), angles.cos()]",
        (ALONE,),
    ),
    Mutation(
        "time not times 1000", "nn/embeddings.py", "NUM_TRAIN_TIMESTEPS = 1000", "NUM_TRAIN_TIMESTEPS = 1", (ALONE,)
    ),
    Mutation(
        "frequencies reach their end",
        "nn/embeddings.py",
        "(-math.log(max_period) / (dim // 2))",
        "(-math.log(max_period) / (dim // 2 - 1))",
        (PARTS + "test_sinusoid_equals_the_reference_in_float64",),
    ),
    # MLP and text
    Mutation(
        "the MLP's halves are swapped",
        "nn/mlp.py",
        "gate, value = self.w1(hidden_states), self.w3(hidden_states)",
        "gate, value = self.w3(hidden_states), self.w1(hidden_states)",
        (ALONE,),
    ),
    Mutation(
        "MLP width rounded before it is multiplied",
        "nn/config.py",
        "8 * self.inner_dim // 3",
        "self.inner_dim // 3 * 8",
        (ALONE,),
    ),
    Mutation(
        "text layers joined in reverse",
        "nn/fusion.py",
        "projection(normed.flatten(1))",
        "projection(normed.flip(1).flatten(1))",
        (PARTS + "test_text_fusion_equals_the_reference",),
    ),
    Mutation(
        "text layers share the first norm",
        "nn/fusion.py",
        "torch.stack([norm.weight for norm in norms])",
        "torch.stack([norms[0].weight for norm in norms])",
        (PARTS + "test_text_fusion_equals_the_reference",),
    ),
    Mutation(
        "fused matrices start as one",
        "nn/initialise.py",
        "shape[0] // 3 if",
        "shape[0] if",
        (MODEL + "test_init_weights_has_the_documented_statistics",),
    ),
    Mutation(
        "every parameter draws from one stream",
        "nn/initialise.py",
        'f"{seed}:{name}"',
        'f"{seed}"',
        (MODEL + "test_init_weights_gives_the_same_weights_from_meta_and_twice",),
    ),
    Mutation(
        "the initial gate is set on the shifts",
        "nn/initialise.py",
        "vectors[[2, 5]] = gate",
        "vectors[[0, 3]] = gate",
        (MODEL + "test_gate_of_init_weights_opens_every_block",),
    ),
    Mutation(
        "text captured after the last block is not finished",
        "nn/transformer.py",
        "skip_text = index == last and index not in captured_blocks",
        "skip_text = index == last",
        (MODEL + "test_capturing_blocks_does_not_change_the_output_and_an_early_stop_sees_the_same",),
    ),
    # Packing
    Mutation(
        "images are packed column by column",
        "packed.py",
        '"b c h w -> (b h w) c"',
        '"b c h w -> (b w h) c"',
        (PACKED + "test_a_batch_packs_like_the_list_of_its_images",),
    ),
    Mutation(
        "text comes before the image",
        "packed.py",
        "torch.cat([2 * image_samples, 2 * text_samples + 1])",
        "torch.cat([2 * image_samples + 1, 2 * text_samples])",
        (PACKED + "test_the_joint_order_is_image_then_text_of_each_sample",),
    ),
    Mutation(
        "the mean runs over the batch",
        "packed.py",
        "torch.stack([piece.mean() for piece in values.split(self.image_lengths)])",
        "torch.stack([values.mean() for piece in values.split(self.image_lengths)])",
        (PACKED + "test_mean_is_the_mean_over_tokens_and_trailing_axes",),
    ),
    # Paths, losses, times
    Mutation(
        "velocity points to the data",
        "paths.py",
        "return (noise - latents)",
        "return (latents - noise)",
        (PATHS + "test_the_velocity_is_the_derivative_of_the_path_in_time",),
    ),
    Mutation(
        "data and noise swapped on the path",
        "paths.py",
        "(1 - time) * latents + time * noise",
        "time * latents + (1 - time) * noise",
        (PATHS + "test_time_zero_is_the_data_and_time_one_the_noise_bit_for_bit",),
    ),
    Mutation(
        "clean prediction walks away",
        "paths.py",
        "(noisy - expand_time(t, noisy, layout=layout) * velocity)",
        "(noisy + expand_time(t, noisy, layout=layout) * velocity)",
        (PATHS + "test_the_velocity_leads_back_to_both_ends_of_the_path",),
    ),
    Mutation(
        "the loss is a sum",
        "objectives/flow_matching.py",
        "squared.flatten(1).mean(1)",
        "squared.flatten(1).sum(1)",
        (LOSS + "test_every_sample_gets_its_own_mean_squared_error",),
    ),
    Mutation(
        "the loss is reduced over the batch",
        "objectives/flow_matching.py",
        "squared.flatten(1).mean(1)",
        "squared.mean().expand(len(squared))",
        (LOSS + "test_every_sample_gets_its_own_mean_squared_error",),
    ),
    Mutation(
        "times lean to the clean side",
        "objectives/times.py",
        "torch.sigmoid(mu + std * normal)",
        "torch.sigmoid(-mu + std * normal)",
        (TIMES + "test_the_law_is_logit_normal",),
    ),
    Mutation(
        "times ignore the spread",
        "objectives/times.py",
        "torch.sigmoid(mu + std * normal)",
        "torch.sigmoid(mu + normal)",
        (TIMES + "test_the_law_is_logit_normal",),
    ),
    Mutation(
        "training centre rises too fast",
        "objectives/times.py",
        "return 1.0 + 0.3 * (num_tokens - 256) / 3840",
        "return 1.0 + 0.3 * num_tokens / 3840",
        (TIMES + "test_the_published_centres",),
    ),
    Mutation(
        "averages take the other weight",
        "averaging.py",
        "_foreach_lerp_(targets, aligned, weight)",
        "_foreach_lerp_(targets, aligned, 1 - weight)",
        ("tests/test_averaging.py::test_one_step_is_the_weighted_mean_of_old_and_new",),
    ),
    # Sampling
    Mutation(
        "shift does not depend on the steps",
        "sampling/grids.py",
        "return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)",
        "return at_200",
        (RUN,),
    ),
    Mutation(
        "shift bends at 4096 tokens",
        "sampling/grids.py",
        "num_tokens > 4300",
        "num_tokens > 4000",
        (SAMPLING + " -k released_schedule",),
    ),
    Mutation(
        "grid shifted to the clean side", "sampling/grids.py", "scale = shifts.exp()", "scale = (-shifts).exp()", (RUN,)
    ),
    Mutation(
        "guidance swaps its halves",
        "sampling/guidance.py",
        "without + scale * (wanted - without)",
        "wanted + scale * (without - wanted)",
        (RUN,),
    ),
    Mutation("guidance without rescaling", "sampling/guidance.py", "if rescale:", "if not rescale:", (RUN,)),
    Mutation(
        "guidance takes the unconditional norm",
        "sampling/guidance.py",
        "torch.linalg.vector_norm(wanted, dim=channel_dim",
        "torch.linalg.vector_norm(without, dim=channel_dim",
        (RUN,),
    ),
    Mutation(
        "Euler steps backwards",
        "sampling/ode.py",
        "return (noisy + (there - here) * velocity).to(noisy.dtype)",
        "return (noisy - (there - here) * velocity).to(noisy.dtype)",
        (RUN,),
    ),
    Mutation(
        "Heun takes the second velocity alone",
        "sampling/ode.py",
        "(first.to(dtype) + second.to(dtype)) / 2",
        "second.to(dtype)",
        (SAMPLING + " -k trapezoidal",),
    ),
    Mutation(
        "dpm2 corrects the other way",
        "sampling/ode.py",
        "weight = (1 - there / here) * ratio / 2",
        "weight = (there / here - 1) * ratio / 2",
        (SAMPLING + " -k papers_multistep",),
    ),
    # Reinforcement learning
    Mutation(
        "SDE noise does not shrink with the step",
        "sampling/kernels.py",
        "(diffusion * -gap).sqrt())",
        "diffusion.sqrt())",
        (KERNELS,),
    ),
    Mutation(
        "SDE noise is linear in the step",
        "sampling/kernels.py",
        "(diffusion * -gap).sqrt())",
        "diffusion.sqrt() * -gap)",
        (KERNELS,),
    ),
    Mutation(
        "SDE follows the score the other way",
        "sampling/kernels.py",
        "gap * rate / 2 * noise",
        "-gap * rate / 2 * noise",
        (KERNELS,),
    ),
    Mutation(
        "SDE drift with the whole score",
        "sampling/kernels.py",
        "gap * rate / 2 * noise",
        "gap * rate * noise",
        (KERNELS,),
    ),
    Mutation(
        "flow diffusion upside down",
        "sampling/kernels.py",
        "rate = torch.where(still, 0.0, eta**2 / (1 - corner))",
        "rate = torch.where(still, 0.0, eta**2 * (1 - corner))",
        (KERNELS,),
    ),
    Mutation(
        "flow is clamped at the time before",
        "sampling/kernels.py",
        "there if at_one is None else at_one",
        "0.99 if at_one is None else at_one",
        (KERNELS,),
    ),
    Mutation(
        "dance diffusion not squared",
        "sampling/kernels.py",
        "diffusion = torch.full_like(here, eta**2)",
        "diffusion = torch.full_like(here, eta)",
        (KERNELS,),
    ),
    Mutation(
        "ddim adds noise and keeps all of the old",
        "sampling/kernels.py",
        "(1 - eta**2 * fresh).sqrt() * noise",
        "noise",
        (KERNELS,),
    ),
    Mutation(
        "ddim forgets half of the posterior's variance",
        "sampling/kernels.py",
        "remaining * (2 - remaining)",
        "remaining",
        (KERNELS,),
    ),
    Mutation(
        "cps angle twice as wide",
        "sampling/kernels.py",
        "angle = eta * math.pi / 2",
        "angle = eta * math.pi",
        (KERNELS,),
    ),
    Mutation(
        "cps swaps sine and cosine",
        "sampling/kernels.py",
        "there * math.cos(angle) * noise, there * math.sin(angle)",
        "there * math.sin(angle) * noise, there * math.cos(angle)",
        (KERNELS,),
    ),
    Mutation(
        "noise prediction is the clean one",
        "sampling/kernels.py",
        "noise = state + (1 - here) * flow",
        "noise = state - here * flow",
        (KERNELS,),
    ),
    Mutation(
        "density without its normaliser",
        "sampling/likelihood.py",
        "hide(spread.log() + 0.5 * math.log(2 * math.pi), counts)",
        "0.0",
        (LIKELIHOOD,),
    ),
    Mutation(
        "density of the variance instead of the deviation",
        "sampling/likelihood.py",
        "(difference / spread).square() - hide",
        "difference.square() / spread - hide",
        (LIKELIHOOD,),
    ),
    Mutation(
        "KL without the half",
        "sampling/likelihood.py",
        "(difference / spread).square() / 2",
        "(difference / spread).square()",
        (LIKELIHOOD,),
    ),
    Mutation(
        "KL without the step's deviation",
        "sampling/likelihood.py",
        "(difference / spread).square() / 2",
        "difference.square() / 2",
        (LIKELIHOOD,),
    ),
    Mutation(
        "a step without noise is scored",
        "sampling/likelihood.py",
        "if not holds(spread > 0):",
        "if not holds(spread >= 0):",
        (LIKELIHOOD,),
    ),
    Mutation(
        "rollout scores the state before it is stored",
        "sampling/rollout.py",
        "gaussian_log_prob(following.to(noise.dtype), mean",
        "gaussian_log_prob(mean + std * fresh, mean",
        (ROLLOUT,),
    ),
    Mutation(
        "rollout goes on from the state before it is stored",
        "sampling/rollout.py",
        "        noisy = following\n",
        "        noisy = (mean + std * fresh)\n",
        (ROLLOUT,),
    ),
    Mutation(
        "window moves at once",
        "sampling/rollout.py",
        "while rest >= dwells[start]",
        "while rest > dwells[start]",
        (ROLLOUT,),
    ),
    Mutation(
        "step noise forgets the step",
        "sampling/noise.py",
        "np.random.SeedSequence((seed, step))",
        "np.random.SeedSequence((seed, 0))",
        (ROLLOUT,),
    ),
    Mutation("sums over the mean", "reduction.py", 'if reduction == "sum":', 'if reduction == "mean":', (LIKELIHOOD,)),
    Mutation(
        "a mean over padding",
        "reduction.py",
        "_sums(mask.expand(values.shape).to(values.dtype), layout).clamp_min(1)",
        "max(values[0].numel(), 1)",
        (MISSING,),
    ),
    Mutation(
        "packed means weigh by resolution",
        "reduction.py",
        "inner * layout.image_offsets.diff()",
        "inner * layout.image_samples.shape[0]",
        (MATCHING,),
    ),
    Mutation(
        "hidden values are multiplied by zero",
        "reduction.py",
        "torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype).to(tensor.device))",
        "tensor * mask",
        (MISSING,),
    ),
    Mutation(
        "Bessel's correction the wrong way",
        "objectives/policy/advantages.py",
        "degrees = count - correction",
        "degrees = count + correction",
        (ADVANTAGES,),
    ),
    Mutation(
        "the group's deviation is the batch's",
        "objectives/policy/advantages.py",
        'if scale == "group":',
        'if scale == "batch":',
        (ADVANTAGES,),
    ),
    Mutation(
        "leaving out is keeping",
        "objectives/policy/advantages.py",
        "centred * members / (members - 1).clamp_min(1), 0.0)",
        "centred * (members - 1) / members.clamp_min(1), 0.0)",
        (ADVANTAGES,),
    ),
    Mutation(
        "advantages the wrong way round",
        "objectives/policy/advantages.py",
        "values - lowest[index], 0.0)",
        "lowest[index] - values, 0.0)",
        (ADVANTAGES,),
    ),
    Mutation(
        "a missing reward is a zero",
        "objectives/policy/advantages.py",
        "count = torch.zeros_like(values).index_add(0, index, valid.double())",
        "count = torch.zeros_like(values).index_add(0, index, torch.ones_like(values))",
        (ADVANTAGES,),
    ),
    Mutation(
        "eps inside no deviation",
        "objectives/policy/advantages.py",
        "centred / (spread + eps), 0.0)",
        "centred / spread, 0.0)",
        (ADVANTAGES,),
    ),
    Mutation(
        "groups by neighbourhood instead of id",
        "reduction.py",
        "order = torch.argsort(group, stable=True)",
        "order = torch.arange(len(group))",
        (ADVANTAGES,),
    ),
    Mutation(
        "optimality without its half",
        "objectives/policy/advantages.py",
        "0.5 + values.clamp(-clip, clip) / (2 * clip)",
        "values.clamp(-clip, clip) / (2 * clip)",
        (ADVANTAGES,),
    ),
    Mutation(
        "optimality twice as steep",
        "objectives/policy/advantages.py",
        "values.clamp(-clip, clip) / (2 * clip)",
        "values.clamp(-clip, clip) / clip",
        (ADVANTAGES,),
    ),
    Mutation(
        "an unknown advantage is a half",
        "objectives/policy/advantages.py",
        'if values.device.type == "cpu" and not holds(~values.isnan()):',
        "values = values.nan_to_num()\n    if False:",
        (ADVANTAGES,),
    ),
    Mutation(
        "NFT pushes towards the bad",
        "objectives/policy/matching.py",
        "good * losses[0] + (1 - good) * losses[1]",
        "good * losses[1] + (1 - good) * losses[0]",
        (MATCHING,),
    ),
    Mutation(
        "NFT ignores beta",
        "objectives/policy/matching.py",
        "moved = beta * (new - old)",
        "moved = new - old",
        (MATCHING,),
    ),
    Mutation(
        "NFT's two policies are one",
        "objectives/policy/matching.py",
        "old - moved - goal]",
        "old + moved - goal]",
        (MATCHING,),
    ),
    Mutation(
        "NFT's weight is not detached",
        "objectives/policy/matching.py",
        "error.detach().abs()",
        "error.abs()",
        (MATCHING,),
    ),
    Mutation(
        "NFT normalises both by one error",
        "objectives/policy/matching.py",
        "for error in errors]\n        losses = [loss / size",
        "for error in errors[:1] * 2]\n        losses = [loss / size",
        (MATCHING,),
    ),
    Mutation(
        "NFT forgets the time of the clean error",
        "objectives/policy/matching.py",
        "errors = [time * error for error in errors]",
        "errors = [error for error in errors]",
        (MATCHING,),
    ),
    Mutation(
        "AWM's ratio upside down",
        "objectives/policy/matching.py",
        "(old - goal).square() - (new - goal).square()",
        "(new - goal).square() - (old - goal).square()",
        (MATCHING,),
    ),
    Mutation(
        "the gap pulls the reference",
        "objectives/policy/matching.py",
        "velocity=velocity, reference_velocity=reference_velocity.detach())",
        "velocity=velocity, reference_velocity=reference_velocity)",
        (MATCHING,),
    ),
    Mutation(
        "NFT trains the old policy",
        "objectives/policy/matching.py",
        "old_velocity=old_velocity.detach(), target=target.detach()\n    )\n    good",
        "old_velocity=old_velocity, target=target.detach()\n    )\n    good",
        (MATCHING,),
    ),
    Mutation(
        "AWM trains the target",
        "objectives/policy/matching.py",
        "old_velocity=old_velocity.detach(), target=target.detach()\n    )\n    gain",
        "old_velocity=old_velocity.detach(), target=target\n    )\n    gain",
        (MATCHING,),
    ),
    Mutation(
        "RAM's target has a gradient",
        "objectives/policy/matching.py",
        "velocity=velocity.detach(),",
        "velocity=velocity,",
        (MATCHING,),
    ),
    Mutation(
        "RAM anchors at the policy",
        "objectives/policy/matching.py",
        "return reference + rows",
        "return new + rows",
        (MATCHING,),
    ),
    Mutation(
        "the surrogate rewards the bad",
        "objectives/policy/ratio.py",
        "return -advantage * bounded.exp()",
        "return advantage * bounded.exp()",
        (RATIO,),
    ),
    Mutation(
        "the surrogate clips the harmless side",
        "objectives/policy/ratio.py",
        "above & (advantage >= 0)",
        "above & (advantage <= 0)",
        (RATIO,),
    ),
    Mutation("clips swapped", "objectives/policy/ratio.py", "math.log1p(clip_high)", "math.log1p(clip_low)", (RATIO,)),
    Mutation(
        "the advantage is trained",
        "objectives/policy/ratio.py",
        "advantage=advantage.detach())",
        "advantage=advantage)",
        (RATIO,),
    ),
    Mutation(
        "the guard is not centred",
        "objectives/policy/ratio.py",
        "return (log_ratio + kl) * std",
        "return (log_ratio - kl) * std",
        (LIKELIHOOD,),
    ),
    Mutation(
        "the guard is not rescaled",
        "objectives/policy/ratio.py",
        "return (log_ratio + kl) * std",
        "log_ratio + kl",
        (LIKELIHOOD,),
    ),
    Mutation(
        "NFT's decay starts where it ends",
        "objectives/policy/schedules.py",
        "max(step - start, 0) * rate",
        "max(start - step, 0) * rate",
        (MATCHING,),
    ),
    # Latents
    Mutation(
        "patch positions before channels",
        "nn/latents.py",
        '"b c (h dy) (w dx) -> b (c dy dx) h w"',
        '"b c (h dy) (w dx) -> b (dy dx c) h w"',
        ("tests/nn/test_latents.py::test_the_layout_is_the_published_one",),
    ),
    Mutation(
        "columns of a patch before rows",
        "nn/latents.py",
        '"b (c dy dx) h w -> b c (h dy) (w dx)"',
        '"b (c dx dy) h w -> b c (h dy) (w dx)"',
        ("tests/nn/test_latents.py::test_published_latents_decode_to_the_autoencoders",),
    ),
    Mutation(
        "grey levels are rounded",
        "nn/autoencoder.py",
        "* 127.5).to(torch.uint8)",
        "* 127.5).round().to(torch.uint8)",
        ("tests/nn/test_autoencoder.py::test_quantising_truncates_and_clamps",),
    ),
    # The order of samples
    Mutation(
        "weights of the micro-batch",
        "data/collate.py",
        "1 / totals.images",
        "1 / layout.batch_size",
        ("tests/data/test_collate.py::test_the_weights_of_a_step_sum_to_one_however_many_ranks_load_it",),
    ),
    Mutation(
        "token weights of images",
        "data/collate.py",
        "lengths / totals.image_tokens",
        "lengths / lengths.sum()",
        ("tests/data/test_collate.py::test_the_weights_of_a_step_sum_to_one_however_many_ranks_load_it",),
    ),
    Mutation(
        "the same order every epoch",
        "data/plan.py",
        "self._shuffle(here, size, derive_key(key, epoch))",
        "self._shuffle(here, size, derive_key(key, 0))",
        ("tests/data/test_plan.py::test_samples_are_shuffled_anew_every_epoch_and_by_the_seed",),
    ),
    Mutation(
        "ranks take slots from the end",
        "data/assign.py",
        "range(rank, len(self.offsets) - 1, world_size)",
        "range(world_size - 1 - rank, len(self.offsets) - 1, world_size)",
        ("tests/data/test_plan.py::test_ranks_share_a_step_without_overlap_and_in_one_order",),
    ),
    Mutation(
        "repeats are not told apart",
        "data/assign.py",
        "np.arange(len(order)) - np.searchsorted(ordered, ordered)",
        "np.zeros(len(order), np.int64)",
        ("tests/data/test_collate.py::test_repeats_count_what_came_before",),
    ),
    Mutation(
        "the cap is one token too large",
        "data/assign.py",
        "room[heap[0][1]] < size:",
        "room[heap[0][1]] < size - 1:",
        ("tests/data/test_assign.py::test_dealing_is_the_slow_reference",),
    ),
    Mutation(
        "exchanges forget the cap",
        "data/exchange.py",
        "gain[(held[light] + size > max_tokens) | (held[heavy] - size > max_tokens)] = 0",
        "pass",
        ("tests/data/test_exchange.py",),
    ),
    Mutation(
        "exchanges move the whole difference",
        "data/exchange.py",
        "np.minimum(cost, loads[heavy] - loads[light] - cost)",
        "cost",
        ("tests/data/test_exchange.py",),
    ),
    # Pictures and their sources
    Mutation(
        "half-turn pictures quarter turned",
        "data/pictures.py",
        "6: (3, False)",
        "6: (1, False)",
        ("tests/data/test_pictures.py::test_pictures_are_upright_as_pillow_turns_them",),
    ),
    Mutation(
        "transparency over black",
        "data/pictures.py",
        "255 * (255 - opaque) + 127",
        "255 * (255 - opaque)",
        ("tests/data/test_pictures.py::test_transparency_lies_over_white",),
    ),
    Mutation(
        "deep grey cut",
        "data/pictures.py",
        "    full = 65_535.0",
        "    full = 65_280.0",
        ("tests/data/test_pictures.py::test_deep_grey_is_scaled_not_cut",),
    ),
    Mutation(
        "checksums ignored",
        "data/picture_bytes.py",
        "if zlib.crc32(view[at + 4 : end]) !=",
        "if False and zlib.crc32(view[at + 4 : end]) !=",
        ("tests/data/test_pictures.py::test_any_flipped_bit_of_a_png_is_found",),
    ),
    Mutation(
        "a scan needs no end",
        "data/picture_bytes.py",
        "        at += 2 + length\n        if marker == 0xDA:",
        "        if marker == 0xDA:\n            return size\n        at += 2 + length\n        if marker == 0xDA:",
        ("tests/data/test_pictures.py::test_a_jpeg_without_its_end_marker_is_truncated",),
    ),
    Mutation(
        "nonsense in a tar skipped",
        "data/source_tars.py",
        "    if any(block):",
        "    if False:",
        ("tests/data/test_sources.py::test_nonsense_inside_a_tar_is_named_and_costs_nothing_before_it",),
    ),
    # Shards
    Mutation(
        "a shard longer than allowed",
        "data/shard_writer.py",
        "shard.num_bytes + len(data) + 1024 > shard_bytes",
        "shard.num_bytes + len(data) > shard_bytes",
        ("tests/data/test_shards.py::test_a_shard_is_as_long_as_allowed_and_no_longer",),
    ),
    Mutation(
        "dots left in shard keys",
        "data/shard_writer.py",
        '.replace(".", "%2E")',
        "",
        ("tests/data/test_shards.py::test_any_key_comes_back_from_a_name_that_webdataset_splits_rightly",),
    ),
    Mutation(
        "what stood behind a shorter shard is kept",
        "data/shard_writer.py",
        "if self._old is not None and self._old.read(1):",
        "if False:",
        ("tests/data/test_shards.py::test_only_shards_that_differ_are_written_again",),
    ),
    Mutation(
        "manifest in the order tasks ended",
        "data/shard_writer.py",
        "places.sort(key=lambda place: place[0].name)",
        "places.reverse()",
        ("tests/data/test_shards.py::test_the_order_in_which_tasks_end_does_not_matter",),
    ),
    Mutation(
        "samples unchecked",
        "data/shards.py",
        "if self.check and checksum(data) != int(sums[row]):",
        "if False:",
        ("tests/data/test_shards.py::test_damage_costs_what_is_damaged_and_names_it",),
    ),
    Mutation(
        "samples cut by damage are called something else",
        "data/tar_index.py",
        '"cut by damage" if damaged else cause',
        "cause",
        ("tests/data/test_shards.py::test_a_damaged_tar_gives_what_came_before",),
    ),
    # Data
    Mutation(
        "budget forgets what is set aside",
        "endpoint/spending.py",
        "prompts = spent.prompt_tokens + self._reserved[0] + prompt",
        "prompts = spent.prompt_tokens + prompt",
        ("tests/test_endpoint.py::test_a_budget_is_never_exceeded_and_not_left_while_a_request_fits",),
    ),
    Mutation(
        "failures are kept",
        "endpoint/session.py",
        "            except _Attempt as error:\n                return Failure(error.cause, error.detail)",
        "            except _Attempt as error:\n                return Reply(error.detail, error.cause, 0, 0)",
        ("tests/test_endpoint.py::test_failures_are_not_kept",),
    ),
    Mutation(
        "the key forgets the seed",
        "endpoint/messages.py",
        '"seed": self.seed,',
        '"seed": None,',
        ("tests/test_endpoint.py::test_nothing_is_asked_twice",),
    ),
    Mutation(
        "clarity at the stored size",
        "data/filters/pixels.py",
        "if size != (height, width):",
        "if False:",
        ("tests/data/test_filters.py::test_clarity_does_not_depend_on_the_stored_size",),
    ),
    Mutation(
        "value is the mean of the colours",
        "data/filters/pixels.py",
        "value = torch.maximum(torch.maximum(image[0], image[1]), image[2])",
        "value = to_gray(image)",
        ("tests/data/test_filters.py::test_luminance_of_a_pure_colour_is_its_largest_channel",),
    ),
    Mutation(
        "NaN passes the filters",
        "data/filters/thresholds.py",
        "if any(score != score for score in scores.values()):",
        "if False:",
        ("tests/data/test_filters.py::test_a_score_that_is_no_number_never_passes",),
    ),
    Mutation(
        "chains of duplicates",
        "data/filters/duplicates.py",
        "alive[row] = not bool((earlier[row] & alive).any())",
        "alive[row] = not bool(earlier[row].any())",
        ("tests/data/test_duplicates.py::test_a_chain_of_small_steps_does_not_swallow_its_ends",),
    ),
    Mutation(
        "a caption that is cut is taken",
        "data/caption_checks.py",
        'if finish_reason == "length" or (density',
        "if (density",
        ("tests/data/test_captions.py::test_each_failure_has_its_name",),
    ),
    Mutation(
        "a scale for all layers",
        "data/fp8.py",
        "largest = wide.abs().amax(2)",
        "largest = wide.abs().amax((1, 2))[:, None].expand(-1, wide.shape[1])",
        ("tests/data/test_features.py::test_eight_bits_are_within_the_formats_rounding",),
    ),
    Mutation(
        "windows of another run are taken",
        "data/rolling.py",
        "if store.numbers == numbers:",
        "if True:",
        ("tests/data/test_features.py::test_windows_are_encoded_once_and_thrown_away",),
    ),
    Mutation(
        "text turned the other way",
        "data/text_ink.py",
        "turn = np.deg2rad(-angle)",
        "turn = np.deg2rad(angle)",
        ("tests/data/test_text_pictures.py::test_the_ink_is_in_its_quads_and_fills_them",),
    ),
    Mutation(
        "rubrics of any name",
        "data/prompts/parse.py",
        "        if name is None:",
        "        if name is None and False:",
        ("tests/data/test_prompts.py::test_each_mistake_in_rubrics_has_its_name",),
    ),
    Mutation(
        "an adapter may overflow",
        "checkpoints/lora.py",
        "        if not bool(_sum(weight, lora, path, scale).isfinite().all())",
        "        if False",
        ("tests/checkpoints/test_lora.py::test_a_merge_that_its_dtype_cannot_hold_changes_nothing",),
    ),
    Mutation(
        "the autoencoder's configuration is believed",
        "checkpoints/autoencoder.py",
        "    if shaped:",
        "    if False:",
        ("tests/pipeline/test_folder.py::test_a_configuration_that_does_not_fit_is_one_error",),
    ),
    # Many ranks
    Mutation(
        "clipping epsilon",
        "parallel/sharding.py",
        "max_norm / (norm + 1e-6)",
        "max_norm / (norm + 1e-1)",
        (SHARDED + "test_clipping_is_the_formula_and_leaves_what_is_not_finite",),
    ),
    Mutation(
        "clipping by a norm that is no number",
        "parallel/sharding.py",
        "    if norm.isfinite():\n",
        "    if True:\n",
        (SHARDED + "test_clipping_is_the_formula_and_leaves_what_is_not_finite",),
    ),
    Mutation(
        "times cast with the inputs",
        "parallel/sharding.py",
        "reduce_dtype=torch.float32, cast_forward_inputs=False",
        "reduce_dtype=torch.float32, cast_forward_inputs=True",
        (SHARDED + "test_times_and_rotations_stay_in_float32_under_bfloat16",),
    ),
    Mutation(
        "weights left gathered in low precision",
        "parallel/sharding.py",
        "mp_policy=policy, reshard_after_forward=True",
        "mp_policy=policy, reshard_after_forward=False",
        (SHARDED + "test_times_and_rotations_stay_in_float32_under_bfloat16",),
    ),
    Mutation(
        "selective recomputation keeps everything",
        "parallel/recompute.py",
        "if name in KEPT_OPERATIONS else",
        "if name else",
        (SHARDED + "test_each_mode_holds_less_than_the_one_before",),
    ),
    Mutation(
        "full recomputation recomputes nothing",
        "parallel/recompute.py",
        "if not torch.is_grad_enabled():",
        "if torch.is_grad_enabled():",
        (SHARDED + "test_each_mode_holds_less_than_the_one_before",),
    ),
    Mutation(
        "one checkpoint too many kept",
        "parallel/sharded_checkpoints.py",
        "self._found()[: -self.keep]",
        "self._found()[: -self.keep - 1]",
        (SHARDED + "test_checkpoints_are_whole_or_absent_and_the_newest_stay",),
    ),
    Mutation(
        "a checkpoint appears before it is on disk",
        "parallel/sharded_checkpoints.py",
        "        for entry in [*new.iterdir(), new]:\n            _sync(entry)\n",
        "",
        (SHARDED + "test_checkpoints_are_whole_or_absent_and_the_newest_stay",),
    ),
    Mutation(
        "a start of a job takes an older start's word",
        "parallel/processes.py",
        "own, end = uuid.uuid4().hex,",
        "own, end = str(rank),",
        ("tests/test_parallel.py::test_every_start_agrees_on_a_word_of_its_own_whatever_the_store_remembers",),
    ),
    Mutation(
        "a dead parameter counts as used",
        "nn/transformer.py",
        '("attn.to_add_out", "txt_norm2", "txt_mlp")',
        '("attn.to_add_out", "txt_mlp")',
        (SHARDED + "test_unused_parameters_are_exactly_those_without_gradient",),
    ),
]


def apply(mutation: Mutation | None, folder: Path) -> None:
    """Copy the library below ``folder`` and plant the mistake in the copy."""
    shutil.copytree(ROOT / "lensmini", folder / "lensmini", ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is None:
        return
    path = folder / "lensmini" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: expected {mutation.old!r} once in {mutation.file}, got {text.count(mutation.old)}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def _arguments(tests: tuple[str, ...]) -> list[str]:
    return ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", *" ".join(tests).split()]


def _child(mutation: Mutation | None, tests: tuple[str, ...], folder: Path) -> int:
    """Inside the fork: import the copy before pytest can find the original, and run the tests against it."""
    import pytest

    apply(mutation, folder)
    sys.path.insert(0, str(folder))
    import lensmini

    if Path(lensmini.__file__).parent != folder / "lensmini":
        return 90
    code = int(pytest.main(_arguments(tests)))
    strangers = [
        name for name, module in sys.modules.items() if name.startswith("lensmini.") and _is_stranger(module, folder)
    ]
    return 91 if strangers else code


def _is_stranger(module: object, folder: Path) -> bool:
    return not str(getattr(module, "__file__", "")).startswith(str(folder))


def _start(mutation: Mutation | None, tests: tuple[str, ...], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 92
    try:
        with log.open("w") as stream, tempfile.TemporaryDirectory() as folder:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            signal.alarm(TIMEOUT_S)
            code = _child(mutation, tests, Path(folder))
    except BaseException:  # the fork must never return into the caller's stack
        traceback.print_exc()
    finally:
        os._exit(code)


def run_all(names: list[str] | None = None, *, jobs: int = 2) -> dict[str, dict[str, object]]:
    """Run the untouched copy and every mistake; exit code 1 of pytest means that a test failed, as it should."""
    with contextlib.redirect_stdout(io.StringIO()):
        _preload()
    everything = tuple(dict.fromkeys(test for m in MUTATIONS for test in m.tests if " " not in test))
    selected = tuple(dict.fromkeys(test for m in MUTATIONS for test in m.tests if " " in test))
    queue: list[tuple[str, Mutation | None, tuple[str, ...]]] = [(UNTOUCHED, None, everything)]
    queue += [(f"{UNTOUCHED} {i}", None, (test,)) for i, test in enumerate(selected)]
    queue += [(m.name, m, m.tests) for m in MUTATIONS]
    if names:
        queue = [item for item in queue if item[0] in names]
    results: dict[str, dict[str, object]] = {}
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as logs:
        for index, (name, mutation, tests) in enumerate(queue):
            if len(running) >= jobs:
                _collect(running, results)
            log = Path(logs) / f"{index}.txt"
            running[_start(mutation, tests, log)] = (name, log)
        while running:
            _collect(running, results)
    return results


def _collect(running: dict[int, tuple[str, Path]], results: dict[str, dict[str, object]]) -> None:
    pid, status = os.waitpid(-1, 0)
    name, log = running.pop(pid)
    results[name] = {"code": os.waitstatus_to_exitcode(status), "log": log.read_text()[-3000:]}


def _preload() -> None:
    """Import what is slow to import once, before forking; nothing of the library."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.tensor
    import torch.nn.attention.flex_attention

    torch.set_num_threads(1)


if __name__ == "__main__":
    os.environ["HYPOTHESIS_PROFILE"] = "ci"  # the same examples every time
    os.chdir(ROOT)
    print(json.dumps(run_all(sys.argv[1:])))
