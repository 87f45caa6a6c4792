"""The forward passes of one run: the plain way, and the fast way that does once what no step changes.

Axes: k steps, b samples, N image tokens, M text tokens, t text layers, e text feature width, c channels, d width.

An engine prepares a run and returns its passes: ``engine(model, text_tokens, layout, times)`` gives
``velocity(step, image_tokens)``. :func:`lensmini.pipeline.painting.paint_packed` takes one, so that guidance, steps,
callbacks and roundings are written once for all of them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from lensmini.nn import LensTransformer, fuse_text_layers
from lensmini.nn.chunk_space import GROUP_TOKENS, Workspace
from lensmini.nn.chunked import Around, chunk_obstacle, run_chunked
from lensmini.packed import Layout
from lensmini.pipeline.schedule_modulation import ScheduleModulation, schedule_modulation
from lensmini.shapes import check_shape

__all__ = ["Engine", "FastEngine", "Passes", "plain_passes"]

Passes = Callable[[int, Tensor], Tensor]
"""``velocity(step, image_tokens)``: ``[N, c]`` to ``[N, output_dim]``."""
Engine = Callable[[LensTransformer, Tensor, Layout, Tensor], Passes]
"""``engine(model, text_tokens [M, t, e], layout, times [k, b])``: the passes of a run."""
Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""Another form of a function of tensors, with the same results."""


def plain_passes(model: LensTransformer, text_tokens: Tensor, layout: Layout, times: Tensor) -> Passes:
    """Every pass by the model's own forward: what the fast ones must equal.

    Args:
        model: predicts the velocity.
        text_tokens: ``[M, t, e]`` of all samples.
        layout: the batch's layout.
        times: ``[k, b]``.

    Returns:
        The passes.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> config = LensConfig(num_layers=1, in_channels=16, out_channels=4, enc_hidden_dim=8, **sizes)
        >>> model, layout = LensTransformer(config).init_weights(0), Layout.build([(2, 3)], text_lengths=[5])
        >>> velocity = plain_passes(model, torch.zeros(5, 4, 8), layout, torch.tensor([[1.0], [0.5]]))
        >>> velocity(0, torch.zeros(6, 16)).shape
        torch.Size([6, 16])
    """

    def velocity(step: int, image_tokens: Tensor) -> Tensor:
        return model.forward_packed(image_tokens, times[step], text_tokens, layout)  # pyright: ignore[reportReturnType]

    return velocity


class FastEngine:
    """Passes that do once per run what no step changes, and the rest in the form that suits the device.

    Once per run: the modulation of all steps, the projection of the text features and the rotary tables. On the CPU the
    blocks run in chunks (:mod:`lensmini.nn.chunked`); elsewhere, or where that is impossible, block by block as
    they are, compiled or not.

    Args:
        chunked: whether chunks are allowed.
        group: where blocks run in chunks, the samples that go through one together before the next ones do: neighbours
            of at most so many image and text tokens, or "sample" for each alone. Both halves of guidance are samples.
            Rounding aside, results do not depend on it.
        around: surrounds each block while it runs, see :class:`lensmini.pipeline.offload.StreamedModules`.
        wrap: makes another function of a whole pass, such as :func:`lensmini.pipeline.graphs.cuda_graph`; called once a
            run, with a function of tensors whose shapes stay the same. Not together with ``around``.
        keep_schedule: keep the modulation for the next run of the same schedule, until :meth:`forget`. Weights that change in
            between are seen only where autograd counts the change: not through ``.data`` or hooks. The pipeline keeps it for
            the batches of one call.

    Raises:
        ValueError: if ``group`` is neither a positive number nor "sample".

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> config = LensConfig(num_layers=1, in_channels=16, out_channels=4, enc_hidden_dim=8, **sizes)
        >>> model, layout = LensTransformer(config).init_weights(0), Layout.build([(2, 3)])
        >>> passes = FastEngine()(model, torch.zeros(0, 4, 8), layout, torch.ones(2, 1))
        >>> passes(0, torch.zeros(6, 16)).shape
        torch.Size([6, 16])
    """

    def __init__(
        self,
        *,
        chunked: bool = True,
        group: int | Literal["sample"] = GROUP_TOKENS,
        around: Around | None = None,
        wrap: Wrap | None = None,
        keep_schedule: bool = False,
    ) -> None:
        if group != "sample" and (not isinstance(group, int) or group < 1):
            raise ValueError(f'group: expected a positive number of tokens or "sample", got {group!r}')
        self.chunked, self.around, self.wrap, self.keep_schedule = chunked, around, wrap, keep_schedule
        self.group_tokens = 1 if group == "sample" else group
        self._schedule: tuple[object, ScheduleModulation] | None = None

    @torch.no_grad()
    def __call__(self, model: LensTransformer, text_tokens: Tensor, layout: Layout, times: Tensor) -> Passes:
        """Prepare a run; arguments as of :func:`plain_passes`."""
        config, blocks = model.config, list(model.transformer_blocks)
        sizes = {"k": config.num_text_layers, "e": config.enc_hidden_dim}
        check_shape("text_tokens", text_tokens, "M k e", M=layout.num_text_tokens, **sizes)
        check_shape("times", times, "k b", b=layout.batch_size)
        schedule = self._modulation(model, times)
        text = fuse_text_layers(text_tokens, model.txt_norm, model.txt_in)
        rotary = model.rotary(layout)
        weight, workspace = model.img_in.weight, None
        if self.chunked and weight.device.type == "cpu" and chunk_obstacle(blocks) is None:
            widths = (config.inner_dim, config.num_attention_heads, config.mlp_dim)
            workspace = Workspace(layout, *widths, dtype=weight.dtype, group_tokens=self.group_tokens)

        def forward(image_tokens: Tensor, image_mod: Tensor, text_mod: Tensor, output_mod: Tensor) -> Tensor:
            image, words = model.img_in(image_tokens.to(weight.dtype)), text
            if workspace is not None:
                vectors = (image_mod, text_mod)
                image = run_chunked(blocks, image, words.clone(), vectors, rotary, workspace, around=self.around)
            else:
                for index, block in enumerate(blocks):
                    vectors, last = (image_mod[index], text_mod[index]), index == len(blocks) - 1
                    with nullcontext() if self.around is None else self.around(index):
                        image, words = block(image, words, None, rotary, layout, modulation=vectors, skip_text=last)
            return model.proj_out(model.norm_out(image, output_mod, layout)).to(image_tokens.dtype)

        run = forward if self.wrap is None else self.wrap(forward)

        @torch.no_grad()
        def velocity(step: int, image_tokens: Tensor) -> Tensor:
            check_shape("image_tokens", image_tokens, "N c", N=layout.num_image_tokens, c=config.in_channels)
            return run(image_tokens, *schedule.step(step))

        return velocity

    def _modulation(self, model: LensTransformer, times: Tensor) -> ScheduleModulation:
        if not self.keep_schedule:
            return schedule_modulation(model, times)
        # Most writes into a parameter count its version up, so a merged adapter is seen.
        versions = sum(0 if p.is_inference() else p._version for p in model.parameters())  # noqa: SLF001
        key = (id(model), model.img_in.weight.device, tuple(map(tuple, times.tolist())), versions)
        if self._schedule is None or self._schedule[0] != key:
            self._schedule = (key, schedule_modulation(model, times))
        return self._schedule[1]

    def forget(self) -> None:
        """Drop the modulation kept from the last run."""
        self._schedule = None
