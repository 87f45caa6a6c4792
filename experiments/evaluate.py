"""Benchmarks: the miniature's scene suite, and the four public ones of arXiv 2605.21573 (tables of section 3).

    python -m experiments.evaluate scenes --checkpoint runs/quickstart             minutes on one CPU core
    python -m experiments.evaluate geneval --dry-run                               pictures, FLOPs, GPU-hours, what is needed
    python -m experiments.evaluate geneval --prompts evaluation_metadata.jsonl --checkpoint microsoft/Lens --device cuda
    python -m experiments.evaluate geneval --prompts F --painted --detector PekingU/rtdetr_r50vd    our own score of it
    python -m experiments.evaluate geneval --prompts F --painted --results results.jsonl            the official one
    python -m experiments.evaluate longtext --prompts text_prompts.jsonl --checkpoint C --reader rapid
    python -m experiments.evaluate cvtg --prompts CVTG-2K --checkpoint C --shard 0/8                one of eight processes

``OUT/images`` has the folders that the official scorer reads (``experiments.evaluation.layouts``), ``OUT/pictures`` what
``experiments.generate`` painted, ``OUT/result.json`` all numbers with their provenance. The same command again paints only
what is missing. Rows: "own" is our scorer with the named detector or reader, "official" what the official one wrote, the
others are printed in the paper; own numbers are not the benchmark's. ``parts`` has the own scores
by size, category, length or folder. ``docs/evaluate.md`` has a command for each table.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from experiments.checkpoints import find_checkpoint
from experiments.evaluate_config import PRESETS, EvaluateConfig
from experiments.evaluation.breakdowns import mean_diversity, missing_pictures
from experiments.evaluation.detectors import clip_colours, open_detector, pixel_colours
from experiments.evaluation.layouts import load_picture, write_layout
from experiments.evaluation.official import read_official
from experiments.evaluation.own_scores import Scored, read_text_content, score_objects, score_texts
from experiments.evaluation.paper import PROMPTS, paper_rows
from experiments.evaluation.prices import SCENE_TOKENS, model_sizes, painting_flops, painting_hours
from experiments.evaluation.prompt_files import Benchmark, BenchmarkPrompt, PromptFile, read_prompts
from experiments.evaluation.scene_scores import SceneSuites, run_data, scene_requests, scene_suites, score_scenes
from experiments.generate import read_config, stream
from experiments.runs import config_dict, config_hash, provenance, write_json
from lensmini.pipeline.folder import default_sampling, guess_variant
from lensmini.rewards.judges import rapid_reader

__all__ = ["NEEDS", "PRESETS", "EvaluateConfig", "evaluate", "format_rows", "price"]

NEEDS = {
    "scenes": "a run of the miniature (python -m experiments.quickstart makes one)",
    "geneval": "weights; prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval; for the official score its "
    "Mask2Former of mmdetection and CLIP ViT-L/14, for our own a detector of transformers (--detector); for the paper's "
    "numbers GPT-5.5 as rewriter (closed)",
    "oneig": "weights; OneIG-Bench.csv or OneIG-Bench-ZH.csv of github.com/OneIG-Bench/OneIG-Benchmark; for the official "
    "score its scripts with Qwen2.5-VL-7B, LLM2CLIP, CSD and DreamSim, for our own of the text dimension --reader and "
    "--text-content; for the paper's numbers GPT-5.5 as rewriter (closed)",
    "longtext": "weights; text_prompts.jsonl of huggingface.co/datasets/X-Omni/LongText-Bench; for the official score "
    "Qwen2.5-VL-7B, for our own --reader; for the paper's numbers GPT-5.5 as rewriter (closed)",
    "cvtg": "weights; the folder CVTG-2K of huggingface.co/datasets/dnkdnk/CVTG-2K; for the official score PaddleOCR, CLIP "
    "and VQAScore, for our own of words and NED --reader; for the paper's numbers GPT-5.5 as rewriter (closed)",
}
"""What a user has to bring."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Paint what is missing, lay it out, and score it.

    Args:
        config: which benchmark, with what.

    Returns:
        What ``OUT/result.json`` says; without scores if this is one of several processes.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if a file is broken, a prompt is bad, or a setting does not suit.
    """
    result = _scenes(config) if config.benchmark == "scenes" else _public(config, config.benchmark)
    if config.part[1] == 1:
        result |= {"config": config_dict(config), "config_hash": config_hash(config), "provenance": provenance()}
        write_json(config.out / "result.json", result)
        print(f"evaluate: {config.out / 'result.json'}", flush=True)
    return result


def _scenes(config: EvaluateConfig) -> dict[str, Any]:
    suites = _suites(config, run_data(config.checkpoint))
    painted = _paint(config, scene_requests(suites))
    if config.part[1] > 1:
        return {"benchmark": "scenes"}
    pictures: dict[tuple[str, int], list[Tensor]] = {}
    for row in painted:
        file = config.out / "pictures" / row["file"]
        pictures.setdefault((row["suite"], row["number"]), []).append(load_picture(file))
    scores = score_scenes(suites, pictures, config.checkpoint)
    rows = {
        name: {measure: score[measure] for measure in ("strict", "low", "high", "loose", "chance_strict", "num")}
        | dict(zip(("low", "high"), score["strict_interval"], strict=True))
        for name, score in scores.items()
        if isinstance(score, dict)
    }
    print(format_rows(rows))
    print(format_rows({kind: {"strict": one["strict"]} for kind, one in scores["trained"]["by_kind"].items()}))
    weights = painted[0]["weights_sha256"]
    return {"benchmark": "scenes", "language": "en", "weights_sha256": weights, "scores": scores}


def _suites(config: EvaluateConfig, data: Mapping[str, Any]) -> SceneSuites:
    others = max(12, config.num_prompts // 3)
    sizes = {"num_prompts": config.num_prompts, "num_others": others, "variety": config.variety}
    return scene_suites(**sizes, seed=2_000_003 + config.seed, data=data)


def _public(config: EvaluateConfig, benchmark: Benchmark) -> dict[str, Any]:
    file = _read(config, benchmark)
    prompts, number, refused = file.prompts[: config.limit], config.num_images_per_prompt, 0
    weights: set[str] = set()
    if not config.painted:
        painted: dict[str, list[Path]] = {}
        for row in _paint(config, _requests(prompts, config)):
            painted.setdefault(row["key"], []).append(config.out / "pictures" / row["file"])
            weights.add(row["weights_sha256"])
        if config.part[1] > 1:
            print("evaluate: one part is painted; the same command without --shard, after all parts, lays them out")
            return {"benchmark": benchmark}
        refused = len(prompts) - len(painted)
        written = write_layout(benchmark, prompts, painted, config.out / "images", config.model_name)
        print(f"evaluate: {written} new files in {config.out / 'images'}", flush=True)
    layout = (benchmark, prompts, config.out / "images", number, config.model_name)
    missing = missing_pictures(*layout)
    rows: dict[str, dict[str, float]] = {}
    if (own := _own(config, benchmark, prompts)) is not None:
        rows["own"] = own.row
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in own.lines)
        (config.out / "own.jsonl").write_text(text, encoding="utf-8")
    if config.results is not None:
        options: dict[str, Any] = {"model": config.model_name, "language": config.language}
        rows["official"] = read_official(benchmark, config.results, **options)
    paper = paper_rows(benchmark, config.language)
    print(format_rows(paper | rows))
    for name, parts in ({} if own is None else own.parts).items():
        print(f"own, by {name}\n{format_rows(parts)}")
    wanted = PROMPTS.get((benchmark, config.language))
    return {
        "benchmark": benchmark,
        "language": config.language,
        "num_prompts": len(prompts),
        "whole": wanted in (None, len(prompts)) and not file.bad and not refused and not missing,
        "refused": refused,
        "missing_files": missing,
        "weights_sha256": next(iter(weights), None),
        "bad": dict(file.bad),
        "images_per_prompt": number,
        "detector": None if config.detector is None else str(config.detector),
        "colours": config.colours if config.detector is not None else None,
        "reader": config.reader,
        "rows": rows,
        "parts": {} if own is None else own.parts,
        "diversity": mean_diversity(*layout),
        "paper": paper,
    }


def _read(config: EvaluateConfig, benchmark: Benchmark) -> PromptFile:
    if config.prompts is None:
        raise ValueError(f"prompts: expected the benchmark's own, got none; needed are {NEEDS[benchmark]}")
    file = read_prompts(benchmark, config.prompts, config.language)
    print(file.describe(), flush=True)
    if file.bad and not config.skip_bad:
        raise ValueError(
            f"prompts: {sum(file.bad.values())} bad rows in {config.prompts}, first {file.examples[0]}; --skip-bad goes on"
        )
    return file


def _requests(prompts: Sequence[BenchmarkPrompt], config: EvaluateConfig) -> list[dict[str, Any]]:
    """Every prompt has seeds of its own, or all would share their few noises; canvases are taken in turn."""
    number, sizes = config.num_images_per_prompt, config.canvases
    requests: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        request = {"prompt": prompt.prompt, "seed": config.seed + number * index, "key": prompt.key}
        size = dict(zip(("height", "width"), sizes[index % len(sizes)], strict=True)) if sizes else {}
        requests.append(request | size)
    return requests


def _paint(config: EvaluateConfig, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Paint by ``experiments.generate`` into OUT/pictures; a row for each picture, in order."""
    config.out.mkdir(parents=True, exist_ok=True)
    number, shards = config.part
    path = config.out / (f"requests-{number}-of-{shards}.jsonl" if shards > 1 else "requests.jsonl")
    path.write_text("".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests), encoding="utf-8")
    return list(stream(config.painting(path)))


def _own(config: EvaluateConfig, benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt]) -> Scored | None:
    images, number = config.out / "images", config.num_images_per_prompt
    if config.detector is not None:
        hub: dict[str, Any] = {"device": config.device, "local_files_only": config.local_files_only}
        wanted = {
            entry["class"]
            for prompt in prompts
            for entry in [*prompt.facts["include"], *prompt.facts.get("exclude", ())]
        }
        detect = open_detector(config.detector, wanted=wanted, **hub)
        colours = pixel_colours if config.colours == "pixels" else clip_colours(config.colours, **hub)
        return score_objects(prompts, images, number, detect, colours, seed=config.seed)
    if config.reader is not None:
        texts = None if config.text_content is None else read_text_content(config.text_content)
        options: dict[str, Any] = {"model": config.model_name, "language": config.language, "text_content": texts}
        return score_texts(benchmark, prompts, images, number, rapid_reader(), seed=config.seed, **options)
    return None


def price(config: EvaluateConfig) -> str:
    """The report of ``--dry-run``: prompts, pictures, FLOPs, GPU-hours, and what a user has to bring."""
    miniature = config.benchmark == "scenes"
    model, is_run = model_sizes(find_checkpoint(config.checkpoint) if miniature else config.checkpoint)
    miniature = miniature or is_run
    if config.benchmark == "scenes":
        requests = scene_requests(_suites(config, run_data(config.checkpoint)))
        prompts, pictures, steps, scale = len({row["prompt"] for row in requests}), len(requests), 12, 4.0
        sizes = [(row["height"], row["width"]) for row in requests]
    else:
        known = PROMPTS.get((config.benchmark, config.language), 0)
        file = None if config.prompts is None else read_prompts(config.benchmark, config.prompts, config.language)
        prompts = known if file is None else len(file.prompts)
        prompts = prompts if config.limit is None else min(prompts, config.limit)
        pictures, sizes = prompts * config.num_images_per_prompt, list(config.sizes)
        variant = guess_variant(str(config.checkpoint)) if config.checkpoint is not None else None
        steps, scale = default_sampling(variant or "Lens")
    steps = steps if config.num_steps is None else config.num_steps
    scale = scale if config.guidance_scale is None else config.guidance_scale
    tokens = SCENE_TOKENS if miniature else config.text_tokens
    options: dict[str, Any] = {"num_steps": steps, "guidance_scale": scale, "text_tokens": tokens}
    parts = painting_flops(model, sizes, miniature=miniature, **options)
    flops = pictures * sum(parts.values())
    hours = painting_hours(flops, config.gpu, config.mfu)
    lines = [
        f"prompts             {prompts:,}",
        f"pictures            {pictures:,}, {steps} steps, guidance {scale:g}",
        f"TFLOP of a picture  {', '.join(f'{name} {value / 1e12:.3g}' for name, value in parts.items())}",
        f"FLOPs in all        {flops:.3e}, {tokens} text tokens a prompt assumed, scorers not counted",
        f"GPU-hours           {hours:.3g} on {config.gpu} at {config.mfu:.0%} of its peak (assumed)",
        f"needed              {NEEDS[config.benchmark]}",
    ]
    return "\n".join(lines)


def format_rows(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table in plain text; what a row does not have stays a dash.

    Example:
        >>> print(format_rows({"own": {"count": 0.5, "missing": 3}, "Lens": {"count": 0.909}}))
              count  missing
        own   0.500        3
        Lens  0.909        -
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    table = [["", *columns], *([name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read the command line; what a person can mend ends in one line."""
    try:
        config = cast(EvaluateConfig, read_config(PRESETS, "python -m experiments.evaluate", arguments))
        if config.dry_run:
            print(price(config))
        else:
            evaluate(config)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"evaluate: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("evaluate: stopped; the same command goes on from here") from None


if __name__ == "__main__":
    cli()
