"""Norm, rotary embedding, time embedding, gated MLP and text fusion against the reference and torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lensmini.nn.embeddings import TimestepEmbedding, timestep_sinusoid
from lensmini.nn.fusion import MultiLayerTextFusion, fuse_text_layers
from lensmini.nn.heads import join_heads
from lensmini.nn.joint import join_streams, split_streams
from lensmini.nn.mlp import SwiGLU, silu_gate
from lensmini.nn.modulation import gated_residual, modulated_norm
from lensmini.nn.norm import RMSNorm, rms_normalise
from lensmini.nn.rope import RotaryEmbedding3D, RotaryTable, apply_rotary
from lensmini.nn.tracing import plain_ops
from lensmini.packed import Layout
from tests import reference
from tests.golden_cases import golden
from tests.strategies import layouts

SEEDS = st.integers(0, 2**32 - 1)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}


# --- RMSNorm


@given(SEEDS, st.integers(1, 9), st.sampled_from([1e-6, 1e-5, 0.1]), st.sampled_from([1e-4, 1.0, 1e4]))
def test_rms_norm_equals_the_reference_at_every_magnitude(seed: int, dim: int, eps: float, size: float) -> None:
    x, weight = size * randn(seed, 4, dim), randn(seed + 1, dim)
    torch.testing.assert_close(
        rms_normalise(x, weight, eps=eps), reference.rms_norm(x, weight, eps), rtol=1e-12, atol=0
    )


def test_rms_norm_module_has_the_eps_it_was_given_and_starts_at_one() -> None:
    x = 1e-3 * randn(0, 5, 8, dtype=torch.float32)
    for eps in (1e-6, 1e-5):
        expected = x / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + eps)
        torch.testing.assert_close(RMSNorm(8, eps=eps)(x), expected.float(), rtol=1e-5, atol=0)


def test_rms_norm_in_bf16_rounds_before_the_weight_is_applied() -> None:
    x, weight = randn(0, 300, 32).bfloat16(), (1 + 0.3 * randn(1, 32)).bfloat16()
    exact = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-6)
    expected = (exact.float().bfloat16().double() * weight.double()).bfloat16()
    actual = rms_normalise(x, weight, eps=1e-6)
    assert actual.dtype == torch.bfloat16
    # A tie in the first rounding may fall either way between float32 and float64 arithmetic.
    assert (actual != expected).float().mean() < 1e-3


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = RMSNorm(4)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and gradient.isfinite().all()


def test_rms_norm_names_the_argument_with_a_wrong_width() -> None:
    with pytest.raises(ValueError, match="hidden_states.*d=8"):
        RMSNorm(8)(torch.zeros(2, 7))


# --- rotary embedding


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), SEEDS, st.data())
@example([(1, 1)], 0, None)
@example([(2080 // 16, 1040 // 16)], 0, None)
def test_rope_tables_equal_the_reference_for_every_sample_of_a_mix(
    grids: list[tuple[int, int]], seed: int, data: st.DataObject | None
) -> None:
    mask = torch.rand(len(grids), 7, generator=torch.Generator().manual_seed(seed)) < 0.6
    axes = data.draw(st.sampled_from([(4, 6, 6), (8, 28, 28), (2, 4, 2)])) if data else (8, 28, 28)
    image, text = RotaryEmbedding3D(axes)(Layout.build(grids, text_mask=mask))
    rows = [reference.rope_angles(h, w, 7, axes) for h, w in grids]
    image_angles = torch.tensor([angle for images, _ in rows for angle in images])
    text_angles = [
        angle for (_, texts), keep in zip(rows, mask, strict=True) for angle, k in zip(texts, keep, strict=True) if k
    ]
    text_angles = torch.tensor(text_angles).reshape(-1, sum(axes) // 2)
    for table, angles in ((image, image_angles), (text, text_angles)):
        assert table.cos.shape == table.sin.shape == angles.shape
        assert ((table.cos - angles.cos()).abs() < 2e-5).all() and ((table.sin - angles.sin()).abs() < 2e-5).all()


@given(SEEDS, st.integers(1, 6), st.integers(1, 3), st.sampled_from([2, 8, 16]))
def test_apply_rotary_is_multiplication_of_complex_neighbours(seed: int, tokens: int, heads: int, dim: int) -> None:
    x, angles = randn(seed, tokens, heads, dim), randn(seed + 1, tokens, dim // 2)
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * angles)[:, None]
    actual = apply_rotary(x, RotaryTable(angles.cos(), angles.sin()))
    torch.testing.assert_close(actual, torch.view_as_real(expected).flatten(-2), rtol=1e-12, atol=1e-12)


@given(SEEDS, st.integers(-3, 9), st.integers(-3, 9))
def test_rotated_queries_and_keys_see_only_relative_positions(seed: int, row: int, column: int) -> None:
    query, key = randn(seed, 1, 1, 16), randn(seed + 1, 1, 1, 16)
    grid = (12, 12)
    table, _ = RotaryEmbedding3D((4, 6, 6))(Layout.build([grid]))

    def product(first: tuple[int, int], second: tuple[int, int]) -> Tensor:
        tables = [RotaryTable(table.cos[[y * 12 + x]], table.sin[[y * 12 + x]]) for y, x in (first, second)]
        return (apply_rotary(query, tables[0]) * apply_rotary(key, tables[1])).sum()

    def clip(value: int) -> int:
        return min(max(value, 0), 8)

    moved = (clip(row), clip(column))
    one = product((0, 0), (2, 3))
    other = product(moved, (moved[0] + 2, moved[1] + 3))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_apply_rotary_computes_at_least_in_float32_and_returns_the_input_dtype() -> None:
    x = randn(0, 50, 2, 8, dtype=torch.bfloat16)
    angles = 30 * randn(1, 50, 4, dtype=torch.float32)
    table = RotaryTable(angles.cos(), angles.sin())
    expected = apply_rotary(x.float(), table).bfloat16()
    assert apply_rotary(x, table).equal(expected)


def test_rope_refuses_odd_bands_and_tables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="axes_dims"):
        RotaryEmbedding3D((3, 6, 7))
    with pytest.raises(ValueError, match="table.cos"):
        apply_rotary(torch.zeros(3, 1, 4), RotaryTable(torch.zeros(2, 2), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="heads"):
        apply_rotary(torch.zeros(3, 1, 5), RotaryTable(torch.zeros(3, 2), torch.zeros(3, 2)))


# --- time


@given(st.floats(0, 1), st.sampled_from([2, 8, 256]))
@example(0.0, 256)
@example(1.0, 256)
def test_sinusoid_equals_the_reference_in_float64(t: float, dim: int) -> None:
    time = torch.tensor([t], dtype=torch.float64)
    expected = reference.sinusoid(time[0], dim)
    torch.testing.assert_close(timestep_sinusoid(time, dim)[0], expected, rtol=0, atol=1e-9)


@given(SEEDS)
def test_time_embedding_equals_the_reference(seed: int) -> None:
    torch.manual_seed(0)
    module = TimestepEmbedding(24).double()
    t = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = [reference.time_embedding(time, weights_of(module), "timestep_embedder") for time in t]
    torch.testing.assert_close(module(t), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_time_is_embedded_in_float32_even_by_bf16_weights() -> None:
    module = TimestepEmbedding(16).bfloat16()
    close = torch.tensor([0.9010, 0.9020])  # the same bf16 number, but cosines apart
    assert close.bfloat16().unique().numel() == 1
    first, second = module(close)
    assert first.dtype == torch.bfloat16 and not first.equal(second)


def test_sinusoid_names_the_argument_at_fault() -> None:
    with pytest.raises(ValueError, match="^t:"):
        timestep_sinusoid(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="^t:.*int64"):
        timestep_sinusoid(torch.tensor([500]))
    with pytest.raises(ValueError, match="^dim:"):
        timestep_sinusoid(torch.zeros(2), 5)


# --- MLP


@given(SEEDS, st.integers(1, 5))
def test_swiglu_equals_the_reference(seed: int, tokens: int) -> None:
    torch.manual_seed(seed % 1000)
    module = SwiGLU(6, 17).double()
    x = randn(seed, tokens, 6)
    expected = reference.swiglu(x, {f"mlp.{k}": v for k, v in weights_of(module).items()}, "mlp")
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)


def test_swiglu_without_gradients_leaves_what_hooks_have_seen_as_it_was() -> None:
    module, x, seen = SwiGLU(6, 17), randn(0, 3, 6, dtype=torch.float32), []
    module.w1.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        module(x)
    assert seen[0].equal(F.linear(x, module.w1.weight))


@given(SEEDS)
def test_silu_gate_has_the_gradients_of_plain_operations(seed: int) -> None:
    gate, value = 3 * randn(seed, 4, 5), randn(seed + 1, 4, 5)
    upstream = randn(seed + 2, 4, 5)
    gate, value = gate.requires_grad_(), value.requires_grad_()
    actual = torch.autograd.grad(silu_gate(gate, value), (gate, value), upstream)
    expected = torch.autograd.grad(F.silu(gate) * value, (gate, value), upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(silu_gate, (gate, value))


@given(SEEDS)
def test_silu_gate_gradient_in_one_argument_only(seed: int) -> None:
    gate, value = randn(seed, 4), randn(seed + 1, 4)
    for index in range(2):
        leaves = [x.clone().requires_grad_(i == index) for i, x in enumerate((gate, value))]
        (actual,) = torch.autograd.grad(silu_gate(*leaves).sum(), leaves[index])
        (expected,) = torch.autograd.grad((F.silu(leaves[0]) * leaves[1]).sum(), leaves[index])
        torch.testing.assert_close(actual, expected)


def test_mlp_shape_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="hidden_states"):
        SwiGLU(6, 4)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="value"):
        silu_gate(torch.zeros(2, 3), torch.zeros(3))


# --- text fusion


@given(SEEDS, st.integers(0, 5), st.integers(1, 4))
def test_text_fusion_equals_the_reference(seed: int, tokens: int, layers: int) -> None:
    torch.manual_seed(seed % 1000)
    module = MultiLayerTextFusion(layers, 6, 10).double()
    for norm in module.txt_norm:
        torch.nn.init.normal_(norm.weight)  # pyright: ignore[reportArgumentType]
    # From far below the epsilon to the size of late layers of a language model.
    features = [1000.0 ** (i - 1) * randn(seed + i, tokens, 6) for i in range(layers)]
    expected = reference.text_fusion(features, weights_of(module))
    actual = module(torch.stack(features, dim=1))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fuse_text_layers(torch.stack(features, 1), module.txt_norm, module.txt_in), actual)


def test_text_fusion_names_the_argument_with_a_wrong_number_of_layers() -> None:
    with pytest.raises(ValueError, match="text_tokens.*k=2"):
        MultiLayerTextFusion(2, 6, 10)(torch.zeros(3, 4, 6))


# --- per-sample modulation, queries and keys, the joint sequence


STREAM = st.sampled_from(["image", "text"])


@given(layouts(), STREAM, SEEDS)
def test_modulated_norm_is_each_tokens_own_norm_scaled_and_shifted(layout: Layout, stream: Any, seed: int) -> None:
    samples = layout.image_samples if stream == "image" else layout.text_samples
    x, weight = randn(seed, len(samples), 6), randn(seed + 1, 6)
    shift, scale = randn(seed + 2, layout.batch_size, 6), randn(seed + 3, layout.batch_size, 6)
    expected = [
        reference.rms_norm(x[i], weight, 1e-6) * (1 + scale[sample]) + shift[sample]
        for i, sample in enumerate(samples.tolist())
    ]
    expected = torch.stack(expected) if expected else x
    torch.testing.assert_close(modulated_norm(x, weight, shift, scale, layout, stream, eps=1e-6), expected)


@given(layouts(), STREAM, SEEDS)
def test_gated_residual_adds_each_tokens_update_times_its_samples_gate(layout: Layout, stream: Any, seed: int) -> None:
    samples = layout.image_samples if stream == "image" else layout.text_samples
    x, update, gate = (
        randn(seed, len(samples), 6),
        randn(seed + 1, len(samples), 6),
        randn(seed + 2, layout.batch_size, 6),
    )
    expected = [x[i] + gate[sample] * update[i] for i, sample in enumerate(samples.tolist())]
    expected = torch.stack(expected) if expected else x
    torch.testing.assert_close(gated_residual(x, update, gate, layout, stream), expected)


@given(layouts(), SEEDS, st.integers(1, 3), st.sampled_from([2, 8]))
def test_joined_heads_are_normed_then_rotated_then_joined(layout: Layout, seed: int, heads: int, dim: int) -> None:
    streams, tables, weights, expected = [], [], [], []
    for number, tokens in enumerate((layout.num_image_tokens, layout.num_text_tokens)):
        x, weight = randn(seed + number, tokens, 3, heads, dim), randn(seed + 2 + number, 2, dim)
        angles = randn(seed + 4 + number, tokens, dim // 2)
        streams, weights = [*streams, x], [*weights, weight]
        tables.append(RotaryTable(angles.cos(), angles.sin()))
        wanted = x.clone()
        for projection in range(2):
            for head in range(heads):
                normed = reference.rms_norm(x[:, projection, head], weight[projection], 1e-6)
                wanted[:, projection, head] = reference.rotate(normed, angles.tolist())
        expected.append(wanted)
    joint = torch.stack(join_heads(*streams, *weights, tuple(tables), layout, eps=1e-6), dim=1)
    by_sample = []
    for sample in range(layout.batch_size):
        by_sample += [expected[0][layout.image_samples == sample], expected[1][layout.text_samples == sample]]
    torch.testing.assert_close(joint, torch.cat(by_sample), rtol=1e-10, atol=1e-12)
    with plain_ops():
        plain = torch.stack(join_heads(*streams, *weights, tuple(tables), layout, eps=1e-6), dim=1)
    torch.testing.assert_close(plain, joint, rtol=1e-10, atol=1e-12)


def fused_cases() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    layout = Layout.build([(1, 2), (1, 2), (1, 1), (1, 3)], text_lengths=[1, 2, 0, 2])
    num, angles = layout.num_image_tokens, randn(9, layout.num_image_tokens + 5, 2)
    tables = [RotaryTable(part.cos(), part.sin()) for part in (angles[:num], angles[num:])]
    cases = {
        "silu_gate": (silu_gate, [(3, 2), (3, 2)]),
        "modulated_norm": (lambda *x: modulated_norm(*x, layout, "image", eps=1e-6), [(num, 4), (4,), (4, 4), (4, 4)]),
        "modulated_norm of text": (
            lambda *x: modulated_norm(*x, layout, "text", eps=1e-6),
            [(5, 4), (4,), (4, 4), (4, 4)],
        ),
        "gated_residual": (lambda *x: gated_residual(*x, layout, "image"), [(num, 4), (num, 4), (4, 4)]),
        "join_heads": (
            lambda *x: torch.stack(join_heads(*x, (tables[0], tables[1]), layout, eps=1e-6)),
            [(num, 3, 2, 4), (5, 3, 2, 4), (2, 4), (2, 4)],
        ),
    }
    return {
        name: (function, tuple(randn(i, *shape).requires_grad_() for i, shape in enumerate(shapes)))
        for name, (function, shapes) in cases.items()
    }


FUSED = pytest.mark.parametrize("name", fused_cases())


@FUSED
def test_hand_written_backward_passes_are_the_derivatives(name: str) -> None:
    function, inputs = fused_cases()[name]
    assert torch.autograd.gradcheck(function, inputs)


@FUSED
def test_hand_written_backward_passes_take_strided_gradients(name: str) -> None:
    function, inputs = fused_cases()[name]
    upstream = randn(7, *function(*inputs).shape)
    strided = torch.stack([upstream, upstream], dim=-1)[..., 0]
    expected = torch.autograd.grad(function(*inputs), inputs, upstream)
    before = strided.clone()
    for actual, wanted in zip(torch.autograd.grad(function(*inputs), inputs, strided), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    assert strided.equal(before), "a gradient that others may hold is not written to"


@FUSED
def test_second_derivatives_are_refused_and_right_with_plain_operations(name: str) -> None:
    """A gradient penalty must never be silently wrong."""
    function, inputs = fused_cases()[name]
    grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in grads).backward()  # pyright: ignore
    with plain_ops():
        assert torch.autograd.gradgradcheck(function, inputs)


@given(layouts(), SEEDS)
def test_splitting_undoes_joining_and_joined_samples_stand_together(layout: Layout, seed: int) -> None:
    image, text = randn(seed, layout.num_image_tokens, 3), randn(seed + 1, layout.num_text_tokens, 3)
    joined = join_streams(image, text, layout)
    expected = []
    for sample in range(layout.batch_size):
        expected += [image[layout.image_samples == sample], text[layout.text_samples == sample]]
    assert joined.equal(torch.cat(expected))
    assert all(a.equal(b) for a, b in zip(split_streams(joined, layout), (image, text), strict=True))


# --- published numbers


def test_published_rope_tables_and_rotation() -> None:
    tensors, meta = golden("rope_a")
    rope = RotaryEmbedding3D(meta["axes_dims_rope"], theta=meta["theta"])
    for grid in meta["grids"]:
        layout = Layout.build([(grid["height"], grid["width"])], text_lengths=[grid["text_len"]])
        for stream, table in zip(("img", "txt"), rope(layout), strict=True):
            for name, values in table._asdict().items():
                assert (values - tensors[f"{grid['key']}.{stream}_{name}"]).abs().max() < 5e-5, grid["key"]
    apply = meta["apply"]
    layout = Layout.build([(apply["height"], apply["width"])], text_lengths=[apply["text_len"]])
    for stream, table in zip(("img", "txt"), rope(layout), strict=True):
        for x, y in zip(tensors[f"apply.x_{stream}"], tensors[f"apply.y_{stream}"], strict=True):
            assert (apply_rotary(x, table) - y).abs().max() < 5e-5


def test_published_time_embedding() -> None:
    tensors, meta = golden("timestep_a")
    t = tensors["inputs.timestep"]
    assert (timestep_sinusoid(t) - tensors["outputs.sinusoid"]).abs().max() < 2e-4
    seen = tensors["bf16.timestep_seen"]
    assert (timestep_sinusoid(seen) - tensors["bf16.sinusoid"]).abs().max() < 2e-4
    module = TimestepEmbedding(meta["inner_dim"])
    module.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("weights.")})
    expected = tensors["outputs.temb"]
    assert (module(t) - expected).abs().max() < 1e-4 * expected.abs().max()
