"""How to fit a run into the memory of a card: what each arrangement needs, and the fastest one that fits.

Sizes are bytes; 1 GiB is 2^30. A run has three phases, encode, sample and decode, and its peak is the largest of theirs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import nn

from lensmini.nn import Autoencoder, LensTransformer, TextEncoder
from lensmini.nn.strips import decodes_in_strips
from lensmini.nn.text_encoder import _find_decoder
from lensmini.pipeline.schedule_modulation import modulation_layers

__all__ = [
    "MEMORY_MODES",
    "MemoryPlan",
    "PartSizes",
    "Workload",
    "budget_of",
    "choose_plan",
    "describe",
    "part_sizes",
    "peaks",
    "workload",
]

GIB = 2**30
MemoryMode = Literal["auto", "8GiB", "12GiB", "16GiB", "24GiB"]
MEMORY_MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
RESERVE = 3 * GIB // 4
"""Of a card: the driver's context, libraries' workspaces and what the allocator cannot use for its fragments."""
KEPT_FREE = 0.05
"""Share of the free memory that "auto" leaves alone."""
DECODE_ELEMENTS = 768
"""Largest number of activations that decoding holds, per pixel: six maps of the decoder's 128 channels at full size."""
STRIP_ELEMENTS = (320, 27_000)
"""Likewise in strips of 32 rows: two and a half such maps, and per pixel of width what is made of one strip."""
ENCODE_WORKSPACE = GIB // 2
_DECODING = {False: ((False, False), (False, True)), True: ((False, False), (True, False), (True, True))}


class PartSizes(NamedTuple):
    """Bytes of weights by what can be moved apart."""

    block: int
    """One transformer block, without what modulates it."""
    num_blocks: int
    modulation: int
    """All modulation layers."""
    rest: int
    """Of the transformer: embeddings, time, output."""
    encoder: int
    encoder_layer: int
    """The encoder's largest decoder layer."""
    encoder_layers: int
    """All its decoder layers."""
    encoder_moves: bool
    """False for packed experts, whose kernels keep their weights where they were made."""
    autoencoder: int
    strips: bool = False
    """Whether it can decode in strips (:mod:`lensmini.nn.strips`)."""


class Workload(NamedTuple):
    """What one forward pass and one picture are made of."""

    tokens: int
    """Image and text tokens of a pass, both halves of guidance together."""
    text_tokens: int
    """Text tokens of them."""
    pixels: int
    """Of the largest picture."""
    times: int
    """Distinct times of the schedule."""
    dim: int
    mlp_dim: int
    text_width: int
    """Features of a text token, all layers together."""
    dtype_bytes: int = 2


def workload(
    transformer: LensTransformer,
    sizes: Sequence[tuple[int, int]],
    downsample: int,
    *,
    guided: bool,
    text_tokens: int,
    num_steps: int,
    batch_size: int,
) -> Workload:
    """What a run asks for.

    Args:
        transformer: for its widths and dtype.
        sizes: for each picture height and width in pixels.
        downsample: pixels per side of a latent position.
        guided: whether an unconditional half runs; its text is counted like the prompt's.
        text_tokens: of the longest prompt.
        num_steps: of the schedule.
        batch_size: pictures per pass.

    Example:
        >>> import torch
        >>> from lensmini.nn import LensConfig
        >>> with torch.device("meta"):
        ...     model = LensTransformer(LensConfig(num_layers=1)).bfloat16()
        >>> run = {"guided": True, "text_tokens": 100, "num_steps": 20, "batch_size": 1}
        >>> workload(model, [(1024, 1024)], 16, **run)[:4]
        (8392, 200, 1048576, 20)
    """
    config, halves = transformer.config, 2 if guided else 1
    images = [(height // downsample) * (width // downsample) for height, width in sizes]
    passes = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    return Workload(
        tokens=max(halves * (sum(rows) + text_tokens * len(rows)) for rows in passes),
        text_tokens=max(halves * text_tokens * len(rows) for rows in passes),
        pixels=max(height * width for height, width in sizes),
        times=num_steps * len({*images}),
        dim=config.inner_dim,
        mlp_dim=config.mlp_dim,
        text_width=config.num_text_layers * config.enc_hidden_dim,
        dtype_bytes=transformer.img_in.weight.dtype.itemsize,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Where the parts are in which phase.

    Example:
        >>> MemoryPlan(resident_blocks=48).encoder
        'resident'
    """

    encoder: Literal["resident", "offload", "free", "stream"] = "resident"
    """Always on the device; on it to encode; dropped when the prompts are encoded; its layers there one at a time."""
    transformer_waits: bool = False
    """The transformer is on the host while prompts are encoded."""
    modulation_resident: bool = True
    """The modulation layers stay on the device; else they visit it once per schedule."""
    resident_blocks: int
    """Blocks that stay during sampling; the others are streamed in for every pass."""
    decode_strips: bool = False
    """Pictures are decoded in strips of rows: the same ones, in less than half of the memory."""
    decode_alone: bool = False
    """The transformer is on the host while pictures are decoded."""


def part_sizes(
    transformer: LensTransformer, autoencoder: Autoencoder | None = None, text_encoder: TextEncoder | None = None
) -> PartSizes:
    """Measure the parts of a pipeline.

    Example:
        >>> import torch
        >>> from lensmini.nn import LensConfig
        >>> with torch.device("meta"):
        ...     model = LensTransformer(LensConfig()).bfloat16()
        >>> sizes = part_sizes(model)
        >>> round((sizes.num_blocks * sizes.block + sizes.modulation + sizes.rest) / 2**30, 2), sizes.block // 10**6
        (7.64, 113)
    """
    modulation = sum(map(_bytes, modulation_layers(transformer)))
    blocks = _bytes(transformer.transformer_blocks) - modulation
    num = len(transformer.transformer_blocks)
    layers = [] if text_encoder is None else [_bytes(layer) for layer in _find_decoder(text_encoder.model).layers]
    return PartSizes(
        block=blocks // num,
        num_blocks=num,
        modulation=modulation,
        rest=_bytes(transformer) - modulation - blocks,
        encoder=0 if text_encoder is None else _bytes(text_encoder),
        encoder_layer=max(layers, default=0),
        encoder_layers=sum(layers),
        encoder_moves=text_encoder is None or not is_packed(text_encoder),
        autoencoder=0 if autoencoder is None else _bytes(autoencoder),
        strips=autoencoder is not None and decodes_in_strips(autoencoder.vae),
    )


def is_packed(text_encoder: TextEncoder) -> bool:
    """Whether its experts are 4-bit, in the kernels' own form."""
    model = getattr(text_encoder, "model", None)
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config is not None and not getattr(config, "dequantize", False)


def peaks(plan: MemoryPlan, sizes: PartSizes, work: Workload) -> dict[str, int]:
    """Bytes on the device at the worst moment of each phase.

    Sampling holds ``(6 d + 3 m)`` activations a token (residual streams, one block's attention or feed-forward layer),
    the text features twice in float32 while they are projected, and ``12 d`` numbers per block and time of the modulation.

    Args:
        plan: the arrangement.
        sizes: of the parts.
        work: of the run.

    Returns:
        Bytes by phase: ``encode``, ``sample``, ``decode``.

    Example:
        >>> sizes = PartSizes(10, 4, 20, 5, 0, 0, 0, True, 1)
        >>> work = Workload(tokens=1, text_tokens=0, pixels=0, times=0, dim=1, mlp_dim=0, text_width=0)
        >>> all_here, two_here = MemoryPlan(resident_blocks=4), MemoryPlan(resident_blocks=2)
        >>> peaks(all_here, sizes, work)["sample"] >= peaks(two_here, sizes, work)["sample"]
        True
    """
    encoder_stays = sizes.encoder if plan.encoder == "resident" else 0
    blocks = plan.resident_blocks * sizes.block
    modulation = sizes.modulation if plan.modulation_resident else 0
    transformer = sizes.rest + blocks + modulation
    # Two streamed blocks at a time: one runs, one arrives. A modulation layer that visits is half a block's.
    visiting = min(2, sizes.num_blocks - plan.resident_blocks) * sizes.block
    visiting = max(visiting, 0 if plan.modulation_resident else sizes.modulation // sizes.num_blocks)
    encoding = sizes.encoder
    if plan.encoder == "stream":
        encoding = sizes.encoder - sizes.encoder_layers + 2 * sizes.encoder_layer
    table = 12 * work.dim * sizes.num_blocks * work.times * work.dtype_bytes
    features = work.text_tokens * work.text_width * (4 + 4)
    activations = work.tokens * (6 * work.dim + 3 * work.mlp_dim) * work.dtype_bytes
    widest = math.isqrt(2 * work.pixels)  # at most 2 : 1
    strips = STRIP_ELEMENTS[0] * work.pixels + STRIP_ELEMENTS[1] * widest
    elements = strips if plan.decode_strips else DECODE_ELEMENTS * work.pixels
    picture = elements * work.dtype_bytes + 3 * 4 * work.pixels
    waiting = 0 if plan.transformer_waits else transformer
    return {
        "encode": encoding + (ENCODE_WORKSPACE if sizes.encoder else 0) + waiting + sizes.autoencoder,
        "sample": encoder_stays + transformer + visiting + sizes.autoencoder + table + max(features, activations),
        "decode": encoder_stays + (0 if plan.decode_alone else transformer) + sizes.autoencoder + picture,
    }


def _candidates(sizes: PartSizes) -> Iterator[MemoryPlan]:
    """All arrangements, from the fastest: moving the encoder costs least, streaming the blocks most."""
    if sizes.encoder_moves:
        ways = [("resident", False), ("offload", False), ("offload", True), ("stream", False), ("stream", True)]
    else:
        ways = [("resident", False), ("free", False), ("free", True)]
    ways = ways if sizes.encoder else [("resident", False)]
    for blocks in range(sizes.num_blocks, -1, -1):
        for modulation in (True, False) if blocks == sizes.num_blocks else (False,):
            for encoder, waits in ways:
                for strips, alone in _DECODING[sizes.strips]:
                    yield MemoryPlan(
                        encoder=encoder, transformer_waits=waits, modulation_resident=modulation,  # pyright: ignore
                        resident_blocks=blocks, decode_strips=strips, decode_alone=alone,
                    )  # fmt: skip


def choose_plan(sizes: PartSizes, work: Workload, budget: int) -> MemoryPlan:
    """The first arrangement, from the fastest to the smallest, whose peak fits.

    Args:
        sizes: of the parts.
        work: of the run.
        budget: bytes.

    Returns:
        The plan.

    Raises:
        ValueError: if none fits, with the smallest peak and what would help.

    Example:
        >>> sizes = PartSizes(10, 4, 20, 5, 0, 0, 0, True, 1)
        >>> work = Workload(tokens=1, text_tokens=0, pixels=0, times=0, dim=1, mlp_dim=0, text_width=0)
        >>> choose_plan(sizes, work, 100).modulation_resident, choose_plan(sizes, work, 60).modulation_resident
        (True, False)
    """
    smallest = None
    for plan in _candidates(sizes):
        need = peaks(plan, sizes, work)
        if max(need.values()) <= budget:
            return plan
        if smallest is None or max(need.values()) < max(smallest.values()):
            smallest = need
    assert smallest is not None
    phase = max(smallest, key=smallest.__getitem__)
    help_ = {
        "encode": "pass prompt_embeds or a prompt_cache and no text encoder",
        "sample": "paint fewer or smaller pictures at once (batch_size=)",
        "decode": 'paint smaller pictures, or take output_type="latent" and decode elsewhere',
    }
    raise ValueError(
        f"memory: expected room for {max(smallest.values()) / GIB:.2f} GiB, the least that any arrangement needs (to "
        f"{phase}), got {budget / GIB:.2f} GiB; {help_[phase]}"
    )


def budget_of(mode: str, free: int | None = None) -> int:
    """The bytes that a mode may use.

    Args:
        mode: "auto" or the size of a card, as in "8GiB" (:data:`MEMORY_MODES` names those in the documentation).
        free: bytes that are free on the device, for "auto".

    Returns:
        Bytes.

    Raises:
        ValueError: if the mode is unknown, or free memory is not known for "auto".

    Example:
        >>> budget_of("8GiB") / 2**30, budget_of("auto", free=100 * 2**30) / 2**30
        (7.25, 95.0)
    """
    if mode == "auto":
        if free is None:
            raise ValueError(
                'memory: expected the size of a card, as in "16GiB", where free memory is unknown, got auto'
            )
        return int(free * (1 - KEPT_FREE))
    number = mode.removesuffix("GiB")
    if number == mode or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f'memory: expected "auto" or the size of a card, as in {", ".join(MEMORY_MODES[1:])}, got {mode!r}'
        )
    return int(number) * GIB - RESERVE


def describe(plan: MemoryPlan, sizes: PartSizes, need: dict[str, int]) -> str:
    """One sentence on an arrangement and its peak.

    Example:
        >>> describe(MemoryPlan(resident_blocks=48), PartSizes(1, 48, 1, 1, 1, 1, 1, True, 1), {"sample": 2**30})
        'text encoder resident, all blocks resident; estimated peak 1.00 GiB (sample)'
    """
    words = {"resident": "resident", "offload": "moved to the host after encoding", "free": "dropped after encoding"}
    words["stream"] = "streamed layer by layer"
    parts = [f"text encoder {words[plan.encoder]}"] if sizes.encoder else []
    parts += ["transformer on the host while encoding"] if plan.transformer_waits else []
    parts += [] if plan.modulation_resident else ["modulation layers on the host"]
    streamed = sizes.num_blocks - plan.resident_blocks
    parts += [f"{streamed} of {sizes.num_blocks} blocks streamed"] if streamed else ["all blocks resident"]
    parts += ["decoding in strips"] if plan.decode_strips else []
    parts += ["transformer on the host while decoding"] if plan.decode_alone else []
    phase = max(need, key=need.__getitem__)
    return f"{', '.join(parts)}; estimated peak {need[phase] / GIB:.2f} GiB ({phase})"


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
