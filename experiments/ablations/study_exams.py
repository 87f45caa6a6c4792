"""Exams of an ablation: prompts that every arm paints from the same noise, and the verifier's answers, prompt by prompt."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.checkpoints import load_checkpoint
from experiments.pretrain_config import PretrainConfig
from experiments.pretrain_data import SceneConfig
from experiments.runs import cached_stage, config_hash, latest_checkpoint, write_json
from experiments.scoring import paint_prompts
from experiments.usage import cpu_seconds
from lensmini.data import KINDS, ScenePrompt, build_scene_prompts, score_images
from lensmini.parallel import Group, run_processes

__all__ = [
    "NUM_SHOWN",
    "Answers",
    "Canvas",
    "Exam",
    "Sampler",
    "clipped",
    "finished",
    "open_answers",
    "saturation",
    "scene_exam",
    "sit_exam",
]

Canvas = tuple[int, int]
NUM_SHOWN = 6
"""Pictures of each exam that are kept for the grid, one of each kind."""
PROMPT_SEED = 4_000_037
"""Of the exams' prompts: no other script's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How pictures are sampled."""

    num_steps: int = 12
    """Euler steps."""
    guidance_scale: float = 4.0
    """Guidance."""
    mu: float | None = 1.8
    """Time shift of the schedule; none is the released model's rule."""
    rescale: bool = True
    """Restore the norms after guidance."""


class Exam(NamedTuple):
    """Prompts, each with its canvas, and how they are painted; their noise depends on number and seed alone."""

    prompts: tuple[ScenePrompt, ...]
    canvases: tuple[Canvas, ...]
    sampler: Sampler = Sampler()

    @property
    def asked(self) -> str:
        """Names kinds, questions and canvases: exams that share it can be compared prompt by prompt."""
        words = [(one.kind, [str(question) for question in one.questions]) for one in self.prompts]
        return config_hash([words, self.canvases])


def scene_exam(
    base: PretrainConfig,
    per_kind: int,
    *,
    form: Literal["dense", "short"] = "dense",
    canvases: Sequence[Canvas] | None = None,
    sampler: Sampler | None = None,
) -> Exam:
    """An exam of the scene suite: the same scenes, questions and noise in either form and on any canvases.

    Args:
        base: the preset; its wording and, by default, its canvases are taken.
        per_kind: prompts of each kind.
        form: full descriptions, or bare requests.
        canvases: heights and widths; every kind meets every canvas.
        sampler: by default the preset's own settings.

    Returns:
        The exam.
    """
    assert isinstance(base.data, SceneConfig)
    sizes = base.data.canvases if canvases is None else tuple(canvases)
    prompts = build_scene_prompts(per_kind, PROMPT_SEED, form=form, wording=base.data.wording)
    places = [divmod(index, len(KINDS)) for index in range(len(prompts))]
    if sampler is None:
        sampler = Sampler(num_steps=base.eval.num_steps, guidance_scale=base.eval.guidance_scale, mu=base.eval.mu)
    return Exam(tuple(prompts), tuple(sizes[(row + column) % len(sizes)] for row, column in places), sampler)


def finished(config: PretrainConfig) -> Path | None:
    """The last checkpoint of a run that has made all of its steps; else None."""
    found = latest_checkpoint(config.run.out)
    done = found is not None and found[1] == config.run.steps and (config.run.out / "summary.json").exists()
    return found[0] if done and found is not None else None


class Answers(NamedTuple):
    """What a run got right in an exam, prompt by prompt, and how its pictures look."""

    strict: list[int]
    loose: list[int]
    atom: list[float]
    saturation: list[float]
    """Mean over pixels of (largest - smallest channel) / largest, black being 0."""
    clipped: list[float]
    """Share of channel values that are 0 or 255."""
    cpu_seconds: float
    asked: str
    """Of the exam."""
    directory: Path
    """With ``shown.safetensors``, the first pictures."""


def sit_exam(config: PretrainConfig, exam: Exam, seed: int, processes: int) -> Answers:
    """Paint and judge an exam with a finished run's averaged weights, unless that was done before.

    Args:
        config: of the run.
        exam: what is asked.
        seed: of the noise; that of a picture is the same for all runs.
        processes: that share the painting.
    """
    checkpoint = finished(config)
    assert checkpoint is not None

    def make(directory: Path) -> None:
        start = cpu_seconds()
        run_processes(_paint_exam, processes, checkpoint, exam, seed, directory)
        if not (directory / "painted.json").is_file():
            # A worker that is interrupted from the keyboard ends without an error.
            raise KeyboardInterrupt
        row = json.loads((directory / "painted.json").read_text())
        write_json(directory / "answers.json", {**row, "cpu_seconds": cpu_seconds() - start, "asked": exam.asked})

    cached_stage(config.run.out, "answers", _exam_key(exam, seed), make, quiet=True)
    answers = open_answers(config, exam, seed)
    assert answers is not None
    return answers


def open_answers(config: PretrainConfig, exam: Exam, seed: int) -> Answers | None:
    """What is known of a run, an exam and a seed of noise; None if it has not been sat."""
    directory = config.run.out / f"answers-{config_hash(_exam_key(exam, seed))}"
    if not (directory / "answers.json").is_file():
        return None
    row = json.loads((directory / "answers.json").read_text())
    bits = {name: [int(digit) for digit in row.pop(name)] for name in ("strict", "loose")}
    return Answers(**bits, **row, directory=directory)


def _exam_key(exam: Exam, seed: int) -> dict[str, Any]:
    texts = hashlib.sha256("\n".join(one.text for one in exam.prompts).encode()).hexdigest()[:16]
    return {"asked": exam.asked, "texts": texts, "sampler": exam.sampler, "seed": seed, "version": 1}


@torch.no_grad()
def _paint_exam(group: Group, checkpoint: Path, exam: Exam, seed: int, directory: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, world = load_checkpoint(checkpoint, "ema", quiet=True)
    mine = range(group.rank, len(exam.prompts), group.world_size)
    painted = paint_prompts(
        model,
        world,
        [exam.prompts[index].text for index in mine],
        [exam.canvases[index] for index in mine],
        exam.sampler,
        seeds=[seed * 1_000_003 + index for index in mine],
        rescale=exam.sampler.rescale,
    )
    parts = group.gather(dict(zip(mine, painted, strict=True)))
    if group.rank == 0:
        found = {index: picture for part in parts for index, picture in part.items()}
        pictures = [found[index] for index in range(len(exam.prompts))]
        reports = score_images(pictures, exam.prompts).reports
        shown = {f"{index:02d}": picture.contiguous() for index, picture in enumerate(pictures[:NUM_SHOWN])}
        save_file(shown, directory / "shown.safetensors")
        row = {
            "strict": "".join(str(int(report.strict)) for report in reports),
            "loose": "".join(str(int(report.loose)) for report in reports),
            "atom": [report.atom for report in reports],
            "saturation": [saturation(picture) for picture in pictures],
            "clipped": [clipped(picture) for picture in pictures],
        }
        write_json(directory / "painted.json", row)
    torch.set_num_threads(threads)


def saturation(picture: Tensor) -> float:
    """Mean over the pixels of a ``[3, h, w]`` picture of (largest - smallest channel) / largest; black is 0.

    Example:
        >>> saturation(torch.tensor([200, 100, 50]).view(3, 1, 1)), saturation(torch.zeros(3, 1, 1))
        (0.75, 0.0)
    """
    channels = picture.double()
    most = channels.amax(0)
    return ((most - channels.amin(0)) / most.clamp(min=1)).mean().item()


def clipped(picture: Tensor) -> float:
    """Share of the channel values of a uint8 picture that are 0 or 255.

    Example:
        >>> clipped(torch.tensor([0, 255, 50, 254]))
        0.5
    """
    return ((picture == 0) | (picture == 255)).double().mean().item()
