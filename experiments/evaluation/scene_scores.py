"""The scene suite of the miniature: requests to paint, and scores of the pictures by kind, canvas and interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.evaluation.intervals import stratified_interval
from experiments.quickstart_score import ScoreConfig, Suite, build_suites, judge, wilson_interval
from experiments.reinforce_eval import diversity
from experiments.training import read_run
from lensmini.data import MINIATURE_CANVASES, score_images

__all__ = ["SceneSuites", "run_data", "scene_requests", "scene_suites", "score_scenes"]

SUITES = ("trained", "unseen", "withheld", "short")
_REPEATED = 12


@dataclass(frozen=True, slots=True)
class SceneSuites:
    """Suites by name, and the prompts that are painted several times for the diversity."""

    suites: dict[str, Suite]
    repeated: Suite
    variety: int


def scene_suites(
    *, num_prompts: int, num_others: int, variety: int, seed: int, data: Mapping[str, Any] | None = None
) -> SceneSuites:
    """The suites of ``experiments.quickstart``: trained and unseen canvases, withheld pairs, short requests.

    Args:
        num_prompts: of the first suite.
        num_others: of each of the others.
        variety: pictures of each of twelve prompts of the first one, for the diversity.
        seed: of the prompts.
        data: what the run was trained on, for its canvases and wording; English is the only language of its captions.

    Returns:
        The suites.
    """
    data = {} if data is None else data
    canvases = [(height, width) for height, width in data.get("canvases", MINIATURE_CANVASES)]
    config = ScoreConfig(num_prompts=num_prompts, num_others=num_others, seed=seed)
    suites = build_suites(config, canvases, wording=data.get("wording", "synonyms"))
    first = suites["trained"]
    repeated = Suite(first.prompts[:_REPEATED], first.canvases[:_REPEATED])
    return SceneSuites({name: suites[name] for name in SUITES}, repeated, variety)


def scene_requests(suites: SceneSuites) -> list[dict[str, Any]]:
    """Lines for ``experiments.generate``; a prompt's seed is its number in the suite, as in the quickstart.

    Example:
        >>> suites = scene_suites(num_prompts=12, num_others=12, variety=2, seed=0)
        >>> lines = scene_requests(suites)
        >>> len(lines), lines[0]["suite"], lines[-1]["suite"], lines[-1]["seed"]
        (72, 'trained', 'repeated', 11000034)
    """

    def line(name: str, suite: Suite, index: int, seed: int) -> dict[str, Any]:
        height, width = suite.canvases[index]
        request = {"prompt": suite.prompts[index].text, "seed": seed, "height": height, "width": width}
        return {**request, "suite": name, "number": index}

    lines = [line(name, suite, i, i) for name, suite in suites.suites.items() for i in range(len(suite.prompts))]
    places = [(index, copy) for index in range(len(suites.repeated.prompts)) for copy in range(suites.variety)]
    return lines + [line("repeated", suites.repeated, i, 1_000_003 * i + copy) for i, copy in places]


def score_scenes(
    suites: SceneSuites, pictures: Mapping[tuple[str, int], Sequence[Tensor]], checkpoint: Path | None
) -> dict[str, Any]:
    """Judge every suite by the exact verifier.

    Args:
        suites: what was asked for.
        pictures: of each suite and number, ``[3, h_i, w_i]`` uint8.
        checkpoint: the run, for its autoencoder, which is the ceiling of every score.

    Returns:
        For each suite the numbers of :func:`experiments.quickstart_score.judge` (with chances and ceilings) and the
        ``strict_interval`` and ``loose_interval`` of prompts drawn again within their kinds (Wilson's where all scored
        alike); and ``diversity``.
    """
    _, world = load_checkpoint(find_checkpoint(checkpoint), quiet=True)
    scores: dict[str, Any] = {}
    for name, suite in suites.suites.items():
        painted = [pictures[name, index][0] for index in range(len(suite.prompts))]
        scores[name] = judge(suite, painted, world.autoencoder)
        reports = score_images(painted, suite.prompts).reports
        for measure in ("strict", "loose"):
            kinds: dict[str, list[float]] = {}
            for prompt, report in zip(suite.prompts, reports, strict=True):
                kinds.setdefault(prompt.kind, []).append(float(getattr(report, measure)))
            low, high = stratified_interval(list(kinds.values()), seed=0)
            if low == high:  # nothing varied, and the bootstrap knows no other prompts
                low, high = wilson_interval(scores[name][measure], len(painted))
            scores[name][f"{measure}_interval"] = [low, high]
    if suites.variety > 1:
        sets = [pictures["repeated", index] for index in range(len(suites.repeated.prompts))]
        scores["diversity"] = math.fsum(map(diversity, sets)) / len(sets)
    return scores


def run_data(checkpoint: Path | None) -> dict[str, Any]:
    """What a run was trained on, from its config."""
    return read_run(find_checkpoint(checkpoint))["config"].get("data", {})
