"""Search for the system prompt of a rewriter, training-free: failures, proposal, paired test (arXiv 2605.21573, section 7).

    python -m experiments.search_prompt mini --out runs/search_prompt              about 5 CPU-minutes; mechanism only
    python -m experiments.search_prompt lens --dry-run                             calls, pictures and the most it can cost
    python -m experiments.search_prompt lens --prompts prompts.jsonl --checkpoint FOLDER --device cuda
        --rewriter gpt-oss-20b --rewriter-url http://localhost:8000/v1 --judge qwen-vl --judge-url http://localhost:8001/v1

`mini` searches for a scripted server that obeys rules: it shows that the search finds what helps the image model and keeps
out what does not, and nothing about language models. `lens` paints with a released checkpoint (by default on CUDA), judges
with a vision model the rubrics of a file of `experiments.build_prompts`, and proposes with a language model; keys come from
the environment. `OUT/search.jsonl` holds every step: the same command goes on after any stop. `OUT/best.txt` is the prompt,
`OUT/report.md` the decisions and the lineage. The test split is read once, at the end.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.generate import read_config
from experiments.miniature.rewriter import is_held_out
from experiments.miniature.scripted_chat import SEED_PROMPT, scripted_answer
from experiments.runs import config_dict, config_hash, provenance, write_json
from experiments.scoring import paint_prompts
from lensmini.data import KINDS, ScenePrompt, build_scene_prompts, score_images
from lensmini.endpoint import FAILURE_CAUSES, Endpoint
from lensmini.prompting import (
    GENERAL,
    Budget,
    ChatProposer,
    Evaluation,
    Rewriter,
    SearchResult,
    SystemPrompt,
    search_pareto_front,
    search_system_prompt,
)

__all__ = ["SearchConfig", "lens", "main", "mini", "quick", "scene_evaluator", "search_suites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What is searched, with what, and for how much."""

    out: Path = Path("runs/search_prompt")
    """Record, report and prompt."""
    world: Literal["scenes", "pictures"] = "scenes"
    """The miniature with its exact verifier, or a released model with a judge."""
    method: Literal["incumbent", "pareto"] = "incumbent"
    """One prompt after the other (the paper), or a pool of those that are best at something."""
    checkpoint: Path | None = None
    """Of the image model; None for the newest run of the quickstart."""
    prompts: Path | None = None
    """For pictures: JSON lines with ``prompt`` and ``rubrics``, as `experiments.build_prompts` writes them."""
    num_dev: int = 150
    """Development prompts."""
    feedback_share: float = 0.2
    """Share of them whose failures the proposer reads; the rest decides."""
    num_test: int = 60
    """Test prompts."""
    candidates: int = 14
    """Candidates, at most; the level of the tests is spread over them."""
    num_seeds: int = 1
    """Pictures of each prompt in a comparison."""
    screen: int = 24
    """Prompts that a candidate has to be better on before the rest is painted."""
    alpha: float = 0.05
    """Chance of accepting anything if nothing is better."""
    max_scorings: int | None = None
    """Pictures, at most."""
    max_cost: float | None = None
    """Money, at most; needs the prices."""
    seed: int = 0
    """Of everything."""
    num_steps: int = 12
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Guidance."""
    mu: float | None = 1.8
    """Time shift, for scenes."""
    height: int = 32
    """Pixels."""
    width: int = 32
    """Pixels."""
    device: str = "cpu"
    """Of the image model."""
    rewriter: str = "scripted"
    """Model that rewrites."""
    rewriter_url: str | None = None
    """Its server, up to /v1; None for OpenAI's own (and for the scripted one)."""
    proposer: str = "scripted"
    """Model that proposes system prompts."""
    proposer_url: str | None = None
    """Its server."""
    judge: str = ""
    """Model that looks at pictures."""
    judge_url: str | None = None
    """Its server."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the servers' key."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens of questions and of answers, the dearest of the three models."""
    tokens_of_rewrite: tuple[int, int] = (2000, 1200)
    """Question and answer, at most, for the estimate and the bound."""
    tokens_of_judgement: tuple[int, int] = (1500, 400)
    """Likewise, of one rubric of one picture."""
    tokens_of_proposal: tuple[int, int] = (12000, 8000)
    """Likewise."""
    rubrics: int = 11
    """Rubrics of a picture, for the estimate: the paper's 10 and 1."""
    dry_run: bool = False
    """Only say what it would take."""

    def __post_init__(self) -> None:
        if min(self.num_dev, self.num_test, self.candidates, self.num_seeds) < 1:
            raise ValueError(
                "num_dev, num_test, candidates, num_seeds: expected positive numbers, got "
                f"{self.num_dev}, {self.num_test}, {self.candidates}, {self.num_seeds}"
            )

    @property
    def cost_of_scoring(self) -> float:
        """The most that one picture can cost: its rewrites (two attempts) and all its judgements (two turns)."""
        asked = [
            2 * r + 2 * self.rubrics * j for r, j in zip(self.tokens_of_rewrite, self.tokens_of_judgement, strict=True)
        ]
        return _price(asked, self.prices)

    @property
    def cost_of_proposal(self) -> float:
        """The most that one proposal can cost."""
        return _price(self.tokens_of_proposal, self.prices)

    @property
    def budget(self) -> Budget:
        """Of the search."""
        return Budget(
            candidates=self.candidates,
            scorings=self.max_scorings,
            cost=self.max_cost,
            cost_of_scoring=self.cost_of_scoring,
            cost_of_proposal=self.cost_of_proposal,
        )


def mini() -> SearchConfig:
    """The miniature with a scripted server: mechanism only."""
    return SearchConfig()


def quick() -> SearchConfig:
    """A minute of the same, that finds nothing: a look at the machinery."""
    return SearchConfig(num_dev=12, num_test=6, candidates=2, screen=0, num_steps=2)


def lens() -> SearchConfig:
    """A released model, GPT-OSS as rewriter, a large model as proposer and judge; set models, servers and prices."""
    return SearchConfig(
        out=Path("runs/search_prompt_lens"),
        world="pictures",
        num_test=150,
        candidates=12,
        num_seeds=3,
        screen=30,
        num_steps=20,
        guidance_scale=5.0,
        height=1024,
        width=1024,
        device="cuda",
        rewriter="openai/gpt-oss-20b",
        proposer="gpt-5.5",
        judge="gpt-4.1-mini",
    )


def search_suites(config: SearchConfig) -> tuple[list[ScenePrompt], list[ScenePrompt]]:
    """Development and test prompts of the scenes: short requests, no text in both, none of the reasoner's evaluation.

    Example:
        >>> dev, test = search_suites(quick())
        >>> len(dev), len(test), {p.text for p in dev} & {p.text for p in test}
        (12, 6, set())
    """
    dev: list[ScenePrompt] = []
    test: list[ScenePrompt] = []
    for part in range(1, 1000):
        for prompt in build_scene_prompts(1, 8_000_000 + 10_000 * config.seed + part, form="short"):
            if is_held_out(prompt):
                continue
            # Sides are chosen by text, so that a text that comes again stays on its side.
            wanted, num = (dev, config.num_dev) if sum(prompt.text.encode()) % 2 else (test, config.num_test)
            if len(wanted) < num and sum(p.kind == prompt.kind for p in wanted) < -(-num // len(KINDS)):
                wanted.append(prompt)
        if (len(dev), len(test)) == (config.num_dev, config.num_test):
            break
    return dev, test


def scene_evaluator(
    config: SearchConfig, model: Any, world: Any, endpoint: Endpoint
) -> Callable[[str, Sequence[ScenePrompt], Sequence[int]], Evaluation]:
    """Rewrite, paint and verify requests of the miniature: the share of right questions, and what is wrong in words."""

    def evaluate(text: str, items: Sequence[ScenePrompt], seeds: Sequence[int]) -> Evaluation:
        rewriter = Rewriter(endpoint, SystemPrompt("candidate", text, 1, 300), required=(), max_tokens=400)
        rewrites = rewriter.rewrite_all([item.text for item in items])
        prompts = [rewrite.prompt for rewrite in rewrites]
        texts = [prompt for prompt in prompts for _ in seeds]
        noise = [seed + 7919 * index for index in range(len(items)) for seed in seeds]
        pictures = paint_prompts(model, world, texts, [(config.height, config.width)], config, seeds=noise)
        reports = score_images(pictures, [item for item in items for _ in seeds]).reports
        scores, feedback = [], []
        for index, item in enumerate(items):
            mine = reports[index * len(seeds) : (index + 1) * len(seeds)]
            # Without an answer of the server there is nothing of the candidate to score.
            failed = rewrites[index].cause in FAILURE_CAUSES
            scores.append([None if failed else report.atom for report in mine])
            wrong = [str(q) for r in mine for q, right in zip(r.questions, r.answers, strict=True) if not right]
            told = "; ".join(dict.fromkeys(wrong))
            feedback.append(f"asked: {item.text}; painted from: {prompts[index]}; wrong: {told}" if wrong else "")
        return Evaluation(scores, feedback)

    return evaluate


def picture_evaluator(config: SearchConfig, rewriting: Endpoint, judging: Endpoint) -> Any:
    """Rewrite, paint and judge by rubrics: the mean of the answers of a picture, missing ones left out."""
    from lensmini.pipeline import LensPipeline
    from lensmini.rewards.judges import ChatJudge, JudgeRequest

    if config.checkpoint is None:
        raise ValueError("checkpoint: expected a pipeline folder or a Hub repository, got none")
    pipe = LensPipeline.from_pretrained(config.checkpoint, device=config.device)
    judge = ChatJudge(judging, calls="picture")

    def evaluate(text: str, items: Sequence[Any], seeds: Sequence[int]) -> Evaluation:
        before = rewriting.spent.cost + judging.spent.cost
        band = SystemPrompt("candidate", text, GENERAL.min_words, GENERAL.max_words)
        rewriter = Rewriter(rewriting, band, max_tokens=config.tokens_of_rewrite[1])
        rewrites = rewriter.rewrite_all([item["prompt"] for item in items])
        scores: list[list[float | None]] = []
        feedback = []
        for index, (item, rewrite) in enumerate(zip(items, rewrites, strict=True)):
            if rewrite.status == "refused" or rewrite.cause in FAILURE_CAUSES:
                # Refused is not painted: nothing of it is right. Without an answer nothing is known.
                scores.append([0.0 if rewrite.status == "refused" else None] * len(seeds))
                feedback.append(f"asked: {item['prompt']}; {rewrite.status}: {rewrite.detail or rewrite.cause}")
                continue
            painted: Any = pipe(
                rewrite.prompt,
                height=config.height,
                width=config.width,
                num_inference_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                num_images_per_prompt=len(seeds),
                seeds=[(seed + 7919 * index) % 2**31 for seed in seeds],
                output_type="pt",
            )
            asked = [
                JudgeRequest(
                    image=(image.cpu() * 255).round().to(torch.uint8), prompt=item["prompt"], criterion=criterion
                )
                for image in painted.images
                for criterion in item["criteria"]
            ]
            verdicts = judge.score(asked)
            size = len(item["criteria"])
            rows = [verdicts[first : first + size] for first in range(0, len(verdicts), size)]
            known = [[v.score for v in row if v.score is not None] for row in rows]
            scores.append([sum(row) / len(row) if 2 * len(row) > size else None for row in known])
            wrong = {v.criterion_id for row in rows for v in row if v.score is not None and v.score < 0.5}
            texts = "; ".join(c.text for c in item["criteria"] if c.id in wrong)
            feedback.append(f"asked: {item['prompt']}; painted from: {rewrite.prompt}; wrong: {texts}" if wrong else "")
        return Evaluation(scores, feedback, rewriting.spent.cost + judging.spent.cost - before)

    return evaluate


def describe(config: SearchConfig) -> str:
    """What a search takes at most, in words."""
    feedback = round(config.feedback_share * config.num_dev)
    pictures = 2 * config.candidates * (config.num_dev - feedback) * config.num_seeds
    pictures += (config.candidates + 1) * feedback * config.num_seeds + 2 * config.num_test * config.num_seeds
    pictures = pictures if config.max_scorings is None else min(pictures, config.max_scorings)
    judged = pictures * config.rubrics if config.world == "pictures" else 0
    cost = pictures * config.cost_of_scoring + 3 * config.candidates * config.cost_of_proposal
    bound = "" if config.max_cost is None else f", bounded by {config.max_cost:g}"
    return (
        f"{config.candidates} candidates, {config.num_dev} development and {config.num_test} test prompts, "
        f"{config.num_seeds} pictures each.\nAt most {pictures} pictures and rewrites, {judged} judgements, "
        f"{3 * config.candidates} proposals of 2 calls; at most {cost:.2f} at prices {config.prices} by million "
        f"tokens{bound}.\nEach comparison at level {config.alpha / config.candidates:.4f}, all together at {config.alpha}."
    )


def main(config: SearchConfig) -> SearchResult | None:
    """Search, and write report, prompt and summary."""
    if config.dry_run:
        print(describe(config))
        return None
    config.out.mkdir(parents=True, exist_ok=True)
    _check_record(config)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        rewriting, proposing, judging = _endpoints(config, stack)
        if config.world == "scenes":
            model, world = load_checkpoint(find_checkpoint(config.checkpoint), quiet=True)
            evaluate: Any = scene_evaluator(config, model, world, rewriting)
            dev: Sequence[Any]
            dev, test = search_suites(config)
            seed_prompt = SEED_PROMPT
        else:
            evaluate = picture_evaluator(config, rewriting, judging)
            items = _read_items(config)
            dev, test = items[: config.num_dev], items[config.num_dev :]
            seed_prompt = GENERAL.text
        search = search_system_prompt if config.method == "incumbent" else search_pareto_front
        options: dict[str, Any] = {"screen": config.screen} if config.method == "incumbent" else {}
        result = search(
            seed_prompt,
            evaluate,
            ChatProposer(proposing, max_tokens=config.tokens_of_proposal[1] // 2, seed=1000 * config.seed),
            dev=dev,
            test=test,
            budget=config.budget,
            seed=config.seed,
            alpha=config.alpha,
            num_seeds=config.num_seeds,
            feedback_share=config.feedback_share,
            log=config.out / "search.jsonl",
            **options,
        )
    (config.out / "report.md").write_text(result.report(), encoding="utf-8")
    (config.out / "best.txt").write_text(result.best.text, encoding="utf-8")
    write_json(
        config.out / "summary.json",
        {
            "mechanism_only": config.rewriter == "scripted",
            "config": config_dict(config),
            "config_hash": config_hash(config),
            **provenance(),
            "test": config_dict(result.test),
            "spending": config_dict(result.spending),
            "stopped": result.stopped,
            "lineage": [candidate.number for candidate in result.lineage],
            "candidates": [
                {
                    "number": c.number,
                    "parent": c.parent,
                    "accepted": c.accepted,
                    "added": c.text.splitlines()[-1],
                    "difference": None if c.comparison is None else c.comparison.difference,
                    "p_value": None if c.comparison is None else c.comparison.p_value,
                    "correlation": None if c.comparison is None else c.comparison.correlation,
                }
                for c in result.candidates
            ],
        },
    )
    print(result.report(), flush=True)
    return result


def _check_record(config: SearchConfig) -> None:
    """The scores on record are those of one image model, rewriter and judge: a record of another config is not gone on with."""
    checkpoint = find_checkpoint(config.checkpoint) if config.world == "scenes" else config.checkpoint
    # Where servers and devices are may change.
    moved = {"rewriter_url": None, "proposer_url": None, "judge_url": None, "key_env": "", "device": ""}
    same = replace(config, out=Path(), dry_run=False, checkpoint=checkpoint, **moved)
    own = config_hash(same)
    path = config.out / "search.key"
    if not path.exists():
        path.write_text(own, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != own:
        raise ValueError(
            f"out: expected a directory without a search of another config or checkpoint, got {config.out}"
        )


def _endpoints(config: SearchConfig, stack: ExitStack) -> tuple[Endpoint, Endpoint, Endpoint]:
    urls = [config.rewriter_url, config.proposer_url, config.judge_url]
    if "scripted" in (config.rewriter, config.proposer):
        from tests.chat_server import ChatServer

        server = stack.enter_context(ChatServer(scripted_answer))
        urls = [server.url, server.url, config.judge_url]
    found = []
    for name, url in zip((config.rewriter, config.proposer, config.judge or "none"), urls, strict=True):
        # Scripted answers cost nothing; others are kept, so that nothing is paid for twice.
        cache = None if name == "scripted" else config.out / "replies.sqlite"
        priced = {"prices": config.prices, "max_cost": config.max_cost} if config.max_cost is not None else {}
        endpoint = Endpoint(name, base_url=url, api_key_env=config.key_env, cache=cache, **priced)
        stack.callback(endpoint.close)
        found.append(endpoint)
    return found[0], found[1], found[2]


def _read_items(config: SearchConfig) -> list[dict[str, Any]]:
    """Prompts with their criteria, from the file's front, development first."""
    from lensmini.rewards import lens_rubric

    if config.prompts is None:
        raise ValueError("prompts: expected a file of experiments.build_prompts, got none")
    items = []
    for line in config.prompts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rubric = lens_rubric(row["prompt"], row["rubrics"])
        items.append({"prompt": row["prompt"], "criteria": [*rubric.criteria, *rubric.global_criteria]})
    items = list({item["prompt"]: item for item in items}.values())[: config.num_dev + config.num_test]
    if len(items) < config.num_dev + config.num_test:
        raise ValueError(f"prompts: expected {config.num_dev + config.num_test} different ones, got {len(items)}")
    return items


def _price(tokens: Sequence[int], prices: tuple[float, float]) -> float:
    return (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6


if __name__ == "__main__":
    try:
        main(read_config((mini, quick, lens), "python -m experiments.search_prompt"))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"search_prompt: {error}") from None
