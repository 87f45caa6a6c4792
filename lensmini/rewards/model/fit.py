"""Training a learned reward on verdicts, calibrating it on others, and measuring it on yet others.

Axes: n pictures, c criteria of the longest rubric, k levels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lensmini.rewards.model.comparison import Answers, compare
from lensmini.rewards.model.head import mean_words
from lensmini.rewards.model.judged import Judged, KnownVerdicts
from lensmini.rewards.model.metrics import Platt, fit_platt, fit_temperature
from lensmini.rewards.model.predictor import RubricRewardModel
from lensmini.shapes import check_shape

__all__ = ["RewardFit", "answer_loss", "compare_reward_model", "fit_reward_model", "spread_levels"]


class RewardFit(NamedTuple):
    """What came of training.

    Example:
        >>> RewardFit([0.7], []).losses
        [0.7]
    """

    losses: list[float]
    """One by step: weighted mean cross-entropy."""
    held_out: list[dict[str, Answers]]
    """For each held-out set the answers of the model and of what it has to beat
    (:func:`~lensmini.rewards.model.comparison.compare`)."""


def spread_levels(scores: Tensor, num_levels: int) -> Tensor:
    """A score as a distribution over equal steps from 0 to 1: all on its level, or shared by the two beside it.

    Its mean is the score. The levels of a scale of three, or of five, are among nine, so that none of them is shared.

    Args:
        scores: ``[...]`` in [0, 1].
        num_levels: k, at least 2.

    Returns:
        ``[..., k]``, sums of 1.

    Example:
        >>> spread_levels(torch.tensor([0.5, 0.25]), 3)
        tensor([[0.0000, 1.0000, 0.0000],
                [0.5000, 0.5000, 0.0000]])
    """
    place = scores[..., None] * (num_levels - 1)
    levels = torch.arange(num_levels, dtype=scores.dtype, device=scores.device)
    return (1 - (place - levels).abs()).clamp_min(0)


def answer_loss(raw: Tensor, scores: Tensor, valid: Tensor, weights: Tensor, graded: Tensor) -> Tensor:
    """Weighted mean cross-entropy of known verdicts; what is not valid reaches neither value nor gradient.

    A yes-or-no criterion has the binary cross-entropy of the first number (a soft score is a probability), a graded one
    that of the distribution over levels.

    Args:
        raw: ``[n, c, 1 + k]`` of :meth:`RubricRewardModel.raw`.
        scores: ``[n, c]`` in [0, 1], anything where not valid.
        valid: ``[n, c]`` bool.
        weights: ``[n, c]``, at least 0.
        graded: ``[n, c]`` bool.

    Returns:
        Scalar; 0 if nothing counts.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> one = torch.ones(1, 1)
        >>> answer_loss(torch.zeros(1, 1, 10), one, one.bool(), one, one.bool())  # log 9
        tensor(2.1972)
    """
    sizes = check_shape("raw", raw, "n c k")
    for name, value in (("scores", scores), ("valid", valid), ("weights", weights), ("graded", graded)):
        check_shape(name, value, "n c", n=sizes["n"], c=sizes["c"])
    counted = valid & (weights > 0)
    known = torch.where(counted, scores, 0.5)
    answers = torch.where(counted[..., None], raw, 0.0)
    yes = F.binary_cross_entropy_with_logits(answers[..., 0], known, reduction="none")
    level = -(spread_levels(known, sizes["k"] - 1) * F.log_softmax(answers[..., 1:], -1)).sum(-1)
    used = torch.where(counted, weights, 0.0)
    return (used * torch.where(graded, level, yes)).sum() / used.sum().clamp_min(torch.finfo(used.dtype).tiny)


def fit_reward_model(
    model: RubricRewardModel,
    train: Judged,
    calibration: Judged,
    *held_out: Judged,
    steps: int = 600,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    warmup: int = 20,
    noise: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> RewardFit:
    """Train the head by AdamW, calibrate it, and measure it beside simpler predictors.

    The features of all pictures are computed once. A batch is drawn from pictures of one size. The rate rises for
    ``warmup`` steps and then falls linearly to 0; the gradient's norm is cut at 1. The same seed gives the same weights.

    Args:
        model: whose head is trained, in place.
        train: what is learnt.
        calibration: what the calibration is fitted on; nothing of ``train``, and asked as the reward will be.
        held_out: what is measured, set by set; nothing of the others. None trains only.
        steps: of the optimiser.
        batch_size: pictures of a step.
        learning_rate: peak.
        weight_decay: of AdamW.
        warmup: steps.
        noise: standard deviation of noise on the standardised image features, against answers that hang on details which
            no eye sees.
        seed: of batches and noise.
        on_step: called with the number of the step and its loss.

    Returns:
        Losses, and the answers about each held-out set.

    Raises:
        ValueError: if there is no known verdict in a set, or a number is out of range or not finite.

    Example:
        >>> from lensmini.rewards import Criterion, Rubric, Verdict
        >>> from lensmini.rewards.model import FrozenFeatures, RewardModelConfig
        >>> image = lambda images: images[..., ::4, ::4]
        >>> text = lambda texts: (torch.ones(len(texts), 2, 4), torch.ones(len(texts), 2, dtype=torch.bool))
        >>> features = FrozenFeatures(image=image, text=text, identity="every fourth pixel")
        >>> model = RubricRewardModel(features, RewardModelConfig(image_dim=3, text_dim=4, width=8, num_heads=2))
        >>> rubric = Rubric(prompt_id="a", prompt="A wall.", criteria=(Criterion(id="lit", text="It is bright."),))
        >>> said = [[Verdict(criterion_id="lit", state="scored", score=score)] for score in (0.0, 1.0)]
        >>> judged = Judged([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)], [rubric, rubric], said)
        >>> fit = fit_reward_model(model, judged, judged, judged, steps=30)
        >>> fit.held_out[0]["model"].scorecard().accuracy
        1.0
    """
    if steps < 1 or batch_size < 1 or not learning_rate > 0 or min(weight_decay, warmup, noise) < 0:
        raise ValueError(
            "steps, batch_size, learning_rate, weight_decay, warmup, noise: expected positive numbers, the last three at "
            f"least 0, got {steps}, {batch_size}, {learning_rate}, {weight_decay}, {warmup}, {noise}"
        )
    data, fresh = KnownVerdicts(model, train, "train"), KnownVerdicts(model, calibration, "calibration")
    others = [KnownVerdicts(model, one, f"held_out[{index}]") for index, one in enumerate(held_out)]
    head = model.head
    _standardise(model, data)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    losses = []
    for step, members in enumerate(_batches(data, steps, batch_size, generator), 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, step / max(1, warmup), (steps - step + 1) / max(1, steps - warmup))
        maps = [data.maps[index] for index in members]
        if noise:
            drawn = [torch.randn(one.shape, generator=generator, dtype=one.dtype).to(one.device) for one in maps]
            spread = noise * head.image_std[:, None, None]
            maps = [one + spread * extra for one, extra in zip(maps, drawn, strict=True)]
        loss = answer_loss(*data.ask(model, members, maps))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    optimiser.zero_grad()
    _calibrate(model, fresh)
    return RewardFit(losses, compare(model, data, fresh, *others))


def compare_reward_model(
    model: RubricRewardModel, train: Judged, calibration: Judged, *held_out: Judged
) -> list[dict[str, Answers]]:
    """Measure a trained model beside simpler predictors, as :func:`fit_reward_model` does at its end.

    Args:
        model: trained and calibrated.
        train: what it was trained on, which the others learn from.
        calibration: what it was calibrated on, likewise.
        held_out: what is measured.

    Returns:
        For each set answers by name, see :func:`~lensmini.rewards.model.comparison.compare`.

    Raises:
        ValueError: if there is no known verdict in a set.

    Example:
        >>> compare_reward_model(None, Judged([], [], []), Judged([], [], []))
        Traceback (most recent call last):
        ...
        ValueError: train: expected at least one known verdict of positive weight, got none
    """
    data, fresh = KnownVerdicts(model, train, "train"), KnownVerdicts(model, calibration, "calibration")
    others = [KnownVerdicts(model, one, f"held_out[{index}]") for index, one in enumerate(held_out)]
    return compare(model, data, fresh, *others)


@torch.no_grad()
def _standardise(model: RubricRewardModel, data: KnownVerdicts) -> None:
    """Measure mean and std of every channel of pictures and of criteria."""
    head, pixels = model.head, torch.cat([one.flatten(1) for one in data.maps], 1)
    words, mask = model.read_texts(list(dict.fromkeys(one.text for row in data.criteria for one in row)))
    for name, values in (("image", pixels.T), ("text", words[mask]), ("topic", mean_words(words, mask))):
        getattr(head, f"{name}_mean").copy_(values.mean(0))
        getattr(head, f"{name}_std").copy_(values.std(0, correction=0).clamp_min(1e-4))


def _batches(data: KnownVerdicts, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Members of each step: pictures of one size, sizes by their share, each picture once before one comes again."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(data.maps):
        sizes.setdefault(tuple(one.shape), []).append(index)
    groups = list(sizes.values())
    shares = torch.tensor([float(len(group)) for group in groups])
    queues: list[list[int]] = [[] for _ in groups]
    for _ in range(steps):
        which = int(torch.multinomial(shares, 1, generator=generator))
        group, queue = groups[which], queues[which]
        while len(queue) < min(batch_size, len(group)):
            queue += [group[index] for index in torch.randperm(len(group), generator=generator).tolist()]
        yield queue[:batch_size]
        del queue[:batch_size]


@torch.no_grad()
def _calibrate(model: RubricRewardModel, data: KnownVerdicts) -> None:
    """Fit the calibration of yes-or-no answers and of levels, each where there are some."""
    raw, scores, _, weights, graded = data.ask_all(model)
    platt, level_scale = Platt(torch.tensor(1.0), torch.tensor(0.0)), torch.tensor(1.0)
    if not bool(graded.all()):
        platt = fit_platt(raw[~graded, 0], scores[~graded], weights[~graded])
    if bool(graded.any()):
        true = spread_levels(scores[graded], model.config.num_levels)
        level_scale = fit_temperature(raw[graded, 1:], true, weights[graded])
    model.calibrate(platt, level_scale)
