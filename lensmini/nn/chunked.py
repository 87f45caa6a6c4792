"""The blocks without gradients, in pieces that stay in the processor's cache: the same numbers, read and written less often.

Axes: b samples, N image tokens, M text tokens, T tokens of one stream, S joint tokens, h heads, d width, m hidden width of
the feed-forward layers; r samples of one shape, s tokens of each.

A plain block writes every intermediate of the whole batch to memory that the allocator has just mapped, so a large batch
pays for each page before it is used. Here a few hundred tokens at a time go through normalisation, projection and gate in
buffers that all blocks and steps share, residual streams are updated in place, and queries, keys and values are written
once, as attention wants them.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensmini.nn.blocks import DualStreamBlock
from lensmini.nn.chunk_cuts import Chunk, Piece
from lensmini.nn.chunk_space import Group, Workspace
from lensmini.nn.rope import RotaryTable
from lensmini.shapes import check_shape

__all__ = ["chunk_obstacle", "run_chunked"]

Around = Callable[[int], AbstractContextManager[object]]
"""What surrounds block i while it runs: where its weights are streamed in."""


def chunk_obstacle(blocks: Iterable[nn.Module]) -> str | None:
    """Why these blocks cannot run in chunks, or None.

    Example:
        >>> chunk_obstacle([DualStreamBlock(32, 2)]), chunk_obstacle([DualStreamBlock(32, 2).double()])
        (None, None)
        >>> chunk_obstacle([DualStreamBlock(32, 2).bfloat16()])
        'its arithmetic is float32 or float64, and the weights are torch.bfloat16'
    """
    for index, block in enumerate(blocks):
        if not isinstance(block, DualStreamBlock):
            return f"block {index} is a {type(block).__name__}"
        if block._compiled_call_impl is not None:  # noqa: SLF001
            return f"block {index} is compiled"
        if (dtype := block.attn.img_qkv.weight.dtype) not in (torch.float32, torch.float64):
            return f"its arithmetic is float32 or float64, and the weights are {dtype}"
        linears = (block.attn.img_qkv, block.attn.txt_qkv, block.attn.to_out[0], block.attn.to_add_out)
        feed_forward = (getattr(mlp, name) for mlp in (block.img_mlp, block.txt_mlp) for name in ("w1", "w2", "w3"))
        # It reads weights, so whatever wraps a linear or listens to it would be passed over.
        for linear in (*linears, *feed_forward):
            if type(linear) is not nn.Linear:
                return f"a linear of block {index} is wrapped"
        for part in block.modules():
            if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):  # noqa: SLF001
                return f"a part of block {index} is hooked, or its forward replaced"
    return None


def run_chunked(
    blocks: Sequence[nn.Module],
    image: Tensor,
    text: Tensor,
    modulation: tuple[Tensor, Tensor],
    rotary: tuple[RotaryTable, RotaryTable],
    workspace: Workspace,
    *,
    around: Around | None = None,
) -> Tensor:
    """Run all blocks; the last one's text tail, which nothing reads, is left out.

    Args:
        blocks: :class:`~lensmini.nn.DualStreamBlock`, for which :func:`chunk_obstacle` is None.
        image: ``[N, d]``; changed in place.
        text: ``[M, d]``; changed in place.
        modulation: of image and text, ``[num_layers, b, 6, d]`` each.
        rotary: tables of the image and of the text tokens.
        workspace: of the batch's layout.
        around: surrounds each block; called with its index.

    Returns:
        ``image``, after the last block.

    Raises:
        ValueError: if a shape does not fit the workspace.

    Example:
        >>> from lensmini.nn.rope import RotaryEmbedding3D
        >>> from lensmini.packed import Layout
        >>> layout, block = Layout.build([(2, 2)]), DualStreamBlock(32, 2)
        >>> vectors = torch.zeros(1, 1, 6, 32)
        >>> space = Workspace(layout, 32, 2, 85)
        >>> tables = RotaryEmbedding3D((4, 6, 6))(layout)
        >>> bool(
        ...     (
        ...         run_chunked([block], torch.ones(4, 32), torch.ones(0, 32), (vectors, vectors), tables, space) == 1
        ...     ).all()
        ... )
        True
    """
    layout, dim = workspace.layout, image.shape[-1]
    check_shape("image", image, "N d", N=layout.num_image_tokens)
    check_shape("text", text, "M d", M=layout.num_text_tokens, d=dim)
    sizes = {"layers": len(blocks), "b": layout.batch_size, "d": dim}
    for name, vectors in zip(("image", "text"), modulation, strict=True):
        check_shape(f"{name} modulation", vectors, "layers b 6 d", **sizes)
    turns = [torch.complex(table.cos.to(image.dtype), table.sin.to(image.dtype))[:, None] for table in rotary]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            with nullcontext() if around is None else around(index):
                vectors = (modulation[0][index], modulation[1][index])
                last = index == len(blocks) - 1
                for group in workspace.groups:
                    _run_block(block, image, text, vectors, turns, workspace, group, skip_text=last)
    return image


def _run_block(
    block: DualStreamBlock,
    image: Tensor,
    text: Tensor,
    modulation: tuple[Tensor, Tensor],
    turns: Sequence[Tensor],
    workspace: Workspace,
    group: Group,
    *,
    skip_text: bool,
) -> None:
    attn = block.attn
    image_mod, text_mod = (vectors[group.samples].unbind(1) for vectors in modulation)
    image, text = image[group.image_rows], text[group.text_rows]
    for stream, chunks, norm, project, norms, mod, turn, is_text in (
        (
            image,
            group.image_chunks,
            block.img_norm1,
            attn.img_qkv,
            (attn.norm_q, attn.norm_k),
            image_mod,
            turns[0][group.image_rows],
            False,
        ),
        (
            text,
            group.text_chunks,
            block.txt_norm1,
            attn.txt_qkv,
            (attn.norm_added_q, attn.norm_added_k),
            text_mod,
            turns[1][group.text_rows],
            True,
        ),
    ):
        gain = norm.weight * (1 + mod[1])
        for chunk in chunks:
            normed = _normalise(stream[chunk.rows], gain, mod[0], norm.eps, chunk, workspace.buffers["normed"])
            heads = torch.addmm(project.bias, normed, project.weight.t(), out=workspace.buffers["qkv"][: len(normed)])
            heads = heads.unflatten(-1, (3, workspace.num_heads, -1))
            inverse = torch.linalg.vector_norm(heads[:, :2], dim=-1, keepdim=True)
            inverse.square_().div_(heads.shape[-1]).add_(norms[0].eps).rsqrt_()
            for which, head_norm in enumerate(norms):
                heads[:, which].mul_(inverse[:, which]).mul_(head_norm.weight)
            for piece in chunk.pieces:
                here = _split(heads[piece.rows], piece)
                turn_here = _split(turn[chunk.rows][piece.rows], piece)
                for which in range(3):
                    target = group.at_joint([qkv[which] for qkv in group.joint], piece, text=is_text, dim=2)
                    target, source = target.transpose(1, 2), here[:, :, which]
                    if which == 2:
                        target.copy_(source)
                    else:
                        torch.mul(_pairs(source), turn_here, out=_pairs(target))
    # What text attends to is read by the text's own tail alone.
    asking = group.run_images if skip_text else [query.shape[2] for query, _, _ in group.joint]
    attended = [
        F.scaled_dot_product_attention(query[:, :, :length], key, value).transpose(1, 2).flatten(2)
        for (query, key, value), length in zip(group.joint, asking, strict=True)
    ]
    _finish(
        image,
        group.image_chunks,
        attended,
        attn.to_out[0],
        block.img_norm2,
        block.img_mlp,
        image_mod,
        workspace,
        group,
        text=False,
    )
    if not skip_text:
        _finish(
            text,
            group.text_chunks,
            attended,
            attn.to_add_out,
            block.txt_norm2,
            block.txt_mlp,
            text_mod,
            workspace,
            group,
            text=True,
        )


def _finish(
    stream: Tensor,
    chunks: Sequence[Chunk],
    attended: Sequence[Tensor],
    project: nn.Linear,
    norm: nn.Module,
    mlp: nn.Module,
    mod: Sequence[Tensor],
    workspace: Workspace,
    group: Group,
    *,
    text: bool,
) -> None:
    """What follows attention in one stream: output projection, gate, feed-forward layer, gate; all in place."""
    buffers, gain = workspace.buffers, norm.weight * (1 + mod[4])
    for chunk in chunks:
        hidden = stream[chunk.rows]
        rows = len(hidden)
        if [piece.samples for piece in chunk.pieces] == [1]:  # in one place already
            inputs = group.at_joint(attended, chunk.pieces[0], text=text, dim=1)[0]
        else:
            inputs = buffers["normed"][:rows]
            for piece in chunk.pieces:
                _split(inputs[piece.rows], piece).copy_(group.at_joint(attended, piece, text=text, dim=1))
        update = torch.addmm(project.bias, inputs, project.weight.t(), out=buffers["update"][:rows])
        _add_gated(hidden, update, mod[2], chunk)
        normed = _normalise(hidden, gain, mod[3], norm.eps, chunk, buffers["normed"])
        gate = torch.mm(normed, mlp.w1.weight.t(), out=buffers["gate"][:rows])
        value = torch.mm(normed, mlp.w3.weight.t(), out=buffers["value"][:rows])
        hidden_mlp = F.silu(gate, inplace=True).mul_(value)
        update = torch.mm(hidden_mlp, mlp.w2.weight.t(), out=buffers["update"][:rows])
        _add_gated(hidden, update, mod[5], chunk)


def _normalise(hidden: Tensor, gain: Tensor, offset: Tensor, eps: float, chunk: Chunk, buffer: Tensor) -> Tensor:
    inverse = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    inverse.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
    result = torch.mul(hidden, inverse, out=buffer[: len(hidden)])
    for piece in chunk.pieces:
        part = _split(result[piece.rows], piece)
        torch.addcmul(_vectors(offset, piece), part, _vectors(gain, piece), out=part)
    return result


def _add_gated(hidden: Tensor, update: Tensor, gate: Tensor, chunk: Chunk) -> None:
    for piece in chunk.pieces:
        _split(hidden[piece.rows], piece).addcmul_(_split(update[piece.rows], piece), _vectors(gate, piece))


def _split(rows: Tensor, piece: Piece) -> Tensor:
    """``[r * s, ...]`` as ``[r, s, ...]``."""
    return rows.unflatten(0, (piece.samples, piece.length))


def _vectors(per_sample: Tensor, piece: Piece) -> Tensor:
    """``[b, d]`` to the piece's ``[r, 1, d]``."""
    return per_sample[piece.sample : piece.sample + piece.samples, None]


def _pairs(values: Tensor) -> Tensor:
    return torch.view_as_complex(values.unflatten(-1, (-1, 2)))
