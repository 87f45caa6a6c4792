"""Samples laid end to end as a model takes them, and what each sample's loss weighs in the global batch.

Axes: b samples, n image tokens of one sample, l text tokens of one sample, c channels, k text layers, e text width,
N and M image and text tokens of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lensmini.data.assign import StepTotals
from lensmini.packed import Layout, pack
from lensmini.shapes import check_shape

__all__ = ["PackedBatch", "Sample", "Weighting", "collate_samples", "loss_weights"]

Weighting = Literal["per_image", "per_token"]


class Sample(NamedTuple):
    """What a data set gives for one sample number.

    Example:
        >>> Sample(7, torch.zeros(4, 2, 3), torch.zeros(5, 2, 8)).number
        7
    """

    number: int
    """The sample number that was asked for; it decides the sample's noise and time, whatever its batch mates."""
    latents: Tensor
    """``[c, h, w]``."""
    text_tokens: Tensor
    """``[l, k, e]`` features of the valid text tokens; none if the text was dropped."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedBatch:
    """One micro-batch. Build it with :func:`collate_samples`.

    Example:
        >>> batch = collate_samples([Sample(7, torch.zeros(4, 2, 3), torch.zeros(5, 2, 8))])
        >>> batch.to("cpu").samples.tolist(), batch.layout.text_lengths
        ([7], (5,))
    """

    samples: Tensor
    """``[b]`` int64 sample numbers."""
    image_tokens: Tensor
    """``[N, c]``."""
    text_tokens: Tensor
    """``[M, k, e]``."""
    layout: Layout
    """Where each sample's tokens stand."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on ``device``; sample numbers go too."""
        return replace(
            self,
            samples=self.samples.to(device, non_blocking=non_blocking),
            image_tokens=self.image_tokens.to(device, non_blocking=non_blocking),
            text_tokens=self.text_tokens.to(device, non_blocking=non_blocking),
            layout=self.layout.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "PackedBatch":
        """The same batch in pinned memory; ``torch.utils.data.DataLoader`` calls this."""
        return replace(
            self,
            samples=self.samples.pin_memory(),
            image_tokens=self.image_tokens.pin_memory(),
            text_tokens=self.text_tokens.pin_memory(),
            layout=self.layout.pin_memory(),
        )


def collate_samples(samples: Sequence[Sample]) -> PackedBatch:
    """Pack samples of any sizes in the order given: the ``collate_fn`` of a ``DataLoader``.

    Args:
        samples: at least one :class:`Sample`, or a tuple of the same three; c, k, e and the dtypes agree.

    Returns:
        The batch.

    Raises:
        ValueError: if there is no sample, or shapes or dtypes differ.

    Example:
        >>> pairs = [(3, torch.zeros(4, 2, 3), torch.zeros(5, 2, 8)), (9, torch.zeros(4, 1, 1), torch.zeros(0, 2, 8))]
        >>> batch = collate_samples([Sample(*pair) for pair in pairs])
        >>> batch.image_tokens.shape, batch.text_tokens.shape, batch.layout.joint_lengths
        (torch.Size([7, 4]), torch.Size([5, 2, 8]), (11, 1))
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    rows = [Sample(*row) for row in samples]
    sizes: dict[str, int] = {}
    for index, row in enumerate(rows):
        shape = check_shape(f"samples[{index}].latents", row.latents, "c h w", **sizes)
        sizes["c"] = shape["c"]
        shape = check_shape(f"samples[{index}].text_tokens", row.text_tokens, "l k e", **sizes)
        sizes |= {"k": shape["k"], "e": shape["e"]}
        if isinstance(row.number, float):
            raise ValueError(f"samples[{index}].number: expected an integer, got {row.number!r}")
        for name in ("latents", "text_tokens"):
            found, first = getattr(row, name).dtype, getattr(rows[0], name).dtype
            if found != first:
                raise ValueError(f"samples[{index}].{name}: expected {first} as in samples[0], got {found}")
    layout = Layout.build(
        [(row.latents.shape[1], row.latents.shape[2]) for row in rows],
        text_lengths=[row.text_tokens.shape[0] for row in rows],
    )
    return PackedBatch(
        samples=torch.tensor([int(row.number) for row in rows], dtype=torch.int64),
        image_tokens=pack([row.latents for row in rows]),
        text_tokens=torch.cat([row.text_tokens for row in rows]),
        layout=layout,
    )


def loss_weights(layout: Layout, totals: StepTotals, weighting: Weighting = "per_image") -> Tensor:
    """Weight of each sample's loss in a step: over all micro-batches of all ranks the weights sum to one.

    ``"per_image"``: ``1 / images``, every image counts the same. ``"per_token"``: ``n / image_tokens``, every image
    token does, so a larger image counts for more. Both divide by what the whole step holds, never by what this
    micro-batch or rank does: ``(loss_weights(...) * losses).sum()``, with gradients summed (not averaged) over
    micro-batches and ranks, is the same gradient however the step was split. arXiv 2605.21573 does not state its rule.

    Args:
        layout: of this micro-batch.
        totals: of the step (``BatchPlan.totals``).
        weighting: which.

    Returns:
        ``[b]`` float32 on the layout's device.

    Raises:
        ValueError: if the weighting is unknown, or the step holds less than this micro-batch.

    Example:
        >>> layout = Layout.build([(1, 1), (1, 3)])
        >>> totals = StepTotals(images=4, image_tokens=8, text_tokens=0)
        >>> loss_weights(layout, totals).tolist(), loss_weights(layout, totals, "per_token").tolist()
        ([0.25, 0.25], [0.125, 0.375])
    """
    if weighting not in ("per_image", "per_token"):
        raise ValueError(f'weighting: expected "per_image" or "per_token", got {weighting!r}')
    if totals.images < layout.batch_size or totals.image_tokens < layout.num_image_tokens:
        raise ValueError(
            f"totals: expected at least this micro-batch's {layout.batch_size} images and "
            f"{layout.num_image_tokens} image tokens, got {totals.images} and {totals.image_tokens}"
        )
    lengths = layout.image_offsets.diff().to(torch.float32)
    if weighting == "per_token":
        return lengths / totals.image_tokens
    return torch.full_like(lengths, 1 / totals.images)
