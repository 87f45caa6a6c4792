"""Carries out a memory plan: has every part where its phase wants it, and nothing else on the device.

The phases are encode, sample and decode, in this order.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from lensmini.nn import Autoencoder, LensTransformer, TextEncoder
from lensmini.nn.text_encoder import _find_decoder
from lensmini.pipeline.memory import (
    MemoryPlan,
    Workload,
    budget_of,
    choose_plan,
    describe,
    is_packed,
    part_sizes,
    peaks,
)
from lensmini.pipeline.offload import StreamedModules, spread
from lensmini.pipeline.schedule_modulation import modulation_layers

__all__ = ["Arranger", "Phases", "Placement", "Unplaced"]


class Phases(Protocol):
    """What a run goes through."""

    def encode(self) -> AbstractContextManager[object]:
        """Have the text encoder ready inside."""
        ...

    def sample(self) -> AbstractContextManager[StreamedModules | None]:
        """Have the transformer ready inside; gives what surrounds each block, if anything."""
        ...

    def decode(self) -> AbstractContextManager[object]:
        """Have the autoencoder ready inside, and room for what it computes."""
        ...


class Unplaced:
    """The phases of a pipeline whose parts stay where they are.

    Example:
        >>> with Unplaced().sample() as around:
        ...     print(around)
        None
    """

    def encode(self) -> AbstractContextManager[None]:
        """Nothing moves."""
        return nullcontext()

    def sample(self) -> AbstractContextManager[None]:
        """Nothing moves."""
        return nullcontext()

    def decode(self) -> AbstractContextManager[None]:
        """Nothing moves."""
        return nullcontext()


class Arranger:
    """Keeps a pipeline inside a memory mode: plans each run, and moves parts only when the plan changes.

    Args:
        mode: "auto" or the size of a card (:func:`lensmini.pipeline.memory.budget_of`).
        device: where everything runs.

    Raises:
        ValueError: if the mode is unknown.

    Example:
        >>> Arranger("12GiB", "cpu").note
        ''
    """

    def __init__(self, mode: str, device: torch.device | str) -> None:
        budget_of(mode, free=0)
        self.mode, self.device = mode, torch.device(device)
        self.note = ""
        self._placement: Placement | None = None
        self._budget: int | None = None

    def arrange(
        self,
        transformer: LensTransformer,
        autoencoder: Autoencoder | None,
        text_encoder: TextEncoder | None,
        work: Workload,
    ) -> "Placement":
        """The phases of one run; what was chosen is printed when it changes, and kept in ``note``.

        Args:
            transformer: of the pipeline.
            autoencoder: of the pipeline, if any.
            text_encoder: of the pipeline, if it is still wanted.
            work: of the run.

        Raises:
            ValueError: if no arrangement fits.
        """
        parts, old = (transformer, autoencoder, text_encoder), self._placement
        sizes = part_sizes(*parts)
        if self._budget is None:
            # Asked once, before the first run: later our own parts would count as taken.
            self._budget = budget_of(self.mode, self._free(*parts))
        budget = self._budget
        plan = choose_plan(sizes, work, budget)
        same = old is not None and (old.transformer, old.autoencoder, old.text_encoder) == parts and old.plan == plan
        if old is not None and same:
            return old
        if old is not None:
            old.release()
        note = f"memory {self.mode}: {describe(plan, sizes, peaks(plan, sizes, work))} of {budget / 2**30:.2f} GiB"
        if note != self.note:
            print(note, flush=True)
        self.note, self._placement = note, Placement(plan, self.device, *parts)
        return self._placement

    def moved(self, device: torch.device | str) -> "Arranger":
        """The same mode on another device; everything goes to the host until the next run."""
        if self._placement is not None:
            self._placement.release()
        return Arranger(self.mode, device)

    def _free(self, *parts: nn.Module | None) -> int | None:
        """What is free on the device, and what parts of ours are there already."""
        if self.device.type != "cuda":
            return None
        ours = [tensor for part in parts if part is not None for tensor in part.parameters() if tensor.is_cuda]
        return torch.cuda.mem_get_info(self.device)[0] + sum(tensor.nbytes for tensor in ours)


class Placement:
    """The parts of a pipeline under one plan.

    Args:
        plan: what is where in which phase.
        device: where everything runs.
        transformer: of the pipeline.
        autoencoder: of the pipeline, if any.
        text_encoder: of the pipeline, if any.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> model = LensTransformer(LensConfig(num_layers=2, **sizes))
        >>> placement = Placement(MemoryPlan(resident_blocks=1), "cpu", model)
        >>> with placement.sample() as around, around(0):
        ...     model.img_in.weight.device.type
        'cpu'
    """

    def __init__(
        self,
        plan: MemoryPlan,
        device: torch.device | str,
        transformer: LensTransformer,
        autoencoder: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.plan, self.device = plan, torch.device(device)
        self.transformer, self.autoencoder, self.text_encoder = transformer, autoencoder, text_encoder
        blocks = list(transformer.transformer_blocks)
        # What runs in every pass, without the layers that modulate.
        self._bodies = [
            nn.ModuleList(part for name, part in block.named_children() if not name.endswith("_mod"))
            for block in blocks
        ]
        self._streamed = spread(len(blocks), plan.resident_blocks)
        rest = [part for name, part in transformer.named_children() if name != "transformer_blocks"]
        self._staying = rest + [body for index, body in enumerate(self._bodies) if index not in self._streamed]
        self._staying += modulation_layers(transformer) if plan.modulation_resident else []
        _move(modulation_layers(transformer), self.device if plan.modulation_resident else "cpu")
        self.blocks = StreamedModules(self._bodies, self.device, streamed=self._streamed)
        self._move_transformer("cpu" if plan.transformer_waits and text_encoder is not None else self.device)
        if autoencoder is not None:
            autoencoder.to(self.device)
        self.layers: StreamedModules | None = None
        if text_encoder is None:
            return
        if plan.encoder == "resident":
            self._move_encoder(self.device)
        elif plan.encoder == "stream":
            self.layers = StreamedModules(list(_find_decoder(text_encoder.model).layers), self.device)

    @contextmanager
    def encode(self) -> Iterator[None]:
        """Have the text encoder ready inside."""
        encoder, plan = self.text_encoder, self.plan
        if encoder is None:
            yield
            return
        if plan.transformer_waits:
            self._move_transformer("cpu")
        remove: Callable[[], None] | None = None
        if self.layers is not None:
            layers = list(_find_decoder(encoder.model).layers)
            self._move_apart(encoder, layers, self.device)
            remove = self.layers.hook(layers)
        elif plan.encoder in ("offload", "free"):
            self._move_encoder(self.device)
        try:
            yield
        finally:
            if remove is not None:
                remove()
                self._move_apart(encoder, list(_find_decoder(encoder.model).layers), "cpu")
            elif plan.encoder == "offload":
                self._move_encoder("cpu")
            elif plan.encoder == "free":
                self.text_encoder = None
            del encoder
            self._let_go()

    @contextmanager
    def sample(self) -> Iterator[StreamedModules]:
        """Have the transformer ready inside; gives what surrounds each block."""
        self._move_transformer(self.device)
        try:
            yield self.blocks
        finally:
            self.blocks.release()
            self._let_go()

    @contextmanager
    def decode(self) -> Iterator[None]:
        """Have the autoencoder ready inside, and room for what it computes."""
        if self.plan.decode_alone:
            self._move_transformer("cpu")
            self._let_go()
        yield

    def release(self) -> None:
        """Bring everything to the host."""
        self.blocks.release()
        if self.layers is not None:
            self.layers.release()
        _move([m for m in (self.transformer, self.autoencoder) if m is not None], "cpu")
        self._move_encoder("cpu")
        self._let_go()

    def _move_apart(self, encoder: TextEncoder, layers: list[nn.Module], device: torch.device | str) -> None:
        """Move what surrounds the layers: above all the embedding of tokens."""
        inside = {id(part) for layer in layers for part in layer.modules()}
        for module in encoder.modules():
            if id(module) not in inside:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(device)

    def _move_encoder(self, device: torch.device | str) -> None:
        # Packed experts stay where their kernels put them.
        if self.text_encoder is not None and not is_packed(self.text_encoder):
            self.text_encoder.to(device)

    def _move_transformer(self, device: torch.device | str) -> None:
        _move(self._staying, device)

    def _let_go(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _move(modules: list[nn.Module], device: torch.device | str) -> None:
    for module in modules:
        module.to(device)
