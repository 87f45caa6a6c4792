"""Whole weights out of a sharded checkpoint, in the released layout: for generate, for others, for the next stage.

python -m experiments.consolidate --path runs/stage1 --out runs/stage1/transformer
python -m experiments.consolidate --path runs/stage1/step-400000 --out OUT --weights model
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.runs import latest_checkpoint
from experiments.sharded_state import consolidate

__all__ = ["ConsolidateConfig", "main"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsolidateConfig:
    """One export."""

    path: Path
    """A sharded run, whose newest checkpoint is taken, or one ``step-N`` of it."""
    out: Path
    """Folder for config.json and safetensors."""
    weights: str = "ema"
    """"ema" or "model"."""


def main(config: ConsolidateConfig) -> None:
    """Read and write."""
    if config.weights not in ("ema", "model"):
        raise SystemExit(f'error: weights: expected "ema" or "model", got {config.weights!r}')
    found = (config.path, 0) if (config.path / "run.json").exists() else latest_checkpoint(config.path)
    if found is None:
        raise SystemExit(f"error: path: expected a run or a checkpoint, found none in {config.path}")
    consolidate(found[0], config.out, config.weights)
    print(f"{config.weights} of {found[0]} is in {config.out}")


if __name__ == "__main__":
    main(tyro.cli(ConsolidateConfig, prog="python -m experiments.consolidate"))
