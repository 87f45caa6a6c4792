"""Settings and presets of ``experiments.evaluate``."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from experiments.estimate_rows import Gpu, RentConfig
from experiments.evaluation.layouts import PICTURES, check_number
from experiments.evaluation.texts import Language
from experiments.generate_config import GenerateConfig

__all__ = ["PRESETS", "EvaluateConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(GenerateConfig):
    """A benchmark, what is scored on it, and how it is painted; --prompts is the benchmark's own file or folder."""

    benchmark: tyro.conf.Suppress[Literal["scenes", "geneval", "oneig", "longtext", "cvtg"]] = "scenes"
    """Chosen by the preset."""
    texts: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Not here: prompts are the benchmark's."""
    compare: tyro.conf.Suppress[tuple[Path, Path] | None] = None
    """Not here: evaluate two checkpoints one after the other."""
    canvases: tuple[tuple[int, int], ...] = ()
    """Not of the scenes: heights and widths that the prompts take in turn, for scores by size, instead of one for all."""
    negative_prompt: tyro.conf.Suppress[str] = ""
    """Not here."""
    language: Language = "en"
    """Of OneIG's and LongText's prompts."""
    model_name: str = "lens"
    """What the model is called in OneIG's folders and tables."""
    painted: bool = False
    """Paint nothing: score what lies in OUT/images, perhaps of another program."""
    skip_bad: bool = False
    """Go on without the bad rows of a prompt file, instead of refusing it."""
    limit: int | None = None
    """Only the first prompts, for a trial; the result says that it is not the benchmark."""
    detector: Path | None = None
    """GenEval: folder or repository of a detector of transformers, to score without mmdetection."""
    colours: str = "pixels"
    """GenEval: "pixels", or folder or repository of a CLIP model, such as openai/clip-vit-large-patch14."""
    reader: Literal["rapid"] | None = None
    """LongText, CVTG, OneIG: reads text in pictures; "rapid" is the package rapidocr-onnxruntime."""
    text_content: Path | None = None
    """OneIG with a reader: scripts/text/text_content.csv of the official repository."""
    results: Path | None = None
    """What the official scorer wrote, to be put beside the paper's numbers."""
    num_prompts: int = 96
    """Scenes: prompts of the first suite; the three others have a third of them, at least twelve."""
    variety: int = 4
    """Scenes: pictures of each of twelve prompts, for the diversity; 1 leaves it out."""
    dry_run: bool = False
    """Print numbers of pictures, FLOPs and GPU-hours, and what is needed; paint nothing."""
    gpu: Gpu = "h100"
    """Of the dry run."""
    mfu: float = 0.4
    """Of the dry run: share of the peak that the work reaches; an ASSUMPTION: measure yours."""
    text_tokens: int = 150
    """Of the dry run: tokens of a prompt; an assumption."""

    def __post_init__(self) -> None:
        GenerateConfig.__post_init__(self)
        if self.texts or self.compare is not None or self.negative_prompt:
            raise ValueError("texts, compare, negative_prompt: expected none, prompts are the benchmark's")
        for name, least in (("num_prompts", 12), ("variety", 1), ("text_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")
        if not re.fullmatch(r"[\w.-]+", self.model_name) or self.model_name in (".", ".."):
            raise ValueError(f"model_name: expected letters, digits, dots and dashes, got {self.model_name!r}")
        RentConfig(gpu=self.gpu, gpus=1, mfu=self.mfu)
        self._check_benchmark()

    def painting(self, prompts: Path) -> GenerateConfig:
        """How ``experiments.generate`` is to paint a file of requests into OUT/pictures."""
        shared = {field.name: getattr(self, field.name) for field in fields(GenerateConfig)}
        # Requests have sizes of their own then; generate would paint every prompt on every canvas.
        return GenerateConfig(**{**shared, "prompts": prompts, "out": self.out / "pictures", "canvases": ()})

    def _check_benchmark(self) -> None:
        for name, where in (("detector", ("geneval",)), ("reader", ("longtext", "cvtg", "oneig"))):
            if getattr(self, name) is not None and self.benchmark not in where:
                raise ValueError(f"{name}: expected none for {self.benchmark}, got {getattr(self, name)}")
        if self.benchmark == "oneig" and (self.reader is None) != (self.text_content is None):
            raise ValueError("reader, text_content: expected both for OneIG's text, or none of them")
        if self.benchmark != "oneig" and self.text_content is not None:
            raise ValueError(f"text_content: expected none for {self.benchmark}, got {self.text_content}")
        if self.benchmark in ("geneval", "cvtg", "scenes") and self.language != "en":
            raise ValueError(f"language: expected en, since {self.benchmark} has no other, got {self.language}")
        if self.benchmark != "scenes":
            check_number(self.benchmark, self.num_images_per_prompt)
        elif self.prompts or self.results or self.painted or self.canvases or self.num_images_per_prompt != 1:
            raise ValueError(
                "prompts, results, painted, canvases, num_images_per_prompt: expected none for the scene suite"
            )


def scenes() -> EvaluateConfig:
    """The miniature's prompts, judged by the exact verifier: by kind, canvas and suite, with intervals."""
    return EvaluateConfig(out=Path("runs/evaluate/scenes"))


def geneval() -> EvaluateConfig:
    """GenEval: 553 prompts, four pictures each, by objects, counts, colours and positions."""
    return _public("geneval")


def oneig() -> EvaluateConfig:
    """OneIG-Bench: 1,120 English prompts in five folders, four pictures each in a grid; --language zh has 1,320."""
    return _public("oneig")


def longtext() -> EvaluateConfig:
    """LongText-Bench: 160 prompts with long texts, four pictures each."""
    return _public("longtext")


def cvtg() -> EvaluateConfig:
    """CVTG-2K: 2,000 prompts with two to five texts, one picture each."""
    return _public("cvtg")


def _public(benchmark: Literal["geneval", "oneig", "longtext", "cvtg"]) -> EvaluateConfig:
    return EvaluateConfig(
        benchmark=benchmark,
        out=Path(f"runs/evaluate/{benchmark}"),
        num_images_per_prompt=PICTURES[benchmark],
        mu=None,
        height=1024,
        width=1024,
        chunk=4,
    )


PRESETS: tuple[Callable[[], EvaluateConfig], ...] = (scenes, geneval, oneig, longtext, cvtg)
