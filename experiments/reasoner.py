"""Short requests with and without a reasoner in front of the miniature: fine-tuned, scripted, with and without metadata.

    python -m experiments.reasoner mini --out runs/reasoner          about 14 CPU-minutes, after `experiments.quickstart`
    python -m experiments.reasoner mini --searched runs/search_prompt/best.txt     with a prompt of `experiments.search_prompt`
    python -m experiments.reasoner quick --out /tmp/reasoner          a look at the machinery

Arms on short requests: the bare request, the miniature's language model fine-tuned as a rewriter, and the dense caption of a
scene for the request, which is the ceiling. On the same requests said indirectly: likewise, and with the direct request as
metadata, as a benchmark's metadata states its questions. The scripted server shows the mechanism only: it obeys rules of its
system prompt. No request text is in the rewriter's training or in the search. Strict scores of the exact verifier, three
seeds of prompts, noise and rewriter. The paper (section 7) has GenEval 0.843 without and 0.930 with a reasoner that reads
the benchmark's metadata; it does not show the two apart. The same command again goes on where it was stopped.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.generate import read_config
from experiments.miniature.caption_reader import intent_lost
from experiments.miniature.language_model import load_language_model
from experiments.miniature.rewriter import RewriterConfig, indirect_request, is_held_out, train_rewriter
from experiments.miniature.scripted_chat import BY_HAND, scripted_answer, with_rules
from experiments.pictures import save_grid
from experiments.runs import (
    append_jsonl,
    cached_stage,
    config_dict,
    config_hash,
    progress,
    provenance,
    read_jsonl,
    write_json,
)
from experiments.scoring import paint_prompts
from lensmini.data import KINDS, ScenePrompt, build_scene_prompts, describe_scene, score_images
from lensmini.endpoint import Endpoint
from lensmini.prompting import LocalChat, Rewrite, Rewriter, SystemPrompt

__all__ = ["ReasonerConfig", "arms_of", "cluster_interval", "held_out_suite", "main", "mini", "quick"]

Make = Callable[[Sequence[ScenePrompt], int], tuple[list[str], list[Rewrite]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasonerConfig:
    """Arms, prompts and seeds."""

    out: Path = Path("runs/reasoner")
    """Rows by arm and seed, ``summary.json`` and ``pictures.png``."""
    checkpoint: Path | None = None
    """A run of the miniature; None for the newest of the quickstart."""
    searched: Path | None = None
    """File with the system prompt that `experiments.search_prompt` found; None leaves its arms out."""
    rewriter: RewriterConfig = field(default_factory=RewriterConfig)
    """The fine-tuning."""
    per_kind: int = 50
    """Short requests of each kind and seed."""
    per_kind_others: int = 10
    """Likewise of the indirect requests and of the scripted arms: the first ones."""
    num_seeds: int = 3
    """Seeds of prompts, noise and rewriter."""
    seed: int = 0
    """The first one."""
    temperature: float = 0.5
    """Of the fine-tuned rewriter."""
    canvases: tuple[tuple[int, int], ...] = ((32, 32),)
    """Heights and widths."""
    num_steps: int = 12
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Guidance."""
    mu: float | None = 1.8
    """Time shift of the schedule."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_kind_others <= self.per_kind or self.num_seeds < 1:
            raise ValueError(
                "per_kind, per_kind_others, num_seeds: expected at least 1, the second at most the first, got "
                f"{self.per_kind}, {self.per_kind_others}, {self.num_seeds}"
            )


def mini() -> ReasonerConfig:
    """300 short requests a seed, three seeds."""
    return ReasonerConfig()


def quick() -> ReasonerConfig:
    """A few pictures, and a rewriter that has learnt nothing: a look at the machinery."""
    return ReasonerConfig(
        per_kind=2, per_kind_others=1, num_seeds=2, num_steps=2, rewriter=RewriterConfig(steps=2, group=1, batch_size=4)
    )


def held_out_suite(per_kind: int, seed: int) -> list[ScenePrompt]:
    """Short-form prompts whose texts the rewriter was never trained on and the search never saw, kinds interleaved.

    Example:
        >>> suite = held_out_suite(2, 0)
        >>> len(suite), all(map(is_held_out, suite))
        (12, True)
    """
    found: dict[str, list[ScenePrompt]] = defaultdict(list)
    for part in range(1, 1000):
        for prompt in build_scene_prompts(4, 9_000_000 + 10_000 * seed + part, form="short"):
            if is_held_out(prompt) and len(found[prompt.kind]) < per_kind:
                found[prompt.kind].append(prompt)
        if sum(map(len, found.values())) == per_kind * len(KINDS):
            break
    return [found[kind][number] for number in range(per_kind) for kind in KINDS]


def arms_of(config: ReasonerConfig, chat: LocalChat, scripted: Endpoint) -> dict[str, tuple[int, Make]]:
    """Arms by name: prompts of each kind, and what makes texts of prompts, with the rewrites behind them.

    Args:
        config: of the run.
        chat: the fine-tuned rewriter.
        scripted: the scripted server.
    """

    def tuned(texts: Sequence[str], seed: int) -> list[Rewrite]:
        band = SystemPrompt("none", "(no system turn: the rewriter is fine-tuned)", 6, 120)
        options = {"required": (), "temperature": config.temperature, "max_tokens": 100, "seed": seed}
        return Rewriter(chat, band, frame=lambda text, facts: text, **options).rewrite_all(texts)

    def obey(system: str, texts: Sequence[str], seed: int, facts: Sequence[Mapping[str, Any]] | None) -> list[Rewrite]:
        rewriter = Rewriter(scripted, SystemPrompt("scripted", system, 1, 200), required=(), max_tokens=400, seed=seed)
        return rewriter.rewrite_all(texts, facts)

    def indirect(prompts: Sequence[ScenePrompt], seed: int) -> list[str]:
        return [indirect_request(prompt, 1000 * seed + number) for number, prompt in enumerate(prompts)]

    def direct(prompts: Sequence[ScenePrompt]) -> list[str]:
        return [prompt.text for prompt in prompts]

    def dense(prompts: Sequence[ScenePrompt], seed: int) -> tuple[list[str], list[Rewrite]]:
        """The caption of each prompt's scene: not a rewrite, the ceiling."""
        wording = config.rewriter.wording
        return [describe_scene(p.scene, wording=wording, generator=seed * 1000 + i) for i, p in enumerate(prompts)], []

    def painted(rewrites: list[Rewrite]) -> tuple[list[str], list[Rewrite]]:
        return [rewrite.prompt for rewrite in rewrites], rewrites

    facts = lambda prompts: [{"request": prompt.text} for prompt in prompts]  # noqa: E731
    every, few = config.per_kind, config.per_kind_others
    arms: dict[str, tuple[int, Make]] = {
        "short / no reasoner": (every, lambda p, seed: (direct(p), [])),
        "short / fine-tuned": (every, lambda p, seed: painted(tuned(direct(p), seed))),
        "short / dense caption (ceiling)": (every, dense),
        "indirect / no reasoner": (few, lambda p, seed: (indirect(p, seed), [])),
        "indirect / fine-tuned": (few, lambda p, seed: painted(tuned(indirect(p, seed), seed))),
        "indirect / fine-tuned, metadata": (few, lambda p, seed: painted(tuned(direct(p), seed))),
        "short / scripted, fixed prompt": (few, lambda p, s: painted(obey(with_rules(*BY_HAND), direct(p), s, None))),
    }
    if config.searched is not None:
        best = config.searched.read_text(encoding="utf-8")
        arms["short / scripted, searched prompt"] = (few, lambda p, s: painted(obey(best, direct(p), s, None)))
        arms["indirect / scripted, searched prompt"] = (few, lambda p, s: painted(obey(best, indirect(p, s), s, None)))
        arms["indirect / scripted, searched prompt, metadata"] = (
            few,
            lambda p, s: painted(obey(best, indirect(p, s), s, facts(p))),
        )
    return arms


def main(config: ReasonerConfig) -> dict[str, Any]:
    """Train the rewriter if it is missing, paint what is missing, and write the summary."""
    from tests.chat_server import ChatServer

    config.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, world = load_checkpoint(find_checkpoint(config.checkpoint), quiet=True)

    def make(directory: Path) -> None:
        train_rewriter(config.rewriter, world.encoder.model, world.encoder.tokenizer, directory)

    folder, _ = cached_stage(config.out.parent, "rewriter", [config.rewriter, world.key], make)
    chat = LocalChat(*load_language_model(folder), name=folder.name, batch_size=32)
    path = config.out / "rows.jsonl"
    with ChatServer(scripted_answer) as server:
        arms = arms_of(config, chat, Endpoint("scripted", base_url=server.url))
        keys = {name: _key(config, name, folder.name) for name in arms}
        rows = {(row["arm"], row["seed"]): row for row in read_jsonl(path) if row.get("key") == keys.get(row["arm"])}
        with progress(len(arms) * config.num_seeds, 0, "reasoner") as bar:
            for name, (per_kind, make_texts) in arms.items():
                for seed in range(config.seed, config.seed + config.num_seeds):
                    if (name, seed) not in rows:
                        suite = held_out_suite(config.per_kind, seed)[: per_kind * len(KINDS)]
                        texts, rewrites = make_texts(suite, seed)
                        seeds = [100_000 * (seed + 1) + number for number in range(len(suite))]
                        pictures = paint_prompts(model, world, texts, config.canvases, config, seeds=seeds)
                        rows[name, seed] = {
                            "key": keys[name],
                            **_row(name, seed, suite, texts, rewrites, pictures),
                        }
                        append_jsonl(path, rows[name, seed])
                        if seed == config.seed:
                            asked = zip(suite[:12], texts, strict=False)
                            labels = [f"{name} | {prompt.text} -> {text}" for prompt, text in asked]
                            save_grid(pictures[:12], labels, config.out / f"{_slug(name)}.png")
                    bar.update()
    summary = _summarise(config, list(arms), rows)
    write_json(config.out / "summary.json", summary)
    for name, cell in summary["arms"].items():
        gain = cell.get("gain")
        told = "" if gain is None else f"  gain {gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        print(f"{name:48s} strict {cell['strict']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}){told}", flush=True)
    return summary


def _key(config: ReasonerConfig, name: str, rewriter: str) -> str:
    """Of all that decides an arm's rows besides the seed: rows of another checkpoint or setting are not taken over."""
    same = replace(
        config, out=Path(), searched=None, num_seeds=1, seed=0, checkpoint=find_checkpoint(config.checkpoint)
    )
    told = config.searched.read_text(encoding="utf-8") if config.searched is not None and "searched" in name else ""
    return config_hash([same, rewriter, told])


def cluster_interval(
    values: Sequence[float], clusters: Sequence[str], *, seed: int = 0, resamples: int = 4000
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of a mean whose values come in clusters (here: equal requests).

    Example:
        >>> low, high = cluster_interval([0.0, 1.0] * 50, [str(number // 2) for number in range(100)])
        >>> low, high
        (0.5, 0.5)
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    member = torch.tensor([names[name] for name in clusters])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, member, torch.tensor(values, dtype=torch.float64))
    counts = torch.bincount(member, minlength=len(names)).double()
    drawn = torch.randint(len(names), (resamples, len(names)), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _row(
    name: str,
    seed: int,
    suite: Sequence[ScenePrompt],
    texts: Sequence[str],
    rewrites: Sequence[Rewrite],
    pictures: Sequence[torch.Tensor],
) -> dict[str, Any]:
    reports = score_images(pictures, suite).reports
    lost = intent_lost(texts, suite)
    known = [pair for pair in lost if pair is not None]
    return {
        "arm": name,
        "seed": seed,
        "requests": [prompt.text for prompt in suite],
        "kinds": [prompt.kind for prompt in suite],
        "texts": list(texts),
        "strict": [int(report.strict) for report in reports],
        "atom": [report.atom for report in reports],
        "captions": len(known),
        "bits": sum(pair[1] for pair in known),
        "bits_lost": sum(pair[0] for pair in known),
        "words_lost": sum(rewrite.report.bits_lost for rewrite in rewrites if rewrite.report is not None),
        "words": sum(rewrite.report.bits for rewrite in rewrites if rewrite.report is not None),
        "status": {status: sum(r.status == status for r in rewrites) for status in {r.status for r in rewrites}},
    }


def _summarise(config: ReasonerConfig, names: Sequence[str], rows: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    seeds = range(config.seed, config.seed + config.num_seeds)
    arms: dict[str, Any] = {}
    for name in names:
        parts = [rows[name, seed] for seed in seeds]
        base = [rows[f"{name.split(' / ')[0]} / no reasoner", seed] for seed in seeds]
        strict = [value for part in parts for value in part["strict"]]
        clusters = [text for part in parts for text in part["requests"]]
        low, high = cluster_interval(strict, clusters)
        cell = {
            "strict": sum(strict) / len(strict),
            "low": low,
            "high": high,
            "by_seed": [sum(part["strict"]) / len(part["strict"]) for part in parts],
            "by_kind": {
                kind: sum(v for p in parts for v, k in zip(p["strict"], p["kinds"], strict=True) if k == kind)
                / sum(k == kind for p in parts for k in p["kinds"])
                for kind in KINDS
            },
            "atom": sum(value for part in parts for value in part["atom"]) / len(strict),
            "num": len(strict),
            "distinct_requests": len(set(clusters)),
            "full_captions": sum(part["captions"] for part in parts) / len(strict),
            "bits_lost_by_bit": _share(parts, "bits_lost", "bits"),
            "words_lost_by_word": _share(parts, "words_lost", "words"),
            "status": {s: sum(p["status"].get(s, 0) for p in parts) for p in parts for s in p["status"]},
        }
        if not name.endswith("no reasoner"):
            # The same prompts and noise: the bare arm's first rows.
            gains = [
                a - b for p, q in zip(parts, base, strict=True) for a, b in zip(p["strict"], q["strict"], strict=False)
            ]
            gain_low, gain_high = cluster_interval(gains, clusters)
            cell["gain"] = {"mean": sum(gains) / len(gains), "low": gain_low, "high": gain_high}
        arms[name] = cell
    return {
        "question": "What does a reasoner do for short requests, and what does metadata add?",
        "metric": "strict: share of pictures with every question right; intervals: 95 %, bootstrap over request texts",
        "config": config_dict(config),
        "config_hash": config_hash(config),
        **provenance(),
        "seeds": list(seeds),
        "arms": arms,
    }


def _share(parts: Sequence[Mapping[str, Any]], lost: str, all_: str) -> float | None:
    total = sum(part[all_] for part in parts)
    return sum(part[lost] for part in parts) / total if total else None


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


if __name__ == "__main__":
    try:
        main(read_config((mini, quick), "python -m experiments.reasoner"))
    except (ValueError, OSError) as error:
        raise SystemExit(f"reasoner: {error}") from None
