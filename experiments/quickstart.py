"""From a clone to pictures: the whole miniature, trained from scratch, painted, scored and reported (arXiv 2605.21573).

    python -m experiments.quickstart                                          two CPU cores, about 8 minutes
    python -m experiments.quickstart --run.out runs/longer --run.steps 6000   a better one
    python -m experiments.quickstart --run.out runs/seed1 --run.seed 1        another seed
    python -m experiments.quickstart smallest                                 seconds, paints nothing but noise

Stages: language model and autoencoder, a bank of encoded scenes, pre-training, pictures and score, report. The same
command again goes on where it was stopped and takes finished stages as they are, as other runs beside it do.
Goal: at least 0.25 of 384 dense prompts painted without a mistake. See ``report.html`` in the run's directory.
"""

import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments import pretrain
from experiments.dry_run import describe_run
from experiments.generate import read_config
from experiments.miniature.autoencoder import smallest_autoencoder
from experiments.miniature.language_model import smallest_language_model
from experiments.miniature.world import prepare_miniature
from experiments.pictures import save_grid
from experiments.pretrain import PretrainConfig
from experiments.pretrain_data import SceneConfig, scene_banks
from experiments.quickstart_report import readable, write_report
from experiments.quickstart_score import ScoreConfig, score_checkpoint
from experiments.runs import (
    append_jsonl,
    cached_stage,
    config_dict,
    latest_checkpoint,
    provenance,
    read_jsonl,
    write_json,
)
from experiments.training import check_same_run, read_run
from experiments.usage import MemoryWatch, cpu_seconds, process_age
from lensmini.parallel import run_processes

__all__ = ["QuickstartConfig", "main", "quickstart", "smallest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig(PretrainConfig):
    """A pre-training run and its score."""

    data: SceneConfig
    """The samples."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Pictures and score at the end."""


def quickstart() -> QuickstartConfig:
    """Everything from scratch on two CPU cores in about ten minutes."""
    base = pretrain.mini()
    return _with_score(replace(base, run=replace(base.run, out=Path("runs/quickstart"))), ScoreConfig())


def smallest() -> QuickstartConfig:
    """Every stage at its smallest, in seconds: for tests."""
    base, language_model = pretrain.mini(), smallest_language_model()
    small = replace(
        base,
        model=replace(
            base.model,
            num_layers=1,
            num_attention_heads=1,
            enc_hidden_dim=language_model.hidden_size,
            selected_layer_index=(0, 1),
        ),
        data=replace(base.data, num_captions=30, pictures_per_caption=2, num_held_out=5),  # pyright: ignore
        run=replace(base.run, out=Path("runs/smallest"), steps=6, sample_every=0, checkpoint_every=3, processes=1),
        eval=replace(base.eval, validate_every=3, num_steps=1, guidance_scale=1.0),
        miniature=replace(
            base.miniature,
            language_model=language_model,
            autoencoder=smallest_autoencoder(),
            layers=(0, 1),
            strict=False,
        ),
    )
    score = ScoreConfig(num_prompts=12, num_others=12, num_samples=10, num_steps=1, processes=1)
    return _with_score(small, score)


PRESETS: tuple[Callable[[], QuickstartConfig], ...] = (quickstart, smallest)


def _with_score(base: PretrainConfig, score: ScoreConfig) -> QuickstartConfig:
    return QuickstartConfig(**{one.name: getattr(base, one.name) for one in fields(base)}, score=score)


def _without_score(config: QuickstartConfig) -> PretrainConfig:
    return PretrainConfig(**{one.name: getattr(config, one.name) for one in fields(PretrainConfig)})


def main(config: QuickstartConfig, *, age: float = 0.0) -> dict[str, Any]:
    """Run every stage that is missing, then write ``samples.png``, ``summary.json`` and ``report.html``.

    Args:
        config: the run.
        age: seconds that this process had lived before the call, to be counted.

    Returns:
        The content of ``summary.json``; nothing after a dry run.

    Raises:
        ValueError: if the directory holds a run with other settings.
        SystemExit: if a stage was asked to stop; the same command goes on from there.
    """
    training, out = _without_score(config), config.run.out
    if config.dry_run:
        print(describe_run(training))
        return {}
    started, cpu_before = time.perf_counter() - age, cpu_seconds() if not age else 0.0
    check_same_run(training.run.out, training)
    out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, dict[str, Any]] = {}
    with _terminating_children(), MemoryWatch() as memory:
        with _stage("language_model_and_autoencoder", stages, out) as row:
            world = prepare_miniature(config.miniature, out.parent)
            row["reused"] = all(world.reused.values())
            reused = [name for name, found in world.reused.items() if found]
        with _stage("scene_bank", stages, out) as row:
            banks = set(out.parent.glob("scene-bank-*"))
            scene_banks(config.data, world, out)
            row["reused"] = set(out.parent.glob("scene-bank-*")) == banks
        del world
        with _stage("pretrain", stages, out) as row:
            checkpoint, row["reused"] = _pretrain(training)
        with _stage("score", stages, out) as row:
            directory, row["reused"] = _score(config, checkpoint)
        with _stage("report", stages, out) as row:
            scores = json.loads((directory / "scores.json").read_text())
            pictures = list(load_file(directory / "samples.safetensors").values())
            samples = scores["samples"]
            save_grid(pictures, [_label(sample) for sample in samples], out / "samples.png")
            reused += [name for name in ("scene_bank", "pretrain", "score") if stages[name]["reused"]]
            summary = _summarise(config, scores) | {
                "checkpoint": checkpoint.as_posix(),
                "seconds": time.perf_counter() - started,
                "cpu_seconds": cpu_seconds() - cpu_before,
                **dict(zip(("peak_memory_mb", "peak_memory_kind"), memory.peak(), strict=True)),
                "stage_seconds": {name: stage["seconds"] for name, stage in stages.items() if name != "report"},
                "reused": reused,
                "stages_of_all_calls": _add_up(read_jsonl(out / "stages.jsonl")),
                "last_metrics": read_jsonl(out / "metrics.jsonl")[-1],
                "config": config_dict(config),
                "provenance": provenance(),
            }
            write_report(out, summary, scores, pictures)
    summary["stage_seconds"] = {name: stage["seconds"] for name, stage in stages.items()}
    summary["stages_of_all_calls"] = _add_up(read_jsonl(out / "stages.jsonl"))
    summary |= {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_before}
    write_json(out / "summary.json", summary)
    _say(out, summary)
    return summary


def _pretrain(config: PretrainConfig) -> tuple[Path, bool]:
    """The last checkpoint of the run, and whether it was there already."""
    found = latest_checkpoint(config.run.out)
    reused = found is not None and found[1] == config.run.steps
    if found is not None and reused:
        print(f"pretrain: reused from {found[0]}", flush=True)
    else:
        at = "" if found is None else f", from step {found[1]}"
        print(f"pretrain: {config.run.steps} steps in {config.run.out}{at}", flush=True)
        pretrain.main(config)
        found = latest_checkpoint(config.run.out)
    if found is None or found[1] < config.run.steps:
        done = 0 if found is None else found[1]
        raise SystemExit(f"quickstart: stopped at step {done} of {config.run.steps}; the same command goes on")
    return found[0], reused


def _score(config: QuickstartConfig, checkpoint: Path) -> tuple[Path, bool]:
    """The directory of the scores, and whether it was there already."""
    run = read_run(checkpoint)
    key = {"score": replace(config.score, processes=1), "training": run["config"], "step": run["step"]}

    def make(directory: Path) -> None:
        arguments = (checkpoint, config.score, config.data, config.run.out, directory)
        run_processes(score_checkpoint, config.score.processes, *arguments)
        if not (directory / "scores.json").is_file():
            # A worker that is interrupted from the keyboard ends without an error.
            raise KeyboardInterrupt

    return cached_stage(config.run.out, "score", key, make)


def _summarise(config: QuickstartConfig, scores: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers, named flat, and everything behind them."""
    main, unseen, withheld, short = (scores[name] for name in ("trained", "unseen", "withheld", "short"))
    extra = {"without_rescale_strict": scores["without_rescale"]["strict"]} if "without_rescale" in scores else {}
    return {
        "verifier_strict": main["strict"],
        "verifier_strict_low": main["low"],
        "verifier_strict_high": main["high"],
        "verifier_loose": main["loose"],
        "verifier_atom": main["atom"],
        "chance_strict": main["chance_strict"],
        "chance_loose": main["chance_loose"],
        "shifted_strict": main["shifted_strict"],
        "shifted_loose": main["shifted_loose"],
        "autoencoder_strict": main["autoencoder_strict"],
        "autoencoder_loose": main["autoencoder_loose"],
        "unseen_strict": unseen["strict"],
        "unseen_loose": unseen["loose"],
        "unseen_autoencoder_strict": unseen["autoencoder_strict"],
        "withheld_strict": withheld["strict"],
        "withheld_loose": withheld["loose"],
        "withheld_chance_strict": withheld["chance_strict"],
        "short_strict": short["strict"],
        "short_loose": short["loose"],
        **extra,
        "by_kind": main["by_kind"],
        "by_canvas": main["by_canvas"] | unseen["by_canvas"],
        "num_prompts": main["num"],
        "num_prompts_of_others": unseen["num"],
        "weights": config.score.weights,
    }


def _add_up(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each stage took over all calls, stopped ones included; reused stages are left out."""
    total: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row["reused"]:
            sums = total.setdefault(row["stage"], {"seconds": 0.0, "cpu_seconds": 0.0})
            for name in sums:
                sums[name] += row[name]
    return total


@contextmanager
def _stage(name: str, stages: dict[str, dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    """Times a stage, and notes it in ``stages.jsonl`` even if it is stopped."""
    start, cpu, row = time.perf_counter(), cpu_seconds(), {"stage": name, "reused": False}
    try:
        yield row
    finally:
        row |= {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
        stages[name] = row
        append_jsonl(out / "stages.jsonl", row)


@contextmanager
def _terminating_children() -> Iterator[None]:
    """SIGTERM ends this process like Ctrl-C does, and its children with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _label(sample: dict[str, Any]) -> str:
    seen = "" if sample["trained"] else ", never trained"
    verdict = "right" if sample["right"] else "wrong"
    return f"{sample['height']}x{sample['width']}{seen} [{verdict}] {readable(sample['prompt'])}"


def _say(out: Path, summary: dict[str, Any]) -> None:
    print(
        f"\n{summary['verifier_strict']:.3f} of {summary['num_prompts']} prompts painted without a mistake "
        f"(95 % {summary['verifier_strict_low']:.3f} to {summary['verifier_strict_high']:.3f}; "
        f"chance {summary['chance_strict']:.3f}, ceiling {summary['autoencoder_strict']:.3f}), "
        f"colours and places alone {summary['verifier_loose']:.3f}\n"
        f"{summary['seconds'] / 60:.1f} minutes, {summary['cpu_seconds'] / 60:.1f} CPU-minutes, "
        f"{summary['peak_memory_mb']:.0f} MB; reused: {', '.join(summary['reused']) or 'nothing'}\n"
        f"look at {out / 'report.html'} and {out / 'samples.png'}",
        flush=True,
    )


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read a preset and its overrides from the command line and run it."""
    config = read_config(PRESETS, "python -m experiments.quickstart", arguments)
    try:
        main(config, age=process_age())
    except KeyboardInterrupt:
        raise SystemExit("quickstart: stopped; the same command goes on from here") from None
    except torch.multiprocessing.ProcessExitedException as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SystemExit(f"quickstart: a process ended ({error}); the same command goes on from here") from None
    except ValueError as error:
        raise SystemExit(f"quickstart: {error}") from None


if __name__ == "__main__":
    cli()
