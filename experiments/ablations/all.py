"""Every study of the miniature from nothing, one after the other: ``make ablations``.

    python -m experiments.ablations.all --dry-run          commands and hours
    python -m experiments.ablations.all                    all that is missing; the same command goes on after any stop
    python -m experiments.ablations.all --only rl captions

Each command keeps its finished runs, so that a second call takes minutes. Results lie under ``runs``, in the study's own
place, and are copied into ``experiments/results`` by whoever has looked at them.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tyro

__all__ = ["COMMANDS", "AllConfig", "Command", "main"]


class Command(NamedTuple):
    """One study."""

    arguments: tuple[str, ...]
    """Of ``python -m``."""
    core_hours: float
    """Of one CPU core; two halve the time."""
    source: str
    """Of the hours: "measured", or what they were computed from."""


COMMANDS: dict[str, Command] = {
    "quickstart": Command(("experiments.quickstart",), 0.3, "measured"),
    "guidance_rescale": Command(
        ("experiments.ablations.guidance_rescale",), 0.5, "pictures, from the quickstart's score"
    ),
    "captions": Command(("experiments.ablations.captions",), 4.0, "FLOPs, from the quickstart"),
    "timestep_shift": Command(("experiments.ablations.timestep_shift",), 3.5, "FLOPs, from the quickstart"),
    "rl": Command(("experiments.ablations.rl",), 6.0, "measured by arm"),
    "distill": Command(("experiments.ablations.distill", "--teacher", "runs/rl/nft-0"), 1.5, "measured by arm"),
    "distill_consistency": Command(("experiments.ablations.distill_consistency",), 0.5, "measured"),
    "reasoner": Command(("experiments.reasoner", "mini"), 0.3, "measured"),
    "toy2d": Command(("experiments.toy2d", "three_seeds"), 0.1, "measured"),
}
"""In an order in which each finds what it starts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllConfig:
    """Which studies."""

    only: tuple[str, ...] = ()
    """These, in the order of the list; empty: all. What they start from has to be there."""
    dry_run: bool = False
    """Print commands and hours, and leave."""

    def __post_init__(self) -> None:
        if not set(self.only) <= set(COMMANDS):
            raise ValueError(f"only: expected some of {list(COMMANDS)}, got {list(self.only)}")


def main(config: AllConfig) -> list[str]:
    """Run the studies; one that fails does not keep the next from running.

    Returns:
        Names of those that failed.
    """
    chosen = {name: one for name, one in COMMANDS.items() if not config.only or name in config.only}
    for name, one in chosen.items():
        print(f"{name:20s} {one.core_hours:4.1f} core-hours ({one.source}): python -m {' '.join(one.arguments)}")
    total = sum(one.core_hours for one in chosen.values())
    print(f"{'total':20s} {total:4.1f} core-hours, {total / 2:.1f} hours on two cores", flush=True)
    if config.dry_run:
        return []
    failed = [name for name, one in chosen.items() if subprocess.run([sys.executable, "-m", *one.arguments]).returncode]
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on")
    return failed


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    config = tyro.cli(AllConfig, args=arguments, prog="python -m experiments.ablations.all", description=__doc__)
    if main(config):
        raise SystemExit(1)


if __name__ == "__main__":
    cli()
