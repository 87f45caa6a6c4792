"""What a sample costs the Lens transformer: FLOPs per operation, parameters, and bytes saved for the backward.

Every count is per sample and takes its image and text tokens as numbers, numpy arrays or tensors of the same shape
(or shapes that broadcast), so a planner can price millions of samples in one call. A multiply-add is 2 FLOPs;
element-wise work is not counted, as in ``torch.utils.flop_counter``. Never estimate with 6 x parameters x tokens: a
third of the parameters modulate and do no work per token, a token meets one stream of two, attention is missing.

Symbols: d inner width, m MLP width, e text width, n image tokens, l text tokens.
"""

from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BLOCK_ACTIVATIONS",
    "ModelSize",
    "SavedTensor",
    "activation_bytes",
    "forward_flops",
    "operation_flops",
    "parameter_count",
    "train_flops",
]

Tokens = TypeVar("Tokens", int, float, np.ndarray, Tensor)
Recompute = Literal["none", "selective", "full"]

SINUSOID_DIM = 256
STATISTIC_BYTES = 4


class ModelSize(Protocol):
    """The numbers that the counts depend on; ``LensConfig`` has them."""

    @property
    def num_layers(self) -> int:
        """Double-stream blocks."""
        ...

    @property
    def inner_dim(self) -> int:
        """Width d of both streams."""
        ...

    @property
    def mlp_dim(self) -> int:
        """SwiGLU width m."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Heads."""
        ...

    @property
    def attention_head_dim(self) -> int:
        """Width of a head."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of an image token."""
        ...

    @property
    def out_channels(self) -> int:
        """Autoencoder channels of the prediction."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a latent patch."""
        ...

    @property
    def enc_hidden_dim(self) -> int:
        """Width e of one text layer."""
        ...

    @property
    def num_text_layers(self) -> int:
        """Text layers."""
        ...


class SavedTensor(NamedTuple):
    """One tensor that a block keeps per token for its backward, ``inner * d + mlp * m`` elements wide."""

    name: str
    inner: int
    mlp: int
    selective: bool
    """True if selective recomputation drops it: neither a matrix product nor the attention makes it."""
    tail: bool
    """True if it is behind the attention, where the last block computes nothing for text."""


BLOCK_ACTIVATIONS = (
    SavedTensor("residual input", 1, 0, selective=False, tail=False),
    SavedTensor("normed and modulated input of qkv", 1, 0, selective=True, tail=False),
    SavedTensor("query, key and value", 3, 0, selective=False, tail=False),
    SavedTensor("rotated query and key, and value, in joint order", 3, 0, selective=True, tail=False),
    SavedTensor("attention output in joint order", 1, 0, selective=False, tail=False),
    SavedTensor("input of the output projection", 1, 0, selective=True, tail=True),
    SavedTensor("output projection, for the gate", 1, 0, selective=False, tail=True),
    SavedTensor("middle residual", 1, 0, selective=True, tail=True),
    SavedTensor("normed and modulated input of the MLP", 1, 0, selective=True, tail=True),
    SavedTensor("both MLP halves", 0, 2, selective=False, tail=True),
    SavedTensor("SwiGLU product", 0, 1, selective=True, tail=True),
    SavedTensor("MLP output, for the gate", 1, 0, selective=False, tail=True),
)
"""What one block saves per token of either stream, as measured with several samples in the batch (a single sample's
streams are views of the joint sequence and save one ``d`` less)."""


def operation_flops(
    config: ModelSize, image_tokens: Tokens, text_tokens: Tokens, *, text_tail: bool = False
) -> dict[str, Any]:
    """Forward FLOPs of one sample, operation by operation.

    Args:
        config: sizes of the model.
        image_tokens: n, any shape, not negative. Integers stay exact integers, arrays and tensors become float64.
        text_tokens: l, valid text tokens, likewise.
        text_tail: count the last block's text output projection and MLP, which cannot influence the output and which
            the model skips.

    Returns:
        FLOPs by operation: ``image_in``, ``text_in``, ``time``, ``modulation``, ``qkv``, ``attention``,
        ``attention_out``, ``mlp``, ``output``; those that depend on tokens have their shape.

    Raises:
        ValueError: if a count is negative or not a number, or an array is mixed with a tensor.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = dict(num_layers=1, inner_dim=6, mlp_dim=16, num_attention_heads=1, attention_head_dim=6)
        >>> sizes |= dict(in_channels=4, out_channels=1, patch_size=2, enc_hidden_dim=8, num_text_layers=1)
        >>> operation_flops(SimpleNamespace(**sizes), 10, 5)["attention"]
        5400
    """
    n, l = _counts(image_tokens, text_tokens)
    d, layers = config.inner_dim, config.num_layers
    blocks_of_text = layers if text_tail else layers - 1
    token_blocks = layers * n + blocks_of_text * l
    return {
        "image_in": 2 * config.in_channels * d * n,
        "text_in": 2 * config.num_text_layers * config.enc_hidden_dim * d * l,
        "time": 2 * SINUSOID_DIM * d + 2 * d * d,
        "modulation": layers * 2 * (2 * d * 6 * d),
        "qkv": layers * (2 * d * 3 * d) * (n + l),
        "attention": layers * 4 * d * (n + l) ** 2,
        "attention_out": 2 * d * d * token_blocks,
        "mlp": 3 * (2 * d * config.mlp_dim) * token_blocks,
        "output": 2 * d * 2 * d + 2 * d * _output_width(config) * n,
    }


def forward_flops(config: ModelSize, image_tokens: Tokens, text_tokens: Tokens, *, text_tail: bool = False) -> Tokens:
    """FLOPs of one forward pass of one sample: the sum of :func:`operation_flops`, with the same arguments.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = dict(num_layers=48, inner_dim=1536, mlp_dim=4096, num_attention_heads=24, attention_head_dim=64)
        >>> sizes |= dict(in_channels=128, out_channels=32, patch_size=2, enc_hidden_dim=2880, num_text_layers=4)
        >>> forward_flops(SimpleNamespace(**sizes), 4096, 256) / 1e12
        17.4
    """
    return sum(operation_flops(config, image_tokens, text_tokens, text_tail=text_tail).values())  # pyright: ignore


def train_flops(
    config: ModelSize,
    image_tokens: Tokens,
    text_tokens: Tokens,
    *,
    recompute: Recompute = "none",
    text_tail: bool = False,
) -> Tokens:
    """FLOPs of forward and backward of one sample: three forwards, four where every block is recomputed.

    The usual count for model FLOPs utilisation: for every matrix product of the forward, two in the backward.
    What a fused attention recomputes inside its backward does not count; selective recomputation repeats no matrix
    product and costs nothing here.

    Args:
        config: sizes of the model.
        image_tokens: n, as in :func:`operation_flops`.
        text_tokens: l, likewise.
        recompute: ``"full"`` adds the fourth forward. For utilisation of the hardware; leave it out for the model's.
        text_tail: as in :func:`operation_flops`.

    Returns:
        FLOPs, in the form of the token counts.

    Raises:
        ValueError: as :func:`operation_flops`, or if ``recompute`` is unknown.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = dict(num_layers=48, inner_dim=1536, mlp_dim=4096, num_attention_heads=24, attention_head_dim=64)
        >>> sizes |= dict(in_channels=128, out_channels=32, patch_size=2, enc_hidden_dim=2880, num_text_layers=4)
        >>> train_flops(SimpleNamespace(**sizes), np.array([256, 4096]), 150) / 1e12
        array([ 3.5, 50.6])
    """
    _check_recompute(recompute)
    return (4 if recompute == "full" else 3) * forward_flops(config, image_tokens, text_tokens, text_tail=text_tail)


def parameter_count(config: ModelSize) -> int:
    """Number of parameters, the last block's unused text tail included (4,104,225,152 as released).

    Args:
        config: sizes of the model.

    Returns:
        The count.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = dict(num_layers=48, inner_dim=1536, mlp_dim=4096, num_attention_heads=24, attention_head_dim=64)
        >>> sizes |= dict(in_channels=128, out_channels=32, patch_size=2, enc_hidden_dim=2880, num_text_layers=4)
        >>> parameter_count(SimpleNamespace(**sizes))
        4104225152
    """
    d, text = config.inner_dim, config.num_text_layers * config.enc_hidden_dim
    qkv, attention_out, modulation = _linear(d, 3 * d), _linear(d, d), _linear(d, 6 * d)
    norms, mlp = 2 * d + 2 * config.attention_head_dim, 3 * d * config.mlp_dim
    block = 2 * (qkv + attention_out + modulation + norms + mlp)
    text_in = text + _linear(text, d)
    time = _linear(SINUSOID_DIM, d) + _linear(d, d)
    output = _linear(d, 2 * d) + _linear(d, _output_width(config))
    return config.num_layers * block + _linear(config.in_channels, d) + text_in + time + output


def activation_bytes(
    config: ModelSize,
    image_tokens: Tokens,
    text_tokens: Tokens,
    *,
    dtype_bytes: int = 2,
    recompute: Recompute = "none",
) -> Tokens:
    """Bytes of activations that one sample holds at the start of the backward, at its largest.

    Each block keeps what :data:`BLOCK_ACTIVATIONS` lists, and float32 statistics (one per norm, two per head for the
    query and key norms and one per head for the softmax). With recomputation each block keeps less, and one block
    at a time has the rest again. The modulation (``12 d`` per block) is held once per sample. Weights, gradients,
    workspaces and the loss are not in it.

    Args:
        config: sizes of the model.
        image_tokens: n, as in :func:`operation_flops`.
        text_tokens: l, likewise.
        dtype_bytes: bytes of one activation: 2 for bfloat16.
        recompute: ``"none"``; ``"selective"``, all but results of matrix products and attention again; ``"full"``, all
            but each block's input.

    Returns:
        Bytes, in the form of the token counts.

    Raises:
        ValueError: as :func:`operation_flops`, or if ``dtype_bytes`` is not positive or ``recompute`` is unknown.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = dict(num_layers=48, inner_dim=1536, mlp_dim=4096, num_attention_heads=24, attention_head_dim=64)
        >>> sizes |= dict(in_channels=128, out_channels=32, patch_size=2, enc_hidden_dim=2880, num_text_layers=4)
        >>> activation_bytes(SimpleNamespace(**sizes), 4096, 256) / 1e9
        14.2
    """
    _check_recompute(recompute)
    if dtype_bytes < 1:
        raise ValueError(f"dtype_bytes: expected at least 1, got {dtype_bytes}")
    n, l = _counts(image_tokens, text_tokens)
    d, layers = config.inner_dim, config.num_layers

    def held(*, again: bool, tail: bool) -> int:
        """Bytes per token of one block that are kept, or that are had again after recomputation."""
        total = 0
        for index, row in enumerate(BLOCK_ACTIVATIONS):
            dropped = (recompute == "selective" and row.selective) or (recompute == "full" and index > 0)
            if dropped == again and (tail or not row.tail):
                total += dtype_bytes * (row.inner * d + row.mlp * config.mlp_dim)
        statistics = 1 + 3 * config.num_attention_heads + (1 if tail else 0)
        return total + (STATISTIC_BYTES * statistics if again == (recompute == "full") else 0)

    kept = held(again=False, tail=True)
    blocks = layers * kept * n + ((layers - 1) * kept + held(again=False, tail=False)) * l
    one_block = held(again=True, tail=True) * n + held(again=True, tail=layers > 1) * l
    # Raw and normed text features; image input; last residual, its modulated norm, prediction.
    ends = dtype_bytes * (config.in_channels + 2 * d + _output_width(config)) * n
    ends = ends + dtype_bytes * 2 * config.num_text_layers * config.enc_hidden_dim * l
    return blocks + one_block + ends + dtype_bytes * 12 * d * layers


def _counts(image_tokens: Any, text_tokens: Any) -> tuple[Any, Any]:
    n, l = _count("image_tokens", image_tokens), _count("text_tokens", text_tokens)
    if {type(n), type(l)} >= {np.ndarray, torch.Tensor}:
        raise ValueError("image_tokens and text_tokens: expected both as arrays or both as tensors, got one of each")
    return n, l


def _count(name: str, tokens: Any) -> Any:
    if isinstance(tokens, np.generic):
        tokens = tokens.item()
    # float64 holds every count exactly up to 9e15 and, unlike the integers that indices are stored in, never wraps.
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iuf":
        tokens = tokens.astype(np.float64)
    elif isinstance(tokens, Tensor) and not tokens.is_complex() and tokens.dtype != torch.bool:
        tokens = tokens.to(torch.float64)
    elif isinstance(tokens, bool) or not isinstance(tokens, int | float):
        raise ValueError(f"{name}: expected a number, a numeric array or a tensor, got {type(tokens).__name__}")
    if bool((tokens < 0).any() if isinstance(tokens, np.ndarray | Tensor) else tokens < 0):
        raise ValueError(f"{name}: expected non-negative counts, got a negative one")
    return tokens


def _check_recompute(recompute: str) -> None:
    if recompute not in ("none", "selective", "full"):
        raise ValueError(f"recompute: expected none, selective or full, got {recompute!r}")


def _output_width(config: ModelSize) -> int:
    return config.patch_size**2 * config.out_channels


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
