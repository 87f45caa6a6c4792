"""Modules whose weights stay in host memory and visit the device one after the other, the next one already on its way.

While one block computes, the next one's weights are copied on a stream of their own; when a block is done its copy is
dropped. At most ``prefetch + 1`` streamed blocks are on the device at any moment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StreamedModules", "spread"]

Event = tuple[str, int]


def spread(num: int, resident: int) -> list[int]:
    """Which of ``num`` modules to stream if ``resident`` stay: evenly spaced, so that each copy hides behind work.

    Example:
        >>> spread(6, 3), spread(4, 4), spread(3, 0)
        ([0, 2, 4], [], [0, 1, 2])
    """
    if not 0 <= resident <= num:
        raise ValueError(f"resident: expected 0 to {num}, got {resident}")
    streamed = num - resident
    return [index * num // streamed for index in range(streamed)]


class StreamedModules:
    """Brings the weights of modules to a device while they run, as something that surrounds each of them.

    Calling it with a module's index gives a context; leaving it drops the copy. Modules run in ascending order, again and
    again: behind the last the first is prefetched. The parameters themselves stay the same objects, so state
    dictionaries, names and compiled code see no difference.

    Args:
        modules: all modules that run in turn; those that are not streamed are left alone.
        device: where they run.
        streamed: which of them to stream; all by default.
        prefetch: copies under way beside the module that runs, at least 0.
        on_event: told ("fetch", "use" or "drop", index) in the order of what happens.

    Raises:
        ValueError: if ``prefetch`` is negative, or an index does not exist or occurs twice.

    Example:
        >>> layers = [nn.Linear(2, 2) for _ in range(3)]
        >>> seen = []
        >>> streamed = StreamedModules(layers, "cpu", on_event=lambda *event: seen.append(event))
        >>> with streamed(0):
        ...     pass
        >>> seen
        [('fetch', 0), ('fetch', 1), ('use', 0), ('drop', 0)]
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device | str,
        *,
        streamed: Sequence[int] | None = None,
        prefetch: int = 1,
        on_event: Callable[[str, int], None] | None = None,
    ) -> None:
        self.order = list(range(len(modules))) if streamed is None else list(streamed)
        if self.order != sorted(set(self.order)) or any(not 0 <= index < len(modules) for index in self.order):
            raise ValueError(f"streamed: expected ascending indices of {len(modules)} modules, got {self.order}")
        if prefetch < 0:
            raise ValueError(f"prefetch: expected at least 0, got {prefetch}")
        self.device, self.prefetch = torch.device(device), prefetch
        self._tell = on_event or (lambda kind, index: None)
        self._places = {index: place for place, index in enumerate(self.order)}
        self._modules = list(modules)
        self._host: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._ready: dict[int, Any] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for index in self.order:
            self._bring_home(index)

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        """Have a module's weights on the device inside; a module that is not streamed passes through."""
        if index not in self._places:
            yield
            return
        self._fetch(index)
        place = self._places[index]
        for ahead in range(1, min(self.prefetch, len(self.order) - 1) + 1):
            self._fetch(self.order[(place + ahead) % len(self.order)])
        self._wait(index)
        try:
            yield
        finally:
            self._drop(index)

    def release(self) -> None:
        """Drop what is on the device, what was prefetched too."""
        for index in [*self._ready]:
            self._drop(index)

    def hook(self, modules: Sequence[nn.Module]) -> Callable[[], None]:
        """Surround modules by hooks, where their loop belongs to somebody else; returns what takes the hooks off.

        A module that fails is dropped like one that ends.

        Args:
            modules: the ones of the constructor; not compiled.
        """
        open_contexts: dict[int, Any] = {}

        def enter(index: int) -> Callable[..., None]:
            def before(*_: object) -> None:
                open_contexts[index] = self(index)
                open_contexts[index].__enter__()

            return before

        def leave(index: int) -> Callable[..., None]:
            def after(*_: object) -> None:
                if (context := open_contexts.pop(index, None)) is not None:
                    context.__exit__(None, None, None)

            return after

        handles = []
        for index in self.order:
            handles.append(modules[index].register_forward_pre_hook(enter(index)))
            handles.append(modules[index].register_forward_hook(leave(index), prepend=True, always_call=True))

        def remove() -> None:
            for handle in handles:
                handle.remove()
            for index in [*open_contexts]:
                open_contexts.pop(index).__exit__(None, None, None)
            self.release()

        return remove

    def _bring_home(self, index: int) -> None:
        """Find a module's weights as they are now, since they may have been replaced, and have them on the host."""
        tensors = [*self._modules[index].parameters(), *self._modules[index].buffers()]
        for tensor in tensors:
            if tensor.device.type != "cpu":
                tensor.data = tensor.data.cpu()
            if self._stream is not None and not tensor.is_pinned():
                tensor.data = tensor.data.pin_memory()  # only pinned memory is copied while the device computes
        self._host[index] = [(tensor, tensor.data) for tensor in tensors]

    def _fetch(self, index: int) -> None:
        if index in self._ready:
            return
        self._bring_home(index)
        self._tell("fetch", index)
        if self._stream is None:
            for tensor, host in self._host[index]:
                tensor.data = host.to(self.device, copy=True)
            self._ready[index] = None
            return
        with torch.cuda.stream(self._stream):
            for tensor, host in self._host[index]:
                tensor.data = host.to(self.device, non_blocking=True)
            self._ready[index] = self._stream.record_event()

    def _wait(self, index: int) -> None:
        self._tell("use", index)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._ready[index])
            for tensor, _ in self._host[index]:
                # Its memory belongs to the copy stream and may be handed out again only after this one is done with it.
                tensor.data.record_stream(current)

    def _drop(self, index: int) -> None:
        self._tell("drop", index)
        for tensor, host in self._host[index]:
            tensor.data = host
        del self._ready[index]
