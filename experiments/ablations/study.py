"""The skeleton of an ablation: arms change a pre-training preset, all arms sit the same exams, claims are made beforehand.

A study is a :class:`Study` and a call of :func:`cli`; see ``captions.py``. Its script then has these commands:

    python -m experiments.ablations.NAME                             every arm, three seeds; the same command goes on
    python -m experiments.ablations.NAME --arms A B --seeds 0        some; --only-summary: results so far
    python -m experiments.ablations.NAME --dry-run                   arms, steps, FLOPs; with --full GPU-hours on 128 A100
    python -m experiments.ablations.NAME --smallest --out /tmp/a/s   all of the machinery in a minute; paints noise
    torchrun ... -m experiments.ablations.NAME --full --arms A       one arm at full scale, from shards

A run lies in ``runs/ablation-HASH`` of its config, so that studies share the arms that they have in common, language model,
autoencoder and banks too; ``answers`` beneath hold every exam's verdict prompt by prompt. Scores decide, never losses.
``OUT/NAME.json`` is what ``experiments/results/NAME.json`` holds, beside a table and pictures.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments import pretrain, quickstart
from experiments.ablations.study_cost import step_flops
from experiments.ablations.study_exams import Exam, Sampler, finished, scene_exam, sit_exam
from experiments.miniature.gates import GateReport, require
from experiments.miniature.world import Miniature, prepare_miniature
from experiments.pretrain_config import PretrainConfig
from experiments.runs import config_hash, latest_checkpoint, write_json
from experiments.training import check_same_run, read_run

__all__ = [
    "Arm",
    "Claim",
    "Exam",
    "Sampler",
    "Study",
    "StudyConfig",
    "arm_parts",
    "changed",
    "check_gates",
    "cli",
    "full_parts",
    "main",
    "preset",
    "run_arm",
    "scene_exam",
]

Score = Literal["strict", "loose", "saturation", "clipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What one arm changes: dotted names of fields, and their values."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the miniature preset, such as ``{"data.density": "brief", "miniature.layers": (3,)}``."""
    first: Mapping[str, Any] | None = None
    """Changes of an earlier part of the run, on top of ``changes``; the main part starts from its last weights."""
    first_share: float = 0.5
    """Share of the steps that the earlier part has; all arms have the same steps in all."""
    compute_of: str | None = None
    """As many steps as give the FLOPs of this arm instead."""
    existing: Path | None = None
    """A finished run of the preset that is scored instead of a new one; seeds are then those of the noise alone."""
    full: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the full-scale preset."""
    full_first: Mapping[str, Any] | None = None
    """As ``first``, of the full-scale preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A difference that is expected before anything is run: mean of ``ours`` minus mean of ``others``."""

    text: str
    """In words."""
    ours: tuple[str, str]
    """Arm and exam."""
    others: tuple[str, str]
    """Arm and exam, of the same questions."""
    kind: Literal["greater", "equal"] = "greater"
    """What is claimed."""
    score: Score = "strict"
    """Of what."""
    margin: float = 0.05
    """The smallest difference of interest."""
    deciding: bool = True
    """Whether the study's verdict depends on it; else it is only reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that is fixed before the first run."""

    name: str
    """Of script and results."""
    question: str
    """What is asked."""
    paper: str
    """What the paper says, and where; or that it does not."""
    arms: Mapping[str, Arm]
    """By name, in the order of their runs."""
    exams: Callable[[PretrainConfig, int], Mapping[str, Exam]]
    """From the preset and the number of prompts of each kind to exams by name; :func:`scene_exam` makes one."""
    claims: tuple[Claim, ...]
    """What decides."""
    base: Callable[[], PretrainConfig] = pretrain.mini
    """The miniature preset."""
    full_base: Callable[[], PretrainConfig] = pretrain.stage1
    """The full-scale preset."""
    measures: Callable[["Study", "StudyConfig"], Mapping[str, Any]] | None = None
    """Whatever else the result is to hold, from finished runs."""
    shown: tuple[str, ...] = ()
    """Exams whose pictures are drawn; by default the first."""
    tried: tuple[str, ...] = ()
    """Every setting that was tried before this design, so that nobody takes it for the first."""
    remarks: tuple[str, ...] = ()
    """What a reader of the result has to know."""

    def __post_init__(self) -> None:
        for claim in self.claims:
            for arm, _ in (claim.ours, claim.others):
                if arm not in self.arms:
                    raise ValueError(f"claims: expected arms of {list(self.arms)}, got {arm!r}")
        for name, arm in self.arms.items():
            if arm.compute_of is not None and self.arms[arm.compute_of].compute_of is not None:
                raise ValueError(f"arms.{name}.compute_of: expected an arm with the study's steps")
            if not 0 < arm.first_share < 1:
                raise ValueError(f"arms.{name}.first_share: expected a share in (0, 1), got {arm.first_share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Which part of a study, and how."""

    out: Path
    """Results; its parent holds runs and frozen parts for all studies."""
    arms: tuple[str, ...] = ()
    """In this order, all seeds of one before the next; empty: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order of samples, noise and times; scenes and prompts are the same for all."""
    steps: int | None = None
    """Optimiser steps of an arm instead of the preset's."""
    checkpoint: Path | None = None
    """A run in place of the one that arms without training name."""
    prompts_per_kind: int = 64
    """Prompts of each of the six kinds, in every exam."""
    processes: int = 2
    """That share a run's steps and the painting, one thread each; it changes results by rounding only."""
    only_summary: bool = False
    """Train and paint nothing."""
    full: bool = False
    """The arms at full scale."""
    dry_run: bool = False
    """Print arms with parameters and FLOPs, or GPU-hours, and leave."""
    smallest: bool = False
    """Everything at its smallest: a test of the machinery."""

    def __post_init__(self) -> None:
        if self.prompts_per_kind < 2 or self.processes < 1 or not self.seeds:
            raise ValueError("prompts_per_kind, processes, seeds: expected at least 2, 1 and 1")


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with some fields replaced.

    Args:
        config: nested frozen dataclasses.
        changes: dotted names of fields, and their values.

    Raises:
        ValueError: if there is no such field, or it refuses the value.

    Example:
        >>> changed(pretrain.mini(), {"data.density": "brief"}).data.density
        'brief'
    """
    for name, value in changes.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    if name not in {one.name for one in fields(config)}:
        raise ValueError(f"changes: expected a field of {type(config).__name__}, got {name!r}")
    return replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})


def preset(study: Study, options: StudyConfig) -> PretrainConfig:
    """The miniature preset that the arms change, at its smallest if asked for."""
    if not options.smallest:
        return study.base()
    tiny = quickstart.smallest()
    return PretrainConfig(**{one.name: getattr(tiny, one.name) for one in fields(PretrainConfig)})


def arm_parts(study: Study, options: StudyConfig, arm: str, seed: int) -> list[PretrainConfig]:
    """The runs that an arm consists of, the last of which is scored.

    Args:
        study: the design.
        options: of the command.
        arm: its name.
        seed: of the run.

    Returns:
        One config, or an earlier part and the main one. Runs that compute the same have the same directory.

    Raises:
        ValueError: if a change does not fit.
    """
    one, base = study.arms[arm], preset(study, options)
    if one.existing is not None and not options.smallest:
        return [_existing(changed(base, one.changes), options.checkpoint or one.existing, options)]
    steps = base.run.steps if options.steps is None else options.steps
    own = changed(base, one.changes)
    if one.compute_of is not None:
        steps = round(steps * step_flops(changed(base, study.arms[one.compute_of].changes)) / step_flops(own))
    run = replace(own.run, seed=seed, steps=steps, sample_every=0, processes=options.processes)
    if one.first is None:
        return [_named(replace(own, run=run), options)]
    early = max(1, round(one.first_share * steps))
    first = _named(changed(replace(own, run=replace(run, steps=early)), one.first), options)
    last = replace(
        own,
        run=replace(run, steps=steps - early),
        init_from=first.run.out / f"step-{early:06d}",
        init_weights="model",
    )
    return [first, _named(last, options)]


def _existing(config: PretrainConfig, path: Path, options: StudyConfig) -> PretrainConfig:
    found = latest_checkpoint(path)
    if found is None:
        raise ValueError(
            f"checkpoint: expected a finished run in {path}, found none (`python -m experiments.quickstart`)"
        )
    seed = read_run(found[0])["config"]["run"]["seed"]
    run = replace(config.run, out=path, steps=found[1], seed=seed, processes=options.processes)
    config = replace(config, run=run)
    check_same_run(path, config)
    return config


def _named(config: PretrainConfig, options: StudyConfig) -> PretrainConfig:
    """The config with a directory that is named after everything that decides what is computed."""
    start = None if config.init_from is None else Path(config.init_from.parent.name, config.init_from.name)
    key = replace(config, run=replace(config.run, out=Path(), processes=1), init_from=start)
    out = options.out.parent / f"ablation-{config_hash(key)}"
    return replace(config, run=replace(config.run, out=out))


def full_parts(study: Study, arm: str, *, out: Path = Path("runs"), seed: int = 0) -> list[PretrainConfig]:
    """The full-scale runs that an arm consists of.

    Raises:
        ValueError: if a change does not fit.
    """
    one, base = study.arms[arm], study.full_base()
    own, steps = changed(base, one.full), base.run.steps
    if one.compute_of is not None:
        steps = round(steps * step_flops(changed(base, study.arms[one.compute_of].full)) / step_flops(own))
    run = replace(own.run, steps=steps, seed=seed, out=out / f"full-{study.name}-{arm}-{seed}")
    if one.full_first is None:
        return [replace(own, run=run)]
    early = round(one.first_share * run.steps)
    before = replace(run, steps=early, out=run.out.with_name(f"{run.out.name}-first"))
    first = changed(replace(own, run=before), one.full_first)
    start = before.out / f"step-{early:06d}"
    return [first, replace(own, run=replace(run, steps=run.steps - early), init_from=start)]


def check_gates(config: PretrainConfig, root: Path) -> tuple[Miniature, dict[str, dict[str, Any]]]:
    """Language model and autoencoder of a config, made on first use, and what their gates measured.

    Returns:
        Both parts, and by name ``numbers`` and ``failures``.

    Raises:
        GateError: if a gate failed and the config is strict about it.
    """
    world, found = prepare_miniature(config.miniature, root, quiet=True), {}
    stages = (("language-model", config.miniature.language_model), ("autoencoder", config.miniature.autoencoder))
    for name, part in stages:
        path = root / f"{name}-{config_hash(part)}" / f"{name.replace('-', '_')}.json"
        gates = json.loads(path.read_text())["gates"]
        report = GateReport(gates["stage"], gates["numbers"], tuple(gates["failures"]))
        if config.miniature.strict:
            require(report)
        found[name] = {"numbers": report.numbers, "failures": list(report.failures)}
    return world, found


def run_arm(study: Study, options: StudyConfig, arm: str, seed: int) -> Path:
    """Train an arm's parts, unless they are there, and let it sit the exams that it has not; returns the run."""
    parts = arm_parts(study, options, arm, seed)
    for config in parts:
        with _alone(config.run.out):
            if finished(config) is None:
                pretrain.main(config)
        if finished(config) is None:
            raise SystemExit(f"{study.name}: {arm}, seed {seed} was stopped; the same command goes on from there")
    for exam in study.exams(preset(study, options), options.prompts_per_kind).values():
        sit_exam(parts[-1], exam, seed, options.processes)
    return parts[-1].run.out


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two studies that share a run do not train it both: one waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(study: Study, options: StudyConfig) -> dict[str, Any]:
    """Run what is missing, arm by arm and seed by seed; the results are written after each run.

    Returns:
        The content of ``OUT/NAME.json``; nothing after a dry run or at full scale.

    Raises:
        GateError: if language model or autoencoder are not good enough; nothing is trained on them.
        SystemExit: if a run was stopped; the same command goes on.
        ValueError: if there is no such arm.
    """
    from experiments.ablations.study_report import describe_full, describe_mini, exam_limits, summarise, write_result

    arms = options.arms or tuple(study.arms)
    if not set(arms) <= set(study.arms):
        raise ValueError(f"arms: expected some of {list(study.arms)}, got {list(arms)}")
    if options.dry_run:
        print(describe_full(study, arms) if options.full else describe_mini(study, options, arms))
        return {}
    if options.full:
        if untrained := [arm for arm in arms if study.arms[arm].existing is not None]:
            raise ValueError(
                f"full: expected arms that train, got {untrained}, which a finished run (--checkpoint) sits"
            )
        for arm, seed in [(arm, seed) for arm in arms for seed in options.seeds]:
            for config in full_parts(study, arm, out=options.out.parent, seed=seed):
                pretrain.main(config)
        return {}
    if options.smallest:
        options = replace(options, prompts_per_kind=2, processes=1)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.only_summary:
        exams = study.exams(preset(study, options), options.prompts_per_kind)
        for config in {arm_parts(study, options, arm, options.seeds[0])[-1] for arm in arms}:
            check_gates(config, options.out.parent)
            for where, value in exam_limits(config, exams, options.out.parent)["limited"].items():
                print(f"{study.name}: {where}: the autoencoder keeps {value:.2f} of perfect pictures", flush=True)
        for arm, seed in [(arm, seed) for arm in arms for seed in options.seeds]:
            print(f"{study.name}: {arm}, seed {seed}", flush=True)
            run_arm(study, options, arm, seed)
            write_json(options.out / f"{study.name}.json", summarise(study, options))
    result = summarise(study, options)
    write_result(study, options, result)
    print((options.out / "table.md").read_text())
    return result


def cli(study: Study, arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the study."""
    default = StudyConfig(out=Path("runs") / study.name)
    options = tyro.cli(
        StudyConfig,
        default=default,
        args=arguments,
        prog=f"python -m experiments.ablations.{study.name}",
        description=study.question,
    )
    try:
        main(study, options)
    except ValueError as error:
        raise SystemExit(f"{study.name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{study.name}: stopped; the same command goes on") from None
