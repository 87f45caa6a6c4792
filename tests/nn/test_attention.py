"""Packed attention: every backend that runs here against a softmax written out, in values and gradients."""

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lensmini.nn.attention import AttentionBackend, packed_attention
from tests import reference

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
HERE: list[AttentionBackend] = ["auto", "loop", "padded", "math"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def draw(seed: int, total: int, dtype: torch.dtype = torch.float64, heads: int = 2, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [2 * torch.randn(total, heads, dim, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def naive(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([reference.attention(q, k, v) for q, k, v in pieces])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", HERE)
@given(lengths=LENGTHS, seed=SEEDS)
@example(lengths=[1], seed=0)
@example(lengths=[1, 1, 1], seed=0)
@example(lengths=[4, 4, 7, 4, 4], seed=0)
@example(lengths=[600, 3], seed=0)
def test_backend_equals_a_written_out_softmax_in_values_and_gradients(
    backend: AttentionBackend, dtype: torch.dtype, lengths: list[int], seed: int
) -> None:
    inputs = draw(seed, sum(lengths), dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actual = packed_attention(*inputs, offsets_of(lengths), backend=backend)
    expected = naive(*exact, lengths)
    assert actual.dtype == dtype
    assert relative(actual, expected) < TOLERANCE[dtype]
    gradients = torch.autograd.grad(actual, inputs, upstream.to(dtype))
    scale = max(g.abs().max() for g in torch.autograd.grad(expected, exact, upstream, retain_graph=True))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert ((gradient - wanted).abs().max() / scale).item() < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", HERE)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any), seed=SEEDS)
def test_samples_without_tokens_are_skipped(backend: AttentionBackend, lengths: list[int], seed: int) -> None:
    inputs = draw(seed, sum(lengths))
    present = [length for length in lengths if length]
    actual = packed_attention(*inputs, offsets_of(lengths), backend=backend)
    assert relative(actual, naive(*inputs, present)) < 1e-12
    assert all(g.isfinite().all() for g in torch.autograd.grad(actual.sum(), inputs))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("lengths", [[40, 17, 40], [300, 20]])
@pytest.mark.parametrize(("size", "limit"), [(1.0, 0.008), (2.0, 0.02)])
def test_bf16_stays_within_its_own_rounding(
    backend: AttentionBackend, lengths: list[int], size: float, limit: float
) -> None:
    """The larger size has logits of standard deviation 4, beyond what normalised queries and keys start with."""
    inputs = [(size / 2 * x.detach()).bfloat16().requires_grad_() for x in draw(3, sum(lengths))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual, expected = packed_attention(*inputs, offsets_of(lengths), backend=backend), naive(*exact, lengths)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(actual, inputs, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((actual, *gradients), (expected, *wanted), strict=True):
        assert one.dtype == torch.bfloat16
        assert ((one - other).norm() / other.norm()).item() < limit


@pytest.mark.parametrize("backend", HERE)
@given(seed=SEEDS, poison=st.sampled_from([math.nan, math.inf, 1e30]), victim=st.integers(0, 2))
def test_poison_in_one_sample_stays_there(backend: AttentionBackend, seed: int, poison: float, victim: int) -> None:
    lengths = [3, 5, 3]
    inputs = [x.detach() for x in draw(seed, sum(lengths), torch.float32)]
    clean = packed_attention(*inputs, offsets_of(lengths), backend=backend).split(lengths)
    for x in inputs:
        x.split(lengths)[victim].fill_(poison)
    poisoned = packed_attention(*inputs, offsets_of(lengths), backend=backend).split(lengths)
    for index, (one, other) in enumerate(zip(clean, poisoned, strict=True)):
        assert index == victim or one.equal(other)


@pytest.mark.parametrize("backend", HERE)
@given(seed=SEEDS, lengths=LENGTHS)
def test_a_sample_does_not_depend_on_its_mates_bit_for_bit_at_equal_shapes(
    backend: AttentionBackend, seed: int, lengths: list[int]
) -> None:
    inputs, others = ([x.detach() for x in draw(s, sum(lengths), torch.float32)] for s in (seed, (seed + 1) % 2**32))
    mine = slice(0, lengths[0])
    for x, other in zip(inputs, others, strict=True):
        other[mine] = x[mine]
    results = [packed_attention(*batch, offsets_of(lengths), backend=backend)[mine] for batch in (inputs, others)]
    assert results[0].equal(results[1])


@given(seed=SEEDS, lengths=LENGTHS, order=st.randoms(use_true_random=False))
def test_permuting_samples_permutes_results(seed: int, lengths: list[int], order) -> None:
    inputs = draw(seed, sum(lengths))
    permutation = list(range(len(lengths)))
    order.shuffle(permutation)
    plain = packed_attention(*inputs, offsets_of(lengths)).split(lengths)
    moved = [torch.cat([x.split(lengths)[i] for i in permutation]) for x in inputs]
    result = packed_attention(*moved, offsets_of([lengths[i] for i in permutation]))
    assert relative(result, torch.cat([plain[i] for i in permutation])) < 1e-12


@pytest.mark.parametrize("backend", HERE)
def test_inputs_are_not_modified_and_strided_inputs_work(backend: AttentionBackend) -> None:
    joined = torch.randn(8, 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = joined.clone()
    strided = packed_attention(*joined.unbind(1), offsets_of([5, 3]), backend=backend)
    plain = packed_attention(*(x.contiguous() for x in joined.unbind(1)), offsets_of([5, 3]), backend=backend)
    assert joined.equal(before)
    torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_host_lengths_change_nothing(backend: AttentionBackend) -> None:
    inputs = draw(0, 9)
    plain = packed_attention(*inputs, offsets_of([4, 5]), backend=backend)
    assert packed_attention(*inputs, offsets_of([4, 5]), lengths=(4, 5), backend=backend).equal(plain)


@pytest.mark.parametrize("backend", ["auto", "padded"])
def test_samples_of_one_length_never_meet_a_mask(backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    original = F.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
        masks.append(args[3] if len(args) > 3 else attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("flex attention is a mask")

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr("lensmini.nn.attention._flex", refuse)
    inputs = draw(0, 12)
    packed_attention(*inputs, offsets_of([4, 4, 4]), backend=backend)
    assert all(mask is None for mask in masks)
    if backend == "padded":
        packed_attention(*inputs, offsets_of([4, 8]), backend=backend)
        assert masks[-1] is not None, "the spy must be able to see a mask"


@needs_no_gpu
@pytest.mark.parametrize(
    ("backend", "reason"), [("varlen", "CUDA"), ("xformers", "CUDA"), ("flex", "no backward on cpu")]
)
def test_a_backend_that_cannot_run_here_says_why(backend: AttentionBackend, reason: str) -> None:
    with pytest.raises(ValueError, match=f'"{backend}" cannot run here.*{reason}'):
        packed_attention(*draw(0, 5), offsets_of([2, 3]), backend=backend)


def test_loop_has_no_forward_mode_and_says_what_has() -> None:
    inputs = [x.detach() for x in draw(0, 5)]

    def attend(query: Tensor) -> Tensor:
        return packed_attention(query, *inputs[1:], offsets_of([2, 3]), backend="loop")

    with pytest.raises(ValueError, match='use "math"'):
        torch.func.jvp(attend, (inputs[0],), (inputs[0],))


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_forward_mode_equals_a_finite_difference(backend: AttentionBackend) -> None:
    inputs = tuple(x.detach() for x in draw(0, 9))
    tangents = tuple(x.detach() for x in draw(1, 9))

    def attend(*tensors: Tensor) -> Tensor:
        return packed_attention(*tensors, offsets_of([2, 3, 4]), backend=backend)

    _, tangent = torch.func.jvp(attend, inputs, tangents)
    step = 1e-5
    moved = [attend(*(x + sign * step * d for x, d in zip(inputs, tangents, strict=True))) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["loop", "padded", "math"])
def test_gradcheck_of_every_backend(backend: AttentionBackend) -> None:
    inputs = draw(0, 6, heads=1, dim=4)
    offsets = offsets_of([2, 0, 3, 1])
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, offsets, backend=backend), inputs)


@pytest.mark.slow
@needs_no_gpu
def test_flex_without_gradients_agrees_on_cpu() -> None:
    lengths = [130, 5, 40]
    inputs = [x.detach() for x in draw(0, sum(lengths), torch.float32, dim=16)]
    actual = packed_attention(*inputs, offsets_of(lengths), backend="flex")
    assert relative(actual, naive(*(x.double() for x in inputs), lengths)) < 1e-5


def test_errors_name_the_argument_at_fault() -> None:
    query, key, value = (x.detach() for x in draw(0, 5))
    good = offsets_of([2, 3])
    with pytest.raises(ValueError, match="^query:"):
        packed_attention(query[0], key, value, good)
    with pytest.raises(ValueError, match="^key:"):
        packed_attention(query, key[:, :1], value, good)
    with pytest.raises(ValueError, match="^value:"):
        packed_attention(query, key, value[:4], good)
    with pytest.raises(ValueError, match="dtype"):
        packed_attention(query, key, value.float(), good)
    with pytest.raises(ValueError, match="^offsets:"):
        packed_attention(query, key, value, offsets_of([2, 2]))
    with pytest.raises(ValueError, match="^offsets:"):
        packed_attention(query, key, value, torch.tensor([0, 7, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="^backend:.*'fast'"):
        packed_attention(query, key, value, good, backend="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="^(offsets|lengths):"):
        packed_attention(query, key, value, good, lengths=(5,))
