"""The learned reward: any picture and rubric to a distribution over each criterion's score, differentiable in the pixels.

Axes: n pictures, h and w pixels, c criteria of the longest rubric, k levels from 0 to 1, l tokens, e text width.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lensmini.reduction import holds
from lensmini.rewards.aggregate import aggregate
from lensmini.rewards.model.features import FrozenFeatures, weights_digest
from lensmini.rewards.model.head import RewardHead, RewardModelConfig
from lensmini.rewards.model.metrics import Platt
from lensmini.rewards.rubric import Criterion, Rubric
from lensmini.shapes import check_shape

__all__ = ["Prediction", "RubricRewardModel"]

_CACHED_TEXTS = 8192


class Prediction(NamedTuple):
    """What is thought of n pictures under their criteria.

    Example:
        >>> Prediction(*[torch.zeros(1, 2)] * 4).scores.shape
        torch.Size([1, 2])
    """

    scores: Tensor
    """``[n, c]`` expected scores in [0, 1], high for a high answer (a pitfall that is there has 1)."""
    variance: Tensor
    """``[n, c]`` of the score: ``p (1 - p)`` of a yes-or-no criterion, the spread over levels of a graded one."""
    logits: Tensor
    """``[n, c]`` log-odds of the expected score: what to climb, for it does not flatten at 0 and 1."""
    valid: Tensor
    """``[n, c]`` bool: false where a rubric has fewer criteria than the longest."""


class RubricRewardModel(nn.Module):
    """A head on frozen vision-language features that answers rubrics with calibrated probabilities.

    A binary criterion has the probability of "yes", ``sigmoid(a z + b)``; any other a distribution over ``num_levels`` equal
    steps from 0 to 1, as Z-Reward has over its nine half points (arXiv 2606.09076), with mean and variance. Criteria are
    answered apart: neither their order nor their number changes an answer. What needs the picture alone does not see the
    prompt. Pictures may have any sizes. The features are not part of the module: they are not saved, moved or trained, and
    text features are kept for texts that come again.

    Args:
        features: frozen; on the device of the pictures.
        config: sizes of the head.

    Attributes:
        head: the trained part.
        calibration: buffer ``[3]``: scale a and bias b of log-odds, and the scale of level logits; 1, 0, 1 at first.

    Example:
        >>> image = lambda images: images[..., ::8, ::8]
        >>> text = lambda texts: (torch.ones(len(texts), 2, 4), torch.ones(len(texts), 2, dtype=torch.bool))
        >>> features = FrozenFeatures(image=image, text=text, identity="every eighth pixel")
        >>> model = RubricRewardModel(features, RewardModelConfig(image_dim=3, text_dim=4, width=8, num_heads=2))
        >>> rubric = Rubric(prompt_id="a", prompt="A wall.", criteria=(Criterion(id="red", text="It is red."),))
        >>> model.reward(torch.zeros(2, 3, 16, 16), [rubric, rubric]).detach()
        tensor([0.5000, 0.5000])
    """

    calibration: Tensor

    def __init__(self, features: FrozenFeatures, config: RewardModelConfig) -> None:
        super().__init__()
        self.features, self.config = features, config
        self.head = RewardHead(config)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0, 1.0]))
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def revision(self) -> str:
        """Sixteen digits of weights, calibration, sizes and features: what decides the answers."""
        described = json.dumps([asdict(self.config), self.features.identity, weights_digest(self)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def forward(self, images: Sequence[Tensor] | Tensor, rubrics: Sequence[Rubric]) -> Prediction:
        """Answer every criterion of every rubric.

        Args:
            images: n pictures ``[3, h_i, w_i]`` of any sizes, or ``[n, 3, h, w]``; floating in 0..1, or uint8.
            rubrics: n, one for each picture.

        Returns:
            Columns in the order of each rubric's ``all_criteria``.

        Raises:
            ValueError: if the numbers differ, a picture is none, or pixels or features are not finite.
        """
        if len(images) != len(rubrics):
            raise ValueError(f"rubrics: expected one for each of {len(images)} images, got {len(rubrics)}")
        criteria = [rubric.all_criteria for rubric in rubrics]
        return self.predict(self.read_images(images), criteria, [rubric.prompt for rubric in rubrics])

    def reward(self, images: Sequence[Tensor] | Tensor, rubrics: Sequence[Rubric], *, use_gates: bool = True) -> Tensor:
        """One number by picture: the weighted mean of expected scores, pitfalls turned round.

        Args:
            images: as :meth:`forward` takes them.
            rubrics: n, one for each picture.
            use_gates: multiply by the expected scores of required criteria.

        Returns:
            ``[n]`` in [0, 1], differentiable in the pixels.

        Raises:
            ValueError: as :meth:`forward`.
        """
        said = self(images, rubrics)
        width = said.scores.shape[1]
        pad = [criteria + (None,) * (width - len(criteria)) for criteria in (rubric.all_criteria for rubric in rubrics)]
        make = said.scores.new_tensor
        return aggregate(
            said.scores,
            said.valid,
            make([[0.0 if one is None else one.weight for one in row] for row in pad]),
            missing="raise",
            pitfalls=make([[one is not None and one.polarity == "pitfall" for one in row] for row in pad]).bool(),
            required=make([[one is not None and one.required and use_gates for one in row] for row in pad]).bool(),
        ).values

    def read_images(self, images: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Feature maps ``[d, y_i, x_i]`` of pictures as :meth:`forward` takes them; equal sizes run together."""
        groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for index, image in enumerate(images):
            check_shape(f"images[{index}]", image, "3 h w")
            groups.setdefault((image.shape, image.dtype), []).append(index)
        maps: dict[int, Tensor] = {}
        for members in groups.values():
            pixels = torch.stack([images[index] for index in members])
            if pixels.dtype == torch.uint8:
                pixels = pixels.to(self.calibration.dtype) / 255
            if not pixels.is_floating_point() or not holds(pixels.isfinite()):
                raise ValueError(f"images: expected uint8, or finite floating values in 0..1, got {pixels.dtype}")
            found = self.features.image(pixels)
            check_shape("image features", found, "n d y x", n=len(members), d=self.config.image_dim)
            if not holds(found.isfinite()):
                raise ValueError("image features: expected finite numbers")
            maps |= dict(zip(members, found.to(self.calibration), strict=True))
        return [maps[index] for index in range(len(images))]

    def read_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features ``[c, l, e]`` of texts and their mask ``[c, l]``; a text that was seen before is not read again."""
        wanted = list(dict.fromkeys(texts))
        missing = [text for text in wanted if text not in self._texts]
        if missing:
            features, mask = self.features.text(missing)
            sizes = check_shape("text features", features, "c l e", c=len(missing), e=self.config.text_dim)
            check_shape("text mask", mask, "c l", c=sizes["c"], l=sizes["l"])
            for text, row, real in zip(missing, features.detach(), mask.bool(), strict=True):
                kept = row[real]
                if not len(kept) or not holds(kept.isfinite()):
                    raise ValueError(f"text features: expected at least one token and finite numbers for {text[:80]!r}")
                self._texts[text] = kept
        rows = [self._texts[text].to(self.calibration) for text in texts]
        for text in wanted:
            self._texts.move_to_end(text)
        while len(self._texts) > _CACHED_TEXTS:
            self._texts.popitem(last=False)
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]

    def raw(
        self, maps: Sequence[Tensor], criteria: Sequence[Sequence[Criterion]], prompts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """The head's answers before calibration, from feature maps that :meth:`read_images` made.

        Args:
            maps: n feature maps ``[d, y_i, x_i]``.
            criteria: for each picture its questions, at least one.
            prompts: n texts.

        Returns:
            ``[n, c, 1 + k]``, a logit of "yes" and logits over levels, and which are questions ``[n, c]``.
        """
        if not (len(maps) == len(criteria) == len(prompts)) or not all(criteria):
            raise ValueError(
                f"maps, criteria, prompts: expected equally many and at least one criterion each, got {len(maps)}, "
                f"{[len(row) for row in criteria]}, {len(prompts)}"
            )
        width = max(len(row) for row in criteria)
        memory, seen = self.head.read_images(maps)
        unique = {text: index for index, text in enumerate(dict.fromkeys(one.text for row in criteria for one in row))}
        queries = self.head.read_criteria(*self.read_texts(list(unique)))
        index = [[unique[one.text] for one in row] + [0] * (width - len(row)) for row in criteria]
        asked = [[True] * len(row) + [False] * (width - len(row)) for row in criteria]
        mask = seen[:, None].expand(-1, width, -1)
        told = self.config.use_prompt
        reads = [[told and one.needs != "image" for one in row] + [False] * (width - len(row)) for row in criteria]
        if any(map(any, reads)):
            words, real = self.read_texts(prompts)
            memory = torch.cat([memory, self.head.read_prompts(words, real)], 1)
            open_ = torch.tensor(reads, device=memory.device)[..., None] & real[:, None]
            mask = torch.cat([mask, open_], 2)
        answers = self.head(queries[torch.tensor(index, device=memory.device)], memory, mask)
        return answers, torch.tensor(asked, device=memory.device)

    def predict(
        self, maps: Sequence[Tensor], criteria: Sequence[Sequence[Criterion]], prompts: Sequence[str]
    ) -> Prediction:
        """Calibrated answers; arguments as of :meth:`raw`."""
        answers, asked = self.raw(maps, criteria, prompts)
        scale, bias, level_scale = self.calibration
        logit = scale * answers[..., 0] + bias
        levels = F.log_softmax(level_scale * answers[..., 1:], dim=-1)
        marks = torch.linspace(0, 1, self.config.num_levels, dtype=levels.dtype, device=levels.device)
        mean = levels.exp() @ marks
        variance = (levels.exp() * (marks - mean[..., None]).square()).sum(-1)
        odds = torch.logsumexp(levels[..., 1:] + marks[1:].log(), -1) - torch.logsumexp(
            levels[..., :-1] + (1 - marks[:-1]).log(), -1
        )
        graded = [[one.scale != "binary" for one in row] for row in criteria]
        width = asked.shape[1]
        pick = torch.tensor([row + [False] * (width - len(row)) for row in graded], device=asked.device)
        yes = torch.sigmoid(logit)
        return Prediction(
            torch.where(pick, mean, yes),
            torch.where(pick, variance, yes * torch.sigmoid(-logit)),
            torch.where(pick, odds, logit),
            asked,
        )

    @torch.no_grad()
    def calibrate(self, platt: Platt, level_scale: Tensor | float = 1.0) -> None:
        """Set the calibration (:func:`~lensmini.rewards.model.metrics.fit_platt`).

        Raises:
            ValueError: if a number is not finite or a scale not positive.
        """
        new = torch.stack([torch.as_tensor(value).double().cpu() for value in (platt.scale, platt.bias, level_scale)])
        if not bool(new.isfinite().all()) or not (new[0] > 0 and new[2] > 0):
            raise ValueError(f"calibration: expected finite numbers and positive scales, got {new.tolist()}")
        self.calibration.copy_(new)
