"""Settings and presets of ``experiments.generate``."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lensmini.data import MINIATURE_CANVASES
from lensmini.pipeline.canvas import bucket_size
from lensmini.pipeline.memory import budget_of

__all__ = ["PRESETS", "UNSEEN_CANVASES", "GenerateConfig"]

UNSEEN_CANVASES = ((28, 36), (36, 28), (28, 40), (40, 28), (24, 44))
"""Sizes (height, width) between the trained ones, that no stage of the miniature ever saw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Prompts, a checkpoint, and how to sample."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts; - reads more of them from standard input, one per line."""
    prompts: Path | None = None
    """File with one prompt per line, or .jsonl with prompt, negative_prompt, height, width, seed; - is standard input."""
    checkpoint: Path | None = None
    """A run (its newest step-N) or a step-N directory; a pipeline or transformer folder, a .safetensors file, a Hub
    repository; by default runs/quickstart, else runs/mini, else the trained one of this repository."""
    compare: tuple[Path, Path] | None = None
    """Two checkpoints instead of one: the same prompts, sizes and noise with both, side by side on the grid."""
    weights: Literal["ema", "model"] = "ema"
    """Of a run: the averaged weights or the last ones."""
    out: Path = Path("runs/generate")
    """Directory of the pictures."""
    shard: str = "0/1"
    """I/N: paint part I, from 0, of N; the N processes may share one directory."""
    chunk: int = 24
    """Pictures painted at once; a kill loses no more."""
    seed: int = 0
    """Seed of a prompt's first picture; the next ones count on."""
    num_images_per_prompt: int = 1
    """Pictures of each prompt and canvas."""
    height: int | None = 32
    """Pixels."""
    width: int | None = 32
    """Pixels."""
    aspect_ratio: str | None = None
    """Width:height, such as 16:9, in place of height and width."""
    base: int = 1024
    """With an aspect ratio: side of the square of about the same area, 1024 or 1440."""
    canvases: tuple[tuple[int, int], ...] = ()
    """Heights and widths instead of the ones above: every prompt on each of them."""
    num_steps: int | None = None
    """Sampling steps; none is what suits the checkpoint."""
    guidance_scale: float | None = None
    """Guidance; 1 follows the text without it at half the cost; none is what suits the checkpoint."""
    negative_prompt: str = ""
    """What to lead away from, of prompts without their own; not for runs of the miniature."""
    rescale: bool = True
    """Restore the norms after guidance, as the released model does."""
    mu: float | Literal["own"] | None = "own"
    """Of a run: time shift of the schedule; "own" is the checkpoint's, none the released model's rule, 0 equal steps."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of a pipeline, by default bfloat16; a run keeps what it was trained in."""
    device: str = "cpu"
    """Of a pipeline."""
    text_encoder: Path | None = None
    """Folder or repository of the text encoder, if the checkpoint has none or another one is wanted."""
    autoencoder: Path | None = None
    """Folder or repository of the autoencoder, likewise."""
    lora: Path | None = None
    """LoRA adapter, merged before painting."""
    lora_scale: float = 1.0
    """Its strength."""
    rewriter: str | None = None
    """Language model that turns prompts into descriptions first: its name on a server, or a folder; none by default, as in
    the released code. ``rewrites.jsonl`` says what became of every prompt; refused ones are left out."""
    rewriter_url: str | None = None
    """Its server, up to /v1; none is OpenAI's own."""
    rewriter_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key."""
    system_prompt: str = "general"
    """What it is told: general, compositional, design, long_text, or a file such as experiments.search_prompt writes."""
    prompt_cache: Path | None = None
    """Directory that keeps text features, so that a prompt is encoded once."""
    published_bf16: bool = False
    """Round as the published bf16 pipeline does, instead of exact times and latents."""
    memory: str | None = None
    """Of a pipeline: fit into a card, 8GiB, 12GiB, 16GiB or 24GiB, or auto for what is free; same pictures."""
    strips: bool = False
    """Of a pipeline: decode in strips of rows, the same pictures in less than half of decoding's memory."""
    compile: bool = False
    """Of a pipeline: compile the blocks and the decoder; worth it from a few pictures on."""
    fp8: bool = False
    """Of a pipeline: 8-bit linear layers on GPUs that have them; other pictures."""
    any_size: bool = False
    """Let a pipeline paint sizes that the released models were not made for."""
    revision: str | None = None
    """Branch, tag or commit of Hub repositories."""
    local_files_only: bool = False
    """Never ask the network."""

    def __post_init__(self) -> None:
        steps = 1 if self.num_steps is None else self.num_steps
        if min(self.num_images_per_prompt, self.chunk, steps) < 1 or self.seed < 0:
            raise ValueError(
                "num_images_per_prompt, num_steps, chunk, seed: expected at least 1, 1, 1 and 0, got "
                f"{self.num_images_per_prompt}, {self.num_steps}, {self.chunk}, {self.seed}"
            )
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: expected a finite number of at least 0, got {self.guidance_scale}")
        if not abs(self.lora_scale) < float("inf"):
            raise ValueError(f"lora_scale: expected a finite number, got {self.lora_scale}")
        if self.compare is not None and self.checkpoint is not None:
            raise ValueError("compare: expected it or checkpoint, got both")
        if (self.height is None) != (self.width is None) or None not in (self.aspect_ratio, self.height):
            raise ValueError(
                "height, width, aspect_ratio: expected two sides (--height H --width W) or a ratio (--height None "
                f"--width None --aspect-ratio R), got {self.height}, {self.width} and {self.aspect_ratio}"
            )
        if self.rewriter is not None and self.part[1] > 1:
            # Two processes could get different rewrites of one request.
            raise ValueError(f"rewriter: expected none for a part of a job, got {self.rewriter!r} and {self.shard}")
        if self.memory is not None:
            budget_of(self.memory, free=0)
            if self.fp8:
                raise ValueError(f"fp8: expected it without memory, whose blocks move, got memory {self.memory}")
        _ = self.part, self.sizes

    @property
    def part(self) -> tuple[int, int]:
        """Number and count of the shards."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"shard: expected I/N with I from 0 to N - 1, got {self.shard!r}")
        return int(found[1]), int(found[2])

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths of every prompt that names none."""
        if self.canvases:
            return self.canvases
        if self.height is None or self.width is None:
            return (bucket_size(self.aspect_ratio or "1:1", self.base),)
        return ((self.height, self.width),)


def mini() -> GenerateConfig:
    """Square pictures of the miniature world."""
    return GenerateConfig()


def ratios() -> GenerateConfig:
    """Every prompt on the five trained canvases and on five that no stage ever saw."""
    return GenerateConfig(canvases=(*MINIATURE_CANVASES, *UNSEEN_CANVASES))


def lens() -> GenerateConfig:
    """Lens, RL-tuned: 20 steps, guidance 5."""
    return GenerateConfig(num_steps=20, guidance_scale=5.0, mu=None, height=None, width=None, chunk=4)


def base() -> GenerateConfig:
    """Lens-Base, pre-trained: 50 steps, guidance 5."""
    return GenerateConfig(num_steps=50, guidance_scale=5.0, mu=None, height=None, width=None, chunk=4)


def turbo() -> GenerateConfig:
    """Lens-Turbo, distilled: 4 steps without guidance."""
    return GenerateConfig(num_steps=4, guidance_scale=1.0, mu=None, height=None, width=None, chunk=4)


PRESETS: tuple[Callable[[], GenerateConfig], ...] = (mini, ratios, lens, base, turbo)
