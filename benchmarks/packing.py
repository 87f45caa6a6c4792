"""Time of a mixed-resolution step on packed tokens against the same step padded to the largest sample.

``python -m benchmarks.packing`` (about 4 minutes on two cores).

Both run the same Lens block, forward and backward, with the same weights; the padded one is written the usual way: dense
``[b, n, d]`` tensors and one mask. Packing should save what it saves in FLOPs, so the claim is ``time ratio / FLOP ratio``
(packed over padded, both) of at most 1.10 on each of three mixes. Token grids are those of the paper's sizes at half the side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleaved, report
from lensmini.cost import activation_bytes
from lensmini.nn import DualStreamBlock, LensConfig, RotaryEmbedding3D, apply_rotary
from lensmini.packed import Layout

DIM, HEADS = 512, 8
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2)
MIXES = {"one tier": (1024,), "three tiers": (256, 512, 1024), "five tiers": (256, 512, 768, 1024, 1440)}


def grids(bases: tuple[int, ...], num_images: int = 9) -> list[tuple[int, int]]:
    """Token grids of images that walk through the nine ratios and the given bases, at half the side."""
    pairs = []
    for index in range(num_images):
        side, ratio = bases[index % len(bases)] / 32, RATIOS[index]
        pairs.append((max(1, round(side / ratio**0.5)), max(1, round(side * ratio**0.5))))
    return pairs


def block_flops(image_tokens: int, text_tokens: int) -> int:
    """Multiply-adds of one block times two: linears of both streams, and joint attention."""
    tokens = image_tokens + text_tokens
    return 24 * DIM**2 * tokens + 4 * tokens**2 * DIM


def padded_step(
    block: DualStreamBlock, streams: list[Tensor], temb: Tensor, tables: list, valid: Tensor
) -> list[Tensor]:
    """The block as it is usually written, on dense padded streams ``[b, n, d]`` and ``[b, l, d]``."""
    attn, outputs, heads = block.attn, [], []
    norms = ((attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k))
    modulations = [vectors[:, :, None].unbind(1) for vectors in block.modulation(temb)]
    firsts, seconds = (block.img_norm1, block.txt_norm1), (block.img_norm2, block.txt_norm2)
    for stream, project, norm, first, mod, table in zip(
        streams, (attn.img_qkv, attn.txt_qkv), norms, firsts, modulations, tables, strict=True
    ):
        hidden = first(stream) * (1 + mod[1]) + mod[0]
        q, k, v = project(hidden).unflatten(-1, (3, HEADS, -1)).unbind(2)
        q, k = (
            apply_rotary(n(x).flatten(0, 1), table).unflatten(0, x.shape[:2]) for n, x in zip(norm, (q, k), strict=True)
        )
        heads.append((q, k, v))
    joint = [torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*heads, strict=True)]
    attended = F.scaled_dot_product_attention(*joint, attn_mask=valid[:, None, None]).transpose(1, 2).flatten(2)
    parts = attended.split([streams[0].shape[1], streams[1].shape[1]], dim=1)
    for stream, part, project, second, mlp, mod in zip(
        streams,
        parts,
        (attn.to_out[0], attn.to_add_out),
        seconds,
        (block.img_mlp, block.txt_mlp),
        modulations,
        strict=True,
    ):
        stream = stream + mod[2] * project(part)
        outputs.append(stream + mod[5] * mlp(second(stream) * (1 + mod[4]) + mod[3]))
    return outputs


def pad(tokens: Tensor, lengths: tuple[int, ...], longest: int) -> Tensor:
    """Packed ``[T, ...]`` to dense ``[b, longest, ...]`` with zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(
        [*tokens.split(lengths), tokens.new_zeros(longest, *tokens.shape[1:])], True
    )[:-1]


def measure(bases: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Time one mix both ways and compare results and saved bytes."""
    torch.manual_seed(0)
    block = DualStreamBlock(DIM, HEADS)
    layout = Layout.build(grids(bases), text_lengths=[40 + 10 * (index % 4) for index in range(9)])
    tables = RotaryEmbedding3D((8, 28, 28))(layout)
    temb = torch.randn(9, DIM)
    image = torch.randn(layout.num_image_tokens, DIM, requires_grad=True)
    text = torch.randn(layout.num_text_tokens, DIM, requires_grad=True)
    lengths, longest = (
        (layout.image_lengths, layout.text_lengths),
        (max(layout.image_lengths), max(layout.text_lengths)),
    )
    dense = [pad(x.detach(), n, m).requires_grad_() for x, n, m in zip((image, text), lengths, longest, strict=True)]
    dense_tables = [
        type(table)(*(pad(x, n, m).flatten(0, 1) for x in table))
        for table, n, m in zip(tables, lengths, longest, strict=True)
    ]
    masks = [torch.arange(m) < torch.tensor(n)[:, None] for n, m in zip(lengths, longest, strict=True)]
    saved: dict[int, int] = {}

    def packed() -> Tensor:
        block.zero_grad()
        outputs = block(image, text, temb, tables, layout)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        return outputs[0].detach()

    def padded() -> Tensor:
        block.zero_grad()
        outputs = padded_step(block, dense, temb, dense_tables, torch.cat(masks, dim=1))
        torch.autograd.backward(
            outputs, [mask[..., None].to(x.dtype).expand_as(x) for mask, x in zip(masks, outputs, strict=True)]
        )
        return outputs[0].detach()[masks[0]]

    difference = (packed() - padded()).abs().max().item()

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        outputs = block(image, text, temb, tables, layout)
    activations = sum(size for pointer, size in saved.items() if pointer not in parameters)
    del outputs
    seconds = interleaved({"packed": packed, "padded": padded}, rounds=rounds, warmup=1)
    flops = sum(block_flops(n, l) for n, l in zip(*lengths, strict=True)) / (9 * block_flops(*longest))
    time_ratio = seconds["packed"] / seconds["padded"]
    tokens = layout.num_image_tokens + layout.num_text_tokens
    config = LensConfig(num_layers=1, num_attention_heads=HEADS)
    model = sum(activation_bytes(config, n, l, dtype_bytes=4) for n, l in zip(*lengths, strict=True))
    return {
        "time_ratio": time_ratio,
        "flop_ratio": flops,
        "time_over_flops": time_ratio / flops,
        "speedup": 1 / time_ratio,
        "max_difference": difference,
        "bytes_per_token": activations / tokens,
        "bytes_per_token_model": float(model) / tokens,
    }


def main(rounds: int = 5) -> None:
    """Run the three mixes and print the result line."""
    rows = {}
    for name, bases in MIXES.items():
        rows[name] = {key: float(f"{value:.4g}") for key, value in measure(bases, rounds).items()}
        print(f"{name:12s}", "  ".join(f"{key} {value:g}" for key, value in rows[name].items()), flush=True)
    worst = max(row["time_over_flops"] for row in rows.values())
    report("packing", ratio=worst, goal=1.10, better="lower", holds=worst <= 1.10, details={"mixes": rows})


if __name__ == "__main__":
    main()
