"""What paints: a run of ours or a released pipeline, behind the few things that ``experiments.generate`` needs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from experiments.checkpoints import EXAMPLE, find_checkpoint, load_checkpoint, unknown_words
from experiments.runs import latest_checkpoint
from experiments.scoring import paint_prompts
from experiments.training import read_run
from experiments.weights_digest import digest_weights
from lensmini.data import SCENE_VOCABULARY
from lensmini.nn import LensTransformer

__all__ = [
    "PaintSettings",
    "Painter",
    "PainterConfig",
    "RunPainter",
    "lora_row",
    "merge_adapter",
    "open_painter",
]

_PIPELINE_ONLY = {"negative_prompt": "", "text_encoder": None, "autoencoder": None, "prompt_cache": None}
_PIPELINE_ONLY |= {"published_bf16": False, "device": "cpu", "dtype": None, "any_size": False}
_PIPELINE_ONLY |= {"memory": None, "strips": False, "compile": False, "fp8": False}


class PainterConfig(Protocol):
    """Which parts to open and how: the fields of ``GenerateConfig`` that a painter reads."""

    @property
    def weights(self) -> str: ...
    @property
    def mu(self) -> float | Literal["own"] | None: ...
    @property
    def strips(self) -> bool: ...
    @property
    def dtype(self) -> str | None: ...
    @property
    def device(self) -> str: ...
    @property
    def negative_prompt(self) -> str: ...
    @property
    def text_encoder(self) -> Path | None: ...
    @property
    def autoencoder(self) -> Path | None: ...
    @property
    def lora(self) -> Path | None: ...
    @property
    def lora_scale(self) -> float: ...
    @property
    def prompt_cache(self) -> Path | None: ...
    @property
    def published_bf16(self) -> bool: ...
    @property
    def any_size(self) -> bool: ...
    @property
    def memory(self) -> str | None: ...
    @property
    def compile(self) -> bool: ...
    @property
    def fp8(self) -> bool: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def local_files_only(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PaintSettings:
    """How pictures are sampled."""

    num_steps: int
    guidance_scale: float
    rescale: bool = True
    mu: float | None = None


class Painter(Protocol):
    """Paints prompts with one checkpoint."""

    @property
    def name(self) -> str:
        """Where the checkpoint lies."""
        ...

    @property
    def digest(self) -> str:
        """Twelve digits of what the weights hold, wherever they lie."""
        ...

    @property
    def fields(self) -> Mapping[str, Any]:
        """What else decides its pictures, in a row of ``pictures.jsonl``."""
        ...

    @property
    def takes_negatives(self) -> bool:
        """Whether negative prompts have a meaning."""
        ...

    def defaults(self) -> tuple[int, float]:
        """Steps and guidance that suit the checkpoint."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size, with a ValueError, before anything is painted."""
        ...

    @property
    def example(self) -> str:
        """A full description, if it follows nothing shorter, else nothing."""
        ...

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that mean nothing to the checkpoint."""
        ...

    def vocabulary(self) -> list[str]:
        """The words to use in their place."""
        ...

    def paint(
        self,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        settings: PaintSettings,
        *,
        negatives: Sequence[str],
    ) -> list[Tensor]:
        """For each prompt a picture ``[3, height, width]`` uint8 that does not depend on the others."""
        ...

    def close(self) -> None:
        """Let go of the memory; painting again would load again."""
        ...


class RunPainter:
    """A ``step-N`` directory of ``experiments.pretrain`` with the frozen parts beneath it."""

    takes_negatives = False

    def __init__(self, path: Path, config: PainterConfig) -> None:
        for name, default in _PIPELINE_ONLY.items():
            if (value := getattr(config, name)) != default:
                raise ValueError(f"{name}: expected {default!r}, since {path} is a run of the miniature, got {value!r}")
        self.name = path.as_posix()
        self.model, self.world = load_checkpoint(path, config.weights)
        # A distilled student says how it samples; pre-trained runs do not.
        run = read_run(path)
        self.sampling: dict[str, Any] = run.get("sampling", {})
        self.example = EXAMPLE if run["config"].get("data", {}).get("density") == "dense" else ""
        self.digest = hashlib.sha256((path / f"{config.weights}.safetensors").read_bytes()).hexdigest()[:12]
        mu = self.sampling.get("mu", 1.8) if config.mu == "own" else config.mu
        self.fields = {"mu": mu, "weights": config.weights, "weights_sha256": self.digest, **lora_row(config)}
        merge_adapter(self.model, config)

    def defaults(self) -> tuple[int, float]:
        return self.sampling.get("num_steps", 12), self.sampling.get("guidance_scale", 4.0)

    def check_size(self, height: int, width: int) -> None:
        side = self.world.autoencoder.downsample
        if min(height, width) < side or height % side or width % side:
            raise ValueError(f"height, width: expected positive multiples of {side}, got {height} x {width}")

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.world.encoder.tokenizer, prompt)

    def vocabulary(self) -> list[str]:
        tokenizer: Any = self.world.encoder.tokenizer
        known = tokenizer.get_vocab()
        return [word for word in SCENE_VOCABULARY if word in known]

    def paint(
        self,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        settings: PaintSettings,
        *,
        negatives: Sequence[str],
    ) -> list[Tensor]:
        assert not any(negative.strip() for negative in negatives)
        if self.sampling.get("walk") == "renoise":
            return self._walk_with_fresh_noise(prompts, sizes, seeds, settings)
        options = {"rescale": settings.rescale, "chunk": max(1, len(prompts))}
        return paint_prompts(self.model, self.world, prompts, sizes, settings, seeds=seeds, **options)

    def _walk_with_fresh_noise(
        self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], seeds: Sequence[int], settings: PaintSettings
    ) -> list[Tensor]:
        """As the student was trained; what it does with guidance or other steps nobody has trained, so guidance is refused."""
        from experiments.distill_score import Sampler, Suite, paint_suite
        from experiments.pretrain_data import encode_texts

        if settings.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale: expected 1 for the few-step {self.name}, got {settings.guidance_scale:g}"
            )
        sampler = Sampler(num_steps=settings.num_steps, mu=settings.mu, walk="renoise")
        suite = Suite([], list(sizes), encode_texts(prompts, self.world, quiet=True))
        return paint_suite(self.model, self.world, suite, sampler, seeds, chunk=len(prompts))

    def close(self) -> None:
        """Does nothing: a miniature is small."""


def open_painter(checkpoint: Path | None, config: PainterConfig) -> Painter:
    """The painter for what a path holds.

    Args:
        checkpoint: a run of ours or its ``step-N`` directory; else a pipeline folder, a transformer's folder or file,
            or a Hub repository. None looks into the runs that make one.
        config: parts, precision and adapters.

    Returns:
        The painter.

    Raises:
        FileNotFoundError: if there is nothing to open.
        ValueError: if a setting does not suit what is there, or a file is broken.
    """
    if checkpoint is None or _is_run(checkpoint):
        return RunPainter(find_checkpoint(checkpoint), config)
    if not _may_be_pipeline(checkpoint.expanduser(), config):
        find_checkpoint(checkpoint)
    from experiments.pipeline_painter import PipelinePainter

    return PipelinePainter(checkpoint, config)


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or latest_checkpoint(path) is not None


def _may_be_pipeline(path: Path, config: PainterConfig) -> bool:
    if path.is_dir():
        patterns = ("model_index.json", "config.json", "*.safetensors", "transformer")
        return any(next(path.glob(pattern), None) for pattern in patterns)
    # What is no path may be a repository, NAME or OWNER/NAME; a misspelt run is not looked for on the network.
    first = path.parts[0] if path.parts else "."
    named = len(path.parts) <= 2 and path.suffix != ".safetensors" and not first.startswith((".", "/"))
    return path.is_file() or (named and config.mu is None and not Path(first).exists())


def lora_row(config: PainterConfig) -> dict[str, Any]:
    """What a row of ``pictures.jsonl`` says about the adapter."""
    if config.lora is None:
        return {}
    if not config.lora.expanduser().exists():
        raise ValueError(f"lora: expected a file or folder, got {config.lora}")
    return {"lora_sha256": digest_weights(str(config.lora.expanduser())), "lora_scale": config.lora_scale}


def merge_adapter(model: LensTransformer, config: PainterConfig) -> None:
    """Merge the adapter into a model, if there is one."""
    if config.lora is not None:
        from lensmini.checkpoints.lora import load_lora, merge_lora

        merge_lora(model, load_lora(config.lora.expanduser()), scale=config.lora_scale, keep=False)
