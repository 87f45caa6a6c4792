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
from torch.autograd import DeviceType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lensmini.cost import SINUSOID_DIM, activation_bytes
from lensmini.nn import LensConfig, LensTransformer, packed_attention
from lensmini.nn.attention import AttentionBackend
from lensmini.packed import Layout, equal_runs
from lensmini.parallel.recompute import Recompute, recompute_blocks

Call = Callable[[], object]
Part = tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s of the SXM cards, by what their names contain."""
POOLED_DIM = 768
MAX_TOKENS = 200_000
"""Where the search for the largest batch ends: at the released width, indices of more elements pass 2^31."""
RECOMPUTE_MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of one step of both models."""

    image_tokens: Tensor
    """``[N, c]``."""
    t: Tensor
    """``[b]`` float32."""
    text_tokens: Tensor
    """``[M, k, e]``."""
    layout: Layout

    @property
    def num_tokens(self) -> int:
        """Image and text tokens."""
        return self.layout.num_image_tokens + self.layout.num_text_tokens


def peak_flops(name: str) -> float | None:
    """Peak of a device by its name, or None if the table lacks it (the slower PCIe cards are not in it)."""
    return None if "PCIe" in name else next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


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
    grad = torch.randn_like(batch.image_tokens[:, :1]).expand(-1, model.config.output_dim).contiguous()

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
        return FluxTransformer2DModel(
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
        ).to(dtype)


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


def linear_shapes(config: LensConfig, layout: Layout) -> tuple[list[tuple[int, int, int]], ...]:
    """Rows, inputs and outputs of each linear: of a block, of the last block (no text tail), and outside of the blocks."""
    d, mlp, b = config.inner_dim, config.mlp_dim, layout.batch_size
    tail = [(d, d), (d, mlp), (d, mlp), (mlp, d)]
    images, texts = layout.num_image_tokens, layout.num_text_tokens
    last = [(b, d, 6 * d)] * 2 + [(images, d, 3 * d), (texts, d, 3 * d)] + [(images, i, o) for i, o in tail]
    ends = [
        (b, SINUSOID_DIM, d),
        (b, d, d),
        (images, config.in_channels, d),
        (texts, config.num_text_layers * config.enc_hidden_dim, d),
        (b, d, 2 * d),
        (images, d, config.output_dim),
    ]
    return [*last, *((texts, i, o) for i, o in tail)], last, ends


def floor_step(config: LensConfig, layout: Layout, dtype: torch.dtype, *, backward: bool = True) -> Call:
    """Only the model's linears, and torch's attention, each on a contiguous input of its own, nothing between them.

    The blocks share one block's tensors, because 48 blocks' would not fit: that can only lower the floor.
    """
    new = partial(torch.randn, dtype=dtype, device=layout.grids.device)
    made: dict[tuple[int, int, int, int], Part] = {}

    def parts(shapes: Sequence[tuple[int, int, int]]) -> list[Part]:
        result = []
        for place, (rows, inputs, outputs) in enumerate(shapes):
            key = (place, rows, inputs, outputs)
            if key not in made:
                x, weight = new(rows, inputs), new(outputs, inputs)
                made[key] = F.linear, (x.requires_grad_(backward), weight.requires_grad_(backward)), new(rows, outputs)
            result.append(made[key])
        return result

    block, last, ends = linear_shapes(config, layout)
    attention = _attention_parts(config, layout, new, backward=backward)
    sequence = parts(ends) + (config.num_layers - 1) * (parts(block) + attention) + parts(last) + attention

    def run() -> None:
        for function, inputs, grad in sequence:
            result = function(*inputs)
            if backward:
                torch.autograd.grad(result, inputs, grad)

    return run


def _attention_parts(config: LensConfig, layout: Layout, new: Callable[..., Tensor], *, backward: bool) -> list[Part]:
    """Torch's attention: its varlen kernel where lengths differ on CUDA, else a call per run of equal lengths."""
    heads, width, lengths = config.num_attention_heads, config.attention_head_dim, layout.joint_lengths
    if layout.grids.is_cuda and len(set(lengths)) > 1:
        function = partial(packed_attention, offsets=layout.joint_offsets, lengths=lengths, backend="varlen")
        shapes = [(sum(lengths), heads, width)]
    else:
        function = F.scaled_dot_product_attention
        shapes = [(run.count, heads, run.length, width) for run in equal_runs(lengths)]
    return [(function, tuple(new(s).requires_grad_(backward) for _ in range(3)), new(s)) for s in shapes]


def attention_calls(config: LensConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Call]:
    """Forward and backward of every attention backend on the layout's joint lengths; what cannot run raises.

    Ours by their names (without "math", which is there to be differentiated), and a loop over torch's SDPA held to its
    flash and to its cuDNN kernels.
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
                q, k, v = (
                    x[run.rows].unflatten(0, (run.count, run.length)).transpose(1, 2) for x in (query, key, value)
                )
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
    """Bytes of the storages that operations made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return result

    def held(self) -> int:
        return sum(size for storage, size in self.made.items() if not storage.expired())


def held_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Bytes that a forward leaves behind for the backward, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        result = forward()
        held = torch.cuda.memory_allocated(device) - before
    else:
        with _LiveBytes() as live:
            result = forward()
            held = live.held()
    del result
    return held


def activations_per_token(model: LensTransformer, batch: Batch) -> dict[str, dict[str, float]]:
    """Bytes per token by recomputation mode: held after an eager forward, and what ``cost.activation_bytes`` says.

    The latter is for the start of the backward, where one block at a time has the rest again.
    """
    rows, layout = {}, batch.layout
    for mode in RECOMPUTE_MODES:
        recompute_blocks(model.transformer_blocks, mode)
        our_step(model, batch)()
        model.zero_grad(set_to_none=True)

        def forward() -> object:
            return model.forward_packed(batch.image_tokens, batch.t, batch.text_tokens, batch.layout)

        held = held_bytes(forward, batch.image_tokens.device)
        undo_recompute(model)
        size = batch.image_tokens.element_size()
        counts = zip(layout.image_lengths, layout.text_lengths, strict=True)
        said = sum(activation_bytes(model.config, n, l, dtype_bytes=size, recompute=mode) for n, l in counts)
        rows[mode] = {"measured": round(held / batch.num_tokens), "cost": round(said / batch.num_tokens)}
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
        else:
            count = (low + high) // 2 if low else high * 4 // 5


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
    """Longest kernels, time by group, and the largest gap: the first group that is neither matmul nor attention.

    Args:
        kernels: name, seconds and calls of each.
        top: how many kernels to keep.
    """
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


def profile_step(call: Call, device: torch.device) -> dict[str, object]:
    """Kernels of one call (operators on the CPU), by torch's profiler."""
    cuda = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        kind = DeviceType.CUDA if cuda else DeviceType.CPU
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            time = event.self_device_time_total if cuda else event.self_cpu_time_total  # microseconds
            rows.append((event.key, time / 1e6, event.count))
    return summarise_kernels(rows)
