"""Near-duplicates among embeddings, greedily: the best picture of every crowd stays.

Axes: n pictures, m pictures accepted before, d embedding width.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["Duplicates", "find_duplicates"]


class Duplicates(NamedTuple):
    """Which pictures repeat another one."""

    duplicate_of: Tensor
    """int64 ``[n]``: -1 for a picture to keep; else the kept one that it repeats, n + j for row j of ``against``."""
    cosine: Tensor
    """float32 ``[n]``: with that one; 0 for a picture to keep."""

    @property
    def keep(self) -> Tensor:
        """bool ``[n]``."""
        return self.duplicate_of < 0


@torch.no_grad()
def find_duplicates(
    embeddings: Tensor,
    *,
    max_cosine: float = 0.985,
    priority: Tensor | None = None,
    against: Tensor | None = None,
    index: Literal["exact", "faiss"] = "exact",
    chunk: int = 2048,
) -> Duplicates:
    """Walk the pictures from the highest priority down and drop each that is too close to one already kept.

    Greedy on purpose: joining all that are linked would let a chain of small steps, each below notice, swallow pictures
    that have nothing in common. The cost is n times the number of kept pictures; memory is the kept rows and a block of
    ``chunk`` by ``chunk`` cosines.

    Args:
        embeddings: ``[n, d]``, of any length but zero; only directions count.
        max_cosine: in [-1, 1]; a pair above it is a pair of duplicates. The paper's 0.985 is for CLIP ViT-L/14.
        priority: ``[n]``, for example area or aesthetic score; higher wins, ties by position. None is by position.
        against: ``[m, d]``, pictures kept elsewhere or earlier, which win over all.
        index: "exact" is blocked products; "faiss" its flat inner-product index, with the same result.
        chunk: rows of a block.

    Returns:
        For each picture what it repeats.

    Raises:
        ValueError: if shapes disagree, or naming rows that are zero, NaN or infinite.
        ImportError: without faiss for ``index="faiss"``.

    Example:
        >>> find_duplicates(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.01]])).duplicate_of
        tensor([-1, -1,  0])
    """
    sizes = check_shape("embeddings", embeddings, "n d")
    if not -1 <= max_cosine <= 1:
        raise ValueError(f"max_cosine: expected a number in [-1, 1], got {max_cosine}")
    if chunk < 1:
        raise ValueError(f"chunk: expected a positive integer, got {chunk}")
    if index not in ("exact", "faiss"):
        raise ValueError(f"index: expected 'exact' or 'faiss', got {index!r}")
    num, width = sizes["n"], sizes["d"]
    if priority is not None and (priority.shape != (num,) or bool(priority.isnan().any())):
        raise ValueError(f"priority: expected [{num}] without NaN, got {list(priority.shape)}")
    directions = _normalise(embeddings, "embeddings")
    order = torch.arange(num) if priority is None else torch.argsort(priority, descending=True, stable=True)
    kept: Any = _Flat(width, chunk) if index == "exact" else _Faiss(width)
    names = torch.zeros(0, dtype=torch.int64)
    if against is not None:
        if check_shape("against", against, "m d")["d"] != width:
            raise ValueError(f"against: expected [m, {width}], got {list(against.shape)}")
        kept.add(_normalise(against, "against"))
        names = num + torch.arange(len(against))
    duplicate_of, cosine = torch.full((num,), -1), torch.zeros(num)
    for rows in order.split(chunk) if num else ():
        block = directions[rows]
        best, where = kept.nearest(block)
        within = block @ block.T
        alive = _greedy(within, best > max_cosine, max_cosine)
        earlier = torch.ones_like(within, dtype=torch.bool).tril(-1) & alive
        own, at = torch.where(earlier, within, -2.0).max(1)
        keeper = torch.where(own > best, rows[at], names[where] if len(names) else rows[at])
        gone = ~alive
        duplicate_of[rows[gone]], cosine[rows[gone]] = keeper[gone], torch.maximum(own, best)[gone]
        kept.add(block[alive])
        names = torch.cat([names, rows[alive]])
    return Duplicates(duplicate_of, cosine)


def _greedy(cosines: Tensor, gone: Tensor, limit: float) -> Tensor:
    """The rows of a block that stay, bool, of which some are gone already."""
    earlier, alive = torch.tril(cosines > limit, diagonal=-1), ~gone
    for row in (earlier.any(1) & alive).nonzero().flatten().tolist():
        alive[row] = not bool((earlier[row] & alive).any())
    return alive


def _normalise(rows: Tensor, name: str) -> Tensor:
    wide = rows.detach().float().cpu()
    lengths = torch.linalg.vector_norm(wide.double(), dim=1)
    bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name}: expected finite rows that are not zero, got others in rows {bad[:8]} ({len(bad)})")
    return (wide.double() / lengths[:, None]).float()


class _Flat:
    """Kept directions and their products with a block."""

    def __init__(self, width: int, chunk: int) -> None:
        self._blocks, self._width, self._chunk = [torch.zeros(0, width)], width, chunk

    def add(self, rows: Tensor) -> None:
        last = torch.cat([self._blocks.pop(), rows])
        self._blocks += last.split(self._chunk) or (torch.zeros(0, self._width),)

    def nearest(self, block: Tensor) -> tuple[Tensor, Tensor]:
        best, where = torch.full((len(block),), -2.0), torch.zeros(len(block), dtype=torch.int64)
        first = 0
        for rows in self._blocks:
            if len(rows):
                found, at = (block @ rows.T).max(1)
                closer = found > best
                best, where = torch.where(closer, found, best), torch.where(closer, at + first, where)
            first += len(rows)
        return best, where


class _Faiss:
    def __init__(self, width: int) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("index='faiss' needs faiss: pip install lensmini[data]") from error
        self._index: Any = faiss.IndexFlatIP(width)

    def add(self, rows: Tensor) -> None:
        self._index.add(rows.contiguous().numpy())

    def nearest(self, block: Tensor) -> tuple[Tensor, Tensor]:
        if not self._index.ntotal or not len(block):
            return torch.full((len(block),), -2.0), torch.zeros(len(block), dtype=torch.int64)
        best, where = self._index.search(block.contiguous().numpy(), 1)
        return torch.from_numpy(best[:, 0]), torch.from_numpy(where[:, 0])
