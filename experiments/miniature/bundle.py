"""A finished miniature run made small enough for the repository, so that pictures need no training.

    python -m experiments.miniature.bundle runs/quickstart     into experiments/miniature/pretrained
    python -m experiments.generate mini "a red circle ..."     paints with it where no run is there

The averaged weights, the language model and the autoencoder, byte for byte, in the same places as under ``runs/``: whatever
opens a run opens this one. What training alone needs (optimiser, last weights, metrics) stays behind. ``bundle.json`` names
every file's SHA-256, the commit and the scores.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.checkpoints import BUNDLE, find_checkpoint, find_stages
from experiments.runs import atomic_directory, config_hash, write_json
from experiments.training import read_run

__all__ = ["BundleConfig", "main"]

LIMIT = 15_000_000
_KEPT = ("config.json", "ema.safetensors", "run.json")
_LEFT_OUT = ("metrics.jsonl", "generation_config.json")
_SCORES = (
    "verifier_strict",
    "verifier_strict_low",
    "verifier_strict_high",
    "verifier_loose",
    "unseen_strict",
    "chance_strict",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleConfig:
    """Which run, and where to."""

    run: Annotated[Path, tyro.conf.Positional] = Path("runs/quickstart")
    """A finished run of ``experiments.quickstart``; its language model and autoencoder lie beside it."""
    out: Path = BUNDLE
    """Directory of the bundle; an older one is replaced, anything else is left alone."""


def main(config: BundleConfig) -> dict[str, Any]:
    """Write the bundle.

    Args:
        config: run and directory.

    Returns:
        The content of ``bundle.json``: ``files`` (name to SHA-256), ``bytes``, ``config_hash``, ``commit``, ``score``.

    Raises:
        FileNotFoundError: if the run, its summary or a part beneath is not there.
        ValueError: if the bundle would be larger than 15 MB, or ``out`` is there and no bundle.
    """
    if config.out.exists() and not (config.out / "bundle.json").is_file():
        raise ValueError(f"out: expected no directory yet or an older bundle, got {config.out}")
    step = find_checkpoint(config.run)
    beneath, root = find_stages(step)
    copies = {Path(step.parent.name, step.name, name): step / name for name in _KEPT}
    copies[Path(step.parent.name, "summary.json")] = step.parent / "summary.json"
    for name, key in (("language-model", "language_model"), ("autoencoder", "autoencoder")):
        stage = root / f"{name}-{config_hash(beneath[key])}"
        if not stage.is_dir():
            raise FileNotFoundError(f"run: expected {stage.name} beside {step.parent}, found none")
        copies |= {Path(stage.name, path.name): path for path in sorted(stage.iterdir()) if path.name not in _LEFT_OUT}
    total = sum(path.stat().st_size for path in copies.values())
    if total > LIMIT:
        raise ValueError(f"run: expected at most {LIMIT:,} bytes for a repository, got {total:,}")
    summary, run = json.loads((step.parent / "summary.json").read_text()), read_run(step)
    bundle = {
        "command": "python -m experiments.quickstart, then python -m experiments.miniature.bundle",
        "files": {name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in copies.items()},
        "bytes": total,
        "config_hash": config_hash(run["config"]),
        "commit": run["provenance"]["commit"],
        "score": {name: summary[name] for name in _SCORES if name in summary},
    }
    with atomic_directory(config.out) as directory:
        for name, path in copies.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
        write_json(directory / "bundle.json", bundle)
    return bundle


if __name__ == "__main__":
    try:
        found = main(tyro.cli(BundleConfig, prog="python -m experiments.miniature.bundle"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"bundle: {error}") from None
    print(f"{len(found['files'])} files, {found['bytes'] / 1e6:.2f} MB")
