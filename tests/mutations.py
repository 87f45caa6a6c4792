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
TIMEOUT_S = 240


@dataclass(frozen=True)
class Mutation:
    """One mistake: a fragment that occurs once in a file of the library, what replaces it, and who notices.

    The file is named from ``lensmini``; a script's is ``../experiments/NAME.py``.
    """

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
FAST = "tests/pipeline/test_fast_paths.py::"
OFFLOAD = "tests/pipeline/test_offload.py::"
MEMORY = "tests/pipeline/test_memory.py::"
STRIPS = "tests/nn/test_strips.py::"
KERNELS = "tests/sampling/test_kernels.py"
LIKELIHOOD = "tests/sampling/test_likelihood.py"
ROLLOUT = "tests/sampling/test_rollout.py"
ADVANTAGES = "tests/objectives/test_advantages.py"
MATCHING = "tests/objectives/test_matching.py"
RATIO = "tests/objectives/test_ratio.py"
MISSING = "tests/objectives/test_policy_properties.py"
PROMPTING = "tests/prompting/"
REINFORCE = "tests/experiments/test_reinforce.py::"
EVALUATE = "tests/experiments/test_evaluate.py::"
EVALUATE_OWN = "tests/experiments/test_evaluate_own.py::"
EVALUATE_RULES = "tests/experiments/test_evaluate_rules.py::"
CONSISTENCY = "tests/objectives/test_consistency.py"
DISCRETE = CONSISTENCY + " -k TestDiscrete"
GAPS = CONSISTENCY + " -k TestGaps"
FLOW_MAPS = CONSISTENCY + " -k TestStraightPath"
TRIGFLOW = CONSISTENCY + " -k TestTrigFlow"
NORMALISED = CONSISTENCY + " -k TestNormalisation"
CONSISTENCY_LAWS = "tests/objectives/test_consistency_properties.py"
DERIVATIVE = "tests/objectives/test_consistency_derivative.py"
DIRECTIONS = "tests/objectives/test_distribution_matching.py::TestDirection::"
GUIDANCE = "tests/objectives/test_distribution_matching.py::TestGuidance::"
SURROGATE = "tests/objectives/test_distribution_matching.py::TestLoss::"
LEVELS = "tests/objectives/test_distribution_matching.py::TestNoiseLevels::"
DIVERGENCES = "tests/objectives/test_distribution_matching.py::TestDivergence::"
ADVERSARIAL = "tests/objectives/test_adversarial.py::"
FEW_STEP = "tests/sampling/test_few_step.py::"
HEAD = "tests/nn/test_discriminator.py::"
REWARD_MODEL = "tests/rewards/test_model.py::"
JUDGES = "tests/rewards/test_judges.py"
LOCAL_JUDGE = "tests/rewards/test_local_judge.py"
PROGRAMS = "tests/rewards/test_programs.py"
INJECTION = "tests/rewards/test_injection.py"
REPEATS = "tests/rewards/test_repeats.py"
DIAGNOSTICS = "tests/rewards/test_diagnostics.py::"
DIAGNOSED_RUNS = "tests/rewards/test_diagnostics_run.py::"

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
        "velocity=velocity, reference_velocity=reference_velocity.detach()",
        "velocity=velocity, reference_velocity=reference_velocity",
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
    # Fast pictures
    Mutation(
        "a piece joins samples with an empty one between them",
        "nn/chunk_cuts.py",
        "whole and last.sample + last.samples == sample and pairs",
        "whole and pairs",
        (FAST + "test_chunks_cover_every_token_once_in_order",),
    ),
    Mutation(
        "a piece joins samples of other text",
        "nn/chunk_cuts.py",
        " and pairs[last.sample] == pairs[sample]:",
        ":",
        (FAST + "test_chunks_cover_every_token_once_in_order",),
    ),
    Mutation(
        "text of a piece stands before the image",
        "nn/chunk_space.py",
        "(self.image_lengths[piece.sample] if text else 0)",
        "0",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "later chunks turn by the first one's positions",
        "nn/chunked.py",
        "_split(turn[chunk.rows][piece.rows], piece)",
        "_split(turn[piece.rows], piece)",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "gates of a chunk are exchanged",
        "nn/chunked.py",
        "_add_gated(hidden, update, mod[5], chunk)",
        "_add_gated(hidden, update, mod[2], chunk)",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "epsilon of heads in chunks",
        "nn/chunked.py",
        ".add_(norms[0].eps).rsqrt_()",
        ".add_(1e-2).rsqrt_()",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "a group is modulated as the first one",
        "nn/chunked.py",
        "(vectors[group.samples].unbind(1) for",
        "(vectors[: group.samples.stop - group.samples.start].unbind(1) for",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "a group turns by the first one's positions",
        "nn/chunked.py",
        "turns[0][group.image_rows],",
        "turns[0],",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "a group counts its last sample only",
        "nn/chunk_cuts.py",
        "        used += length",
        "        used = length",
        (FAST + "test_groups_are_as_full_as_they_may_be",),
    ),
    Mutation(
        "runs of a group share their queries",
        "nn/chunk_space.py",
        "        used += 3 * size",
        "        used += 0",
        (FAST + "test_blocks_in_chunks_equal_the_blocks",),
    ),
    Mutation(
        "hooked linears run in chunks",
        "nn/chunked.py",
        "part._forward_hooks or part._forward_pre_hooks or ",
        "",
        (FAST + "test_what_cannot_run_in_chunks_runs_block_by_block",),
    ),
    Mutation(
        "the text of one pass is the next one's",
        "pipeline/passes.py",
        "words.clone(), vectors",
        "words, vectors",
        (FAST + "test_passes_can_be_asked_in_any_order_and_change_no_input",),
    ),
    Mutation(
        "an engine keeps the modulation of other weights",
        "pipeline/passes.py",
        "tuple(map(tuple, times.tolist())), versions)",
        "tuple(map(tuple, times.tolist())))",
        (FAST + "test_one_engine_serves_runs_of_other_schedules_models_and_weights",),
    ),
    Mutation(
        "every step is modulated as the first",
        "pipeline/schedule_modulation.py",
        "rows = self.rows[index]",
        "rows = self.rows[0]",
        (FAST + "test_a_step_of_the_table_is_the_models_modulation_of_that_step",),
    ),
    Mutation(
        "equal times are modulated again",
        "pipeline/schedule_modulation.py",
        "torch.unique(times.cpu(), return_inverse=True)",
        "(times.cpu().flatten(), torch.arange(times.numel()).view(times.shape))",
        (FAST + "test_modulation_runs_once_for_a_run_and_a_repeated_schedule_not_at_all",),
    ),
    Mutation(
        "the unconditional half is asked first",
        "pipeline/painting.py",
        "cond, uncond = velocity.chunk(2)",
        "uncond, cond = velocity.chunk(2)",
        (FAST + "test_the_published_run",),
    ),
    Mutation(
        "weights of the first round are streamed for ever",
        "pipeline/offload.py",
        "        self._bring_home(index)\n        self._tell",
        "        self._tell",
        (OFFLOAD + "test_weights_replaced_between_rounds_are_the_ones_that_visit",),
    ),
    Mutation(
        "a schedule is kept from call to call",
        "pipeline/call.py",
        "                engine.forget()",
        "                pass",
        (FAST + "test_weights_changed_in_any_way_between_calls_are_seen",),
    ),
    Mutation(
        "nothing is prefetched",
        "pipeline/offload.py",
        "for ahead in range(1, min(self.prefetch, len(self.order) - 1) + 1):",
        "for ahead in range(1, 1):",
        (OFFLOAD + "test_every_module_is_there_when_used_and_few_are_there_at_once",),
    ),
    Mutation(
        "streamed weights stay",
        "pipeline/offload.py",
        "            tensor.data = host\n        del self._ready[index]",
        "            pass\n        del self._ready[index]",
        (OFFLOAD + "test_every_module_is_there_when_used_and_few_are_there_at_once",),
    ),
    Mutation(
        "prefetching does not wrap around",
        "pipeline/offload.py",
        "self.order[(place + ahead) % len(self.order)]",
        "self.order[min(place + ahead, len(self.order) - 1)]",
        (OFFLOAD + "test_every_module_is_there_when_used_and_few_are_there_at_once",),
    ),
    Mutation(
        "streamed blocks are the first ones",
        "pipeline/offload.py",
        "[index * num // streamed for index in range(streamed)]",
        "list(range(streamed))",
        (OFFLOAD + "test_streamed_modules_are_evenly_spread",),
    ),
    Mutation(
        "a strip without the row above it",
        "nn/strips.py",
        "part = part.clone() if above is None else torch.cat([above, part], dim=2)",
        "part = part.clone() if above is None else torch.cat([part[:, :, :1], part], dim=2)",
        (STRIPS + "test_other_shapes_of_decoders_in_float64_are_exact",),
    ),
    Mutation(
        "norms of each strip's own mean",
        "nn/strips.py",
        "mean = mean + gap * num / total",
        "mean = own.double()",
        (STRIPS + "test_other_shapes_of_decoders_in_float64_are_exact",),
    ),
    Mutation(
        "variances of strips without their means' distance",
        "nn/strips.py",
        "square + var.double() * num + gap.square() * count * num / total",
        "square + var.double() * num",
        (STRIPS + "test_other_shapes_of_decoders_in_float64_are_exact",),
    ),
    Mutation(
        "the spare half of a map stays",
        "nn/strips.py",
        "x = x.clone() if x.untyped_storage().nbytes() > x.nbytes else x",
        "x = x",
        (STRIPS + "test_memory_is_less_than_half",),
    ),
    Mutation(
        "one streamed block is counted",
        "pipeline/memory.py",
        "min(2, sizes.num_blocks - plan.resident_blocks) * sizes.block",
        "min(1, sizes.num_blocks - plan.resident_blocks) * sizes.block",
        (MEMORY + "test_streaming_holds_two_blocks_and_no_more_than_are_left",),
    ),
    Mutation(
        "half of the feed-forward layer is not counted",
        "pipeline/memory.py",
        "(6 * work.dim + 3 * work.mlp_dim)",
        "(6 * work.dim + 2 * work.mlp_dim)",
        (MEMORY + "test_activations_are_estimated_from_above_and_by_no_more_than_a_fifth",),
    ),
    Mutation(
        "the unconditional half needs no memory",
        "pipeline/memory.py",
        "halves = transformer.config, 2 if guided else 1",
        "halves = transformer.config, 1",
        ("tests/pipeline/test_memory.py::test_the_work_of_a_guided_run",),
    ),
    Mutation(
        "the waiting transformer is on the device",
        "pipeline/placement.py",
        "        if plan.transformer_waits:\n",
        "        if False:\n",
        (MEMORY + "test_the_encoder_comes_and_goes_as_the_plan_says",),
    ),
    Mutation(
        "modulation layers follow the blocks",
        "pipeline/placement.py",
        'if not name.endswith("_mod")',
        "if name",
        (MEMORY + "test_only_the_bodies_of_streamed_blocks_are_copied",),
    ),
    Mutation(
        "rows share a scale",
        "pipeline/low_precision.py",
        "wide.abs().amax(-1, keepdim=True)",
        "wide.abs().amax()",
        ("tests/pipeline/test_low_precision.py::test_rows_round_to_e4m3_with_their_own_scale",),
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
    # Distillation
    Mutation(
        "sign of the matching direction",
        "objectives/distribution_matching.py",
        "fake - real, real, x, normaliser",
        "real - fake, real, x, normaliser",
        (DIRECTIONS + "test_it_is_a_difference_of_velocities_and_of_scores",),
    ),
    Mutation(
        "direction divided by the distance to the fake prediction",
        "objectives/distribution_matching.py",
        '_normalised("dmd_direction", fake - real, real,',
        '_normalised("dmd_direction", fake - real, fake,',
        (DIRECTIONS + "test_the_divisor_is_each_samples_mean_distance_to_the_teachers_prediction",),
    ),
    Mutation(
        "normaliser of squares",
        "objectives/distribution_matching.py",
        "reduce_samples(apart.abs(), ",
        "reduce_samples(apart.square(), ",
        (DIRECTIONS + "test_the_normalised_direction_knows_no_scale_and_no_origin",),
    ),
    Mutation(
        "normaliser summed, not averaged",
        "objectives/distribution_matching.py",
        'apart.abs(), "mean", mask=counts',
        'apart.abs(), "sum", mask=counts',
        (DIRECTIONS + "test_the_divisor_is_each_samples_mean_distance_to_the_teachers_prediction",),
    ),
    Mutation(
        "floor added to the divisor",
        "objectives/distribution_matching.py",
        "layout=layout).clamp_min(floor)",
        "layout=layout) + floor",
        (DIRECTIONS + "test_the_floor_bounds_it_where_student_and_teacher_agree",),
    ),
    Mutation(
        "broken directions pass",
        "objectives/distribution_matching.py",
        'if direction.device.type == "cpu" and not holds(direction.isfinite()):',
        "if False:",
        (DIRECTIONS + "test_a_broken_network_is_an_error_and_a_masked_one_is_hidden",),
    ),
    Mutation(
        "masked elements count in the divisor",
        "objectives/distribution_matching.py",
        'apart.abs(), "mean", mask=counts, layout',
        'apart.abs(), "mean", mask=None, layout',
        (DIRECTIONS + "test_a_broken_network_is_an_error_and_a_masked_one_is_hidden",),
    ),
    Mutation(
        "augmentation with the whole scale",
        "objectives/distribution_matching.py",
        "added = -(scale - 1) * (cond - uncond)",
        "added = -scale * (cond - uncond)",
        (GUIDANCE + "test_guidance_one_adds_nothing",),
    ),
    Mutation(
        "sign of the augmentation",
        "objectives/distribution_matching.py",
        "added = -(scale - 1) * (cond - uncond)",
        "added = (scale - 1) * (cond - uncond)",
        (GUIDANCE + "test_descending_it_moves_towards_what_the_text_adds",),
    ),
    Mutation(
        "augmentation divided by the distance to the unconditional",
        "objectives/distribution_matching.py",
        '"cfg_augmentation_direction", added, cond,',
        '"cfg_augmentation_direction", added, uncond,',
        (GUIDANCE + "test_matching_and_augmentation_add_up_to_the_guided_direction",),
    ),
    Mutation(
        "direction keeps its graph",
        "objectives/distribution_matching.py",
        "    direction = direction.detach()\n    if normaliser ==",
        "    if normaliser ==",
        (SURROGATE + "test_gradient_reaches_the_student_only_through_the_surrogate",),
    ),
    Mutation(
        "surrogate lets gradient into the direction",
        "objectives/distribution_matching.py",
        "x=x, direction=direction.detach())",
        "x=x, direction=direction)",
        (SURROGATE + "test_gradient_reaches_the_student_only_through_the_surrogate",),
    ),
    Mutation(
        "surrogate ascends",
        "objectives/distribution_matching.py",
        "moved = samples - samples.detach() + wanted",
        "moved = samples.detach() - samples + wanted",
        (SURROGATE + "test_its_gradient_is_the_direction_and_its_value_half_the_square",),
    ),
    Mutation(
        "surrogate without its half",
        "objectives/distribution_matching.py",
        "reduce_samples(0.5 * moved.square()",
        "reduce_samples(moved.square()",
        (SURROGATE + "test_its_gradient_is_the_direction_and_its_value_half_the_square",),
    ),
    Mutation(
        "surrogate rounds the direction away",
        "objectives/distribution_matching.py",
        "moved = samples - samples.detach() + wanted",
        "moved = samples - (samples - wanted).detach()",
        (SURROGATE + "test_a_small_direction_survives_far_from_the_origin",),
    ),
    Mutation(
        "augmentation at noisier levels",
        "objectives/distribution_matching.py",
        "    top = time.clamp_max(high)\n",
        "    top = torch.full_like(time, high)\n",
        (LEVELS + "test_levels_stay_in_their_ranges",),
    ),
    Mutation(
        "matching bounded by the student's step",
        "objectives/distribution_matching.py",
        "    matching = low + (high - low) * first\n",
        "    matching = low + (time - low) * first\n",
        (LEVELS + "test_the_laws_are_uniform",),
    ),
    Mutation(
        "decoupled levels share their number",
        "objectives/distribution_matching.py",
        "NoiseLevels(matching, low + (high - low) * second)",
        "NoiseLevels(matching, low + (high - low) * first)",
        (LEVELS + "test_the_laws_are_uniform",),
    ),
    Mutation(
        "forward KL upside down",
        "objectives/distribution_matching.py",
        "        return value.exp()\n",
        "        return (-value).exp()\n",
        (DIVERGENCES + "test_weighted_matching_descends_that_divergence",),
    ),
    Mutation(
        "Jensen-Shannon without its half",
        "objectives/distribution_matching.py",
        "return value.sigmoid() / 2",
        "return value.sigmoid()",
        (DIVERGENCES + "test_the_weight_is_the_second_derivative_times_the_square_of_the_ratio",),
    ),
    Mutation(
        "generator runs from the real",
        "objectives/adversarial.py",
        "_shown(F.softplus(-fake), seen)",
        "_shown(F.softplus(fake), seen)",
        (ADVERSARIAL + "TestLosses",),
    ),
    Mutation(
        "saturating generator",
        "objectives/adversarial.py",
        "_shown(F.softplus(-fake), seen)",
        "_shown(-F.softplus(fake), seen)",
        (ADVERSARIAL + "TestLosses",),
    ),
    Mutation(
        "discriminator takes fake for real",
        "objectives/adversarial.py",
        "F.softplus(-real) + F.softplus(fake)",
        "F.softplus(real) + F.softplus(-fake)",
        (ADVERSARIAL + "TestLosses",),
    ),
    Mutation(
        "penalty of absolute differences",
        "objectives/adversarial.py",
        "(real - perturbed).square()",
        "(real - perturbed).abs()",
        (ADVERSARIAL + "TestApproximateR1",),
    ),
    Mutation(
        "masked logits have gradient",
        "objectives/adversarial.py",
        "value = value if mask is None else torch.where(mask, value, 0.0)",
        "value = value",
        (ADVERSARIAL + "TestLosses",),
    ),
    Mutation(
        "re-noised to the same level",
        "sampling/few_step.py",
        "return interpolate(clean, fresh, t_next, layout=layout)",
        "return interpolate(clean, fresh, t, layout=layout)",
        (FEW_STEP + "TestFewSteps",),
    ),
    Mutation(
        "noise of the first step every time",
        "sampling/few_step.py",
        "noises(index) if callable(noises) else noises[index]",
        "noises(0) if callable(noises) else noises[0]",
        (FEW_STEP + "TestFewSteps",),
    ),
    Mutation(
        "last step noised again",
        "sampling/few_step.py",
        "    if index == grid.shape[0] - 2:\n",
        "    if index == grid.shape[0]:\n",
        (FEW_STEP + "TestFewSteps",),
    ),
    Mutation(
        "simulation stops one step late",
        "sampling/few_step.py",
        "walking = stops > index",
        "walking = stops >= index",
        (FEW_STEP + "TestBackwardSimulation",),
    ),
    Mutation(
        "simulation carries gradient through all steps",
        "sampling/few_step.py",
        "    with torch.no_grad():\n        for index",
        "    with torch.enable_grad():\n        for index",
        (FEW_STEP + "TestBackwardSimulation",),
    ),
    Mutation(
        "prediction at the wrong step's time",
        "sampling/few_step.py",
        "    t = grid[stops, torch.arange",
        "    t = grid[stops + 1, torch.arange",
        (FEW_STEP + "TestBackwardSimulation",),
    ),
    Mutation(
        "large pictures have more votes",
        "nn/discriminator.py",
        "votes.append(layout.mean(logit(",
        "votes.append(0.1 * layout.image_offsets.diff() * layout.mean(logit(",
        (HEAD + "test_it_is_the_mean_vote_of_tokens_and_blocks_written_out",),
    ),
    Mutation(
        "head reads the text",
        "nn/discriminator.py",
        "            image, _ = hidden_states[block]",
        "            image = hidden_states[block][0] + hidden_states[block][1].sum(0)",
        (HEAD + "test_it_is_the_mean_vote_of_tokens_and_blocks_written_out",),
    ),
    Mutation(
        "head sums its blocks",
        "nn/discriminator.py",
        "torch.stack(votes).mean(0)",
        "torch.stack(votes).sum(0)",
        (HEAD + "test_it_is_the_mean_vote_of_tokens_and_blocks_written_out",),
    ),
    Mutation(
        "every block starts alike",
        "nn/discriminator.py",
        'initial_value(f"discriminator.{name}"',
        'initial_value("discriminator." + name.split(".")[0] + name[-7:]',
        (HEAD + "test_initial_weights_are_a_function_of_seed_and_name",),
    ),
    # Consistency models and flow maps
    Mutation(
        "pseudo-Huber forgets the square of c",
        "objectives/consistency/discrete.py",
        "(squares + c**2).sqrt() + c)",
        "(squares + c).sqrt() + c)",
        (DISCRETE,),
    ),
    Mutation(
        "pseudo-Huber starts at c instead of zero",
        "objectives/consistency/discrete.py",
        "squares / ((squares + c**2).sqrt() + c)",
        "(squares + c**2).sqrt()",
        (DISCRETE,),
    ),
    Mutation(
        "pseudo-Huber by its formula, which rounds to zero",
        "objectives/consistency/discrete.py",
        "squares / ((squares + c**2).sqrt() + c)",
        "(squares + c**2).sqrt() - c",
        (DISCRETE,),
    ),
    Mutation(
        "pseudo-Huber of a sample without the root of its size",
        "objectives/consistency/discrete.py",
        ".clamp_min(1).sqrt()",
        ".clamp_min(1)",
        (DISCRETE,),
    ),
    Mutation(
        "pseudo-Huber radius counts hidden elements",
        "objectives/consistency/discrete.py",
        "ones = torch.ones_like(squares) if counts is None else counts.expand(squares.shape).to(squares.dtype)",
        "ones = torch.ones_like(squares)",
        (CONSISTENCY_LAWS,),
    ),
    Mutation(
        "consistency target keeps its gradient",
        "objectives/consistency/discrete.py",
        "prediction=prediction, target=target.detach())",
        "prediction=prediction, target=target)",
        (DISCRETE,),
    ),
    Mutation(
        "consistency weight keeps its gradient",
        "objectives/consistency/discrete.py",
        'known_values("weight", weight.detach(), mask',
        'known_values("weight", weight, mask',
        (DISCRETE,),
    ),
    Mutation(
        "teacher steps towards noise",
        "objectives/consistency/discrete.py",
        'name="t_next") - expand_time(t, noisy, layout=layout)',
        'name="t_next") * -1 + expand_time(t, noisy, layout=layout)',
        (DISCRETE,),
    ),
    Mutation(
        "heun without the half",
        "objectives/consistency/discrete.py",
        "noisy + step / 2 * (first",
        "noisy + step * (first",
        (DISCRETE,),
    ),
    Mutation(
        "heun looks twice at the start",
        "objectives/consistency/discrete.py",
        "velocity(there.to(noisy.dtype), t_next)",
        "velocity(there.to(noisy.dtype), t)",
        (DISCRETE,),
    ),
    Mutation(
        "teacher's step is rounded to the state's dtype",
        "objectives/consistency/discrete.py",
        "            return there\n",
        "            return there.to(noisy.dtype)\n",
        (DISCRETE,),
    ),
    Mutation(
        "boundary by multiplication with zero",
        "objectives/consistency/discrete.py",
        "torch.where(time > 0, noisy - time * output, noisy.to(time.dtype))",
        "noisy - time * output",
        (DISCRETE,),
    ),
    Mutation(
        "consistency target is the noise",
        "objectives/consistency/discrete.py",
        "noisy - time * output",
        "noisy + (1 - time) * output",
        (DISCRETE,),
    ),
    Mutation(
        "pairs skip a step of the grid",
        "objectives/consistency/gaps.py",
        "grid.gather(1, step + 1)",
        "grid.gather(1, (step + 2).clamp_max(times.shape[-1] - 1))",
        (GAPS,),
    ),
    Mutation(
        "last step of the grid is never drawn",
        "objectives/consistency/gaps.py",
        "torch.randint(times.shape[-1] - 1,",
        "torch.randint(max(times.shape[-1] - 2, 1),",
        (GAPS,),
    ),
    Mutation(
        "curriculum's intervals are one too few",
        "objectives/consistency/gaps.py",
        "(math.log2(stop // start) + 1)",
        "math.log2(stop // start)",
        (GAPS,),
    ),
    Mutation("gap grows", "objectives/consistency/gaps.py", "(1 - base**-stage)", "base**-stage", (GAPS,)),
    Mutation(
        "mean velocity without the time span",
        "objectives/consistency/flow_maps.py",
        "return flow - hide(_span(t, r, velocity, layout), counts).to(flow.dtype) * slope",
        "return flow - slope",
        (FLOW_MAPS,),
    ),
    Mutation(
        "slope of the mean velocity has the wrong sign",
        "objectives/consistency/flow_maps.py",
        "return flow - hide(_span",
        "return flow + hide(_span",
        (FLOW_MAPS,),
    ),
    Mutation(
        "mean velocity's span is t",
        "objectives/consistency/flow_maps.py",
        ' - expand_time(r, latents, layout=layout, name="r")',
        ' + 0 * expand_time(r, latents, layout=layout, name="r")',
        (FLOW_MAPS,),
    ),
    Mutation(
        "mean velocity target keeps its gradient",
        "objectives/consistency/flow_maps.py",
        "velocity=velocity.detach(), dudt=dudt.detach())",
        "velocity=velocity, dudt=dudt)",
        (TRIGFLOW,),
    ),
    Mutation(
        "tangent keeps its gradient",
        "objectives/consistency/tangents.py",
        "prediction=prediction.detach(),",
        "prediction=prediction,",
        (TRIGFLOW,),
    ),
    Mutation(
        "improved meanflow trains through the slope",
        "objectives/consistency/flow_maps.py",
        "mean_velocity=mean_velocity, dudt=dudt.detach()",
        "mean_velocity=mean_velocity, dudt=dudt",
        (FLOW_MAPS,),
    ),
    Mutation(
        "improved meanflow subtracts its slope",
        "objectives/consistency/flow_maps.py",
        "compound = mine + hide(",
        "compound = mine - hide(",
        (FLOW_MAPS,),
    ),
    Mutation(
        "adaptive weight has c outside the power",
        "objectives/consistency/flow_maps.py",
        "(known + c).pow(-p)",
        "1 / (known.pow(p) + c)",
        (FLOW_MAPS,),
    ),
    Mutation(
        "adaptive weight is trained",
        "objectives/consistency/flow_maps.py",
        'known_values("loss", loss.detach()',
        'known_values("loss", loss',
        (FLOW_MAPS,),
    ),
    Mutation(
        "angle counts from noise",
        "objectives/consistency/trigflow.py",
        "torch.atan2(t, 1 - t)",
        "torch.atan2(1 - t, t)",
        (TRIGFLOW,),
    ),
    Mutation(
        "trigflow's velocity forgets the state",
        "objectives/consistency/trigflow.py",
        "flow = (cos - sin) * noisy + velocity / (cos + sin)",
        "flow = velocity / (cos + sin)",
        (TRIGFLOW,),
    ),
    Mutation(
        "trigflow's velocity is scaled the wrong way",
        "objectives/consistency/trigflow.py",
        "flow = (cos - sin) * noisy + velocity / (cos + sin)",
        "flow = (cos - sin) * noisy + velocity * (cos + sin)",
        (TRIGFLOW,),
    ),
    Mutation(
        "wrapped network sees the unscaled state",
        "objectives/consistency/trigflow.py",
        "straight = noisy / (cos + sin)",
        "straight = noisy * 1.0",
        (TRIGFLOW,),
    ),
    Mutation(
        "back to the straight path with a plus",
        "objectives/consistency/trigflow.py",
        "(cos + sin) * prediction - (cos - sin) * noisy",
        "(cos + sin) * prediction + (cos - sin) * noisy",
        (TRIGFLOW,),
    ),
    Mutation(
        "tangent pulls away from the teacher",
        "objectives/consistency/tangents.py",
        "hide(-pull * (mine - goal) - rest",
        "hide(pull * (mine - goal) - rest",
        (TRIGFLOW,),
    ),
    Mutation(
        "tangent has the wrong sign",
        "objectives/consistency/tangents.py",
        "hide(-pull * (mine - goal) - rest",
        "hide(-pull * (mine - goal) + rest",
        (TRIGFLOW,),
    ),
    Mutation(
        "rcm has scm's weight",
        "objectives/consistency/tangents.py",
        "cos * (1 - warmup**2 * sin.square()).sqrt()",
        "cos * (1 - sin.square()).sqrt()",
        (TRIGFLOW,),
    ),
    Mutation(
        "rcm's weight warms up with r instead of its square",
        "objectives/consistency/tangents.py",
        "1 - warmup**2 * sin.square()",
        "1 - warmup * sin.square()",
        (TRIGFLOW,),
    ),
    Mutation(
        "warm-up forgets the state",
        "objectives/consistency/tangents.py",
        "warmup * cos * sin * state",
        "cos * sin * state",
        (TRIGFLOW,),
    ),
    Mutation(
        "warm-up forgets the derivative",
        "objectives/consistency/tangents.py",
        "(warmup if scale_derivative else 1.0)",
        "(1.0 if scale_derivative else warmup)",
        (TRIGFLOW,),
    ),
    Mutation(
        "scm's weight is cos",
        "objectives/consistency/tangents.py",
        "pull = cos.square() if",
        "pull = cos if",
        (TRIGFLOW,),
    ),
    Mutation(
        "direction without its factor",
        "objectives/consistency/tangents.py",
        "(cos * sin * teacher).to(teacher.dtype)",
        "(cos * teacher).to(teacher.dtype)",
        (TRIGFLOW,),
    ),
    Mutation(
        "rms is the length",
        "objectives/consistency/tangents.py",
        'how = "mean" if reduction == "rms"',
        'how = "sum" if reduction == "rms"',
        (NORMALISED,),
    ),
    Mutation(
        "normalisation without the root",
        "objectives/consistency/tangents.py",
        "layout=layout).sqrt()\n    rows",
        "layout=layout)\n    rows",
        (NORMALISED,),
    ),
    Mutation(
        "normalisation's c multiplies",
        "objectives/consistency/tangents.py",
        "*[1] * (values.ndim - 1)) + c)",
        "*[1] * (values.ndim - 1)) * c)",
        (NORMALISED,),
    ),
    Mutation(
        "difference over one step", "objectives/consistency/derivative.py", "/ (2 * step)", "/ step", (DERIVATIVE,)
    ),
    Mutation(
        "difference on one side",
        "objectives/consistency/derivative.py",
        "for side in (1, -1)",
        "for side in (1, 0)",
        (DERIVATIVE,),
    ),
    Mutation(
        "semi forgets the other primals",
        "objectives/consistency/derivative.py",
        "return _not_rounded(value), along + rest",
        "return _not_rounded(value), along",
        (DERIVATIVE,),
    ),
    Mutation(
        "semi shifts the first primal too",
        "objectives/consistency/derivative.py",
        "lambda *moved: function(first, *moved), others, tangents[1:], step",
        "function, primals, tangents, step",
        (DERIVATIVE,),
    ),
    Mutation(
        "derivative keeps its graph",
        "objectives/consistency/derivative.py",
        "return result[0], result[1].detach()",
        "return result[0], result[1]",
        (DERIVATIVE,),
    ),
    Mutation(
        "half precision passes",
        "objectives/consistency/derivative.py",
        "return torch.finfo(dtype).bits < 32",
        "return torch.finfo(dtype).bits < 16",
        (DERIVATIVE,),
    ),
    Mutation(
        "narrow weights behind a cast pass",
        "objectives/consistency/derivative.py",
        "(value).count_nonzero() >= 64",
        "(value).count_nonzero() >= 10**9",
        (DERIVATIVE,),
    ),
    Mutation(
        "autocast is not looked at",
        "objectives/consistency/derivative.py",
        "if torch.is_autocast_enabled(device) and",
        "if False and",
        (DERIVATIVE,),
    ),
    Mutation(
        "forward mode of an expanded time",
        "objectives/consistency/derivative.py",
        "tuple(x.contiguous() for x in tensors)",
        "tuple(tensors)",
        (DERIVATIVE,),
    ),
    Mutation(
        "extrapolation with the wrong weight",
        "objectives/consistency/derivative.py",
        "(4 * fine - coarse) / 3",
        "(2 * fine - coarse)",
        (DERIVATIVE,),
    ),
    Mutation(
        "self-check rounds times",
        "objectives/consistency/derivative.py",
        "x.to(dtype if x.ndim > 1 else time_dtype)",
        "x.to(dtype)",
        (DERIVATIVE,),
    ),
    Mutation(
        "one noise for every picture in training",
        "../experiments/reinforce_update.py",
        'seed_of(config.run.seed, "training", _name(config, sample), place)',
        'seed_of(config.run.seed, "training", 0, place)',
        (REINFORCE + "test_nft_of_a_chunk_is_the_written_out_loss_of_each_picture",),
    ),
    Mutation(
        "distance to the sampling policy in place of the reference",
        "../experiments/reinforce_update.py",
        """            with policies.acting("reference") as model:
                reference = velocity(model)""",
        """            with policies.acting("old") as model:
                reference = velocity(model)""",
        (REINFORCE + "test_nft_of_a_chunk_is_the_written_out_loss_of_each_picture",),
    ),
    Mutation(
        "size of a step depends on the advantages' clip",
        "../experiments/reinforce_update.py",
        "losses = losses * (objective.advantage_clip / objective.beta)",
        "losses = losses / objective.beta",
        (REINFORCE + "test_nft_of_a_chunk_is_the_written_out_loss_of_each_picture",),
    ),
    Mutation(
        "pictures without a reward are trained on",
        "../experiments/reinforce_update.py",
        'new, shared = velocity(policies.model), {"mask": known, "layout": layout}',
        'new, shared = velocity(policies.model), {"mask": None, "layout": layout}',
        (REINFORCE + "test_masked_pictures_count_as_if_they_were_not_there",),
    ),
    Mutation(
        "one noise for a whole group of rollouts",
        "../experiments/reinforce_rollout.py",
        'seed_of(config.run.seed, "noise", sample.number)',
        'seed_of(config.run.seed, "noise", sample.group)',
        (REINFORCE + "test_a_picture_depends_on_its_number_and_not_on_what_is_sampled_beside_it",),
    ),
    Mutation(
        "every group begins with the same shapes",
        "../experiments/reinforce_rollout.py",
        "places = range(first, first + size) if not kinds",
        "places = range(size) if not kinds",
        (REINFORCE + "test_every_prompt_comes_once_before_any_comes_again_and_shapes_are_dealt_evenly",),
    ),
    Mutation(
        "pictures that fit no process are lost",
        "../experiments/reinforce_rollout.py",
        "each = -(-len(chunks) // group.world_size)",
        "each = len(chunks) // group.world_size",
        (REINFORCE + "test_processes_have_whole_chunks_that_do_not_depend_on_their_number",),
    ),
    Mutation(
        "updates of one rollout see the same times",
        "../experiments/reinforce_update.py",
        "order[(update * wanted + index) % len(places)]",
        "order[index % len(places)]",
        (REINFORCE + "test_updates_see_different_times_as_long_as_there_are_some",),
    ),
    Mutation(
        "sampling policy follows by the decay",
        "../experiments/reinforce_state.py",
        "lerp_parameters_(self.old, self._masters(), 1 - decay)",
        "lerp_parameters_(self.old, self._masters(), decay)",
        (REINFORCE + "test_another_policy_acts_for_a_while_and_the_sampling_one_follows_the_trained_one",),
    ),
    Mutation(
        "a policy that acts stays after an error",
        "../experiments/reinforce_state.py",
        """        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]""",
        """        except RuntimeError:
            raise
        else:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]""",
        (REINFORCE + "test_another_policy_acts_for_a_while_and_the_sampling_one_follows_the_trained_one",),
    ),
    Mutation(
        "the sampling policy of a resumed run is the base",
        "../experiments/reinforce_state.py",
        "lerp_parameters_(self.old, stored, 1.0)",
        "lerp_parameters_(self.old, stored, 0.0)",
        (REINFORCE + "test_every_objective_runs_resumes_and_repeats_itself -k nft",),
    ),
    Mutation(
        "failed verdicts are kept",
        "rewards/judges/cache.py",
        """            if verdict.state != "missing"
        ]""",
        "        ]",
        ("tests/experiments/test_reinforce.py::test_what_was_judged_is_not_judged_again_and_what_failed_is",),
    ),
    Mutation(
        "no ratio is looked at",
        "../experiments/reinforce_update.py",
        "if moments.first_ratio:",
        "if moments.first_ratio > 1:",
        (REINFORCE + "test_the_first_ratio_after_a_rollout_is_exactly_one_or_the_run_stops",),
    ),
    # The learned reward
    Mutation(
        "a fault counts as good",
        "rewards/model/predictor.py",
        'one.polarity == "pitfall"',
        'one.polarity != "pitfall"',
        (REWARD_MODEL + "TestReward",),
    ),
    Mutation(
        "gates are open where they are asked for",
        "rewards/model/predictor.py",
        "one.required and use_gates",
        "one.required and not use_gates",
        (REWARD_MODEL + "TestReward",),
    ),
    Mutation(
        "variance of a probability",
        "rewards/model/predictor.py",
        "yes * torch.sigmoid(-logit)",
        "yes * torch.sigmoid(logit)",
        (REWARD_MODEL + "TestReward",),
    ),
    Mutation(
        "the calibration's bias is taken off",
        "rewards/model/predictor.py",
        "scale * answers[..., 0] + bias",
        "scale * answers[..., 0] - bias",
        (REWARD_MODEL + "TestReward",),
    ),
    Mutation(
        "log-odds of levels",
        "rewards/model/predictor.py",
        "(1 - marks[:-1]).log()",
        "marks[1:].log()",
        (REWARD_MODEL + "TestGradient",),
    ),
    Mutation(
        "a criterion of the picture alone sees the prompt",
        "rewards/model/predictor.py",
        'told and one.needs != "image" for one in row',
        "told for one in row",
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "padding of texts reaches a product",
        "rewards/model/head.py",
        "torch.where(mask[..., None], features.to(self.text_mean.dtype), 0.0)",
        "features.to(self.text_mean.dtype)",
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "criteria read the padding of their words",
        "rewards/model/head.py",
        "self.ask(seeds, words, mask[:, None])",
        "self.ask(seeds, words)",
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "the mean of words counts padding",
        "rewards/model/head.py",
        "0.0).sum(1) / mask.sum(1, keepdim=True)",
        "0.0).mean(1)",
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "pictures see one place too many",
        "rewards/model/head.py",
        "torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]",
        "torch.arange(padded.shape[1], device=padded.device) <= lengths[:, None]",
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "places are forgotten",
        "rewards/model/head.py",
        "return self.place_in(torch.cat([down, right], -1))",
        "return 0 * self.place_in(torch.cat([down, right], -1))",
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "questions of a picture talk to each other",
        "rewards/model/head.py",
        'rearrange(queries, "n c m w -> (n c) m w")',
        'rearrange(queries, "n c m w -> n (c m) w")',
        (REWARD_MODEL + "TestIndependence",),
    ),
    Mutation(
        "the learned reward learns from missing verdicts",
        "rewards/model/fit.py",
        "counted = valid & (weights > 0)",
        "counted = weights > 0",
        (REWARD_MODEL + "TestLoss",),
    ),
    Mutation(
        "graded and binary criteria change losses",
        "rewards/model/fit.py",
        "torch.where(graded, level, yes)",
        "torch.where(graded, yes, level)",
        (REWARD_MODEL + "TestLoss",),
    ),
    Mutation(
        "a score is spread over one level too many",
        "rewards/model/fit.py",
        "scores[..., None] * (num_levels - 1)",
        "scores[..., None] * num_levels",
        (REWARD_MODEL + "TestLoss",),
    ),
    Mutation(
        "feature noise from the global generator",
        "rewards/model/fit.py",
        "torch.randn(one.shape, generator=generator, dtype=one.dtype)",
        "torch.randn(one.shape, dtype=one.dtype)",
        (REWARD_MODEL + "TestFit",),
    ),
    Mutation(
        "weights of pictures do not count",
        "rewards/model/judged.py",
        "[(scores[column], share * weights[column]) for column in chosen]",
        "[(scores[column], weights[column]) for column in chosen]",
        (REWARD_MODEL + "TestFit",),
    ),
    Mutation(
        "a missing verdict is asked about",
        "rewards/model/judged.py",
        "if known and share * weights[column] > 0",
        "if share * weights[column] > 0",
        (REWARD_MODEL + "TestFit",),
    ),
    Mutation(
        "over- and underconfidence cancel",
        "rewards/model/metrics.py",
        "(claimed - happened).abs().sum()",
        "(claimed - happened).sum().abs()",
        (REWARD_MODEL + "TestMetrics",),
    ),
    Mutation(
        "a target of one half counts",
        "rewards/model/metrics.py",
        "torch.where(true == 0.5, 0.0, weight)",
        "weight",
        (REWARD_MODEL + "TestMetrics",),
    ),
    Mutation(
        "reliability against the base rate",
        "rewards/model/metrics.py",
        "(mass * (values - rate).square())",
        "(mass * (values - base).square())",
        (REWARD_MODEL + "TestMetrics",),
    ),
    Mutation(
        "calibration without its bias",
        "rewards/model/metrics.py",
        "shift = parameters[1] if bias else 0.0",
        "shift = 0.0",
        (REWARD_MODEL + "TestCalibration",),
    ),
    Mutation(
        "a temperature over answers instead of levels",
        "rewards/model/metrics.py",
        "F.log_softmax(parameters[0].exp() * wide, dim=1)",
        "F.log_softmax(parameters[0].exp() * wide, dim=0)",
        (REWARD_MODEL + "TestCalibration",),
    ),
    Mutation(
        "unknown criteria have even odds",
        "rewards/model/baselines.py",
        "rates.get(key, overall)",
        "rates.get(key, 0.5)",
        (REWARD_MODEL + "TestBaselines",),
    ),
    Mutation(
        "a reward takes any features",
        "rewards/model/files.py",
        'if found["features"] != features.identity:',
        "if not features.identity:",
        (REWARD_MODEL + "TestFiles",),
    ),
    Mutation(
        "the class token is taken for a patch",
        "rewards/model/features.py",
        "tokens[:, extra:]",
        "tokens[:, : side**2]",
        (REWARD_MODEL + "TestTransformersTowers",),
    ),
    Mutation(
        "the learned judge answers picture by picture",
        "rewards/model/judge.py",
        "return [verdicts[index] for index in range(len(requests))]",
        "return list(verdicts.values())",
        (REWARD_MODEL + "TestJudge",),
    ),
    Mutation(
        "a revision without its features",
        "rewards/model/predictor.py",
        "[asdict(self.config), self.features.identity, weights_digest(self)]",
        "[asdict(self.config), weights_digest(self)]",
        (REWARD_MODEL + "TestJudge",),
    ),
    Mutation(
        "a quorum counts failures",
        "rewards/judges/chat.py",
        'sum(v.state != "missing" for v in verdicts.values())',
        "len(verdicts)",
        (f"{JUDGES} -k quorum_needs_both",),
    ),
    Mutation(
        "a quorum without its time",
        "rewards/judges/chat.py",
        "if self.quorum is None or time.monotonic() - begun < self.quorum[1]:",
        "if self.quorum is None:",
        (f"{JUDGES} -k quorum_needs_both",),
    ),
    Mutation(
        "a deadline for each turn",
        "rewards/judges/chat.py",
        "left = max(left - (time.monotonic() - begun), 1e-3)",
        "left = max(left, 1e-3)",
        (f"{JUDGES} -k both_turns_share",),
    ),
    Mutation(
        "stragglers without an outcome",
        "endpoint/client.py",
        "                    yield from session.give_up()\n",
        "",
        ("tests/test_endpoint.py::test_who_has_enough_waits_for_nothing_more_and_nothing_is_lost_or_named_twice",),
    ),
    Mutation(
        "a missing verdict is kept",
        "rewards/judges/cache.py",
        'if verdict.state != "missing"',
        "if verdict.criterion_id",
        (f"{JUDGES} -k key_is_the_content",),
    ),
    Mutation(
        "the repeat is no part of the key",
        "rewards/judges/cache.py",
        "request.criterion.hash, request.repeat]",
        "request.criterion.hash]",
        (f"{JUDGES} -k key_is_the_content",),
    ),
    Mutation(
        "the first of several answers counts",
        "rewards/judges/parse.py",
        "if all(result == results[0] for result in results) else",
        "if results else",
        (f"{JUDGES} -k not_an_answer",),
    ),
    Mutation(
        "a key that comes twice",
        "rewards/judges/parse.py",
        "if len(value) != len(pairs):",
        "if len(value) > len(pairs):",
        (f"{JUDGES} -k not_an_answer",),
    ),
    Mutation(
        "markers of a template pass",
        "rewards/judges/questions.py",
        '.replace("<", "\\\\u003c")',
        "",
        (f"{JUDGES} -k what_is_sent_is_data",),
    ),
    Mutation(
        "markers without angles pass",
        "rewards/judges/local.py",
        "as_data(part, self._markers)",
        "as_data(part)",
        (f"{LOCAL_JUDGE} -k no_marker_of_the_tokenizer",),
    ),
    Mutation(
        "zero is a level",
        "rewards/judges/local.py",
        "self.answer_ids[1 : criterion.levels + 1]",
        "self.answer_ids[: criterion.levels]",
        (f"{LOCAL_JUDGE} -k levels_are_their_expectation",),
    ),
    Mutation(
        "answers behind padding",
        "rewards/judges/local.py",
        'padding_side = "left"',
        'padding_side = "right"',
        (f"{LOCAL_JUDGE} -k depends_on_its_own_question",),
    ),
    Mutation(
        "improbable answers count",
        "rewards/judges/local.py",
        "if answer.mass < self.min_mass:",
        "if answer.mass < 0:",
        (f"{LOCAL_JUDGE} -k together_are_improbable",),
    ),
    Mutation(
        "a second moment for a variance",
        "rewards/judges/local.py",
        "(levels - score[:, None]).square()",
        "levels.square()",
        (f"{LOCAL_JUDGE} -k mean_variance_and_mass",),
    ),
    Mutation(
        "the mass of the answers alone",
        "rewards/judges/local.py",
        "log_probs.exp().sum(-1)",
        "shares.sum(-1)",
        (f"{LOCAL_JUDGE} -k mean_variance_and_mass",),
    ),
    Mutation(
        "one fault fails a batch",
        "rewards/judges/local.py",
        "        if len(batch) == 1:\n",
        "        if len(batch):\n",
        (f"{LOCAL_JUDGE} -k one_fault_is_one",),
    ),
    Mutation(
        "a column that never rises at the top",
        "rewards/judges/lettering.py",
        "(rises << 1 | 1) & full",
        "(rises << 1) & full",
        (f"{PROGRAMS} -k is_the_definition",),
    ),
    Mutation(
        "similarity by one length",
        "rewards/judges/lettering.py",
        "longest = max(len(one), len(other))",
        "longest = max(len(one), 1)",
        (f"{PROGRAMS} -k one_minus_the_share",),
    ),
    Mutation(
        "words of one line alone",
        "rewards/judges/lettering.py",
        "most = 2 * len(_TOKEN.findall(goal)) + 2",
        "most = 1",
        (f"{PROGRAMS} -k best_run_of_words",),
    ),
    Mutation(
        "accents apart from their letters",
        "rewards/judges/lettering.py",
        'unicodedata.normalize("NFKC", text).translate',
        "text.translate",
        (f"{PROGRAMS} -k case_counts",),
    ),
    Mutation(
        "the picture used last is forgotten",
        "rewards/judges/programs.py",
        "popitem(last=False)",
        "popitem(last=True)",
        (f"{PROGRAMS} -k used_last_are_remembered",),
    ),
    Mutation(
        "red for blue",
        "rewards/judges/programs.py",
        "image.cpu().flip(0).permute",
        "image.cpu().permute",
        (f"{PROGRAMS} -k interface_is_spoken",),
    ),
    Mutation(
        "almost the right text",
        "rewards/judges/programs.py",
        "return float(share == 1)",
        "return float(share > 0.8)",
        (f"{PROGRAMS} -k each_scale_has_its_answer",),
    ),
    Mutation(
        "levels are rounded up",
        "rewards/judges/programs.py",
        "1 + math.floor(share",
        "1 + math.ceil(share",
        (f"{PROGRAMS} -k each_scale_has_its_answer",),
    ),
    Mutation(
        "accents hide phrases",
        "rewards/judges/injection.py",
        'normalize("NFKD", text.casefold())',
        'normalize("NFC", text.casefold())',
        (f"{INJECTION} -k what_speaks_to_a_judge",),
    ),
    Mutation(
        "spaces hide phrases",
        "rewards/judges/injection.py",
        '"".join(c for c in latin if c.isalnum())',
        "latin",
        (f"{INJECTION} -k spacing_look_alikes",),
    ),
    Mutation(
        "words from anywhere",
        "rewards/judges/injection.py",
        "_CLOSE = 80",
        "_CLOSE = 8000",
        (f"{INJECTION} -k far_apart",),
    ),
    Mutation(
        "what cannot be read is vouched for",
        "rewards/judges/injection.py",
        'return "error", f"{type(error).__name__}: {error}"[:500]',
        "return None",
        (f"{INJECTION} -k flagged_is_missing",),
    ),
    Mutation(
        "the alarm of a few pictures",
        "rewards/judges/injection.py",
        "if len(self._recent) == self.alarm[0] and share",
        "if share",
        (f"{INJECTION} -k alarm_rings",),
    ),
    Mutation(
        "the gap the other way round",
        "rewards/judges/red_team.py",
        "by_name[attack.name].append(after - before)",
        "by_name[attack.name].append(before - after)",
        (f"{INJECTION} -k always_gains",),
    ),
    Mutation(
        "an interval over pairs",
        "rewards/judges/red_team.py",
        "by_picture[request.image_hash].append",
        "by_picture[attack.name + request.criterion.id + request.image_hash].append",
        (f"{INJECTION} -k interval_is_over_pictures",),
    ),
    Mutation(
        "the variance of one answer",
        "rewards/judges/repeats.py",
        "variance(scores) / len(scores)",
        "variance(scores)",
        (f"{REPEATS} -k variance_of_that_mean",),
    ),
    Mutation(
        "near ties by rounding",
        "rewards/judges/repeats.py",
        "gaps <= margin * (1 + 1e-6) + 1e-6",
        "gaps < margin",
        (f"{REPEATS} -k rounded_sums",),
    ),
    Mutation(
        "the same question again",
        "rewards/judges/repeats.py",
        "replace(first[place], repeat=k)",
        "replace(first[place], repeat=1)",
        (f"{REPEATS} -k near_ties_and_no_others",),
    ),
    Mutation(
        "a budget exceeded by a picture",
        "rewards/judges/repeats.py",
        "if len(asked.keys() | set(wanted)) > bound:",
        "if len(asked) > bound:",
        (f"{REPEATS} -k never_exceeded",),
    ),
    Mutation(
        "ties across groups",
        "rewards/judges/repeats.py",
        "rows = ((group == name).cpu() & ~values.isnan())",
        "rows = ((group <= name).cpu() & ~values.isnan())",
        (f"{REPEATS} -k distance_is_that_of_a_loop",),
    ),
    Mutation(
        "diagnostics: wilson without its centre",
        "rewards/diagnostics/estimates.py",
        "(share + extra / 2 + sign * half)",
        "(share + sign * half)",
        (DIAGNOSTICS + "TestEstimates::test_wilson_interval_is_scipys",),
    ),
    Mutation(
        "diagnostics: student with one degree too many",
        "rewards/diagnostics/estimates.py",
        "for k in range(2 + odd, degrees + 1, 2):",
        "for k in range(2 + odd, degrees + 3, 2):",
        (DIAGNOSTICS + "TestEstimates::test_student_quantile_is_scipys",),
    ),
    Mutation(
        "diagnostics: tied ranks are not shared",
        "rewards/diagnostics/estimates.py",
        "(counts.cumsum(0).double() - (counts.double() - 1) / 2)",
        "counts.cumsum(0).double()",
        (DIAGNOSTICS + "TestEstimates::test_ranks_are_scipys_and_ties_share_them",),
    ),
    Mutation(
        "diagnostics: slope's error over n",
        "rewards/diagnostics/estimates.py",
        "math.sqrt(rest / (len(x) - 2) / spread)",
        "math.sqrt(rest / len(x) / spread)",
        (DIAGNOSTICS + "TestEstimates::test_slope_and_its_interval_are_scipys",),
    ),
    Mutation(
        "diagnostics: variance inside groups counts every sample",
        "rewards/diagnostics/estimates.py",
        "degrees = len(values) - len(ids)",
        "degrees = len(values) - 1",
        (DIAGNOSTICS + "TestEstimates::test_variance_inside_groups_by_hand",),
    ),
    Mutation(
        "diagnostics: pitfalls are not turned round",
        "rewards/diagnostics/criteria.py",
        "torch.where(turned, 1 - values, values)",
        "torch.where(turned, values, values)",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: spread over prompts",
        "rewards/diagnostics/criteria.py",
        "torch.stack([table.group[rows], columns, owner])",
        "torch.stack([columns, columns, owner])",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: spread of n",
        "rewards/diagnostics/criteria.py",
        "degrees = per_label.index_add(0, cells[2], count - 1)",
        "degrees = per_label.index_add(0, cells[2], count)",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: lonely verdicts are constant groups",
        "rewards/diagnostics/criteria.py",
        "plural = (count > 1).double()",
        "plural = (count > 0).double()",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: padding is due",
        "rewards/diagnostics/criteria.py",
        "due, known = table.due & (label >= 0), table.known & (label >= 0)",
        "due, known = table.due, table.known",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: weight zero is due",
        "rewards/diagnostics/criteria.py",
        "due = weight > 0",
        "due = weight >= 0",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: missing verdicts count as failed",
        "rewards/diagnostics/criteria.py",
        "_ratio(total[i], num_known[i])",
        "_ratio(total[i], num_due[i])",
        (DIAGNOSTICS + "TestCriteria::test_it_is_the_definition_name_by_name",),
    ),
    Mutation(
        "diagnostics: correlation over all pictures of a criterion",
        "rewards/diagnostics/criteria.py",
        "first = _sums_by_group(values[:, :, None] * present[:, None, :], index)",
        "first = _sums_by_group(values[:, :, None] * torch.ones_like(present)[:, None, :], index)",
        (DIAGNOSTICS + "TestCriteria::test_correlation_is_numpys_over_the_pictures_of_each_pair",),
    ),
    Mutation(
        "diagnostics: flips invert to the disagreement",
        "rewards/diagnostics/reliability.py",
        "disagreement / (1 + math.sqrt(max(1 - 2 * disagreement, 0.0)))",
        "disagreement / 2",
        (DIAGNOSTICS + "TestReliability::test_disagreement_and_flips_are_inverse",),
    ),
    Mutation(
        "diagnostics: pairs with themselves",
        "rewards/diagnostics/reliability.py",
        "pairs = count * (count - 1) / 2",
        "pairs = count * count / 2",
        (DIAGNOSTICS + "TestReliability::test_more_repeats_are_all_their_pairs",),
    ),
    Mutation(
        "diagnostics: noise of repeats over n",
        "rewards/diagnostics/reliability.py",
        "(squares / (count - 1).clamp_min(1))[repeated]",
        "(squares / count.clamp_min(1))[repeated]",
        (DIAGNOSTICS + "TestReliability::test_more_repeats_are_all_their_pairs",),
    ),
    Mutation(
        "diagnostics: weights enter noise plainly",
        "rewards/diagnostics/reliability.py",
        "(weight.square() * noise).sum(1)[used]",
        "(weight * noise).sum(1)[used]",
        (DIAGNOSTICS + "TestReliability::test_weights_enter_the_noise_squared",),
    ),
    Mutation(
        "diagnostics: flips do not shrink the signal",
        "rewards/diagnostics/reliability.py",
        "return (1 - 2 * q) ** 2 * p * (1 - p)",
        "return p * (1 - p)",
        (DIAGNOSTICS + "TestReliability::test_reliability_is_the_correlation_of_two_judgements",),
    ),
    Mutation(
        "diagnostics: reliability against the spread of prompts",
        "rewards/diagnostics/reliability.py",
        "within, _ = within_group_variance(values, owner)",
        "within, _ = within_group_variance(values, torch.zeros_like(owner))",
        (DIAGNOSTICS + "TestReliability::test_hard_prompts_do_not_make_a_judge_reliable",),
    ),
    Mutation(
        "diagnostics: trend over prompts",
        "rewards/diagnostics/bias.py",
        "moments.append((first - first.mean(), second - second.mean()))",
        "moments.append((first - x.double().mean(), second - values.double().mean()))",
        (DIAGNOSTICS + "TestBias::test_hard_prompts_with_large_pictures_do_not_pass_for_an_effect_of_size",),
    ),
    Mutation(
        "diagnostics: sandwich without its correction",
        "rewards/diagnostics/bias.py",
        "/ spread**2 * len(moments) / (len(moments) - 1)",
        "/ spread**2",
        (DIAGNOSTICS + "TestBias::test_slope_is_that_of_a_regression_with_a_level_for_each_group",),
    ),
    Mutation(
        "diagnostics: width and height exchanged",
        "rewards/diagnostics/bias.py",
        "height, width = image_sizes.double().log2().unbind(1)",
        "width, height = image_sizes.double().log2().unbind(1)",
        (DIAGNOSTICS + "TestBias::test_area_aspect_and_elongation_mean_what_they_say",),
    ),
    Mutation(
        "diagnostics: chance without the failures",
        "rewards/diagnostics/agreement.py",
        "chance = (pp + pf) * (pp + fp) + (fp + ff) * (pf + ff)",
        "chance = (pp + pf) * (pp + fp)",
        (DIAGNOSTICS + "TestAgreement::test_cohens_kappa_of_a_table_that_everybody_knows",),
    ),
    Mutation(
        "diagnostics: agreement where one judge is silent",
        "rewards/diagnostics/agreement.py",
        "both = valid & other_valid",
        "both = valid | other_valid",
        (DIAGNOSTICS + "TestAgreement::test_only_what_both_know_is_compared",),
    ),
    Mutation(
        "diagnostics: bootstrap without replacement",
        "rewards/diagnostics/agreement.py",
        "rows[torch.randint(len(rows), (num, len(rows)), generator=generator)]",
        "rows[torch.arange(len(rows)).expand(num, -1)]",
        (DIAGNOSTICS + "TestAgreement::test_cohens_kappa_of_a_table_that_everybody_knows",),
    ),
    Mutation(
        "diagnostics: a control of its own prompt",
        "rewards/diagnostics/controls.py",
        "others = (owners != owners[sample]).nonzero()[:, 0]",
        "others = (owners == owners[sample]).nonzero()[:, 0]",
        (DIAGNOSTICS + "TestControls::test_every_kind_stands_in_for_a_picture_of_its_size",),
    ),
    Mutation(
        "diagnostics: mean of ratios",
        "rewards/diagnostics/health.py",
        "logs = (first[usable] / second[usable]).log()",
        "logs = (first[usable] / second[usable]) - 1",
        (DIAGNOSTICS + "TestHealth::test_norms_compare_as_ratios",),
    ),
    Mutation(
        "diagnostics: distances to oneself",
        "rewards/diagnostics/health.py",
        "float(torch.pdist(values[members]).mean())",
        "float(torch.cdist(values[members], values[members]).mean())",
        (DIAGNOSTICS + "TestHealth::test_diversity_is_the_mean_distance_of_each_group_and_then_of_groups",),
    ),
    Mutation(
        "diagnostics: repeats of pitfalls as they are",
        "rewards/diagnostics/step.py",
        "torch.where(pitfalls.detach().cpu(), 1 - again, again)",
        "again",
        (DIAGNOSTICS + "TestStep::test_a_pitfall_is_turned_round_in_repeats_too",),
    ),
    Mutation(
        "diagnostics: judges on different pictures",
        "rewards/diagnostics/step.py",
        "both = known & answered",
        "both = answered",
        (DIAGNOSTICS + "TestStep::test_both_judges_are_compared_on_the_same_pictures",),
    ),
    Mutation(
        "diagnostics: pitfalls turned twice",
        "rewards/diagnostics/step.py",
        'found = aggregate(table.good, table.known, table.weights, missing="renormalise")',
        'found = aggregate(table.good, table.known, table.weights, missing="renormalise", pitfalls=pitfalls)',
        (DIAGNOSTICS + "TestStep::test_without_rewards_they_are_the_renormalised_mean",),
    ),
    Mutation(
        "diagnostics: a falling reward is exploitation",
        "rewards/diagnostics/alarms.py",
        'if up["low"] > 0 and down["high"] < 0:',
        'if down["high"] < 0:',
        (DIAGNOSED_RUNS + "TestHeldOut::test_both_falling_is_no_exploitation",),
    ),
    Mutation(
        "diagnostics: slopes without intervals",
        "rewards/diagnostics/alarms.py",
        'if up["low"] > 0 and down["high"] < 0:',
        'if up["slope"] > 0 and down["slope"] < 0:',
        (DIAGNOSED_RUNS + "TestHeldOut::test_a_gap_that_widens_over_a_standing_judge_is_mild",),
    ),
    Mutation(
        "diagnostics: steps by position",
        "rewards/diagnostics/alarms.py",
        "return float(position if step is None else step)",
        "return float(position)",
        (DIAGNOSED_RUNS + "TestHeldOut::test_steps_between_records_are_counted",),
    ),
    Mutation(
        "diagnostics: since the first time ever",
        "rewards/diagnostics/alarms.py",
        'open_names &= {alarm["name"] for alarm in _check(history[:end], bounds)} if end else set()',
        "open_names = open_names if end else set()",
        (DIAGNOSED_RUNS + "TestOtherAlarms::test_since_when_is_the_start_of_the_unbroken_run",),
    ),
    Mutation(
        "diagnostics: only the base model's controls may be high",
        "rewards/diagnostics/alarms.py",
        'if kind != "base_model" and recent',
        'if kind == "base_model" and recent',
        (DIAGNOSED_RUNS + "TestOtherAlarms::test_each_is_silent_below_its_bound_and_speaks_above",),
    ),
    Mutation(
        "diagnostics: mild alarms stop",
        "rewards/diagnostics/alarms.py",
        'held &= {alarm["name"] for alarm in _check(history[:end], read) if alarm["severe"]}',
        'held &= {alarm["name"] for alarm in _check(history[-1:], read) if alarm["severe"]}',
        (DIAGNOSED_RUNS + "TestStopping::test_an_interruption_starts_the_count_again",),
    ),
    Mutation(
        "diagnostics: a title as it comes",
        "rewards/diagnostics/page.py",
        'f"<h1>{html.escape(title)}</h1>',
        'f"<h1>{title}</h1>',
        (DIAGNOSED_RUNS + "TestPage::test_hostile_text_stays_text",),
    ),
    Mutation(
        "diagnostics: a caption as it comes",
        "rewards/diagnostics/page.py",
        "<figcaption>{html.escape(caption)}</figcaption>",
        "<figcaption>{caption}</figcaption>",
        (DIAGNOSED_RUNS + "TestPage::test_hostile_text_stays_text",),
    ),
    Mutation(
        "diagnostics: an alarm as it comes",
        "rewards/diagnostics/page.py",
        "{html.escape(alarm['message'])}",
        "{alarm['message']}",
        (DIAGNOSED_RUNS + "TestPage::test_hostile_text_stays_text",),
    ),
    Mutation(
        "diagnostics: a legend as it comes",
        "rewards/diagnostics/figures.py",
        'f"{html.escape(str(name))}</span>"',
        'f"{name}</span>"',
        (DIAGNOSED_RUNS + "TestPage::test_hostile_text_stays_text",),
    ),
    Mutation(
        "diagnostics: a line upside down",
        "rewards/diagnostics/figures.py",
        "_place(line[i], y_range, BOTTOM, TOP)) for i in kept]",
        "_place(line[i], y_range, TOP, BOTTOM)) for i in kept]",
        (DIAGNOSED_RUNS + "TestPage::test_what_a_line_shows_is_the_series",),
    ),
    Mutation(
        "diagnostics: the last point is left out",
        "rewards/diagnostics/figures.py",
        "return [*range(0, count - 1, stride), count - 1]",
        "return [*range(0, count - 1, stride)] or [0]",
        (DIAGNOSED_RUNS + "TestPage::test_what_a_line_shows_is_the_series",),
    ),
    Mutation(
        "a bootstrap bound is enough to accept",
        "prompting/compare.py",
        "accepted = lower > 0 and p_value <= alpha and coverage",
        "accepted = lower > 0 and coverage",
        (PROMPTING + "test_compare.py -k TestComparison",),
    ),
    Mutation(
        "a comparison with few pairs is accepted",
        "prompting/compare.py",
        " and coverage >= min_coverage",
        "",
        (PROMPTING + "test_compare.py -k TestComparison",),
    ),
    Mutation(
        "an item's missing seeds count as zero",
        "prompting/compare.py",
        "gaps[counts > 0] / counts[counts > 0]",
        "gaps[counts > 0] / candidate.shape[1]",
        (PROMPTING + "test_compare.py -k TestComparison",),
    ),
    Mutation(
        "equal sums are no reason for doubt",
        "prompting/compare.py",
        "reached += int((signs @ values >= total - slack).sum())",
        "reached += int((signs @ values > total + slack).sum())",
        (PROMPTING + "test_compare.py -k TestFlips",),
    ),
    Mutation(
        "equal values up to rounding have an infinite interval",
        "prompting/compare.py",
        "if error <= 1e-9 * values.abs().amax():",
        "if error == 0:",
        (PROMPTING + "test_compare.py -k TestBootstrap",),
    ),
    Mutation(
        "bootstrap bounds are turned around",
        "prompting/compare.py",
        "return (mean - high * error).item(), (mean - low * error).item()",
        "return (mean + low * error).item(), (mean + high * error).item()",
        (PROMPTING + "test_compare.py -k TestBootstrap",),
    ),
    Mutation(
        "every candidate is tested at the whole level",
        "prompting/search.py",
        "level = alpha / budget.candidates",
        "level = alpha",
        (PROMPTING + "test_search.py -k TestAcceptance",),
    ),
    Mutation(
        "all comparisons share their noise",
        "prompting/search.py",
        '"round", number, alpha=level',
        '"round", alpha=level',
        (PROMPTING + "test_search.py -k TestIndependence",),
    ),
    Mutation(
        "the proposer learns scores",
        "prompting/search_steps.py",
        "history = tuple((candidate.text, candidate.accepted) for",
        "history = tuple((candidate.text, candidate.comparison) for",
        (PROMPTING + "test_search.py -k TestIndependence",),
    ),
    Mutation(
        "the incumbent stays whatever is accepted",
        "prompting/search.py",
        "incumbent, failures = number, None",
        "failures = None",
        (PROMPTING + "test_search.py -k TestAcceptance",),
    ),
    Mutation(
        "a candidate joins the pool by being as good",
        "prompting/search.py",
        "joins = bool((means > best).any())",
        "joins = bool((means >= best).any())",
        (PROMPTING + "test_search.py -k TestAcceptance",),
    ),
    Mutation(
        "the proposer reads failures of the items that decide",
        "prompting/search_steps.py",
        "scores, feedback = self._score(prompt, self.feedback,",
        "scores, feedback = self._score(prompt, self.selection,",
        (PROMPTING + "test_search.py -k TestIndependence",),
    ),
    Mutation(
        "nothing is set aside for the test split",
        "prompting/search_steps.py",
        "self._reserved = 2 * num_test * num_seeds",
        "self._reserved = 0",
        (PROMPTING + "test_search.py -k TestBudget",),
    ),
    Mutation(
        "incumbent and candidate have noise of their own",
        "prompting/search_steps.py",
        "self.score(candidate, first, seeds), self.score(incumbent, first, seeds)",
        "self.score(candidate, first, seeds), self.score(incumbent, first, self.noise(0))",
        (PROMPTING + "test_search.py -k TestIndependence",),
    ),
    Mutation(
        "the least bad failures come first",
        "prompting/search_steps.py",
        "key=lambda row: (means[row].item(), row)",
        "key=lambda row: (-means[row].item(), row)",
        (PROMPTING + "test_search.py -k TestIndependence",),
    ),
    Mutation(
        "test items may be development items",
        "prompting/search_report.py",
        "    if shared:",
        "    if shared == len(items):",
        (PROMPTING + "test_search.py -k TestIndependence",),
    ),
    Mutation(
        "a torn line is read",
        "prompting/search_log.py",
        'whole, end, torn = data.rpartition(b"\\n")',
        'whole, end, torn = data.removesuffix(b"\\n"), b"\\n", b""',
        (PROMPTING + "test_search.py -k TestRecord",),
    ),
    Mutation(
        "a file that ends without a line end is emptied",
        "prompting/search_log.py",
        "if not any(torn.startswith(",
        "if torn[:1] == b'?' and not any(torn.startswith(",
        (PROMPTING + "test_search.py -k TestRecord",),
    ),
    Mutation(
        "proposals use up what the comparison takes",
        "prompting/search_steps.py",
        "self.afford(scorings, proposals=1)\n            request",
        "self.afford(0, proposals=1)\n            request",
        (PROMPTING + "test_search.py -k TestBudget",),
    ),
    Mutation(
        "an item without a score is the worst score",
        "prompting/search.py",
        "known = means[means.isfinite()]",
        "known = means",
        (PROMPTING + "test_search.py -k TestAcceptance",),
    ),
    Mutation(
        "development items may come twice",
        "prompting/search_steps.py",
        "        if twice:",
        "        if twice == len(dev):",
        (PROMPTING + "test_search.py -k TestArguments",),
    ),
    Mutation(
        "another search's record is taken",
        "prompting/search_log.py",
        "if row.get(kind) != _plain(wanted):",
        "if kind not in row:",
        (PROMPTING + "test_search.py -k TestRecord",),
    ),
    Mutation(
        "bad answers stay in the cache",
        "prompting/reasoner.py",
        "self.model.forget(chat)",
        "pass",
        (
            PROMPTING + "test_reasoner.py -k TestServer",
            PROMPTING + "test_reasoner.py::test_a_bad_answer_and_then_a_good_one_is_a_rewrite_in_two_attempts",
        ),
    ),
    Mutation(
        "a refusal is a fallback",
        "prompting/reasoner.py",
        'self._keep(request, "refused", "model"',
        'self._keep(request, "fallback", "model"',
        (PROMPTING + "test_reasoner.py::test_hostile_answers_give_a_prompt_and_a_true_status",),
    ),
    Mutation(
        "a forbidden rewrite is painted",
        "prompting/reasoner.py",
        "reason = self.policy(answer.prompt) if self.policy is not None else None",
        "reason = None",
        (PROMPTING + "test_reasoner.py -k TestPolicy",),
    ),
    Mutation(
        "a user can write a template's marks",
        "prompting/reasoner.py",
        'ensure_ascii=False).replace("<", "\\\\u003c")',
        "ensure_ascii=False)",
        (
            PROMPTING + "test_reasoner.py -k TestServer",
            PROMPTING + "test_reasoner.py::test_data_says_exactly_what_was_said_without_a_bracket_that_opens_a_marker",
        ),
    ),
    Mutation(
        "a status may be untrue",
        "prompting/reasoner.py",
        'or same == (self.status == "rewritten"):',
        "or False:",
        (PROMPTING + "test_reasoner.py::test_a_status_that_is_not_true_cannot_be_written_down",),
    ),
    Mutation(
        "reasoning without an end is painted",
        "prompting/answers.py",
        "    if not depth:\n        kept.append(text[at:])",
        "    kept.append(text[at:])",
        (PROMPTING + "test_reasoner.py::test_hostile_answers_give_a_prompt_and_a_true_status",),
    ),
    Mutation(
        "the channel of reasoning is painted",
        "prompting/answers.py",
        'if mark and re.match(r"\\s*final(?!\\w)", header):',
        'if mark and not re.match(r"\\s*commentary", header):',
        (PROMPTING + "test_reasoner.py::test_hostile_answers_give_a_prompt_and_a_true_status",),
    ),
    Mutation(
        "a loop is painted",
        "prompting/answers.py",
        "    if is_loop(text):",
        "    if not text:",
        (PROMPTING + "test_reasoner.py::test_hostile_answers_give_a_prompt_and_a_true_status",),
    ),
    Mutation(
        "a quoted text inside a longer one is kept",
        "prompting/intent.py",
        "if text in listed or _is_written(text, spoken, outside)]",
        "if text in spoken]",
        (PROMPTING + "test_intent.py::test_losses_are_named",),
    ),
    Mutation(
        "any language is kept",
        "prompting/intent.py",
        '[before] if before in ("", after) or _same_script(before, after) else []',
        "[before]",
        (PROMPTING + "test_intent.py::test_a_language_is_lost_exactly_where_it_is_another",),
    ),
    Mutation(
        "an answer's noise depends on its place in the batch",
        "prompting/local.py",
        "seeds = [int(request.key(model)[:15], 16) for request in requests]",
        "seeds = [*range(len(requests))]",
        (PROMPTING + "test_local.py::test_an_answer_depends_on_its_request_alone",),
    ),
    Mutation(
        "padding is attended to",
        "prompting/local.py",
        "[0] * (longest - len(tokens)) + [1] * len(tokens)",
        "[1] * longest",
        (PROMPTING + "test_local.py::test_an_answer_depends_on_its_request_alone",),
    ),
    Mutation(
        "Gumbel noise with the wrong sign",
        "prompting/local.py",
        "noise = -(-uniform.log()).log()",
        "noise = (-uniform.log()).log()",
        (PROMPTING + "test_local.py::test_perturbed_logits_are_samples_of_the_softmax",),
    ),
    Mutation(
        "a centre a little to the left is already left",
        "../experiments/evaluation/boxes.py",
        "share > _MOSTLY",
        "share > 0",
        (EVALUATE_RULES + "TestRelations",),
    ),
    Mutation(
        "above and below of a y that grows upwards",
        "../experiments/evaluation/boxes.py",
        '"above": -down, "below": down',
        '"above": down, "below": -down',
        (EVALUATE_RULES + "TestRelations",),
    ),
    Mutation(
        "colours of the least confident detections",
        "../experiments/evaluation/boxes.py",
        "key=lambda one: -one.score",
        "key=lambda one: one.score",
        (EVALUATE_RULES + "TestObjects",),
    ),
    Mutation(
        "one object too many is not noticed",
        "../experiments/evaluation/boxes.py",
        'if number >= entry["count"]:',
        'if number > entry["count"]:',
        (EVALUATE_RULES + "TestObjects",),
    ),
    Mutation(
        "a word read once is found as often as it is wanted",
        "../experiments/evaluation/texts.py",
        "(Counter(goals) & Counter(words)).total()",
        "sum(word in words for word in goals)",
        (EVALUATE_RULES + "TestWords",),
    ),
    Mutation(
        "NED by the wanted word's length",
        "../experiments/evaluation/texts.py",
        "max(len(word), len(nearest[0])) if nearest",
        "len(word) if nearest",
        (EVALUATE_RULES + "TestWords",),
    ),
    Mutation(
        "prompts drawn again over all tasks alike",
        "../experiments/evaluation/intervals.py",
        "/ len(groups)\n",
        "* len(group) / sum(map(len, groups))\n",
        (EVALUATE_RULES + "TestIntervals",),
    ),
    Mutation(
        "joined words come apart though a letter is left",
        "../experiments/evaluation/texts.py",
        "found += ways[-1] or [word]",
        "found += next((way for way in reversed(ways) if way), [word])",
        (EVALUATE_RULES + "TestWords",),
    ),
    Mutation(
        "words come apart into the most parts",
        "../experiments/evaluation/texts.py",
        "ways.append(min(possible, key=len, default=None))",
        "ways.append(max(possible, key=len, default=None))",
        (EVALUATE_RULES + "TestWords",),
    ),
    Mutation(
        "the size of a picture as width by height",
        "../experiments/evaluation/own_scores.py",
        'f"{picture.shape[1]}x{picture.shape[2]}"',
        'f"{picture.shape[2]}x{picture.shape[1]}"',
        (EVALUATE_OWN + "TestOwnScores",),
    ),
    Mutation(
        "a bundle takes the place of any directory",
        "../experiments/miniature/bundle.py",
        'not (config.out / "bundle.json").is_file()',
        "not config.out.is_dir()",
        ("tests/experiments/test_bundle.py::test_a_directory_that_is_no_bundle_is_left_alone",),
    ),
    Mutation(
        "OneIG's grid column by column",
        "../experiments/evaluation/layouts.py",
        "(index % side * width, index // side * height)",
        "(index // side * width, index % side * height)",
        (EVALUATE + "TestLayouts",),
    ),
    Mutation(
        "GenEval's overall score over pictures instead of tasks",
        "../experiments/evaluation/official.py",
        "math.fsum(row.values()) / len(row)})",
        "math.fsum(sum(tasks.values(), [])) / sum(map(len, tasks.values()))})",
        (EVALUATE_OWN + "TestOwnScores",),
    ),
    Mutation(
        "bad rows move the folders of those after them",
        "../experiments/evaluation/prompt_files.py",
        "checked = check(row, number)",
        "checked = check(row, len(found.prompts))",
        (EVALUATE + "TestPromptFiles",),
    ),
]


def apply(mutation: Mutation | None, folder: Path) -> None:
    """Copy the library below ``folder`` and plant the mistake in the copy."""
    shutil.copytree(ROOT / "lensmini", folder / "lensmini", ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is None:
        return
    if mutation.file.startswith("../experiments/"):
        shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
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
    if (folder / "experiments").exists():
        import experiments

        if Path(str(experiments.__file__)).parent != folder / "experiments":
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
            signal.alarm(TIMEOUT_S if mutation is not None else 10 * TIMEOUT_S)  # the untouched copy runs every test
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
