"""What time contributes to every forward pass of a run, computed once, before the first.

Axes: k steps, b samples, u distinct times, d width.

Shift, scale and gate depend on time alone (no text enters them), and a third of the parameters do nothing but make them.
For a fixed schedule they are a table, so those parameters are read once per run and not once per pass, and need not be
where the rest of the model is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lensmini.nn import LensTransformer, Modulation
from lensmini.shapes import check_shape

__all__ = ["ScheduleModulation", "modulation_layers", "schedule_modulation"]


class ScheduleModulation(NamedTuple):
    """The modulation of all steps of a run."""

    table: Modulation
    """Of the u distinct times: ``[num_layers, u, 6, d]`` twice and ``[u, 2, d]``."""
    rows: Tensor
    """``[k, b]`` int64: the row of each step and sample."""

    def step(self, index: int) -> Modulation:
        """The modulation of one step's b samples."""
        rows = self.rows[index]
        image, text, output = self.table
        return Modulation(image.index_select(1, rows), text.index_select(1, rows), output.index_select(0, rows))


def modulation_layers(model: LensTransformer) -> list[nn.Module]:
    """The modules that only modulate: two for each block, 1.36 of the released model's 4.1 billion parameters.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> with torch.device("meta"):
        ...     model = LensTransformer(LensConfig())
        >>> sum(p.numel() for layer in modulation_layers(model) for p in layer.parameters())
        1359839232
    """
    return [layer for block in model.transformer_blocks for layer in (block.img_mod, block.txt_mod)]  # pyright: ignore


@torch.no_grad()
def schedule_modulation(model: LensTransformer, times: Tensor) -> ScheduleModulation:
    """Modulate all steps of a run in one call; equal times are computed once.

    Args:
        model: whose modulation layers may lie on another device than the rest: each is then brought over, used and
            dropped, one at a time.
        times: ``[k, b]`` in [0, 1], the time of each sample at each step.

    Returns:
        The table and its rows, on the device of the model's other weights.

    Raises:
        ValueError: if ``times`` is not ``[k, b]``.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> model = LensTransformer(LensConfig(num_layers=1, **sizes))
        >>> found = schedule_modulation(model, torch.tensor([[1.0, 1.0], [0.5, 0.5]]))
        >>> found.table.image.shape, found.step(1).image.shape
        (torch.Size([1, 2, 6, 32]), torch.Size([1, 2, 6, 32]))
    """
    check_shape("times", times, "k b")
    device = model.img_in.weight.device
    # A handful of numbers: sorting them on the host costs less than asking the device for the size of the result.
    distinct, rows = torch.unique(times.cpu(), return_inverse=True)
    temb = model.time_text_embed(distinct.to(device))
    vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in model.transformer_blocks:
        for found, layer in zip(vectors, (block.img_mod, block.txt_mod), strict=True):  # pyright: ignore
            found.append(_apply(layer, temb).unflatten(-1, (6, -1)))  # pyright: ignore
    table = Modulation(torch.stack(vectors[0]), torch.stack(vectors[1]), model.norm_out.modulation(temb))
    return ScheduleModulation(table, rows.to(device))


def _apply(layer: nn.Module, temb: Tensor) -> Tensor:
    parameters = dict(layer.named_parameters())
    if all(parameter.device == temb.device for parameter in parameters.values()):
        return layer(temb)
    here = {name: parameter.to(temb.device, non_blocking=True) for name, parameter in parameters.items()}
    return torch.func.functional_call(layer, here, (temb,))
