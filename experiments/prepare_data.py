"""From raw pictures to shards of samples: read, filter, drop duplicates, caption, store, report.

    python -m experiments.prepare_data folder --path DIR --run.out OUT
    python -m experiments.prepare_data tars --path DIR --captions.which missing --captions.url http://localhost:8000/v1
    python -m experiments.prepare_data list --path FILE --run.shard 3/64      one of 64 tasks, anywhere, in any order
    python -m experiments.prepare_data folder --path DIR --run.ray            the same work as Ray tasks
    python -m experiments.prepare_data text --path FILE --text.num 1000       a text a line, drawn; with exact boxes

``OUT/shards`` holds tars by bucket with a manifest, for `python -m experiments.pretrain folder --data.path OUT/shards` and
for any reader of webdataset's tars; ``OUT/report.html`` shows what was thrown away and why, ``OUT/summary.json`` counts it.
The same command goes on after any interruption, and ends with the same bytes; a caption that was paid for is never asked
for again.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.prepare_config import PrepareConfig, TextConfig
from experiments.prepare_report import write_report
from experiments.prepare_stages import caption_units, drop_duplicates, group_units, merge_groups, write_group
from experiments.prepare_units import open_input, part_file, run_unit
from experiments.runs import progress, provenance, write_json

__all__ = ["PrepareConfig", "Unfinished", "cli", "prepare"]

Task = Callable[..., int]


class Unfinished(RuntimeError):
    """Other tasks of the same work have to end first."""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Do what is left to do, and report.

    Args:
        config: what and how.

    Returns:
        What ``summary.json`` holds: ``read``, ``kept``, ``dropped`` by cause, which add up, and the words of captions.

    Raises:
        ValueError: if there is nothing to read, or ``out`` holds the work of another command.
        Unfinished: if other tasks have to end first.
        RuntimeError: if captions are missing because a server failed.
    """
    out = config.run.out
    source = open_input(config)
    num_units = len(source.units())
    if not num_units:
        raise ValueError(f"path: expected pictures in {config.path}, found nothing")
    out.mkdir(parents=True, exist_ok=True)
    _check_same(config, source.fingerprint())
    number, count = config.run.part
    mine = range(number, num_units, count)
    _run(config, run_unit, [(unit,) for unit in mine], "units")
    _wait(config, [part_file(out, "parts", unit) for unit in range(num_units)], "units")
    drop_duplicates(config, num_units)
    if config.captions.which != "given":
        spent = caption_units(config, list(mine))
        if spent.get("calls"):
            print(f"captions: {json.dumps(spent)}", flush=True)
        _wait(config, [part_file(out, "captions", unit) for unit in range(num_units)], "captioned units")
    groups = list(enumerate(group_units(config, num_units)))
    _run(config, write_group, groups[number::count], "shards")
    notes = out / "shards" / "parts"
    _wait(config, [notes / f"{group:05d}.json" for group, _ in groups], "groups of shards")
    merge_groups(config, len(groups))
    summary = write_report(config, num_units)
    print(
        f"prepare_data: {summary['kept']} of {summary['read']} samples in {out}/shards; see {out}/report.html",
        flush=True,
    )
    return summary


def _check_same(config: PrepareConfig, fingerprint: str) -> None:
    """One directory, one input and one set of settings."""
    path, identity = config.run.out / "prepare.json", config.identity(fingerprint)
    if path.exists():
        if json.loads(path.read_text())["identity"] != identity:
            raise ValueError(
                f"run.out: {config.run.out} holds the work of other pictures or settings; choose another, or delete it"
            )
        return
    write_json(path, {"identity": identity, "config": config, "provenance": provenance()})


def _run(config: PrepareConfig, task: Task, items: Sequence[tuple[Any, ...]], name: str) -> None:
    """Every item, here, in processes or by Ray; what is done already returns at once."""
    with progress(len(items), 0, name) as bar:
        if config.run.ray:
            finished = _by_ray(config, task, items)
        elif config.run.workers > 1 and len(items) > 1:
            finished = _by_processes(config, task, items)
        else:
            finished = (task(config, *item) for item in items)
        for _ in finished:
            bar.update()


def _by_processes(config: PrepareConfig, task: Task, items: Sequence[tuple[Any, ...]]) -> Iterable[int]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.run.workers, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(task, [config] * len(items), *zip(*items, strict=True))


def _by_ray(config: PrepareConfig, task: Task, items: Sequence[tuple[Any, ...]]) -> Iterable[int]:
    """A worker that dies is replaced and its task done again."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("run.ray needs Ray: pip install lensmini[ray]") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    remote: Any = ray.remote(task).options(max_retries=5, num_cpus=1)
    here = replace(config, path=config.path.absolute(), run=replace(config.run, out=config.run.out.absolute()))
    waiting = [remote.remote(here, *item) for item in items]
    while waiting:
        done, waiting = ray.wait(waiting)
        yield from ray.get(done)


def _wait(config: PrepareConfig, files: Sequence[Path], name: str) -> None:
    until = time.monotonic() + config.run.wait_s
    while missing := sum(not file.exists() for file in files):
        if time.monotonic() >= until:
            raise Unfinished(
                f"{missing} of {len(files)} {name} belong to other tasks and are not there yet: when they are, the same "
                "command goes on (or give --run.wait-s)"
            )
        time.sleep(1.0)


def folder() -> PrepareConfig:
    """Every picture below a folder; captions in name.txt, name.json or metadata.jsonl."""
    return PrepareConfig()


def tars() -> PrepareConfig:
    """Tars of pictures and captions, one file or a folder of them."""
    return PrepareConfig(path=Path("tars"))


def listed() -> PrepareConfig:
    """Files named by a list, a path or a JSON object a line."""
    return PrepareConfig(path=Path("list.txt"))


def text() -> PrepareConfig:
    """Texts of a file, drawn onto backgrounds; their boxes stand in the samples' json."""
    return PrepareConfig(path=Path("texts.txt"), text=TextConfig(num=1000))


PRESETS = {"folder": folder, "tars": tars, "list": listed, "text": text}


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read a preset and its overrides from the command line; what a person can mend ends in one line."""
    presets = {name: (make.__doc__ or "", make()) for name, make in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, args=arguments, prog="python -m experiments.prepare_data")
    try:
        prepare(config)
    except Unfinished as waiting:
        print(f"prepare_data: {waiting}", flush=True)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"prepare_data: {error}") from None


if __name__ == "__main__":
    cli(sys.argv[1:])
