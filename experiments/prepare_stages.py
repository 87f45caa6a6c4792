"""The later stages of `experiments.prepare_data`: duplicates, captions, shards."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.prepare_config import PrepareConfig
from experiments.prepare_units import (
    load_embeddings,
    part_file,
    read_rows,
    read_unit,
    score_names,
    stored_picture,
    write_rows,
)
from experiments.runs import progress
from lensmini.data import assign_buckets, read_picture
from lensmini.data.caption_checks import count_words
from lensmini.data.captions import Caption, Captioner, EndpointCaptioner, caption_images
from lensmini.data.filters import find_duplicates
from lensmini.data.shard_writer import ShardSample, merge_manifests, write_shards
from lensmini.endpoint import Endpoint

__all__ = [
    "caption_units",
    "drop_duplicates",
    "final_rows",
    "group_units",
    "merge_groups",
    "open_captioner",
    "write_group",
]


def drop_duplicates(config: PrepareConfig, num_units: int) -> None:
    """Find pictures that others repeat, over all units, and write down whose they are, unless that is done."""
    path = config.run.out / "duplicates.jsonl"
    if path.exists():
        return
    keys: list[str] = []
    hashes: list[str] = []
    priority: list[float] = []
    embeddings = []
    for index in range(num_units):
        kept = [row for row in read_rows(part_file(config.run.out, "parts", index)) if row["fate"] == "kept"]
        keys += [row["key"] for row in kept]
        hashes += [row["pixels"] for row in kept]
        priority += [row["scores"].get("aesthetic", row["scores"]["area"]) for row in kept]
        if config.models.embedder is not None and kept:
            embeddings.append(load_embeddings(config, index))
    rows, seen, left = [], dict[str, str](), []
    for number, (key, pixels) in enumerate(zip(keys, hashes, strict=True)):
        if pixels in seen:
            rows.append({"key": key, "fate": "duplicate", "of": seen[pixels]})
        else:
            seen[pixels] = key
            left.append(number)
    if embeddings and left:
        chosen = torch.cat(embeddings)[left]
        order = torch.tensor([priority[number] for number in left], dtype=torch.float64)
        found = find_duplicates(chosen, max_cosine=config.thresholds.max_duplicate_cosine, priority=order)
        for number, other, cosine in zip(left, found.duplicate_of.tolist(), found.cosine.tolist(), strict=True):
            if other >= 0:
                of = keys[left[other]]
                rows.append({"key": keys[number], "fate": "near-duplicate", "of": of, "cosine": round(cosine, 6)})
    write_rows(path, rows)


def open_captioner(config: PrepareConfig) -> Captioner:
    """The model that captions are asked of."""
    captions = config.captions
    if captions.local is not None:
        from lensmini.data.local_captioner import LocalCaptioner

        return LocalCaptioner(
            captions.local,
            device=config.models.device,
            dtype=torch.float32 if config.models.device == "cpu" else torch.bfloat16,
            max_new_tokens=captions.max_tokens,
            local_files_only=config.models.local_files_only,
        )
    endpoint = Endpoint(
        captions.model,
        base_url=captions.url,
        api_key_env=captions.key_env,
        concurrency=captions.concurrency,
        timeout_s=captions.timeout_s,
        max_cost=captions.max_cost,
        max_tokens_total=captions.max_tokens_total,
        deadline_s=captions.deadline_s,
        prices=captions.prices,
        cache=config.run.out / "replies.sqlite",
    )
    return EndpointCaptioner(endpoint, max_tokens=captions.max_tokens)


def caption_units(config: PrepareConfig, units: list[int]) -> dict[str, Any]:
    """Ask for the captions of units that have none yet; a unit's file is written when its last picture is done.

    Pictures that fail for a passing reason (a server that does not answer, a budget that is spent) leave their unit
    unfinished, so that the same command asks for them again.

    Returns:
        What was spent.

    Raises:
        RuntimeError: if units are left unfinished, with the causes counted.
    """
    out = config.run.out
    todo = [unit for unit in units if not part_file(out, "captions", unit).exists()]
    gone = _duplicates(out)
    left: dict[int, int] = {}
    rows: dict[int, list[dict[str, Any]]] = {}
    hints: dict[str, str] = {}
    failed = Counter[str]()

    def pictures() -> Iterator[tuple[str, bytes]]:
        for unit in todo:
            wanted = {}
            for row in read_rows(part_file(out, "parts", unit)):
                asked = config.captions.which == "all" or row.get("caption") is None
                if asked and row["fate"] == "kept" and row["key"] not in gone:
                    wanted[row["key"]] = row["caption"]
            rows[unit], left[unit] = [], len(wanted)
            if not wanted:
                write_rows(part_file(out, "captions", unit), [])
                continue
            for sample in read_unit(config, unit):
                if sample.key in wanted:
                    name = f"{unit} {sample.key}"
                    if config.captions.use_given and wanted[sample.key]:
                        hints[name] = wanted[sample.key]
                    yield name, sample.picture

    captioner = open_captioner(config) if todo else None
    with progress(None, 0, "captions") as bar:
        options = {"mode": config.captions.mode, "seed": config.seed, "max_attempts": config.captions.max_attempts}
        outcomes = caption_images(pictures(), captioner, hints=hints, **options) if captioner is not None else ()
        for outcome in outcomes:
            unit, _, key = outcome.key.partition(" ")
            number = int(unit)
            hints.pop(outcome.key, None)
            bar.update()
            if isinstance(outcome, Caption):
                rows[number].append({"key": key, "caption": outcome.text, "density": outcome.density})
            elif outcome.cause in _LASTING:
                rows[number].append({"key": key, "cause": outcome.cause, "detail": outcome.detail})
            else:
                failed[outcome.cause] += 1
                continue
            left[number] -= 1
            if not left[number]:
                done = sorted(rows.pop(number), key=lambda row: row["key"])
                write_rows(part_file(out, "captions", number), done)
    spent = asdict(captioner.endpoint.spent) if isinstance(captioner, EndpointCaptioner) else {}
    if failed:
        counted = ", ".join(f"{count} x {cause}" for cause, count in failed.most_common())
        raise RuntimeError(f"captions: expected an answer for every picture, got {counted}; the same command goes on")
    return spent


_LASTING = ("refusal", "empty", "truncated", "loop", "too long", "bad request", "picture")
"""Causes for which asking again would only cost again."""


def final_rows(config: PrepareConfig, index: int, gone: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The rows of a unit with what duplicates and captions made of them."""
    out = config.run.out
    gone = _duplicates(out) if gone is None else gone
    made = {}
    if config.captions.which != "given":
        made = {row["key"]: row for row in read_rows(part_file(out, "captions", index))}
    rows = read_rows(part_file(out, "parts", index))
    for row in rows:
        if row["fate"] != "kept":
            continue
        answer = made.get(row["key"])
        if row["key"] in gone:
            row["fate"] = gone[row["key"]]
        elif answer is not None and "cause" in answer:
            row["fate"] = f"caption: {answer['cause']}"
        elif answer is not None:
            row["caption"] = answer["caption"]
        elif row["caption"] is None:
            row["fate"] = f"caption: {row['caption_problem'] or 'none'}"
    return rows


def group_units(config: PrepareConfig, num_units: int) -> list[range]:
    """Units that are written together."""
    step = config.shards.units_per_group
    return [range(first, min(first + step, num_units)) for first in range(0, num_units, step)]


def write_group(config: PrepareConfig, number: int, units: range) -> int:
    """Write the shards of a group, unless that is done; returns the group's number."""
    buckets = config.shards.buckets()
    write_shards(
        _samples(config, units),
        config.run.out / "shards",
        buckets,
        bases=config.shards.base_of_bucket(),
        shard_bytes=config.shards.shard_bytes,
        name=f"{number:05d}",
    )
    return number


def merge_groups(config: PrepareConfig, num_groups: int) -> None:
    """One manifest of all groups, once all are there."""
    merge_manifests(config.run.out / "shards", parts=[f"{number:05d}" for number in range(num_groups)])


def _samples(config: PrepareConfig, units: range) -> Iterator[ShardSample]:
    buckets, bases = config.shards.buckets(), config.shards.base_of_bucket()
    gone, names = _duplicates(config.run.out), score_names(config)
    for unit in units:
        rows = {row["key"]: row for row in final_rows(config, unit, gone) if row["fate"] == "kept"}
        for sample in read_unit(config, unit) if rows else ():
            row = rows.get(sample.key)
            if row is None:
                continue
            suffix, data = stored_picture(sample.picture, read_picture(sample.picture))
            (bucket,) = assign_buckets([row["height"]], [row["width"]], buckets, bases=bases, small="upscale")
            members = {suffix: data, "txt": row["caption"].encode()}
            if sample.metadata:
                members["json"] = json.dumps(sample.metadata, sort_keys=True).encode()
            yield ShardSample(
                sample.key,
                int(bucket),
                row["height"],
                row["width"],
                min(count_words(row["caption"]), 2**16 - 1),
                members,
                {name: float(row["scores"][name]) for name in names},
            )


def _duplicates(out: Path) -> dict[str, str]:
    return {row["key"]: row["fate"] for row in read_rows(out / "duplicates.jsonl")}
