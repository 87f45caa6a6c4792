"""Points where implementations of Lens disagree with the published code; the page sorts them by damage.

Only what has been read in the implementations that are named, or recorded by their authors; versions change, and what is
only somebody's account is marked as secondary.
"""

import math

import torch
from torch import Tensor

from experiments import parity_plants as plants
from experiments.parity_cases import Outcome, golden, velocity
from experiments.parity_measures import (
    Trap,
    both_errors,
    feature_errors,
    mask_fill_error,
    rounded_pixels,
    run_error,
    template_for_blank,
    time_error,
    training_times,
    velocity_error,
)

__all__ = ["DISAGREEMENTS"]

SDCPP, COMFY, DIFFUSERS = "stable-diffusion.cpp", "ComfyUI", "diffusers' port"
CASE, EPS_CASE = "dit_b_blocks_odd", "dit_c_eps_holes"
EPS = plants.query_key_eps(1e-5)
STRETCH = plants.use_positions(stretch_text=True)
FLOOR = plants.use_positions(start="-floor(n/2)")


def dead_weights() -> Outcome:
    published = golden(CASE)[0]["outputs.sample"]
    planted = velocity(CASE, change=plants.noise_in_dead_weights, read_text_tail=True)
    return Outcome(velocity(CASE, read_text_tail=True), planted, published)


def no_text(features: list[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor]:
    return features, torch.zeros_like(mask)


DISAGREEMENTS: tuple[Trap, ...] = (
    Trap(
        name="qk-eps",
        group="transformer",
        point="epsilon of the query and key norms",
        published="1e-6",
        differs=(f"{COMFY}: 1e-5", f"{SDCPP}: 1e-5", "an MLX port: 1e-5"),
        planted="1e-5",
        measures={
            "velocity": velocity_error(EPS_CASE, change=EPS),
            "velocity, usual size": velocity_error(CASE, change=EPS),
            "final latents": run_error(change=EPS),
        },
        note="The first number is of a model whose activations are so small that every epsilon matters. At the usual size "
        "nothing shows in float32: a comparison of pictures cannot find this one.",
    ),
    Trap(
        name="mu-constant",
        group="sampling",
        point="mu",
        published="from the number of tokens and steps",
        differs=(f"{SDCPP}: 1.83", f"{COMFY}: 1.829 by a port author's account *(secondary)*"),
        planted="1.83",
        measures={"final latents": run_error(mu=1.83), "times": time_error(lambda tokens, steps: 1.83)},
        note="Right only near 1440 x 1440 (1.8278); 24 tokens and 4 steps, the run here, want 1.946, and 1024 x 1024 in 20 "
        "steps wants 2.198.",
    ),
    Trap(
        name="mu-exponent",
        group="sampling",
        point="mu, read wrongly",
        published="the shift is e^mu",
        differs=("one port: 1.83 read as e^mu",),
        planted="e^mu = 1.83",
        measures={
            "final latents": run_error(mu=math.log(1.83)),
            "times": time_error(lambda tokens, steps: math.log(1.83)),
        },
    ),
    Trap(
        name="guidance",
        group="sampling",
        point="guidance",
        published="the combination gets the norm of the conditional velocity, token by token",
        differs=(f"{SDCPP}: plain", "generic samplers: plain"),
        planted="plain",
        measures={"final latents": run_error(rescale=False)},
        note="At guidance 5 here. At guidance 1 (Turbo) both are the conditional velocity.",
    ),
    Trap(
        name="blank-negative-zero-length",
        group="sampling",
        point="blank negative prompt",
        published="zero features and an all-false mask",
        differs=(f"{COMFY}: text of length zero",),
        planted="no text tokens",
        measures={"final latents": run_error(negative="absent")},
        kind="equivalent",
    ),
    Trap(
        name="blank-negative-template",
        group="sampling",
        point="blank negative prompt, encoded",
        published="zero features and an all-false mask",
        differs=("some ports: the encoded template", "OneTrainer's sampler: the encoded template"),
        planted="noise of the prompt's size in place of the encoded template",
        measures={"final latents": template_for_blank},
        note="What a rendered blank prompt looks like needs the real encoder; the size here says little about it.",
    ),
    Trap(
        name="blank-positive",
        group="sampling",
        point="blank prompt",
        published="encoded through the template",
        differs=(f"{COMFY}: no text",),
        planted="no text (the case's features stand for the encoded blank prompt)",
        measures={"final latents": run_error(text=no_text)},
        note="Both halves of guidance are then the same.",
    ),
    Trap(
        name="odd-centre",
        group="transformer",
        point="centring of odd sides",
        published="rows and columns start at -ceil(n/2)",
        differs=(f"{SDCPP}: at -floor(n/2)",),
        planted="-floor(n/2)",
        measures={"velocity": velocity_error(CASE, change=FLOOR)},
        note="7 x 4 tokens here. Released sizes with an odd side: 1040, 1168, 1616 and 1936 px.",
    ),
    Trap(
        name="text-step",
        group="transformer",
        point="text positions",
        published="step 1",
        differs=(f"{SDCPP}: stretched, step T / (T - 1)",),
        planted="step T / (T - 1)",
        measures=both_errors(STRETCH),
        note="T is 9 in the pass and 6 in the run. The last token always moves by one position, the others by less.",
    ),
    Trap(
        name="date",
        group="unmeasured",
        point="date in the system message",
        published="today",
        differs=("other implementations: fixed at 2025-01-01, 2026-05-23 or 2026-05-26",),
        kind="unmeasured",
        note="Needs the real tokenizer and encoder. The date's tokens are cut, but later ones attend to them, so features "
        'depend on it slightly: pin it for reproducibility (ours: date="2026-05-23" unless told otherwise).',
    ),
    Trap(
        name="last-layer-norm",
        group="text",
        point="last text feature",
        published="before the final norm",
        differs=("the library's output_hidden_states: normed",),
        planted="after the final norm",
        measures=feature_errors(final_norm=True),
        note="The other layers are right, so that a look at the first feature does not show it.",
    ),
    Trap(
        name="yarn-range",
        group="text",
        point="correction range of YaRN",
        published="not rounded",
        differs=("one Rust port: rounded to whole numbers",),
        planted="rounded",
        measures=feature_errors(rotary=lambda yarn: {**yarn, "truncate": True}),
        note="8.0928 to 17.3980 released; of 8 frequencies here against 32, one boundary weighs more.",
    ),
    Trap(
        name="mask-fill",
        group="transformer",
        point="value of the mask",
        published="-inf",
        differs=("other implementations: the most negative float, or -1e9",),
        planted="both, in dense attention with an additive mask",
        measures={
            "velocity, most negative float": mask_fill_error(torch.finfo(torch.float32).min),
            "velocity, -1e9": mask_fill_error(-1e9),
        },
        kind="equivalent",
        note="Ours drops masked tokens and needs no mask. Image keys are never masked, so no row is empty.",
    ),
    Trap(
        name="uint8",
        group="pixels",
        point="float to uint8",
        published="truncation",
        differs=("some ports: rounding",),
        planted="rounding",
        measures={"pixels": rounded_pixels},
        note="One grey level, in half of the values that are not clamped.",
    ),
    Trap(
        name="token-budget",
        group="text",
        point="token budget",
        published="512 with the template: 415 behind the cut",
        differs=("OneTrainer: 512 + 97",),
        planted="tokens that the published budget cuts off are kept",
        measures={"velocity": velocity_error(CASE, text=plants.keep_all_text)},
        note="Two of the three prompts were cut at 4 and 1 of 9 tokens. Prompts within the budget do not change.",
    ),
    Trap(
        name="training-timestep",
        group="training",
        point="time in training",
        published="sigma",
        differs=("SushiUI's trainer: sigma * 1000",),
        planted="sigma * 1000",
        measures={"velocity": velocity_error(CASE, time_scale=1e3), "final latents": run_error(time_scale=1e3)},
        note="The run samples with the same mistake; a model trained with it would expect it.",
    ),
    Trap(
        name="training-shift",
        group="training",
        point="shift of training times",
        published="logit-normal, mean 1.06 at 512 x 512 *(secondary: readers' summaries of the paper)*",
        differs=("OneTrainer: the scheduler's base and max shift, on a token count 4x too small",),
        planted="that shift as the mean, 256 tokens for 1024",
        measures={"training times": training_times},
        note="Ours against the logit-normal of mean 1.06, both from the same normals; the published answer is itself a "
        "summary.",
    ),
    Trap(
        name="fp16-clip",
        group="transformer",
        point="clipping in fp16",
        published="none",
        differs=(f"{DIFFUSERS}: both streams to +-65504 after each block",),
        planted="the clip, in float32",
        measures=both_errors(plants.clip_streams),
        kind="equivalent",
        note="Acts only where fp16 would overflow. In bf16 and float32 nothing is near the limit here.",
    ),
    Trap(
        name="unused-sinusoid",
        group="unmeasured",
        point="unused code",
        published="the transformer's file has a sinusoid helper of its own that nothing calls",
        differs=("-",),
        kind="unmeasured",
        note="Dead code: the embedding that runs is diffusers'. Nothing to plant; do not port the helper.",
    ),
    Trap(
        name="dead-weights",
        group="transformer",
        point="last block's text path",
        published="33,040,960 numbers of the checkpoint never reach the output",
        differs=("-",),
        planted="random numbers in all of them",
        measures={"velocity": dead_weights},
        kind="equivalent",
        note="Their gradient is zero; a wrong load of them cannot be seen in a picture, only in the last text stream.",
    ),
    Trap(
        name="all-sdcpp",
        group="all",
        point=SDCPP,
        published="-",
        differs=(f"{SDCPP}: the sum of its rows",),
        planted="epsilon, mu, plain guidance and text positions together",
        measures={"final latents": run_error(change=plants.compose(EPS, STRETCH), mu=1.83, rescale=False)},
        note="Centring has no effect on the even 6 x 4 grid of the run.",
    ),
    Trap(
        name="all-comfyui",
        group="all",
        point=COMFY,
        published="-",
        differs=(f"{COMFY}: the sum of its rows",),
        planted="epsilon, mu *(secondary)* and a negative of length zero together",
        measures={"final latents": run_error(change=EPS, mu=1.829, negative="absent")},
        note="The prompt is not blank.",
    ),
)
