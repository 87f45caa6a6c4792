"""Laws that hold for every public tensor function: one table, and a test that nothing public is missing from it.

Each entry builds seeded inputs for a batch of three samples, the first two of one shape, and says which rows of
every input and output belong to a sample. The laws follow from that: results have the right dtype and device, inputs
stay as they are, masked text does not count, randomness comes from the generator alone, the compiler accepts the
function whole, and a sample does not depend on its batch mates.
"""

import copy
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lensmini
from lensmini import averaging, packed, paths, reduction, sampling, segments
from lensmini.data.assign import StepTotals
from lensmini.data.buckets import Bucket
from lensmini.data.collate import loss_weights
from lensmini.data.transforms import resize_and_crop
from lensmini.nn import (
    attention,
    autoencoder,
    blocks,
    cpu_attention,
    discriminator,
    embeddings,
    fusion,
    heads,
    joint,
    latents,
    mlp,
    modulation,
    norm,
    rope,
    text_encoder,
    transformer,
)
from lensmini.nn.config import LensConfig
from lensmini.objectives import adversarial, consistency, distribution_matching, flow_matching, policy, times
from lensmini.objectives.consistency import trigflow
from lensmini.packed import Layout
from lensmini.rewards.judges import local

aggregation = importlib.import_module("lensmini.rewards.aggregate")  # the package has a function of that name
CHANNELS, TEXT_LAYERS, TEXT_DIM, HEADS, HEAD_DIM = 8, 2, 6, 2, 8

Inputs = dict[str, Any]
Kinds = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Mix:
    """The shapes of a batch: a grid and a row of the text mask for each sample."""

    grids: tuple[tuple[int, int], ...]
    mask: Tensor
    device: str = "cpu"

    def layout(self) -> Layout:
        return Layout.build(self.grids, text_mask=self.mask).to(self.device)


MASK = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
ALL = Mix(((2, 3), (2, 3), (1, 4)), MASK)
FIRST = Mix(ALL.grids[:1], MASK[:1])
ROWS = {
    "sample": (3, 1),
    "image": (16, 6),
    "text": (6, 3),
    "joint": (22, 9),
    "slots": (3, 1),
    "square": (18, 6),
}
"""Rows on the first axis of each kind of tensor: of the whole batch, and of its first sample."""


@dataclass(frozen=True)
class Entry:
    """One public tensor function and how to call it."""

    covers: Callable[..., Any]
    """The function or class of the library."""
    make: Callable[[torch.dtype], Callable[..., Any]]
    """From a dtype to a function of (inputs, layout)."""
    inputs: Kinds = field(default_factory=dict)
    """For each input its kind of rows and the axes behind them; ``shared`` has no rows."""
    outputs: str | Sequence[str] = "image"
    """The kind of rows of the output, or of each output; ``shared`` for none."""
    dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    name: str = ""
    draw: dict[str, Callable[[int, tuple[int, ...]], Tensor]] = field(default_factory=dict)
    """Inputs that are not standard normal, from (seed, shape)."""
    eager_only: str = ""
    """Why the compiler does not take it whole; empty where it does."""
    meta: bool = True
    """Whether it runs without data, on the meta device."""

    @property
    def label(self) -> str:
        return f"{self.covers.__module__}.{self.covers.__qualname__}".removeprefix("lensmini.") + self.name

    def build(self, seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
        values: Inputs = {}
        for index, (key, (kind, axes)) in enumerate(self.inputs.items()):
            shape = axes if kind == "shared" else (ROWS[kind][0], *axes)
            drawn = self.draw.get(key, randn)(31 * seed + index, shape)
            values[key] = (
                drawn.to(time_dtype(dtype) if key in TIMES_LIKE else dtype) if drawn.is_floating_point() else drawn
            )
        return values

    def first(self, values: Inputs) -> Inputs:
        """The inputs of the first sample alone."""
        kinds = {key: kind for key, (kind, _) in self.inputs.items()}
        return {key: value if kinds[key] == "shared" else value[: ROWS[kinds[key]][1]] for key, value in values.items()}

    def rows(self, result: Any, sample: int = 0) -> list[Tensor]:
        """The part of every output that belongs to the first sample."""
        kinds = [self.outputs] if isinstance(self.outputs, str) else self.outputs
        return [
            value if kind == "shared" else value[: ROWS[kind][1]]
            for value, kind in zip(flat(result), kinds, strict=True)
        ]


def randn(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    return 0.05 + 0.9 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bytes_(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def tokens(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(1, 5000, shape, generator=torch.Generator().manual_seed(seed))


def time_dtype(dtype: torch.dtype) -> torch.dtype:
    """Time is float32 at least, whatever the latents are."""
    return torch.promote_types(dtype, torch.float32)


def fixed(dtype: torch.dtype) -> Callable[[torch.dtype], torch.dtype]:
    return lambda _: dtype


def flat(result: Any) -> list[Tensor]:
    """Every tensor of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if result is None:
        return []
    return [tensor for part in result for tensor in flat(part)]


def plain(function: Callable[..., Any]) -> Callable[[torch.dtype], Callable[..., Any]]:
    """A function without parameters: the same for every dtype."""
    return lambda dtype: function


def module(build: Callable[[], nn.Module], call: Callable[..., Any]) -> Callable[[torch.dtype], Callable[..., Any]]:
    """A module with random weights in the dtype of the inputs."""

    def make(dtype: torch.dtype) -> Callable[..., Any]:
        built = build()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
        built = built.to(dtype)
        by_device = {"cpu": built, "meta": copy.deepcopy(built).to("meta")}
        return lambda inputs, layout: call(by_device[layout.grids.device.type], inputs, layout)

    return make


def velocity(x: Tensor, t: Tensor, layout: Layout | None) -> Tensor:
    """A model for the samplers: smooth, and different for every sample's time."""
    rows = t if layout is None else t[layout.image_samples]
    return torch.tanh(x) * (1 + rows.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))


DENSE = ("sample", (CHANNELS, 2, 3))
PACKED = ("image", (CHANNELS,))
ROW = ("sample", (CHANNELS,))
DIM = HEADS * HEAD_DIM
TIME = ("sample", ())
JOINT = ("joint", (HEADS, HEAD_DIM))
TIMES_LIKE = {"t": uniform, "t_next": uniform}


def both_forms(function: Callable[..., Any], names: Sequence[str], num_times: int, outputs: str = "") -> list[Entry]:
    """Entries for the dense and the packed form of ``function(*tensors, *times, layout=)``."""
    time_names = ["t", "t_next"][:num_times]
    entries = []
    for form, shape, kind in (("dense", DENSE, "sample"), ("packed", PACKED, "image")):

        def call(inputs: Inputs, layout: Layout, form: str = form) -> Any:
            values = [inputs[name] for name in (*names, *time_names)]
            return function(*values, **({"layout": layout} if form == "packed" else {}))

        inputs = {**dict.fromkeys(names, shape), **dict.fromkeys(time_names, TIME)}
        dtype = time_dtype if outputs else (lambda d: d)
        entries.append(Entry(function, plain(call), inputs, outputs or kind, dtype, f"[{form}]", TIMES_LIKE))
    return entries


def dpm2_with_previous(noisy: Tensor, v: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, **options: Any) -> Tensor:
    previous = (clean, 1 - (1 - t) / 2)
    return sampling.dpm2(noisy, v, t, t_next, previous=previous, **options)


def heun(noisy: Tensor, t: Tensor, t_next: Tensor, layout: Layout | None = None) -> Tensor:
    return sampling.heun_step(lambda x, s: velocity(x, s, layout), noisy, t, t_next, layout=layout)


def relabel(entries: list[Entry], covers: Callable[..., Any], name: str = "", **changes: Any) -> list[Entry]:
    return [replace(entry, covers=covers, name=name + entry.name, **changes) for entry in entries]


def ode_entries() -> list[Entry]:
    entries = []
    for step in ("euler", "heun", "dpm2"):
        for form, shape, kind in (("dense", DENSE, "sample"), ("packed", PACKED, "image")):

            def call(inputs: Inputs, layout: Layout, step: Any = step, form: str = form) -> Tensor:
                used = layout if form == "packed" else None
                grid = torch.tensor([1.0, 0.7, 0.4, 0.0], device=inputs["noise"].device)
                return sampling.sample_ode(
                    lambda x, t: velocity(x, t, used), inputs["noise"], grid, step=step, layout=used
                )

            entries.append(Entry(sampling.sample_ode, plain(call), {"noise": shape}, kind, name=f"[{step}, {form}]"))
    return entries


def attention_entries() -> list[Entry]:
    entries = []
    for backend in ("auto", "loop", "padded", "math"):

        def call(inputs: Inputs, layout: Layout, backend: Any = backend) -> Tensor:
            lengths = layout.joint_lengths
            return attention.packed_attention(
                inputs["query"], inputs["key"], inputs["value"], layout.joint_offsets, lengths=lengths, backend=backend
            )

        inputs: Kinds = {"query": JOINT, "key": JOINT, "value": JOINT}
        entries.append(
            Entry(
                attention.packed_attention, plain(call), inputs, "joint", name=f"[{backend}]", meta=backend != "padded"
            )
        )
    return entries


def rotary(layout: Layout) -> tuple[rope.RotaryTable, rope.RotaryTable]:
    return rope.RotaryEmbedding3D((2, 2, 4))(layout)


def tiny_transformer() -> transformer.LensTransformer:
    config = LensConfig(
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        axes_dims_rope=(2, 2, 4),
        in_channels=CHANNELS,
        out_channels=CHANNELS // 4,
        enc_hidden_dim=TEXT_DIM,
        selected_layer_index=tuple(range(TEXT_LAYERS)),
    )
    return transformer.LensTransformer(config)


class Posterior(NamedTuple):
    mean: Tensor
    logvar: Tensor


class Encoded(NamedTuple):
    latent_dist: Posterior


class Decoded(NamedTuple):
    sample: Tensor


class TinyVae(nn.Module):
    """Stands in for an autoencoder: one convolution each way, and a constant variance."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def encode(self, images: Tensor) -> Encoded:
        mean = self.down(images)
        return Encoded(Posterior(mean, torch.full_like(mean, -1.0)))

    def decode(self, z: Tensor) -> Decoded:
        return Decoded(self.up(z))


def tiny_autoencoder() -> autoencoder.Autoencoder:
    return autoencoder.Autoencoder(TinyVae(), normaliser(16), downsample=4)


def normaliser(channels: int) -> latents.LatentNormalizer:
    return latents.LatentNormalizer(torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))


def lerped(inputs: Inputs, layout: Layout) -> Tensor:
    target = inputs["target"].clone()
    averaging.lerp_parameters_([target], [inputs["source"]], 0.3)
    return target


def policy_entries() -> list[Entry]:
    """The objectives of reinforcement learning and the Gaussian steps they score, dense and packed."""
    three = ["one", "two", "three"]
    row = ["row"]
    table: list[tuple[Callable[..., Any], list[str], list[str], Any, bool]] = [
        (policy.nft_loss, three, row, lambda a, b, c, r, **o: policy.nft_loss(a, b, c, r, beta=0.5, **o), True),
        (
            policy.nft_loss,
            three,
            row,
            lambda a, b, c, r, **o: policy.nft_loss(a, b, c, r, weight="self_normalised", t=r, **o),
            True,
        ),
        (policy.matching_log_ratio, three, row, policy.matching_log_ratio, True),
        (policy.velocity_gap, three[:2], [], policy.velocity_gap, True),
        (policy.ram_target, three, row, policy.ram_target, False),
        (sampling.gaussian_log_prob, three[:2], row, sampling.gaussian_log_prob, True),
        (
            sampling.gaussian_log_prob,
            three[:2],
            row,
            lambda a, b, r, **o: sampling.gaussian_log_prob(a, b, r, "mean", **o),
            True,
        ),
        (sampling.gaussian_kl, three[:2], row, sampling.gaussian_kl, True),
    ]
    entries = []
    for index, (covers, fields, rows, function, reduces) in enumerate(table):
        for form, shape, kind in (("dense", DENSE, "sample"), ("packed", PACKED, "image")):

            def call(inputs: Inputs, layout: Layout, f: Any = function, form: str = form) -> Any:
                return f(*inputs.values(), **({"layout": layout} if form == "packed" else {}))

            inputs: Kinds = {**dict.fromkeys(fields, shape), **dict.fromkeys(rows, TIME)}
            outputs = "sample" if reduces else kind
            name = f"[{index}, {form}]"
            entries.append(Entry(covers, plain(call), inputs, outputs, time_dtype, name, {"row": uniform}))
    for kernel in ("ddim", "flow", "dance", "cps"):
        for form, shape, kind in (("dense", DENSE, "sample"), ("packed", PACKED, "image")):

            def step(inputs: Inputs, layout: Layout, kernel: Any = kernel, form: str = form) -> Any:
                used = layout if form == "packed" else None
                x, v, t = inputs["x"], inputs["v"], inputs["t"]
                return tuple(sampling.sde_kernel(x, v, t, t / 2, 0.6, kernel, layout=used))

            inputs = {"x": shape, "v": shape, "t": TIME}
            name = f"[{kernel}, {form}]"
            entries.append(Entry(sampling.sde_kernel, plain(step), inputs, (kind, kind), time_dtype, name, TIMES_LIKE))
    for reduction_ in ("sum", "mean"):

        def reduce(inputs: Inputs, layout: Layout, how: Any = reduction_) -> Tensor:
            return reduction.reduce_samples(inputs["x"], how, layout=layout)

        entries.append(Entry(reduction.reduce_samples, plain(reduce), {"x": PACKED}, "sample", name=f"[{reduction_}]"))
    return entries


def distillation_entries() -> list[Entry]:
    """Directions, losses and noise levels of distribution matching, and walks of a few steps, dense and packed."""
    matching = distribution_matching
    both, row, three = ["one", "two"], ["row"], ["one", "two", "three"]
    grid = torch.tensor([1.0, 0.7, 0.4, 0.0])

    def augment(a: Tensor, b: Tensor, x: Tensor, **o: Any) -> Tensor:
        return matching.cfg_augmentation_direction(a, b, 5.0, x=x, normaliser="mean_abs", **o)

    def walk(a: Tensor, b: Tensor, layout: Layout | None = None) -> Tensor:
        model = lambda x, t: velocity(x, t, layout)  # noqa: E731
        return sampling.few_step_sample(model, a, grid, [b, b / 2], layout=layout)

    def simulate(a: Tensor, b: Tensor, layout: Layout | None = None) -> tuple[Tensor, ...]:
        model = lambda x, t: velocity(x, t, layout)  # noqa: E731
        num = a.shape[0] if layout is None else layout.image_offsets.shape[0] - 1
        stop = torch.tensor([1, 2, 0], device=a.device)[:num]
        return tuple(sampling.backward_simulation(model, a, grid, stop, [b, b / 2], layout=layout)[:2])

    table: list[tuple[Callable[..., Any], list[str], Any, str]] = [
        (
            matching.dmd_direction,
            three,
            lambda a, b, x, **o: matching.dmd_direction(a, b, x=x, floor=1e-3, **o),
            "wide",
        ),
        (matching.cfg_augmentation_direction, three, augment, "wide"),
        (matching.directional_loss, both, matching.directional_loss, "sample"),
        (sampling.few_step_sample, both, walk, "same"),
        (sampling.backward_simulation, both, simulate, "step"),
    ]
    entries = []
    for covers, fields, function, result in table:
        for form, shape, kind in (("dense", DENSE, "sample"), ("packed", PACKED, "image")):

            def call(inputs: Inputs, layout: Layout, f: Any = function, form: str = form) -> Any:
                return f(*inputs.values(), **({"layout": layout} if form == "packed" else {}))

            outputs = {"sample": "sample", "step": (kind, kind)}.get(result, kind)
            dtype = time_dtype if result in ("wide", "sample") else (lambda d: d)
            entries.append(Entry(covers, plain(call), dict.fromkeys(fields, shape), outputs, dtype, f"[{form}]"))
    for schedule in ("shared", "decoupled", "hybrid"):

        def levels(inputs: Inputs, _: Layout, schedule: Any = schedule) -> Any:
            return tuple(matching.noise_levels(inputs["t"], inputs["row"], schedule, low=0.1))

        drawn = {"t": uniform, "row": uniform}
        kinds: Kinds = {"t": TIME, "row": ("sample", (2,))}
        outputs = ("sample", "sample")
        entries.append(Entry(matching.noise_levels, plain(levels), kinds, outputs, time_dtype, f"[{schedule}]", drawn))
    for covers, fields in (
        (adversarial.generator_loss, row),
        (adversarial.discriminator_loss, both),
        (adversarial.approximate_r1, both),
        (matching.divergence_weight, row),
    ):
        option = {"divergence": "jeffreys"} if covers is matching.divergence_weight else {}
        function = plain(lambda i, _, f=covers, o=option: f(*i.values(), **o))
        entries.append(Entry(covers, function, dict.fromkeys(fields, TIME), "sample", time_dtype))
    head = module(
        lambda: discriminator.DiscriminatorHead(CHANNELS, [0, 2], hidden_dim=6),
        lambda m, i, layout: m({0: (i["one"], i["one"][:0]), 2: (i["two"], i["two"][:0])}, layout),
    )
    kinds = {"one": PACKED, "two": PACKED}
    return [*entries, Entry(discriminator.DiscriminatorHead, head, kinds, "sample", time_dtype)]


def consistency_entries() -> list[Entry]:
    """Consistency models and flow maps, dense and packed."""
    four = ["one", "two", "three", "four"]
    model = velocity

    def slope(x: Tensor, tx: Tensor, t: Tensor, method: Any, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        step = None if method == "forward" else 0.01
        return consistency.directional_derivative(
            lambda x, t: model(x, t, layout), (x, t), (tx, t.cos()), method=method, step=step
        )

    def loss(metric: Any) -> Callable[..., Tensor]:
        return lambda a, b, r, **o: consistency.consistency_loss(a, b, metric=metric, c=0.1, weight=r, **o)

    def angled(variant: Any) -> Callable[..., Tensor]:
        return lambda *x, **o: consistency.trigflow_tangent(*x, warmup=0.4, variant=variant, **o)

    def step(solver: Any) -> Callable[..., Tensor]:
        return lambda x, t, layout=None: consistency.teacher_step(
            lambda x, t: model(x, t, layout), x, t, t / 2, solver=solver, layout=layout
        )

    def target(x: Tensor, t: Tensor, layout: Layout | None = None) -> Tensor:
        return consistency.consistency_target(lambda x, t: model(x, t, layout), x, t, layout=layout)

    def wrapped(x: Tensor, t: Tensor, layout: Layout | None = None) -> Tensor:
        return consistency.trig_prediction(lambda x, t: model(x, t, layout), x, t, layout=layout)

    def half(t: Tensor) -> Tensor:
        return t / 2

    of = consistency
    same = lambda dtype: dtype  # noqa: E731
    # Function, its tensors, whether it takes times, the call, what it returns (state, sample or both), its dtype.
    table: list[tuple[Callable[..., Any], list[str], bool, Any, str, Any]] = [
        *((of.consistency_loss, four[:2], True, loss(m), "sample", time_dtype) for m in ("squared", "pseudo_huber")),
        (of.consistency_loss, four[:2], True, loss("pseudo_huber_norm"), "sample", time_dtype),
        (of.teacher_step, four[:1], True, step("euler"), "state", time_dtype),
        (of.teacher_step, four[:1], True, step("heun"), "state", time_dtype),
        (of.consistency_target, four[:1], True, target, "state", time_dtype),
        (
            of.mean_velocity_target,
            four[:2],
            True,
            lambda a, b, t, **o: of.mean_velocity_target(a, b, t, half(t), **o),
            "state",
            time_dtype,
        ),
        (
            of.mean_velocity_loss,
            four[:3],
            True,
            lambda a, b, c, t, **o: of.mean_velocity_loss(a, b, c, t, half(t), **o),
            "sample",
            time_dtype,
        ),
        (of.normalise_tangent, four[:1], False, of.normalise_tangent, "state", time_dtype),
        (
            of.normalise_tangent,
            four[:1],
            False,
            lambda x, **o: of.normalise_tangent(x, 0.1, "l2", **o),
            "state",
            time_dtype,
        ),
        *((of.trigflow_tangent, four, True, angled(variant), "state", time_dtype) for variant in ("scm", "rcm")),
        (of.trigflow_direction, four[:1], True, lambda *x, **o: of.trigflow_direction(*x, **o)[0], "state", same),
        (
            of.trigflow_direction,
            four[:1],
            True,
            lambda *x, **o: of.trigflow_direction(*x, **o)[1],
            "sample",
            time_dtype,
        ),
        (of.rf_to_trig, four[:2], True, lambda *x, **o: of.rf_to_trig(*x, **o)[:2], "both", same),
        (of.rf_to_trig, four[:2], True, lambda *x, **o: of.rf_to_trig(*x, **o)[2], "sample", time_dtype),
        (of.trig_to_rf, four[:2], True, lambda *x, **o: of.trig_to_rf(*x, **o)[:2], "both", same),
        (of.trig_to_rf, four[:2], True, lambda *x, **o: of.trig_to_rf(*x, **o)[2], "sample", time_dtype),
        (of.trig_prediction, four[:1], True, wrapped, "state", same),
        (trigflow.expand_angle, four[:1], True, lambda x, t, **o: trigflow.expand_angle(t, x, **o), "both", time_dtype),
        (of.directional_derivative, four[:2], True, lambda *x, **o: slope(*x, "forward", **o), "both", same),
    ]
    entries = []
    for index, (covers, fields, timed, function, returned, dtype) in enumerate(table):
        for form, shape, kind in (("dense", DENSE, "sample"), ("packed", PACKED, "image")):

            def call(inputs: Inputs, layout: Layout, f: Any = function, form: str = form) -> Any:
                return f(*inputs.values(), **({"layout": layout} if form == "packed" else {}))

            inputs: Kinds = {**dict.fromkeys(fields, shape), **({"t": TIME} if timed else {})}
            outputs = {"sample": "sample", "state": kind, "both": (kind, kind)}[returned]
            entries.append(Entry(covers, plain(call), inputs, outputs, dtype, f"[{index}, {form}]", TIMES_LIKE))
    return [
        *entries,
        Entry(
            of.adaptive_weight,
            plain(lambda i, _: of.adaptive_weight(i["x"], p=0.5)),
            {"x": TIME},
            "sample",
            time_dtype,
            draw={"x": uniform},
        ),
        Entry(
            of.shrinking_gap,
            plain(lambda i, _: of.shrinking_gap(i["t"], 2)),
            {"t": TIME},
            "sample",
            time_dtype,
            draw=TIMES_LIKE,
        ),
    ]


def advantages(inputs: Inputs, layout: Layout) -> Tensor:
    group = torch.tensor([4, 4, -1], device=inputs["rewards"].device)
    return policy.group_advantages(inputs["rewards"], group, scale="group")


def rolled(inputs: Inputs, layout: Layout) -> Tensor:
    grid = torch.tensor([0.9, 0.5, 0.2])
    noise = inputs["noise"]
    model = lambda x, t: velocity(x, t, layout)  # noqa: E731
    return sampling.sample_sde(model, noise, grid, lambda step: noise / 2, eta=0.5, kind="cps", layout=layout)[0]


ENTRIES = [
    Entry(
        local.expected_score,
        plain(lambda i, _: torch.stack(local.expected_score(i["x"], [4, 0, 2]), -1)),
        {"x": ("sample", (5,))},
        "sample",
        fixed(torch.float32),
    ),
    *policy_entries(),
    *consistency_entries(),
    *distillation_entries(),
    Entry(
        policy.group_advantages,
        plain(advantages),
        {"rewards": TIME},
        "shared",
        time_dtype,
    ),
    Entry(
        aggregation.aggregate,
        plain(lambda i, _: aggregation.aggregate(i["x"], i["x"] > 0.2, missing="renormalise", min_coverage=0.5).values),
        {"x": ("sample", (5,))},
        "sample",
        time_dtype,
        draw={"x": uniform},
    ),
    Entry(
        aggregation.criterion_advantages,
        plain(
            lambda i, _: (
                aggregation.criterion_advantages(
                    i["x"], i["x"] > 0.2, torch.tensor([1, 1, 0], device=i["x"].device), scale="group", contrast=True
                ).values
            )
        ),
        {"x": ("sample", (5,))},
        "shared",
        time_dtype,
        draw={"x": uniform},
    ),
    Entry(policy.optimality, plain(lambda i, _: policy.optimality(i["a"])), {"a": TIME}, "sample", time_dtype),
    Entry(
        policy.clipped_surrogate,
        plain(lambda i, _: policy.clipped_surrogate(i["log_ratio"], i["advantage"], 0.2, 0.2)),
        {"log_ratio": TIME, "advantage": TIME},
        "sample",
        time_dtype,
    ),
    Entry(
        policy.guarded_log_ratio,
        plain(lambda i, _: policy.guarded_log_ratio(i["log_ratio"], i["kl"], i["t"])),
        {"log_ratio": TIME, "kl": TIME, "t": TIME},
        "sample",
        time_dtype,
        draw=TIMES_LIKE,
    ),
    Entry(
        sampling.sample_sde,
        plain(rolled),
        {"noise": PACKED},
        eager_only="stores steps in records",
        meta=False,
    ),
    Entry(
        sampling.step_noise,
        plain(lambda inputs, layout: sampling.step_noise(range(layout.batch_size), 1, CHANNELS, layout)),
        dtype=fixed(torch.float32),
        eager_only="seeds generators",
    ),
    Entry(
        reduction.hide,
        plain(lambda i, _: reduction.hide(i["x"], i["x"] < 0)),
        {"x": PACKED},
    ),
    *both_forms(paths.interpolate, ["latents", "noise"], 1),
    *both_forms(paths.clean_prediction, ["noisy", "velocity"], 1),
    *both_forms(paths.noise_prediction, ["noisy", "velocity"], 1),
    *relabel(
        both_forms(lambda x, t, **options: paths.expand_time(t, x, **options), ["x"], 1),
        paths.expand_time,
        dtype=time_dtype,
    ),
    Entry(
        paths.velocity_target,
        plain(lambda inputs, layout: paths.velocity_target(**inputs)),
        {"latents": PACKED, "noise": PACKED},
    ),
    *both_forms(sampling.euler_step, ["noisy", "velocity"], 2),
    *relabel(both_forms(heun, ["noisy"], 2), sampling.heun_step),
    *both_forms(sampling.dpm2, ["noisy", "velocity"], 2),
    *relabel(both_forms(dpm2_with_previous, ["noisy", "velocity", "clean"], 2), sampling.dpm2, "[second step]"),
    *ode_entries(),
    Entry(
        sampling.guide,
        plain(lambda inputs, layout: sampling.guide(inputs["cond"], inputs["uncond"], 4.0, channel_dim=1)),
        {"cond": DENSE, "uncond": DENSE},
        "sample",
    ),
    Entry(
        sampling.time_grid,
        plain(lambda inputs, layout: sampling.time_grid(5, 1.3, device=layout.grids.device)),
        outputs="shared",
        dtype=fixed(torch.float32),
        meta=False,
    ),
    Entry(
        sampling.initial_noise,
        plain(lambda inputs, layout: sampling.initial_noise(range(layout.batch_size), CHANNELS, layout)),
        dtype=fixed(torch.float32),
        eager_only="seeds generators",
    ),
    *both_forms(flow_matching.flow_matching_loss, ["velocity", "target"], 0, outputs="sample"),
    Entry(
        times.sample_times,
        plain(lambda i, _: times.sample_times(3, mu=i["mu"], generator=torch.Generator().manual_seed(3))),
        {"mu": ("sample", ())},
        "sample",
        dtype=fixed(torch.float32),
        eager_only="draws from a generator",
        meta=False,
    ),
    Entry(
        times.training_mu,
        plain(lambda inputs, layout: times.training_mu(inputs["num_tokens"])),
        {"num_tokens": ("sample", ())},
        "sample",
        dtype=fixed(torch.float32),
        draw={"num_tokens": tokens},
    ),
    Entry(
        averaging.lerp_parameters_, plain(lerped), {"target": ("shared", (4,)), "source": ("shared", (4,))}, "shared"
    ),
    Entry(
        packed.pack,
        plain(lambda inputs, layout: packed.pack(inputs["latents"])),
        {"latents": ("sample", (4, 2, 3))},
        "square",
    ),
    Entry(
        packed.pack,
        plain(lambda inputs, layout: packed.pack(list(inputs["latents"]))),
        {"latents": ("sample", (4, 2, 3))},
        "square",
        name="[list]",
    ),
    Entry(
        packed.unpack,
        plain(lambda inputs, layout: packed.unpack(inputs["tokens_"], layout)[0]),
        {"tokens_": PACKED},
        "shared",
        name="[first sample]",
        eager_only="splits by sizes that stand in a tensor",
        meta=False,
    ),
    Entry(
        packed.pack_text,
        plain(lambda inputs, layout: packed.pack_text([inputs["one"], inputs["two"]], MASK[: layout.batch_size])),
        {"one": ("slots", (5, 4)), "two": ("slots", (5, 4))},
        "text",
        eager_only="the number of its rows is data",
        meta=False,
    ),
    Entry(
        Layout,
        plain(lambda inputs, layout: (layout.expand(inputs["row"]), layout.expand(inputs["row"], "text"))),
        {"row": ("sample", (4,))},
        ("image", "text"),
        name=".expand",
    ),
    Entry(
        Layout,
        plain(lambda inputs, layout: layout.mean(inputs["x"])),
        {"x": PACKED},
        "sample",
        time_dtype,
        name=".mean",
    ),
    Entry(
        norm.rms_normalise,
        plain(lambda inputs, layout: norm.rms_normalise(inputs["x"], inputs["weight"], eps=1e-6)),
        {"x": PACKED, "weight": ("shared", (CHANNELS,))},
    ),
    Entry(norm.RMSNorm, module(lambda: norm.RMSNorm(CHANNELS), lambda m, i, _: m(i["x"])), {"x": PACKED}),
    Entry(
        rope.RotaryEmbedding3D,
        module(lambda: rope.RotaryEmbedding3D((2, 2, 4)), lambda m, inputs, layout: m(layout)),
        outputs=("image", "image", "text", "text"),
        dtype=fixed(torch.float32),
    ),
    Entry(
        rope.apply_rotary,
        plain(lambda i, _: rope.apply_rotary(i["heads"], rope.RotaryTable(i["cos"], i["sin"]))),
        {"heads": ("image", (HEADS, HEAD_DIM)), "cos": ("image", (HEAD_DIM // 2,)), "sin": ("image", (HEAD_DIM // 2,))},
    ),
    Entry(mlp.SwiGLU, module(lambda: mlp.SwiGLU(CHANNELS, 20), lambda m, i, _: m(i["x"])), {"x": PACKED}),
    Entry(
        mlp.silu_gate,
        plain(lambda inputs, layout: mlp.silu_gate(inputs["gate"], inputs["value"])),
        {"gate": PACKED, "value": PACKED},
    ),
    Entry(
        embeddings.timestep_sinusoid,
        plain(lambda inputs, layout: embeddings.timestep_sinusoid(inputs["t"], 16)),
        {"t": TIME},
        "sample",
        time_dtype,
        draw=TIMES_LIKE,
    ),
    Entry(
        embeddings.TimestepEmbedding,
        module(lambda: embeddings.TimestepEmbedding(12), lambda m, i, _: m(i["t"])),
        {"t": TIME},
        "sample",
        draw=TIMES_LIKE,
    ),
    Entry(
        fusion.MultiLayerTextFusion,
        module(lambda: fusion.MultiLayerTextFusion(TEXT_LAYERS, TEXT_DIM, 12), lambda m, i, _: m(i["text_"])),
        {"text_": ("text", (TEXT_LAYERS, TEXT_DIM))},
        "text",
    ),
    Entry(
        fusion.fuse_text_layers,
        module(
            lambda: fusion.MultiLayerTextFusion(TEXT_LAYERS, TEXT_DIM, 12),
            lambda m, i, _: fusion.fuse_text_layers(i["x"], m.txt_norm, m.txt_in),
        ),
        {"x": ("text", (TEXT_LAYERS, TEXT_DIM))},
        "text",
    ),
    *attention_entries(),
    Entry(
        segments.expand_rows,
        plain(lambda i, layout: segments.expand_rows(i["row"], layout.image_samples, layout.image_offsets)),
        {"row": ("sample", (4,))},
    ),
    Entry(
        segments.segment_sum,
        plain(lambda i, layout: segments.segment_sum(i["x"], layout.image_samples, layout.image_offsets)),
        {"x": PACKED},
        "sample",
    ),
    Entry(
        joint.join_streams,
        plain(lambda i, layout: joint.join_streams(i["image"], i["words"], layout)),
        {"image": PACKED, "words": ("text", (CHANNELS,))},
        "joint",
    ),
    Entry(
        joint.split_streams,
        plain(lambda i, layout: joint.split_streams(i["x"], layout)),
        {"x": JOINT},
        ("image", "text"),
    ),
    Entry(
        modulation.modulated_norm,
        plain(
            lambda i, layout: modulation.modulated_norm(
                i["x"], i["weight"], i["shift"], i["scale"], layout, "image", eps=1e-6
            )
        ),
        {"x": PACKED, "weight": ("shared", (CHANNELS,)), "shift": ROW, "scale": ROW},
    ),
    Entry(
        modulation.gated_residual,
        plain(lambda i, layout: modulation.gated_residual(i["x"], i["update"], i["gate"], layout, "text")),
        {"x": ("text", (CHANNELS,)), "update": ("text", (CHANNELS,)), "gate": ROW},
        "text",
    ),
    Entry(
        heads.join_heads,
        plain(
            lambda i, layout: heads.join_heads(
                i["image"],
                i["words"],
                i["image_weight"],
                i["text_weight"],
                (rope.RotaryTable(i["cos"], i["sin"]), rope.RotaryTable(i["text_cos"], i["text_sin"])),
                layout,
                eps=1e-6,
            )
        ),
        {
            "image": ("image", (3, HEADS, HEAD_DIM)),
            "words": ("text", (3, HEADS, HEAD_DIM)),
            "image_weight": ("shared", (2, HEAD_DIM)),
            "text_weight": ("shared", (2, HEAD_DIM)),
            "cos": ("image", (HEAD_DIM // 2,)),
            "sin": ("image", (HEAD_DIM // 2,)),
            "text_cos": ("text", (HEAD_DIM // 2,)),
            "text_sin": ("text", (HEAD_DIM // 2,)),
        },
        ("joint", "joint", "joint"),
    ),
    Entry(
        blocks.JointAttention,
        module(
            lambda: blocks.JointAttention(DIM, HEADS),
            lambda m, i, layout: m(i["x"], i["words"], rotary(layout), layout),
        ),
        {"x": ("image", (DIM,)), "words": ("text", (DIM,))},
        ("image", "text"),
    ),
    Entry(
        blocks.DualStreamBlock,
        module(
            lambda: blocks.DualStreamBlock(DIM, HEADS),
            lambda m, i, layout: m(i["x"], i["words"], i["temb"], rotary(layout), layout),
        ),
        {"x": ("image", (DIM,)), "words": ("text", (DIM,)), "temb": ("sample", (DIM,))},
        ("image", "text"),
    ),
    Entry(
        transformer.OutputNorm,
        module(lambda: transformer.OutputNorm(DIM), lambda m, i, layout: m(i["x"], m.modulation(i["temb"]), layout)),
        {"x": ("image", (DIM,)), "temb": ("sample", (DIM,))},
    ),
    Entry(
        transformer.LensTransformer,
        module(tiny_transformer, lambda m, i, layout: m.forward_packed(i["x"], i["t"], i["words"], layout)),
        {"x": PACKED, "t": TIME, "words": ("text", (TEXT_LAYERS, TEXT_DIM))},
        name=".forward_packed",
        draw=TIMES_LIKE,
    ),
    Entry(
        transformer.LensTransformer,
        module(
            tiny_transformer, lambda m, i, layout: m(i["x"], i["t"], [i["one"], i["two"]], MASK[: layout.batch_size])
        ),
        {"x": DENSE, "t": TIME, "one": ("slots", (5, TEXT_DIM)), "two": ("slots", (5, TEXT_DIM))},
        "sample",
        name=".forward",
        draw=TIMES_LIKE,
        eager_only="drops masked tokens, whose number is data; forward_packed compiles",
        meta=False,
    ),
    Entry(
        transformer.LensTransformer,
        module(tiny_transformer, lambda m, i, _: m.modulation(i["t"]).output),
        {"t": TIME},
        "sample",
        name=".modulation",
        draw=TIMES_LIKE,
    ),
    Entry(
        cpu_attention.cpu_attention,
        plain(lambda i, layout: cpu_attention.cpu_attention(i["q"], i["k"], i["v"], layout.joint_offsets)),
        {"q": JOINT, "k": JOINT, "v": JOINT},
        "joint",
        meta=False,
    ),
    Entry(
        text_encoder.pad_text,
        plain(lambda i, layout: text_encoder.pad_text([i["one"]], MASK[: layout.batch_size], 7)[0]),
        {"one": ("slots", (5, 4))},
        "slots",
        meta=False,
    ),
    Entry(latents.patchify, plain(lambda i, _: latents.patchify(i["x"])), {"x": ("sample", (3, 4, 6))}, "sample"),
    Entry(latents.unpatchify, plain(lambda i, _: latents.unpatchify(i["x"])), {"x": ("sample", (12, 2, 3))}, "sample"),
    Entry(
        latents.LatentNormalizer,
        module(lambda: normaliser(CHANNELS), lambda m, i, _: m.normalize(i["x"])),
        {"x": DENSE},
        "sample",
        name=".normalize",
    ),
    Entry(
        latents.LatentNormalizer,
        module(lambda: normaliser(CHANNELS), lambda m, i, _: m.denormalize(i["x"])),
        {"x": DENSE},
        "sample",
        name=".denormalize",
    ),
    Entry(
        autoencoder.Autoencoder,
        module(tiny_autoencoder, lambda m, i, _: m.encode(i["x"])),
        {"x": ("sample", (3, 8, 12))},
        "sample",
        name=".encode",
    ),
    Entry(
        autoencoder.Autoencoder,
        module(tiny_autoencoder, lambda m, i, _: m.decode(i["x"])),
        {"x": ("sample", (16, 2, 3))},
        "sample",
        name=".decode",
    ),
    Entry(
        autoencoder.to_uint8,
        plain(lambda i, _: autoencoder.to_uint8(i["x"])),
        {"x": ("sample", (3, 4, 4))},
        "sample",
        fixed(torch.uint8),
    ),
    Entry(
        autoencoder.from_uint8,
        plain(lambda i, _: autoencoder.from_uint8(i["x"])),
        {"x": ("sample", (3, 4, 4))},
        "sample",
        fixed(torch.float32),
        draw={"x": bytes_},
    ),
    Entry(
        resize_and_crop,
        plain(lambda i, _: resize_and_crop(i["x"], Bucket(4, 6))),
        {"x": ("shared", (3, 9, 8))},
        "shared",
        eager_only="prepares data with exact fractions",
    ),
    Entry(
        loss_weights,
        plain(lambda _, layout: loss_weights(layout, StepTotals(50, 9000, 0), "per_token")),
        outputs="sample",
        dtype=fixed(torch.float32),
    ),
]

EXCLUDED = {
    "lensmini.rewards.judges.injection.GuardedJudge": "requests to verdicts; tests/rewards/test_injection.py",
    "lensmini.rewards.judges.local.LocalJudge": "requests to verdicts; tests/rewards/test_local_judge.py",
    "lensmini.rewards.judges.programs.ocr_judge": "a judge of functions; tests/rewards/test_programs.py",
    "lensmini.rewards.judges.programs.once_per_picture": "remembers a function; tests/rewards/test_programs.py",
    "lensmini.rewards.judges.programs.question_judge": "a judge of functions; tests/rewards/test_programs.py",
    "lensmini.rewards.judges.programs.rapid_reader": "pictures to texts; tests/rewards/test_programs.py",
    "lensmini.rewards.judges.programs.read_strings": "pictures to texts; tests/rewards/test_programs.py",
    "lensmini.rewards.judges.questions.shrink": "pictures uint8 to uint8; tests/rewards/test_judges.py",
    "lensmini.rewards.judges.red_team.RedTeamPicture": "a record of a picture; tests/rewards/test_injection.py",
    "lensmini.rewards.judges.red_team.red_team_pictures": "paints on bytes; tests/rewards/test_injection.py",
    "lensmini.rewards.judges.repeats.Repeated": "a record of verdicts; tests/rewards/test_repeats.py",
    "lensmini.rewards.judges.repeats.nearest_in_group": "of a group, not differentiated; tests/rewards/test_repeats.py",
    "lensmini.rewards.judges.repeats.repeat_near_ties": "pictures to verdicts; tests/rewards/test_repeats.py",
    "lensmini.rewards.model.baselines.base_rates": "counts on the CPU; tests/rewards/test_model.py",
    "lensmini.rewards.model.baselines.fit_logistic": "minimises, not differentiated; tests/rewards/test_model.py",
    "lensmini.rewards.model.baselines.pool_map": "of one picture's features; tests/rewards/test_model.py",
    "lensmini.rewards.model.baselines.principal_axes": "axes of a whole set; tests/rewards/test_model.py",
    "lensmini.rewards.model.comparison.Answers": "a record of tensors; tests/rewards/test_model.py",
    "lensmini.rewards.model.features.FrozenFeatures": "a record of callables; tests/rewards/test_model.py",
    "lensmini.rewards.model.fit.answer_loss": "a mean over a batch; tests/rewards/test_model.py",
    "lensmini.rewards.model.fit.spread_levels": "exact levels in float32; tests/rewards/test_model.py",
    "lensmini.rewards.model.features.resize_and_normalise": "pictures to a model's input; tests/rewards/test_model.py",
    "lensmini.rewards.model.head.mean_words": "of features and their own mask; tests/rewards/test_model.py",
    "lensmini.rewards.model.head.RewardHead": "lists of maps of any sizes; tests/rewards/test_model.py",
    "lensmini.rewards.model.judged.Judged": "a record of pictures; tests/rewards/test_model.py",
    "lensmini.rewards.model.judged.KnownVerdicts": "holds verdicts; tests/rewards/test_model.py",
    "lensmini.rewards.model.judged.Questions": "a record of tensors without operations; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.BrierParts": "a record of tensors without operations; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.Platt": "a record of tensors without operations; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.accuracy": "a mean over answers, in float32; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.brier_decomposition": "groups answers by their values; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.brier_score": "a mean over answers, in float32; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.expected_calibration_error": "a mean over answers, in float32; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.fit_platt": "minimises, not differentiated; tests/rewards/test_model.py",
    "lensmini.rewards.model.metrics.fit_temperature": "minimises, not differentiated; tests/rewards/test_model.py",
    "lensmini.rewards.model.predictor.Prediction": "a record of tensors without operations; tests/rewards/test_model.py",
    "lensmini.rewards.model.predictor.RubricRewardModel": "takes strings and pictures; tests/rewards/test_model.py",
    "lensmini.objectives.consistency.derivative.check_derivative": "a report; tests/objectives/test_consistency_derivative.py",
    "lensmini.objectives.consistency.gaps.sample_time_pairs": "draws; tests/objectives/test_consistency.py",
    "lensmini.rewards.judges.protocol.JudgeRequest": "a record of a picture; tests/rewards/test_judges.py",
    "lensmini.rewards.judges.protocol.judge_pictures": "pictures to verdicts; tests/rewards/test_judges.py",
    "lensmini.rewards.aggregate.Aggregate": "a record of tensors without operations",
    "lensmini.rewards.verdicts.ScoreTable": "a record of tensors without operations",
    "lensmini.objectives.policy.advantages.count_groups": "counts, for a log; tests/objectives/test_advantages.py",
    "lensmini.reduction.align_samples": "casts and hides; tests/test_reduction.py",
    "lensmini.reduction.known_values": "a check and a cast; tests/test_reduction.py",
    "lensmini.reduction.dense_ids": "integers to integers; tests/objectives/test_advantages.py",
    "lensmini.reduction.element_mask": "reshapes masks; tests/test_reduction.py",
    "lensmini.reduction.holds": "answers yes or no; tests/test_reduction.py",
    "lensmini.reduction.per_sample": "a check and a cast; tests/test_reduction.py",
    "lensmini.objectives.distribution_matching.NoiseLevels": "a record of tensors without operations",
    "lensmini.sampling.few_step.SimulatedStep": "a record of tensors without operations",
    "lensmini.sampling.kernels.Transition": "a record of tensors without operations",
    "lensmini.sampling.rollout.Replay": "a record of tensors without operations",
    "lensmini.sampling.rollout.StochasticStep": "a record of tensors without operations",
    "lensmini.sampling.rollout.replay_step": "of a stored step, not of a batch; tests/sampling/test_rollout.py",
    "lensmini.data.text_pictures.TextPicture": "a record of a picture; tests/data/test_text_pictures.py",
    "lensmini.data.text_pictures.draw_text_picture": "text to a picture; tests/data/test_text_pictures.py",
    "lensmini.data.features.FeatureStore": "files of features; tests/data/test_features.py",
    "lensmini.data.fp8.dequantise_features": "of eight-bit codes; tests/data/test_features.py",
    "lensmini.data.fp8.quantise_features": "rounds to eight bits on purpose; tests/data/test_features.py",
    "lensmini.data.fp8.relative_error": "a report of an error, not differentiated; tests/data/test_features.py",
    "lensmini.data.captions.shrink": "pictures uint8 to uint8; tests/data/test_captions.py",
    "lensmini.data.filters.duplicates.Duplicates": "a record of tensors; tests/data/test_duplicates.py",
    "lensmini.data.filters.duplicates.find_duplicates": "a greedy choice of rows, on the CPU; tests/data/test_duplicates.py",
    "lensmini.data.filters.models.ModelFilter": "wraps models of other libraries; tests/data/test_filters_models.py",
    "lensmini.data.filters.pixels.filter_area": "pictures uint8 to scores; tests/data/test_filters.py",
    "lensmini.data.filters.pixels.filter_clarity": "pictures uint8 to scores; tests/data/test_filters.py",
    "lensmini.data.filters.pixels.filter_entropy": "pictures uint8 to scores; tests/data/test_filters.py",
    "lensmini.data.filters.pixels.filter_luminance": "pictures uint8 to scores; tests/data/test_filters.py",
    "lensmini.data.filters.pixels.pixel_scores": "pictures uint8 to scores; tests/data/test_filters.py",
    "lensmini.data.filters.pixels.to_gray": "uint8 to uint8; tests/data/test_filters.py",
    "lensmini.endpoint.messages.image_message": "a picture to a data URL; tests/test_endpoint.py",
    "lensmini.pipeline.request.read_features": "checks and lists, no arithmetic; tests/pipeline/test_call.py",
    "lensmini.data.collate.PackedBatch": "a record of tensors; tests/data/test_collate.py",
    "lensmini.data.pictures.Picture": "a record of a tensor; tests/data/test_pictures.py",
    "lensmini.data.pictures.encode_picture": "a picture to bytes of a file; tests/data/test_pictures.py",
    "lensmini.data.collate.Sample": "a record of tensors without operations",
    "lensmini.nn.strips.decode_in_strips": "walks a diffusers decoder; tests/nn/test_strips.py has its laws",
    "lensmini.pipeline.decoding.decode_picture": "wraps a diffusers decoder; tests/pipeline/test_call.py",
    "lensmini.pipeline.decoding.finish_pictures": "returns pictures; tests/pipeline/test_call.py",
    "lensmini.pipeline.decoding.stack_equal": "stacks or lists, no arithmetic",
    "lensmini.checkpoints.lora.MergedLoRA": "a record of tensors; tests/checkpoints/test_lora.py",
    "lensmini.checkpoints.lora_files.LoRALayer": "a record of tensors without operations",
    "lensmini.checkpoints.mxfp4.unpack_mxfp4": "uint8 codes to weights, once while loading; tests/checkpoints/test_mxfp4.py",
    "lensmini.pipeline.painting.draw_noise": "a function of seeds; tests/pipeline/test_call.py",
    "lensmini.pipeline.painting.paint_packed": "takes a transformer; tests/pipeline/test_call.py",
    "lensmini.nn.chunk_space.Group": "views of buffers; tests/pipeline/test_fast_paths.py",
    "lensmini.nn.chunked.run_chunked": "changes its inputs on purpose; tests/pipeline/test_fast_paths.py",
    "lensmini.pipeline.graphs.cuda_graph": "makes a function of a function; tests/pipeline/test_low_precision.py",
    "lensmini.pipeline.low_precision.fp8_linear": "rounds to 8 bits on purpose; tests/pipeline/test_low_precision.py",
    "lensmini.pipeline.passes.FastEngine": "takes a transformer; tests/pipeline/test_fast_paths.py",
    "lensmini.pipeline.passes.plain_passes": "takes a transformer; tests/pipeline/test_fast_paths.py",
    "lensmini.pipeline.schedule_modulation.ScheduleModulation": "a record of tensors; tests/pipeline/test_fast_paths.py",
    "lensmini.pipeline.schedule_modulation.schedule_modulation": "takes a transformer; tests/pipeline/test_fast_paths.py",
    "lensmini.pipeline.picture.to_picture": "returns a PIL image; tests/pipeline/test_picture.py",
    "lensmini.pipeline.request.Noise": "a record of tensors without operations",
    "lensmini.pipeline.request.choose_noise": "a function of seeds; tests/pipeline/test_call.py",
    "lensmini.pipeline.request.latent_sizes": "returns sizes, no tensor",
    "lensmini.pipeline.call.LensPipeline": "takes strings; tests/pipeline/test_call.py",
    "lensmini.pipeline.prompt_cache.PromptCache": "files of features; tests/pipeline/test_prompt_cache.py",
    "lensmini.pipeline.prompt_features.FeatureCache": "a protocol",
    "lensmini.pipeline.prompt_features.encode_prompts": "takes strings; tests/pipeline/test_call.py",
    "lensmini.pipeline.published.published_timestep": "rounds to bfloat16 on purpose; tests/pipeline/test_published.py",
    "lensmini.pipeline.published.published_guide": "rounds to bfloat16 on purpose; tests/pipeline/test_published.py",
    "lensmini.pipeline.published.published_euler_step": "rounds to bfloat16 on purpose; tests/pipeline/test_published.py",
    "lensmini.pipeline.published.published_denormalize": "rounds to bfloat16 on purpose; tests/pipeline/test_published.py",
    "lensmini.shapes.check_shape": "returns sizes, no tensor",
    "lensmini.paths.check_same_shape": "returns nothing",
    "lensmini.paths.check_time_range": "returns nothing",
    "lensmini.nn.rope.RotaryTable": "a pair of tensors without operations",
    "lensmini.nn.text_encoder.TextEncoder": "wraps a language model and takes strings; tests/nn/test_text_encoder.py",
    "lensmini.nn.text_encoder.TokenizedPrompts": "a record of tensors without operations",
    "lensmini.nn.transformer.Captured": "a record of tensors without operations",
    "lensmini.nn.transformer.Modulation": "a record of tensors without operations",
    "lensmini.nn.initialise.initial_value": "a function of a seed and a name; tests/nn/test_transformer.py",
}


every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    return all(a.shape == e.shape and (a - e).abs().max() <= tolerance * e.abs().max() for a, e in pairs)


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(a.dtype == e.dtype and a.equal(e) for a, e in zip(actual, expected, strict=True))


@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype_follows_the_input(entry: Entry, dtype: torch.dtype) -> None:
    results = flat(entry.make(dtype)(entry.build(0, dtype), ALL.layout()))
    assert results and all(result.dtype == entry.dtype(dtype) for result in results)
    assert all(result.device.type == "cpu" for result in results)
    kinds = [entry.outputs] if isinstance(entry.outputs, str) else entry.outputs
    assert all(k == "shared" or len(r) == ROWS[k][0] for k, r in zip(kinds, results, strict=True)), "the table is wrong"


@every_entry
def test_low_precision_result_is_the_exact_one_up_to_rounding(entry: Entry) -> None:
    inputs = {k: v.bfloat16().double() if v.is_floating_point() else v for k, v in entry.build(0).items()}
    rounded = {
        k: v.to(torch.float32 if k in TIMES_LIKE else torch.bfloat16) if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    exact = flat(entry.make(torch.float64)(inputs, ALL.layout()))
    actual = flat(entry.make(torch.bfloat16)(rounded, ALL.layout()))
    if exact[0].dtype == torch.uint8:
        assert all((a.int() - e.int()).abs().max() <= 1 for a, e in zip(actual, exact, strict=True))
    else:
        assert close(actual, exact, 0.06)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.meta], ids=lambda entry: entry.label)
def test_device_follows_the_input(entry: Entry) -> None:
    inputs = {key: value.to("meta") for key, value in entry.build(0).items()}
    results = flat(entry.make(torch.float32)(inputs, ALL.layout().to("meta")))
    assert results and all(result.device.type == "meta" for result in results)


@every_entry
def test_inputs_are_not_modified(entry: Entry) -> None:
    inputs, layout = entry.build(0), ALL.layout()
    copies = {key: value.clone() for key, value in inputs.items()}
    layout_copies = {k: v.clone() for k, v in vars(layout).items() if isinstance(v, Tensor)}
    function = entry.make(torch.float32)
    results = flat(function(inputs, layout))
    assert all(inputs[key].equal(value) and inputs[key]._version == 0 for key, value in copies.items())
    assert all(getattr(layout, key).equal(value) for key, value in layout_copies.items())
    again = flat(function(inputs, layout))
    assert same_bits(results, again), "the same inputs give the same result"


@every_entry
def test_no_global_randomness_is_used(entry: Entry) -> None:
    inputs, layout, function = entry.build(0), ALL.layout(), entry.make(torch.float32)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(flat(function(inputs, layout)))
        assert torch.get_rng_state().equal(state)
    assert same_bits(*results)


COMPILED = [
    pytest.param(e, marks=[pytest.mark.slow] if e.covers is transformer.LensTransformer else [])
    for e in ENTRIES
    if not e.eager_only
]


@pytest.mark.parametrize("entry", COMPILED, ids=lambda entry: entry.label)
def test_compiles_whole_and_equals_eager(entry: Entry) -> None:
    torch._dynamo.reset()
    inputs, layout, function = entry.build(0), ALL.layout(), entry.make(torch.float32)
    expected = flat(function(inputs, layout))
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    actual = flat(compiled(inputs, layout))
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert close(actual, expected, 1e-5)


PER_SAMPLE = [e for e in ENTRIES if e.inputs and e.outputs != "shared"]


@pytest.mark.parametrize("entry", PER_SAMPLE, ids=lambda entry: entry.label)
def test_a_sample_does_not_depend_on_its_mates_bit_for_bit(entry: Entry) -> None:
    function, one, other = entry.make(torch.float32), entry.build(0), entry.build(1)
    mixed = {}
    for key, (kind, _) in entry.inputs.items():
        rows = ROWS[kind][1] if kind != "shared" else len(one[key])
        mixed[key] = torch.cat([one[key][:rows], other[key][rows:]])
    before, after = function(one, ALL.layout()), function(mixed, ALL.layout())
    assert same_bits(entry.rows(before), entry.rows(after))
    assert not same_bits(flat(before), flat(after)), "the mates must really differ"


@pytest.mark.parametrize("entry", [e for e in PER_SAMPLE if e.covers is not times.sample_times], ids=lambda e: e.label)
def test_a_sample_alone_gives_the_same_result(entry: Entry) -> None:
    function, inputs = entry.make(torch.float32), entry.build(0)
    together = entry.rows(function(inputs, ALL.layout()))
    alone = flat(function(entry.first(inputs), FIRST.layout()))
    assert close(alone, together, 1e-5)


EXCLUDED_MODULES = {
    "lensmini.parallel": "collectives over process groups; tests/test_parallel.py",
    "lensmini.data.scene": "the miniature's world: pictures from descriptions and back, scene by scene",
    "lensmini.prompting": "texts, and statistics of their scores; tests/prompting",
    "lensmini.rewards.diagnostics": "reports as plain numbers, over groups; tests/rewards/test_diagnostics.py",
}
"""Prefixes of module names, with the reason."""


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "slots" in dict(e.inputs.values())], ids=lambda e: e.label)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_content_under_the_mask_changes_nothing(entry: Entry, poison: float) -> None:
    if entry.covers is text_encoder.pad_text:
        pytest.skip("hands masked features on as they are; whatever reads them has a mask")
    inputs, function = entry.build(0), entry.make(torch.float32)
    hidden = {
        key: value.masked_fill(~MASK[..., None], poison) if entry.inputs[key][0] == "slots" else value
        for key, value in inputs.items()
    }
    assert same_bits(flat(function(inputs, ALL.layout())), flat(function(hidden, ALL.layout())))


def public_tensor_functions() -> dict[str, Any]:
    """Every function and class in an ``__all__`` of the library that handles tensors, by full name."""
    found = {}
    for info in pkgutil.walk_packages(lensmini.__path__, "lensmini."):
        if info.name.startswith(tuple(EXCLUDED_MODULES)):
            continue
        loaded = importlib.import_module(info.name)
        for name in getattr(loaded, "__all__", []):
            value = getattr(loaded, name)
            if getattr(value, "__module__", None) != info.name or not callable(value):
                continue
            if handles_tensors(value):
                found[f"{info.name}.{name}"] = value
    return found


def handles_tensors(value: Any) -> bool:
    if not inspect.isclass(value):
        return "Tensor" in str(inspect.signature(value))
    members = [
        member for _, member in inspect.getmembers(value, inspect.isfunction) if member.__module__ == value.__module__
    ]
    return any("Tensor" in str(inspect.signature(member)) for member in members) or "Tensor" in str(
        getattr(value, "__annotations__", "")
    )


def test_every_public_tensor_function_is_in_the_table_or_excluded_with_a_reason() -> None:
    public = public_tensor_functions()
    covered = {f"{entry.covers.__module__}.{entry.covers.__qualname__}" for entry in ENTRIES}
    assert len(public) > 30, "the walk must find the library"
    assert not covered - public.keys(), "entries for what is not public"
    assert not EXCLUDED.keys() - public.keys(), "exclusions of what is gone"
    assert not EXCLUDED.keys() & covered
    missing = sorted(public.keys() - covered - EXCLUDED.keys())
    assert not missing, f"add to the table, or exclude with a reason: {missing}"
