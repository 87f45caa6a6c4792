"""What the training-step benchmark measures: contestants, the floor, memory, attention backends and kernels."""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lensmini.cost import SINUSOID_DIM, activation_bytes
from lensmini.nn import LensConfig, LensTransformer, packed_attention
from lensmini.nn.attention import AttentionBackend
from lensmini.packed import Layout, equal_runs
from lensmini.parallel.recompute import Recompute, recompute_blocks

Call = Callable[[], object]
Part = tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]

POOLED_DIM = 768
MAX_TOKENS = 200_000
"""Where the search for the largest batch ends: at the released width, indices of more elements pass 2^31."""
RECOMPUTE_MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of one step of both models: ``[N, c]``, ``[b]`` float32, ``[M, k, e]`` and where they stand."""

    image_tokens: Tensor
    t: Tensor
    text_tokens: Tensor
    layout: Layout


def make_batch(config: LensConfig, layout: Layout, dtype: torch.dtype) -> Batch:
    """Random inputs for a layout, on its device."""
    new = partial(torch.randn, dtype=dtype, device=layout.grids.device)
    return Batch(
        image_tokens=new(layout.num_image_tokens, config.in_channels),
        t=torch.rand(layout.batch_size, device=layout.grids.device),
        text_tokens=new(layout.num_text_tokens, config.num_text_layers, config.enc_hidden_dim),
        layout=layout,
    )


def make_ours(config: LensConfig, dtype: torch.dtype, device: torch.device) -> LensTransformer:
    """The model with torch's default fill: with adaLN-zero the products would multiply zeros, which is cheaper on GPUs."""
    with device:
        return LensTransformer(config).to(dtype)


def our_step(model: LensTransformer, batch: Batch, *, keep_grads: bool = False) -> Call:
    """Forward and backward to all parameters; gradients are made anew unless kept."""
    grad = batch.image_tokens.new_empty(len(batch.image_tokens), model.config.output_dim).normal_()

    def run() -> None:
        model.zero_grad(set_to_none=not keep_grads)
        velocity = model.forward_packed(batch.image_tokens, batch.t, batch.text_tokens, batch.layout)
        torch.autograd.backward(velocity, grad)  # pyright: ignore[reportArgumentType]

    return run


def make_peer(config: LensConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """diffusers' Flux with double-stream blocks only: the same products per token, the same modulation and depth.

    Its last block runs the text tail that ours skips, and a pooled text vector passes two small linears.
    """
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    with device:
        peer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=config.in_channels,
            out_channels=config.output_dim,
            num_layers=config.num_layers,
            num_single_layers=0,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            joint_attention_dim=config.num_text_layers * config.enc_hidden_dim,
            pooled_projection_dim=POOLED_DIM,
            axes_dims_rope=config.axes_dims_rope,
        )
    return nn.Module.to(peer, dtype)


def peer_step(peer: nn.Module, batch: Batch) -> Call:
    """The same step of the peer on dense ``[b, n, c]``; samples must have equal lengths.

    Raises:
        ValueError: if they have not.
    """
    layout, b = batch.layout, batch.layout.batch_size
    grids = {tuple(pair) for pair in layout.grids.tolist()}
    if len(grids) > 1 or len(set(layout.text_lengths)) > 1:
        raise ValueError(f"layout: expected samples of equal size for the dense peer, got {layout.joint_lengths}")
    (height, width), text = grids.pop(), layout.text_lengths[0]
    device, dtype = batch.image_tokens.device, batch.image_tokens.dtype
    ids = torch.zeros(height * width, 3, device=device)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(ids)
    inputs = {
        "hidden_states": batch.image_tokens.unflatten(0, (b, -1)),
        "encoder_hidden_states": batch.text_tokens.flatten(1).unflatten(0, (b, -1)),
        "pooled_projections": torch.randn(b, POOLED_DIM, dtype=dtype, device=device),
        "timestep": batch.t.to(dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }
    grad = torch.randn(b, height * width, peer.config.out_channels, dtype=dtype, device=device)  # pyright: ignore

    def run() -> None:
        peer.zero_grad(set_to_none=True)
        torch.autograd.backward(peer(**inputs)[0], grad)

    return run


def floor_step(config: LensConfig, layout: Layout, dtype: torch.dtype, *, backward: bool = True) -> Call:
    """Only the model's linears and torch's attention, each on contiguous inputs of its own, nothing between them.

    The blocks share one block's tensors, because those of 48 blocks would not fit: that can only lower the floor.
    Attention is torch's varlen kernel where lengths differ on CUDA, else one SDPA per run of equal lengths.
    """
    d, mlp, b, lengths = config.inner_dim, config.mlp_dim, layout.batch_size, layout.joint_lengths
    images, texts, heads = layout.num_image_tokens, layout.num_text_tokens, config.num_attention_heads
    new = partial(torch.randn, dtype=dtype, device=layout.grids.device)

    def part(function: Callable[..., Tensor], result: tuple[int, ...], *inputs: tuple[int, ...]) -> Part:
        return function, tuple(new(size).requires_grad_(backward) for size in inputs), new(result)

    def linears(*sizes: tuple[int, int, int]) -> list[Part]:
        return [part(F.linear, (rows, o), (rows, i), (o, i)) for rows, i, o in sizes]

    tails = [linears((n, d, d), (n, d, mlp), (n, d, mlp), (n, mlp, d)) for n in (images, texts)]
    if layout.grids.is_cuda and len(set(lengths)) > 1:
        varlen = partial(packed_attention, offsets=layout.joint_offsets, lengths=lengths, backend="varlen")
        attention = [part(varlen, *[(sum(lengths), heads, d // heads)] * 4)]
    else:
        shapes = [(run.count, heads, run.length, d // heads) for run in equal_runs(lengths)]
        attention = [part(F.scaled_dot_product_attention, *[shape] * 4) for shape in shapes]
    # Nothing reads the last block's text: it has no tail there.
    last = [*linears((b, d, 6 * d), (b, d, 6 * d), (images, d, 3 * d), (texts, d, 3 * d)), *attention, *tails[0]]
    inside = (config.num_layers - 1) * [*last, *tails[1]] + last
    text_dim = config.num_text_layers * config.enc_hidden_dim
    before = linears((b, SINUSOID_DIM, d), (b, d, d), (images, config.in_channels, d), (texts, text_dim, d))
    sequence = [*before, *inside, *linears((b, d, 2 * d), (images, d, config.output_dim))]

    def run() -> None:
        for function, inputs, grad in sequence:
            result = function(*inputs)
            if backward:
                torch.autograd.grad(result, inputs, grad)

    return run


def attention_calls(config: LensConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Call]:
    """Forward and backward of attention on the layout's joint lengths by every backend; what cannot run raises.

    Ours by name (without "math", which is no contestant), and a loop over torch's SDPA with its flash or cuDNN kernel.
    """
    lengths, device = layout.joint_lengths, layout.grids.device
    shape = (sum(lengths), config.num_attention_heads, config.attention_head_dim)
    query, key, value = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype, device=device)

    def ours(backend: AttentionBackend) -> None:
        result = packed_attention(query, key, value, layout.joint_offsets, lengths=lengths, backend=backend)
        torch.autograd.grad(result, (query, key, value), grad)

    def sdpa(kernel: SDPBackend) -> None:
        if kernel == SDPBackend.CUDNN_ATTENTION and device.type != "cuda":
            raise ValueError(f"cuDNN's attention has CUDA kernels only, and query is on {device}")
        with sdpa_kernel(kernel):
            pieces = []
            for run in equal_runs(lengths):
                size = (run.count, run.length)
                q, k, v = (x[run.rows].unflatten(0, size).transpose(1, 2) for x in (query, key, value))
                pieces.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
            torch.autograd.grad(torch.cat(pieces), (query, key, value), grad)

    names = [name for name in get_args(AttentionBackend) if name not in ("auto", "math")]
    calls: dict[str, Call] = {name: partial(ours, name) for name in names}
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return calls | {f"sdpa {name}": partial(sdpa, kernel) for name, kernel in kernels.items()}


def usable(
    calls: Mapping[str, Call], errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)
) -> tuple[dict[str, Call], dict[str, str]]:
    """Call each once: those that ran, and of those that raised one of ``errors`` the first line of why."""
    reasons: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
        except errors as error:
            reasons[name] = (str(error) or type(error).__name__).splitlines()[0]
        if name in reasons:  # outside of the handler, which still holds the frames and their tensors
            release()
    return {name: call for name, call in calls.items() if name not in reasons}, reasons


def release() -> None:
    """Give memory that nobody holds back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _LiveBytes(TorchDispatchMode):
    """Storages that operations made, with their bytes; views of tensors from outside are not made here."""

    def __init__(self, outside: Sequence[Tensor]) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.outside = {StorageWeakRef(tensor.untyped_storage()) for tensor in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return result


def held_bytes(forward: Callable[[], object], outside: Sequence[Tensor]) -> int:
    """Bytes that a forward leaves behind, its result included, without the tensors ``outside`` that were there before."""
    if outside[0].is_cuda:
        before = torch.cuda.memory_allocated()
        result = forward()
        held = torch.cuda.memory_allocated() - before
    else:
        with _LiveBytes(outside) as live:
            result = forward()
            alive = [storage for storage in live.made if not storage.expired()]
            held = sum(live.made[storage] for storage in alive if storage not in live.outside)
    del result
    return held


def activations_per_token(model: LensTransformer, batch: Batch) -> dict[str, dict[str, int | None]]:
    """Bytes per token by recomputation mode: held after an eager forward (None if the step does not fit), and by ``cost``.

    What ``cost.activation_bytes`` says is for the start of the backward, where one block has all of its own again.
    """
    rows, layout, num_tokens = {}, batch.layout, len(batch.layout.joint_order)
    for mode in RECOMPUTE_MODES:
        recompute_blocks(model.transformer_blocks, mode)
        ran, _ = usable({"step": our_step(model, batch)})
        model.zero_grad(set_to_none=True)

        def forward() -> object:
            return model.forward_packed(batch.image_tokens, batch.t, batch.text_tokens, batch.layout)

        outside = [batch.image_tokens, batch.t, batch.text_tokens, *model.parameters()]
        outside += [x for x in vars(layout).values() if isinstance(x, Tensor)]
        held = round(held_bytes(forward, outside) / num_tokens) if ran else None
        undo_recompute(model)
        size = batch.image_tokens.element_size()
        counts = zip(layout.image_lengths, layout.text_lengths, strict=True)
        said = sum(activation_bytes(model.config, n, l, dtype_bytes=size, recompute=mode) for n, l in counts)
        rows[mode] = {"measured": held, "cost": round(said / num_tokens)}
    return rows


def undo_recompute(model: LensTransformer) -> None:
    """Take back what ``recompute_blocks`` put over the class's forward."""
    for block in model.transformer_blocks:
        vars(block).pop("forward", None)


def largest_fit(fits: Callable[[int], bool], *, guess: int, cap: int) -> int:
    """Largest count that fits, to 2 %, by bisection from a guess; ``cap`` if that fits, 0 if not even 1 does."""
    low, high, count = 0, None, min(max(1, guess), cap)
    while True:
        if fits(count):
            low = count
        else:
            high = count
        if low == cap or high == 1 or (high is not None and low and high - low <= max(1, 0.02 * low)):
            return low
        if high is None:
            count = min(cap, max(low + 1, low * 5 // 4))
        elif low:
            count = (low + high) // 2
        else:
            count = high * 4 // 5


def largest_batches(model: LensTransformer, grid: tuple[int, int], text: int) -> dict[str, dict[str, object]]:
    """Largest packed batch of equal images whose eager step fits beside weights and gradients (CUDA), by mode."""
    device, dtype = model.proj_out.weight.device, model.proj_out.weight.dtype
    tokens, rows = grid[0] * grid[1] + text, {}
    for mode in RECOMPUTE_MODES:
        recompute_blocks(model.transformer_blocks, mode)

        def step(count: int) -> None:
            layout = Layout.build([grid] * count, text_lengths=[text] * count, device=device)
            our_step(model, make_batch(model.config, layout, dtype), keep_grads=True)()

        def fits(count: int) -> bool:
            ran, _ = usable({"step": partial(step, count)})
            release()
            return bool(ran)

        each = activation_bytes(model.config, grid[0] * grid[1], text, recompute=mode)
        cap = max(1, MAX_TOKENS // tokens)
        room = torch.cuda.mem_get_info()[0] if fits(1) else 0
        count = largest_fit(fits, guess=int(room / each), cap=cap) if room else 0
        rows[mode] = {"images": count, "tokens": count * tokens, "search_ended_there": count == cap}
        undo_recompute(model)
        model.zero_grad(set_to_none=True)
        release()
    return rows


def kernel_group(name: str) -> str:
    """``attention``, ``matmul``, or the kernel's name without its arguments and number."""
    if re.search(r"flash|fmha|sdpa|attention|attn", name, re.IGNORECASE):
        return "attention"
    if re.search(r"gemm|nvjet|cutlass|cublas|xmma|(::|add|b|_)mm\b|mkl_linear", name, re.IGNORECASE):
        return "matmul"
    return re.sub(r"_\d+$", "", re.sub(r"^void |[<(].*", "", name)) or name


def summarise_kernels(kernels: Sequence[tuple[str, float, int]], top: int = 12) -> dict[str, object]:
    """Of (name, seconds, calls): the longest, time by group, and the largest group that is neither matmul nor attention."""
    groups: dict[str, float] = {}
    for name, seconds, _ in kernels:
        groups[kernel_group(name)] = groups.get(kernel_group(name), 0.0) + seconds
    ordered = sorted(groups, key=lambda name: -groups[name])
    rest = [name for name in ordered if name not in ("matmul", "attention")]
    longest = sorted(kernels, key=lambda row: -row[1])[:top]
    return {
        "seconds": sum(groups.values()),
        "groups": {name: groups[name] for name in ordered[:top]},
        "largest_gap": {"group": rest[0], "seconds": groups[rest[0]]} if rest else None,
        "top": [{"name": name[:160], "seconds": seconds, "calls": calls} for name, seconds, calls in longest],
    }
