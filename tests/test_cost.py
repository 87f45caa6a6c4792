"""FLOPs against torch's own counter on a model written here from bare linears and SDPA; released and tabled numbers."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lensmini.cost import activation_bytes, forward_flops, operation_flops, parameter_count, train_flops
from lensmini.nn.config import LensConfig
from lensmini.nn.transformer import LensTransformer
from tests.golden_cases import golden
from tests.reference import tensor_shapes
from tests.strategies import tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    num_layers: int = 48
    inner_dim: int = 1536
    mlp_dim: int = 4096
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 32
    patch_size: int = 2
    enc_hidden_dim: int = 2880
    num_text_layers: int = 4


RELEASED = Sizes()


@st.composite
def sizes(draw):
    heads, head_dim = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 6))
    numbers = {name: draw(st.integers(1, 9)) for name in ("in_channels", "out_channels", "enc_hidden_dim")}
    return Sizes(
        num_layers=draw(st.integers(1, 3)),
        inner_dim=heads * head_dim,
        mlp_dim=draw(st.integers(1, 40)),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        patch_size=draw(st.integers(1, 3)),
        num_text_layers=draw(st.integers(1, 4)),
        **numbers,
    )


counts = st.integers(1, 60)


def meta(*shape, **kwargs):
    return torch.empty(*shape, device="meta", **kwargs)


def linear(x, width):
    return F.linear(x, meta(width, x.shape[-1], requires_grad=True))


def block(image, text, temb, s, *, modulate=True, text_tail=True):
    """One double-stream block of Lens as matrix products; element-wise work is left out."""
    d, streams, out = s.inner_dim, {"image": image, "text": text}, {}
    if modulate:
        for _ in streams:
            linear(temb, 6 * d)
    joint = torch.cat([linear(x, 3 * d) for x in streams.values()])
    query, key, value = joint.unflatten(-1, (3, s.num_attention_heads, s.attention_head_dim)).unbind(1)
    heads_first = [x.transpose(0, 1)[None] for x in (query, key, value)]
    attended = F.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1).flatten(1)
    for name, x, y in zip(streams, streams.values(), attended.split([len(image), len(text)]), strict=True):
        if name == "text" and not text_tail:
            continue
        x = x + linear(y, d)
        out[name] = x + linear(linear(x, s.mlp_dim) * linear(x, s.mlp_dim), d)
    return out["image"], out.get("text")


def transformer(n, l, s, *, text_tail):
    temb = linear(linear(meta(1, 256), s.inner_dim), s.inner_dim)
    image = linear(meta(n, s.in_channels), s.inner_dim)
    text = linear(meta(l, s.num_text_layers * s.enc_hidden_dim), s.inner_dim)
    for index in range(s.num_layers):
        last = index == s.num_layers - 1
        image, text = block(image, text, temb, s, text_tail=text_tail or not last)
    linear(temb, 2 * s.inner_dim)
    linear(image, s.patch_size**2 * s.out_channels)


def counted(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


@given(s=sizes(), n=counts, l=counts, text_tail=st.booleans())
def test_forward_flops_equal_torchs_counter(s, n, l, text_tail):
    expected = counted(transformer, n, l, s, text_tail=text_tail)
    assert forward_flops(s, n, l, text_tail=text_tail) == expected


def test_one_released_block_has_the_tabled_flops():
    image = meta(4096, 1536, requires_grad=True)
    text = meta(256, 1536, requires_grad=True)

    def forward():
        return block(image, text, None, RELEASED, modulate=False)

    def forward_and_backward():
        sum(x.sum() for x in forward()).backward()

    forward_count = counted(forward)
    assert forward_count / 1e12 == pytest.approx(0.36279, abs=5e-6)
    per_token = operation_flops(RELEASED, 4096, 256, text_tail=True)
    ours = sum(per_token[name] for name in ("qkv", "attention", "attention_out", "mlp"))
    assert ours == 48 * forward_count
    assert train_flops(RELEASED, 4096, 256) == pytest.approx(
        forward_flops(RELEASED, 4096, 256) * counted(forward_and_backward) / forward_count
    )


@pytest.mark.parametrize(
    ("n", "l", "forward", "attention_share", "train", "recompute_all"),
    [
        (256, 150, 1.16, 0.04, 3.5, 4.6),
        (1024, 150, 3.61, 0.11, 10.8, 14.4),
        (2304, 150, 8.46, 0.21, 25.4, 33.8),
        (4096, 150, 16.9, 0.32, 50.6, 67.5),
        (4096, 256, 17.4, 0.32, 52.3, 69.7),
        (8100, 256, 43.3, 0.48, 130, 173),
    ],
)
def test_the_published_buckets_cost_what_the_table_says(n, l, forward, attention_share, train, recompute_all):
    # The table counts the blocks alone, with the text tail; one per cent covers the rest and its rounding.
    assert forward_flops(RELEASED, n, l, text_tail=True) / 1e12 == pytest.approx(forward, rel=0.01)
    assert train_flops(RELEASED, n, l, text_tail=True) / 1e12 == pytest.approx(train, rel=0.011)
    assert train_flops(RELEASED, n, l, text_tail=True, recompute="full") / 1e12 == pytest.approx(
        recompute_all, rel=0.011
    )
    share = operation_flops(RELEASED, n, l)["attention"] / forward_flops(RELEASED, n, l)
    assert share == pytest.approx(attention_share, abs=0.007)


@given(s=sizes(), n=st.lists(st.integers(0, 65535), min_size=1, max_size=5), l=st.integers(0, 415))
def test_arrays_and_tensors_cost_what_their_integers_do(s, n, l):
    for function in (forward_flops, train_flops, activation_bytes):
        expected = [function(s, count, l) for count in n]
        assert all(isinstance(value, int) for value in expected)
        array = function(s, np.array(n, dtype=np.uint16), np.full(len(n), l, dtype=np.uint16))
        assert array.dtype == np.float64 and array.tolist() == expected
        tensor = function(s, torch.tensor(n, dtype=torch.int32), l)
        assert tensor.dtype == torch.float64 and tensor.tolist() == expected
        assert function(s, np.uint16(n[0]), np.uint16(l)) == expected[0]


def test_parameter_count_is_the_released_one():
    _, released = golden("released_state_dict")
    assert parameter_count(RELEASED) == released["parameter_count"] == 4_104_225_152


@given(s=sizes())
def test_parameter_count_is_the_sum_over_the_checkpoints_tensors(s):
    config = {**asdict(s), "selected_layer_index": range(s.num_text_layers)}
    hidden = int(s.inner_dim / 3 * 8)
    shapes = tensor_shapes(config)
    assert parameter_count(replace(s, mlp_dim=hidden)) == sum(torch.Size(shape).numel() for shape in shapes.values())


def slope(recompute, n=0, l=0):
    """Bytes in bf16 that one more token adds."""
    few = activation_bytes(RELEASED, 0, 0, recompute=recompute)
    return (activation_bytes(RELEASED, n, l, recompute=recompute) - few) / max(n, l)


def test_activations_are_near_the_estimate_of_61_kilobytes_per_token_and_block():
    assert slope("none", n=1000) / 48 == pytest.approx(61e3, rel=0.15)
    assert slope("none", l=1000) / 48 == pytest.approx(61e3, rel=0.15)


def saved_bytes(num_layers, side, num_text):
    """What autograd holds after a forward of two samples through our own transformer, parameters excepted."""
    config = LensConfig.from_dict(
        {
            **golden("released_state_dict")[1]["model_config"],
            "num_layers": num_layers,
            "num_attention_heads": 2,
            "inner_dim": 128,
            "enc_hidden_dim": 8,
        }
    )
    model = LensTransformer(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def keep(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return saved

    text = [tensor((2, num_text, 8), 0)] * 4
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        result = model(tensor((2, 128, side, side), 1), torch.full((2,), 0.5), text, torch.ones(2, num_text) > 0)
    total = sum(storage.nbytes() for storage in held.values())
    assert result.requires_grad
    return config, total


@pytest.mark.parametrize(("more_side", "more_text"), [(4, 0), (0, 40)])
def test_a_blocks_activations_are_what_the_transformer_saves(more_side, more_text):
    (few, base), (many, deep) = saved_bytes(2, 4, 8), saved_bytes(3, 4, 8)
    measured = saved_bytes(3, 4 + more_side, 8 + more_text)[1] - saved_bytes(2, 4 + more_side, 8 + more_text)[1]
    measured -= deep - base

    def held(config, side, num_text):
        return 2 * activation_bytes(config, side**2, num_text, dtype_bytes=4)

    expected = held(many, 4 + more_side, 8 + more_text) - held(few, 4 + more_side, 8 + more_text)
    expected -= held(many, 4, 8) - held(few, 4, 8)
    assert measured == expected


def test_recomputation_keeps_the_inputs_of_the_blocks_and_one_block():
    one_block = slope("none", n=1000) / 48
    # 48 inputs of 1536 bf16 values, and the working set of the one block that is being recomputed.
    assert slope("full", n=1000) == pytest.approx(48 * 1536 * 2 + one_block, rel=0.03)
    # Results of linears and of the attention, with the block's input: 7 d + 2 m of 14 d + 3 m values, and one block's rest.
    kept, rest = 2 * (7 * 1536 + 2 * 4096), 2 * (7 * 1536 + 4096)
    assert slope("selective", n=1000) == pytest.approx(48 * kept + rest, rel=0.03)


def test_the_last_blocks_text_tail_holds_nothing():
    image, text = slope("none", n=1000), slope("none", l=1000)
    # 5 d + 3 m elements and a statistic fewer, but 2 x 4 x 2880 text features against the ends of the image stream.
    assert image - text == 2 * (5 * 1536 + 3 * 4096) + 4 - 2 * (2 * 4 * 2880 - 128 - 2 * 1536 - 128)


@given(s=sizes(), n=counts, l=counts, dtype_bytes=st.sampled_from([2, 4]))
def test_activations_grow_linearly_and_shrink_with_recomputation(s, n, l, dtype_bytes):
    def held(n, l, recompute="none"):
        return activation_bytes(s, n, l, dtype_bytes=dtype_bytes, recompute=recompute)

    assert held(2 * n, 2 * l) - held(n, l) == held(n, l) - held(0, 0) > 0
    if s.num_layers == 1:
        assert held(n, l) == held(n, l, "selective") == held(n, l, "full")
    else:
        assert held(n, l) > held(n, l, "selective") > held(n, l, "full")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward_flops(RELEASED, -1, 5), r"image_tokens: expected non-negative"),
        (lambda: forward_flops(RELEASED, 5, np.array([3, -1])), r"text_tokens: expected non-negative"),
        (lambda: forward_flops(RELEASED, torch.tensor([-1.0]), 5), r"image_tokens: expected non-negative"),
        (lambda: forward_flops(RELEASED, "12", 5), r"image_tokens: expected a number.*got str"),
        (lambda: forward_flops(RELEASED, True, 5), r"image_tokens: expected a number.*got bool"),
        (lambda: forward_flops(RELEASED, 5, torch.tensor([True])), r"text_tokens: expected a number"),
        (lambda: forward_flops(RELEASED, np.ones(2), torch.ones(2)), r"both as arrays or both as tensors"),
        (
            lambda: train_flops(RELEASED, 5, 5, recompute="half"),
            r"recompute: expected none, selective or full, got 'half'",
        ),
        (lambda: activation_bytes(RELEASED, 5, 5, recompute="half"), r"recompute: expected none"),
        (lambda: activation_bytes(RELEASED, 5, 5, dtype_bytes=0), r"dtype_bytes: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
