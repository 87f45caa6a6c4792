"""From pictures to rewards: prompts with their rubrics, judges that work beside the sampler, and verdicts that survive.

Axes: n pictures, c criteria.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from experiments.miniature.rubrics import held_out_judge, naive_rubric, request_rubric, scene_judge, scene_rubric
from experiments.miniature.world import Miniature
from experiments.reinforce_config import PromptsConfig, ReinforceConfig
from lensmini.data import KINDS, ScenePrompt, build_scene_prompts
from lensmini.data.prompts import load_prompts
from lensmini.endpoint import Endpoint
from lensmini.rewards import Aggregate, Rubric, ScoreTable, Verdict, aggregate, criterion_advantages, lens_rubric
from lensmini.rewards import load_rubrics as load_rubric_file
from lensmini.rewards.judges import (
    ChatJudge,
    Judge,
    JudgeRequest,
    JudgeUnavailableError,
    VerdictCache,
    judge_pictures,
)

__all__ = ["CachedJudge", "Judging", "Task", "load_tasks", "make_judges", "rewards_of"]


class Task(NamedTuple):
    """A prompt and what its pictures are judged by."""

    text: str
    category: str
    rubric: Rubric
    scene: ScenePrompt | None = None


def load_tasks(config: PromptsConfig, kind: str = "rubric") -> list[Task]:
    """The prompts of a run, each once, with their rubrics.

    Args:
        config: where they come from and which part is used.
        kind: of the reward; "naive" gives scenes the careless rubric.

    Returns:
        The tasks; a share takes the front part of every category.

    Raises:
        ValueError: if nothing is left.
    """
    if config.source == "scenes":
        each = -(-config.num_prompts // len(KINDS))
        dense = config.form == "dense"
        precise = scene_rubric if dense else request_rubric
        rubric = partial(naive_rubric, placed=dense) if kind == "naive" else precise
        scenes = build_scene_prompts(each, config.seed, form=config.form, wording=config.wording)
        tasks = [Task(prompt.text, prompt.kind, rubric(prompt), prompt) for prompt in scenes]
    else:
        tasks = _file_tasks(config.path)
    tasks = list({task.text: task for task in tasks if task.category not in config.without}.values())
    used: dict[str, list[Task]] = {}
    for task in tasks:
        used.setdefault(task.category, []).append(task)
    kept = {id(task) for members in used.values() for task in members[: max(1, round(config.share * len(members)))]}
    tasks = [task for task in tasks if id(task) in kept]
    if not tasks:
        raise ValueError(f"prompts: expected at least one, {config.path} without {list(config.without)} has none")
    return tasks


def _file_tasks(path: Path) -> list[Task]:
    with path.open(encoding="utf-8") as stream:
        first = stream.readline()
    if '"rubrics"' in first:  # of experiments.build_prompts
        records = load_prompts(path)
        return [Task(r.prompt, r.category, lens_rubric(r.prompt, r.rubrics, prompt_id=r.id)) for r in records]
    return [Task(rubric.prompt, "all", rubric) for rubric in load_rubric_file(path)]


class CachedJudge:
    """A judge whose verdicts are kept: what was asked once is never asked again, after any kill.

    Args:
        judge: who answers what is not known.
        cache: of verdicts; a call's are written together.

    Example:
        >>> from lensmini.rewards.judges import ScriptedJudge
        >>> CachedJudge(ScriptedJudge({}), VerdictCache(":memory:")).judge_id
        'scripted'
    """

    def __init__(self, judge: Judge, cache: VerdictCache) -> None:
        self.judge, self.cache = judge, cache

    @property
    def judge_id(self) -> str:
        """The judge's own."""
        return self.judge.judge_id

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Known verdicts, and the judge's for the rest."""
        verdicts = {i: self.cache.get(self.judge_id, request) for i, request in enumerate(requests)}
        unknown = [index for index, verdict in verdicts.items() if verdict is None]
        found = self.judge.score([requests[index] for index in unknown]) if unknown else []
        self.cache.put_all(self.judge_id, [(requests[i], verdict) for i, verdict in zip(unknown, found, strict=True)])
        verdicts |= dict(zip(unknown, found, strict=True))
        return [verdict for verdict in verdicts.values() if verdict is not None]


def make_judges(
    config: ReinforceConfig, world: Miniature | None = None, judge: Judge | None = None
) -> tuple[Judge, Judge | None]:
    """The judge that is trained on, and one that is not, if there is one.

    Args:
        config: of the run.
        world: the miniature's parts, which the learned reward model is trained with.
        judge: stands in for the configured one.

    Returns:
        Both; the held-out one is for scenes alone.
    """
    reward, cache = config.reward, None
    if reward.cache:
        config.run.out.mkdir(parents=True, exist_ok=True)
        cache = VerdictCache(config.run.out / "verdicts.sqlite")
    scenes = config.prompts.source == "scenes"
    if judge is None and not scenes:
        endpoint = Endpoint(
            reward.model,
            base_url=reward.url,
            api_key_env=reward.key_env,
            concurrency=reward.concurrency,
            deadline_s=reward.deadline_s,
            max_cost=reward.max_cost,
            prices=reward.prices,
        )
        return ChatJudge(endpoint, calls=reward.calls, cache=cache), None
    if judge is None and reward.kind == "model":
        from experiments.reward_model import mini, prepare_reward_model
        from lensmini.rewards.model import RewardModelJudge

        assert world is not None
        judge = RewardModelJudge(prepare_reward_model(mini(), world, Path("runs")))
    found = scene_judge() if judge is None else judge
    return (found if cache is None else CachedJudge(found, cache)), (held_out_judge() if scenes else None)


class Judging:
    """Judges chunks of pictures, in a thread of its own while the next chunk is sampled, or at once.

    Args:
        judge: whom to ask.
        overlap: whether a thread works beside the caller. Verdicts depend on what is judged alone, so that the results are
            the same.

    Example:
        >>> from lensmini.rewards.judges import ScriptedJudge
        >>> with Judging(ScriptedJudge({}), overlap=True) as judging:
        ...     judging.results()
        []
    """

    def __init__(self, judge: Judge, *, overlap: bool) -> None:
        self.judge = judge
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="judge") if overlap else None
        self._waiting: list[Future[list[list[Verdict]]]] = []

    def __enter__(self) -> "Judging":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, pictures: Sequence[Tensor], rubrics: Sequence[Rubric]) -> None:
        """Have a chunk judged."""
        if self._pool is not None:
            self._waiting.append(self._pool.submit(judge_pictures, self.judge, pictures, rubrics))
            return
        done: Future[list[list[Verdict]]] = Future()
        try:
            done.set_result(judge_pictures(self.judge, pictures, rubrics))
        except JudgeUnavailableError as error:
            done.set_exception(error)
        self._waiting.append(done)

    def results(self) -> list[list[Verdict]]:
        """The verdicts of all pictures since the last call, in the order in which they were handed in.

        Raises:
            JudgeUnavailableError: if the judge says so; what was still to be judged is dropped.
        """
        waiting, self._waiting = self._waiting, []
        try:
            return [row for future in waiting for row in future.result()]
        finally:
            for future in waiting:
                future.cancel()


def rewards_of(table: ScoreTable, group: Tensor, config: ReinforceConfig) -> Aggregate:
    """Rewards ``[n]`` of all pictures of a step, by the rule that the settings name.

    Args:
        table: scores of all pictures.
        group: ``[n]`` integers.
        config: of the run.

    Returns:
        Rewards, or sums of centred criteria, and which are known.
    """
    reward = config.reward
    if reward.centred:
        return criterion_advantages(
            table.scores,
            table.valid,
            group,
            table.weights,
            min_coverage=reward.min_coverage,
            pitfalls=table.pitfalls,
        )
    return aggregate(
        table.scores,
        table.valid,
        table.weights,
        missing=reward.missing,
        group=group,
        min_coverage=reward.min_coverage,
        pitfalls=table.pitfalls,
        required=table.required,
    )
