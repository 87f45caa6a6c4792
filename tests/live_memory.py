"""Bytes of tensors alive at once, counted as operations run: on the meta device, of models that no machine here could hold."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveMemory"]


class LiveMemory(TorchDispatchMode):
    """Inside, ``peak`` is the largest sum of the bytes of storages that operations made and that were still alive."""

    def __init__(self, *ignored: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()
        for module in ignored:
            for tensor in (*module.parameters(), *module.buffers()):
                self.seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self.seen:
                storage = value.untyped_storage()
                size = storage.nbytes()
                self.seen[storage] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size
