"""Prompts with rubrics for reinforcement learning, from the library's taxonomy or yours, by a language model.

    python -m experiments.build_prompts --model qwen --url http://localhost:8000/v1 --out runs/prompts
    python -m experiments.build_prompts --model qwen --url http://localhost:8000/v1 --target 8406      more items first
    python -m experiments.build_prompts --dry-run                                                      what would be asked

``OUT/prompts.jsonl`` holds them, ``OUT/report.json`` what became of every item and the coverage. Answers are kept in
``OUT/replies.sqlite``: the same command goes on where it was interrupted and pays for nothing twice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lensmini.data.prompts import (
    DIMENSIONS,
    BuildReport,
    build_prompts,
    coverage_table,
    draw_dimensions,
    extend_taxonomy,
    load_prompts,
    load_taxonomy,
    prompt_request,
)
from lensmini.endpoint import Endpoint

__all__ = ["BuildConfig", "cli", "main"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """From items to prompts with rubrics."""

    out: Path = Path("runs/prompts")
    """Everything is written here."""
    taxonomy: Path | None = None
    """Items; None for the library's own of 2,000."""
    target: int | None = None
    """Let the model add items until there are so many; the paper has 8,406."""
    limit: int | None = None
    """Use only so many items, evenly spread."""
    seed: int = 0
    """Of dimensions and choices."""
    model: str = "gpt-4.1"
    """Name on the server."""
    url: str | None = None
    """Server, up to /v1; None for OpenAI's own."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key."""
    concurrency: int = 16
    """Requests in flight."""
    max_cost: float | None = None
    """Never spend more; needs prices."""
    prices: tuple[float, float] | None = None
    """Of a million tokens of questions and of answers."""
    dry_run: bool = False
    """Only show the first question and the number of items."""


def main(config: BuildConfig) -> BuildReport | None:
    """Extend the taxonomy if asked to, build, and print the coverage."""
    kept = config.out / "taxonomy.txt"
    taxonomy = load_taxonomy(kept if config.target is not None and kept.exists() else config.taxonomy)
    if config.dry_run:
        item = taxonomy.items[0]
        print(prompt_request(item, draw_dimensions(item, seed=config.seed)).messages[0]["content"])
        print(f"\n{len(taxonomy.items)} items, at least {2 * len(taxonomy.items)} questions", flush=True)
        return None
    config.out.mkdir(parents=True, exist_ok=True)
    endpoint = Endpoint(
        config.model,
        base_url=config.url,
        api_key_env=config.key_env,
        concurrency=config.concurrency,
        max_cost=config.max_cost,
        prices=config.prices,
        cache=config.out / "replies.sqlite",
    )
    if config.target is not None:
        taxonomy, causes = extend_taxonomy(taxonomy, endpoint.ask, target=config.target, save=kept)
        print(f"taxonomy: {len(taxonomy.items)} items in {kept}; answers: {causes or 'all good'}", flush=True)
    items = taxonomy.items
    if config.limit is not None and config.limit < len(items):
        items = tuple(items[number * len(items) // config.limit] for number in range(config.limit))
    report = build_prompts(items, endpoint.ask, config.out, seed=config.seed)
    table = coverage_table(load_prompts(config.out / "prompts.jsonl"))
    columns = ("prompts", "rubrics", *DIMENSIONS)
    print(" ".join([f"{'':22}", *(f"{name:>11}" for name in columns)]))
    for name, row in table.items():
        print(" ".join([f"{name:22}", *(f"{row[column]:>11}" for column in columns)]))
    print(
        f"build_prompts: {report.records} of {report.asked} items in {config.out}; lost {report.lost or 'none'}",
        flush=True,
    )
    return report


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read the command line; what a person can mend ends in one line."""
    try:
        main(tyro.cli(BuildConfig, args=arguments, prog="python -m experiments.build_prompts"))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"build_prompts: {error}") from None


if __name__ == "__main__":
    cli(sys.argv[1:])
