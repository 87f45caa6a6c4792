"""The transformer as a whole: packed equals one by one, masked text and mates do not count, gradients, compiling."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lensmini.nn import DualStreamBlock, LensConfig, LensTransformer, RotaryEmbedding3D
from lensmini.nn.transformer import Captured, Modulation
from lensmini.packed import Layout, pack, pack_text
from tests import reference
from tests.reference import Batch
from tests.strategies import grids, seeds, text_masks

CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "inner_dim": 16,
    "axes_dims_rope": [2, 2, 4],
    "in_channels": 8,
    "out_channels": 2,
    "patch_size": 2,
    "enc_hidden_dim": 6,
    "selected_layer_index": [1, 3],
    "gate_mlp": True,
    "rms_norm": True,
    "multi_layer_encoder_feature": True,
}
WEIGHTS = reference.random_weights(CONFIG, seed=7)
DEAD = ["attn.norm_added_q.weight", "attn.to_add_out.weight", "attn.to_add_out.bias", "txt_norm2.weight"]
DEAD += ["txt_mlp.w1.weight", "txt_mlp.w2.weight", "txt_mlp.w3.weight"]
LAST = f"transformer_blocks.{CONFIG['num_layers'] - 1}"
few = settings(max_examples=12)


def make_model(dtype: torch.dtype = torch.float32) -> LensTransformer:
    model = LensTransformer(LensConfig.from_dict(CONFIG))
    model.load_state_dict(WEIGHTS, strict=True)
    return model.to(dtype)


MODEL32, MODEL64 = make_model(torch.float32), make_model(torch.float64)


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float32, min_size: int = 1, same_grid: bool = False) -> Batch:
    """Random mixes of grids, text lengths and masks of any pattern."""
    shapes = draw(grids(min_size=min_size))
    shapes = [shapes[0]] * len(shapes) if same_grid else shapes
    return reference.random_batch(CONFIG, shapes, draw(text_masks(len(shapes))), draw(seeds()), dtype)


def run(model: LensTransformer, batch: Batch, **options: Any) -> Any:
    return model(batch.latents, batch.t, batch.text_features, batch.text_mask, **options)


def mixed(dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """One fixed mix: three grids, a mask with holes, a padded row and an empty one."""
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    return reference.random_batch(CONFIG, [(2, 3), (1, 1), (3, 2)], mask, seed, dtype)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Relative to each tensor's largest value, or to a thousandth of the largest of all where a tensor almost vanishes."""
    floor = 1e-3 * max((e.abs().max().item() for e in expected if e.numel()), default=0.0)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if e.numel():
            assert (a - e).abs().max().item() <= tolerance * max(e.abs().max().item(), floor)


def upstreams(outputs: Sequence[Tensor], seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]


def gradients(outputs: Sequence[Tensor], weights: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a random projection of all outputs; a leaf that cannot influence them has zeros."""
    loss = torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    results = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, results, strict=True)]


# --- values and gradients against the reference and one by one


@few
@given(batch=batches(torch.float64))
def test_output_equals_the_reference_for_every_sample_of_a_mix(batch: Batch) -> None:
    weights = {key: value.double() for key, value in WEIGHTS.items()}
    expected = [seen["sample"] for seen in reference.batch_forward(weights, CONFIG, batch)]
    with torch.no_grad():
        assert_close(run(MODEL64, batch), expected, 1e-5)
        assert_close(run(MODEL32, batch.map(Tensor.float)), [x.float() for x in expected], 1e-4)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any sizes that a checkpoint could have; widths that 3 does not divide, one head, one text layer, no patch."""
    axes = [2 * draw(st.integers(1, 3)) for _ in range(3)]
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        **CONFIG,
        "num_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "inner_dim": heads * sum(axes),
        "axes_dims_rope": axes,
        "in_channels": draw(st.integers(1, 9)),
        "out_channels": draw(st.integers(1, 3)),
        "patch_size": draw(st.integers(1, 2)),
        "enc_hidden_dim": draw(st.integers(2, 9)),
        "selected_layer_index": list(range(1, 1 + layers)),
    }


@few
@given(config=configurations(), shapes=grids(), data=st.data())
def test_output_equals_the_reference_for_every_configuration(config: dict, shapes: list, data: st.DataObject) -> None:
    weights = {key: value.double() for key, value in reference.random_weights(config, seed=3).items()}
    model = LensTransformer(LensConfig.from_dict(config)).double()
    model.load_state_dict(weights, strict=True)
    batch = reference.random_batch(
        config, shapes, data.draw(text_masks(len(shapes))), data.draw(seeds()), torch.float64
    )
    expected = [seen["sample"] for seen in reference.batch_forward(weights, config, batch)]
    with torch.no_grad():
        assert_close(run(model, batch), expected, 1e-5)


@settings(max_examples=6)
@given(batch=batches(torch.float64))
@example(batch=mixed(torch.float64))
def test_gradients_equal_the_reference_in_parameters_and_inputs(batch: Batch) -> None:
    leaves = batch.map(lambda x: x.clone().requires_grad_())
    weights = {key: value.double().requires_grad_() for key, value in WEIGHTS.items()}
    expected = [seen["sample"] for seen in reference.batch_forward(weights, CONFIG, leaves)]
    directions = upstreams(expected)
    named = dict(MODEL64.named_parameters())
    actual = gradients(run(MODEL64, leaves), directions, [*(named[key] for key in weights), *leaves.tensors()])
    assert_close(actual, gradients(expected, directions, [*weights.values(), *leaves.tensors()]), 2e-5)


@pytest.mark.parametrize("backend", ["auto", "padded", "math"])
@given(batch=batches(torch.float32))
@few
def test_packed_equals_one_by_one_in_values_and_gradients(backend: Any, batch: Batch) -> None:
    leaves = batch.map(lambda x: x.clone().requires_grad_())
    together = run(MODEL32, leaves, backend=backend)
    alone = [run(MODEL32, leaves.select([i]), backend=backend)[0] for i in range(len(batch.latents))]
    assert_close(together, alone, 1e-5)
    wanted = [*MODEL32.parameters(), *leaves.tensors()]
    directions = upstreams(together)
    assert_close(gradients(together, directions, wanted), gradients(alone, directions, wanted), 1e-5)


@few
@given(batch=batches(torch.float64))
def test_modulation_gradient_is_the_loops_in_float64(batch: Batch) -> None:
    """Each sample's own shift, scale and gate collect the gradient of its own tokens, and no other's."""
    modulation = MODEL64.modulation(batch.t)
    leaves = [x.detach().requires_grad_() for x in modulation]
    together = run(MODEL64, batch, modulation=Modulation(*leaves))
    directions = upstreams(together)
    actual = gradients(together, directions, leaves)
    for i in range(len(batch.latents)):
        own = [leaves[0][:, i : i + 1], leaves[1][:, i : i + 1], leaves[2][i : i + 1]]
        own = [x.detach().requires_grad_() for x in own]
        one = run(MODEL64, batch.select([i]), modulation=Modulation(*own))
        expected = gradients(one, directions[i : i + 1], own)
        assert_close([actual[0][:, i : i + 1], actual[1][:, i : i + 1], actual[2][i : i + 1]], expected, 1e-10)


# --- what must not matter


@few
@given(batch=batches(), poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_features_under_the_mask_do_not_count(batch: Batch, poison: float) -> None:
    def poisoned() -> list[Tensor]:
        return [
            layer.masked_fill(~batch.text_mask[..., None], poison).requires_grad_() for layer in batch.text_features
        ]

    parameters = list(MODEL32.parameters())
    clean, features = run(MODEL32, batch), poisoned()
    output = run(MODEL32, Batch(batch.latents, batch.t, features, batch.text_mask))
    assert all(a.equal(b) for a, b in zip(clean, output, strict=True))
    directions = upstreams(clean)
    *with_poison, last = gradients(output, directions, [*parameters, features[0]])
    assert all(a.equal(b) for a, b in zip(gradients(clean, directions, parameters), with_poison, strict=True))
    assert not last[~batch.text_mask].any()


@few
@given(batch=batches(min_size=2), poison=st.sampled_from([math.nan, math.inf, 1e30]), data=st.data())
def test_a_poisoned_batch_mate_changes_nothing(batch: Batch, poison: float, data: st.DataObject) -> None:
    victim = data.draw(st.integers(0, len(batch.latents) - 1))
    hurt = batch.map(Tensor.clone)
    hurt.latents[victim].fill_(poison)
    for layer in hurt.text_features:
        layer[victim] = poison
    directions = upstreams(batch.latents)
    directions[victim].zero_()
    others = [i for i in range(len(batch.latents)) if i != victim]
    results = []
    for each in (batch, hurt):
        leaves = each.map(lambda x: x.clone().requires_grad_())
        output = run(MODEL32, leaves)
        kept = [output[i] for i in others]
        inputs = [leaves.latents[i] for i in others]
        results.append([*kept, *gradients(kept, [directions[i] for i in others], inputs)])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@few
@given(batch=batches(min_size=2, same_grid=True), seed=seeds())
def test_a_sample_is_bit_equal_whatever_its_mates_hold(batch: Batch, seed: int) -> None:
    other = reference.random_batch(CONFIG, batch.grids, batch.text_mask, seed)
    features = [torch.cat([a[:1], b[1:]]) for a, b in zip(batch.text_features, other.text_features, strict=True)]
    t = torch.cat([batch.t[:1], other.t[1:]])
    swapped = Batch([batch.latents[0], *other.latents[1:]], t, features, batch.text_mask)
    with torch.no_grad():
        assert run(MODEL32, batch)[0].equal(run(MODEL32, swapped)[0])


@few
@given(batch=batches(), more=st.integers(1, 5), seed=seeds())
def test_padding_to_any_length_changes_nothing(batch: Batch, more: int, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    features = [torch.cat([x, torch.randn(len(x), more, x.shape[2], generator=noise)], 1) for x in batch.text_features]
    mask = torch.cat([batch.text_mask, torch.zeros(len(batch.latents), more, dtype=torch.bool)], 1)
    with torch.no_grad():
        padded = run(MODEL32, Batch(batch.latents, batch.t, features, mask))
        assert all(a.equal(b) for a, b in zip(run(MODEL32, batch), padded, strict=True))


def test_a_hole_is_not_the_same_as_a_shorter_text() -> None:
    """A masked slot keeps its place: the tokens behind it keep their positions."""
    batch = mixed().select([0])
    squeezed = Batch(
        batch.latents, batch.t, [x[:, [0, 2, 3]] for x in batch.text_features], batch.text_mask[:, [0, 2, 3]]
    )
    with torch.no_grad():
        difference = (run(MODEL32, batch)[0] - run(MODEL32, squeezed)[0]).abs().max()
    assert difference > 1e-3


@few
@given(batch=batches())
def test_all_text_masked_equals_no_text(batch: Batch) -> None:
    masked = Batch(batch.latents, batch.t, batch.text_features, torch.zeros_like(batch.text_mask))
    empty = Batch(batch.latents, batch.t, [x[:, :0] for x in batch.text_features], batch.text_mask[:, :0])
    with torch.no_grad():
        results = [run(MODEL32, masked), run(MODEL32, empty), MODEL32(batch.latents, batch.t)]
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(*results, strict=True))


@few
@given(batch=batches(same_grid=True))
def test_list_tensor_and_packed_forms_agree(batch: Batch) -> None:
    stacked = torch.stack(batch.latents)
    layout = Layout.build(batch.grids, text_mask=batch.text_mask)
    with torch.no_grad():
        listed = run(MODEL32, batch)
        dense = MODEL32(stacked, batch.t, batch.text_features, batch.text_mask)
        text = pack_text(batch.text_features, batch.text_mask)
        tokens = MODEL32.forward_packed(pack(batch.latents), batch.t, text, layout)
    assert isinstance(dense, Tensor) and isinstance(tokens, Tensor)
    assert_close(list(dense), listed, 1e-5)
    assert_close([tokens], [pack(listed)], 1e-5)


@few
@given(batch=batches(), order=st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_result(batch: Batch, order: Any) -> None:
    permutation = list(range(len(batch.latents)))
    order.shuffle(permutation)
    with torch.no_grad():
        plain, moved = run(MODEL32, batch), run(MODEL32, batch.select(permutation))
    assert_close(moved, [plain[i] for i in permutation], 1e-5)


def test_the_model_uses_no_global_randomness_and_keeps_its_inputs() -> None:
    batch = mixed()
    copies = [x.clone() for x in batch.tensors()]
    state = torch.get_rng_state()
    first, second = run(MODEL32, batch), run(MODEL32, batch)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(copies, batch.tensors(), strict=True))


@few
@given(batch=batches())
def test_the_output_is_the_same_with_and_without_gradients(batch: Batch) -> None:
    """Without gradients the model may work in place; that must neither show nor reach its inputs."""
    copies = [x.clone() for x in batch.tensors()]
    weights = [p.detach().clone() for p in MODEL32.parameters()]
    expected = run(MODEL32, batch)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(run(MODEL32, batch), expected, 1e-6)
    assert all(a.equal(b) for a, b in zip(copies, batch.tensors(), strict=True))
    assert all(a.equal(b) for a, b in zip(weights, MODEL32.parameters(), strict=True))


def test_gradients_are_the_same_bits_every_time() -> None:
    batch = mixed()
    results = [gradients(run(MODEL32, batch), upstreams(batch.latents), [*MODEL32.parameters()]) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_follows_the_latents(dtype: torch.dtype) -> None:
    batch = mixed(dtype)
    batch.t = batch.t.float()
    output = run(make_model(dtype), batch)
    assert all(x.dtype == dtype for x in output)
    cast = MODEL32([x.to(dtype) for x in batch.latents], batch.t, batch.text_features, batch.text_mask)
    assert all(x.dtype == dtype for x in cast)


# --- hooks for later work: capturing, stopping early, precomputed modulation


@few
@given(batch=batches(), chosen=st.sets(st.integers(-2, 1), min_size=1))
def test_capturing_blocks_does_not_change_the_output_and_an_early_stop_sees_the_same(
    batch: Batch, chosen: set[int]
) -> None:
    weights = {key: value.double() for key, value in WEIGHTS.items()}
    expected = reference.batch_forward(weights, CONFIG, batch.map(Tensor.double))
    with torch.no_grad():
        plain = run(MODEL32, batch)
        full = run(MODEL32, batch, capture_blocks=sorted(chosen))
        short = run(MODEL32, batch, capture_blocks=sorted(chosen), early_stop=True)
    assert isinstance(full, Captured) and isinstance(short, Captured)
    assert all(a.equal(b) for a, b in zip(plain, full.velocity, strict=True)) and short.velocity is None
    assert full.hidden_states.keys() == short.hidden_states.keys() == {index % 2 for index in chosen}
    for index, streams in full.hidden_states.items():
        assert all(a.equal(b) for a, b in zip(streams, short.hidden_states[index], strict=True))
        image = torch.cat([seen[f"block.{index}.img"] for seen in expected]).float()
        rows = zip(expected, batch.text_mask, strict=True)
        text = torch.cat([seen[f"block.{index}.txt"][mask] for seen, mask in rows]).float()
        assert_close(streams, [image, text], 1e-4)


def test_an_early_stop_runs_nothing_behind_the_last_captured_block() -> None:
    model = make_model()
    ran: list[int] = []
    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.norm_out.register_forward_hook(lambda *_: ran.append(-1))
    run(model, mixed(), capture_blocks=(0,), early_stop=True)
    assert ran == [0]


def test_captured_states_carry_gradients() -> None:
    batch = mixed(torch.float64)
    latents = [x.requires_grad_() for x in batch.latents]
    captured = run(MODEL64, batch, capture_blocks=(1,), early_stop=True)
    assert isinstance(captured, Captured)
    image, text = captured.hidden_states[1]
    assert all(g.any() for g in torch.autograd.grad(image.sum(), latents, retain_graph=True))
    dead = [p for name, p in MODEL64.named_parameters() if name.removeprefix(LAST + ".") in DEAD]
    assert len(dead) == len(DEAD)
    assert all(g.any() for g in torch.autograd.grad(text.square().sum(), dead)), "captured text needs its whole path"


@few
@given(batch=batches())
def test_precomputed_modulation_gives_the_same_output(batch: Batch) -> None:
    with torch.no_grad():
        plain = run(MODEL32, batch)
        modulation = MODEL32.modulation(batch.t)
        reused = MODEL32(batch.latents, None, batch.text_features, batch.text_mask, modulation=modulation)
    assert_close(reused, plain, 1e-6)


def test_modulation_of_a_schedule_serves_every_step() -> None:
    batch, times = mixed(), torch.tensor([1.0, 0.6, 0.2])
    schedule = MODEL32.modulation(times)
    for step, t in enumerate(times):
        one = Modulation(
            schedule.image[:, step : step + 1].expand(-1, 3, -1, -1),
            schedule.text[:, step : step + 1].expand(-1, 3, -1, -1),
            schedule.output[step : step + 1].expand(3, -1, -1),
        )
        expected = run(MODEL32, Batch(batch.latents, t.expand(3), batch.text_features, batch.text_mask))
        assert_close(run(MODEL32, batch, modulation=one), expected, 1e-6)


# --- the last block's text


def test_the_last_blocks_dead_text_path_gets_no_gradient() -> None:
    model = make_model()
    batch = mixed()
    torch.stack([x.square().sum() for x in run(model, batch)]).sum().backward()
    for name, parameter in model.named_parameters():
        if name == f"{LAST}.attn.norm_added_q.weight":
            assert parameter.grad is None or not parameter.grad.any(), name
        elif name.removeprefix(LAST + ".") in DEAD:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
    last: Any = model.get_submodule(LAST)
    dim = CONFIG["inner_dim"]
    query, *others = last.attn.txt_qkv.weight.grad.split(dim)
    assert not query.any() and all(part.any() for part in others)
    parts = [part.any().item() for part in last.txt_mod[1].weight.grad.split(dim)]
    assert parts == [True, True, False, False, False, False]


def test_dead_parameters_of_the_released_model_are_those_of_the_specification() -> None:
    with torch.device("meta"):
        model = LensTransformer(LensConfig())
    dead = [p for name, p in model.named_parameters() if name.removeprefix("transformer_blocks.47.") in DEAD]
    assert sum(p.numel() for p in dead) == 21_236_800


# --- starting from scratch


def test_init_weights_gives_the_same_weights_from_meta_and_twice() -> None:
    config = LensConfig.from_dict(CONFIG)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.device("meta"):
        born_on_meta = LensTransformer(config)
    born_on_meta.init_weights(3)
    assert torch.get_rng_state().equal(state)
    others = {
        "again": LensTransformer(config).init_weights(3).init_weights(3),
        "float64": LensTransformer(config).double().init_weights(3),
    }
    expected = born_on_meta.state_dict()
    assert not any(value.is_meta for value in expected.values())
    for model in others.values():
        for key, value in model.state_dict().items():
            assert value.float().equal(expected[key]), key
    different = LensTransformer(config).init_weights(4).state_dict()
    drawn = [key for key, value in expected.items() if value.unique().numel() > 2]
    assert len(drawn) > 10 and all(not different[key].equal(expected[key]) for key in drawn)
    shapes = {expected[key].shape for key in drawn}
    for shape in shapes:
        same = [expected[key] for key in drawn if expected[key].shape == shape]
        assert all(not a.equal(b) for i, a in enumerate(same) for b in same[:i]), "every name has a stream of its own"


def test_init_weights_has_the_documented_statistics() -> None:
    settings = {
        **CONFIG,
        "num_attention_heads": 24,
        "inner_dim": 192,
        "in_channels": 64,
        "enc_hidden_dim": 48,
        "num_layers": 1,
    }
    model = LensTransformer(LensConfig.from_dict(settings)).init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("mod.1.weight", "norm_out.linear.weight", "proj_out.weight", "bias")):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert parameter.eq(1).all(), name
        else:
            rows, columns = parameter.shape
            bound = math.sqrt(6 / (columns + (rows // 3 if "qkv" in name else rows)))
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.01), name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * bound / math.sqrt(3 * parameter.numel()), name


def test_a_model_from_init_weights_starts_at_zero_velocity_with_identity_blocks_and_learns() -> None:
    batch = mixed()
    model = LensTransformer(LensConfig.from_dict(CONFIG)).init_weights(0)
    captured = run(model, batch, capture_blocks=(0, 1))
    assert isinstance(captured, Captured)
    assert not any(x.any() for x in captured.velocity or [])
    first, second = captured.hidden_states[0], captured.hidden_states[1]
    assert all(a.equal(b) and a.any() for a, b in zip(first, second, strict=True))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    targets = upstreams(batch.latents)
    losses = []
    for _ in range(30):
        output = run(model, batch)
        loss = torch.stack([(x - y).square().mean() for x, y in zip(output, targets, strict=True)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gate_of_init_weights_opens_every_block() -> None:
    model = LensTransformer(LensConfig.from_dict(CONFIG)).init_weights(0, gate=0.1)
    dim = CONFIG["inner_dim"]
    blocks: Any = model.transformer_blocks
    for block in blocks:
        for mod in (block.img_mod, block.txt_mod):
            parts = mod[1].bias.split(dim)
            assert [part.eq(0.1).all().item() for part in parts] == [False, False, True, False, False, True]
            assert not any(parts[i].any() for i in (0, 1, 3, 4))


# --- derivatives of other kinds


def tiny_case() -> tuple[LensTransformer, Batch]:
    settings = {
        **CONFIG,
        "num_layers": 1,
        "num_attention_heads": 1,
        "inner_dim": 8,
        "in_channels": 4,
        "out_channels": 1,
    }
    settings["enc_hidden_dim"] = 4
    model = LensTransformer(LensConfig.from_dict(settings))
    model.load_state_dict(reference.random_weights(settings, seed=1))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    return model.double(), reference.random_batch(settings, [(1, 2), (2, 1)], mask, 0, torch.float64)


@pytest.mark.parametrize("backend", ["loop", "padded", "math"])
def test_gradcheck_of_the_whole_model(backend: Any) -> None:
    model, batch = tiny_case()
    batch.t = 0.001 * batch.t  # the sinusoid turns 1000 radians per unit of time
    leaves = batch.map(lambda x: x.requires_grad_())

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(list(tensors[:2]), tensors[2], tensors[3:], batch.text_mask, backend=backend))

    assert torch.autograd.gradcheck(outputs, leaves.tensors(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_forward_mode_equals_a_finite_difference(backend: Any) -> None:
    batch = mixed(torch.float64)
    layout = Layout.build(batch.grids, text_mask=batch.text_mask)
    tokens, text = pack(batch.latents), pack_text(batch.text_features, batch.text_mask)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    speed = torch.rand(3, generator=generator, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return MODEL64.forward_packed(x, t, text, layout, backend=backend)  # pyright: ignore[reportReturnType]

    value, tangent = torch.func.jvp(velocity, (tokens, batch.t), (direction, speed))  # pyright: ignore
    step = 1e-6
    moved = [velocity(tokens + s * direction, batch.t + s * speed) for s in (step, -step)]
    difference = (moved[0] - moved[1]) / (2 * step)
    assert_close([value], [velocity(tokens, batch.t)], 1e-10)
    assert_close([tangent], [difference], 1e-5)


def test_plain_operations_of_forward_mode_equal_the_fused_ones_in_gradients() -> None:
    """Inside torch.func the hand-written backward passes are off; both must be the same function."""
    batch = mixed(torch.float64)
    parameters = dict(MODEL64.named_parameters())

    def loss(values: Mapping[str, Tensor]) -> Tensor:
        args = (batch.latents, batch.t, batch.text_features, batch.text_mask)
        outputs = torch.func.functional_call(MODEL64, dict(values), args)
        return torch.stack([x.square().sum() for x in outputs]).sum()

    plain = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    fused = torch.autograd.grad(loss(parameters), [*parameters.values()], allow_unused=True)
    fused = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), fused, strict=True)]
    assert_close([plain[name] for name in parameters], fused, 1e-9)


def test_second_derivatives_of_the_math_backend_are_right() -> None:
    """A gradient penalty through the model must never be silently wrong."""
    model, batch = tiny_case()

    def outputs(image: Tensor) -> Tensor:
        args = (batch.t[:1], [x[:1] for x in batch.text_features], batch.text_mask[:1])
        return model([image], *args, backend="math")[0]

    image = batch.latents[0].requires_grad_()
    assert torch.autograd.gradgradcheck(outputs, (image,), atol=1e-5, rtol=1e-3)


# --- compiling

BUCKETS = [(352, 704), (384, 672), (416, 640), (448, 608), (512, 512), (608, 448), (640, 416), (672, 384), (704, 352)]
BUCKETS += [
    (544, 1088),
    (576, 1024),
    (640, 960),
    (672, 896),
    (768, 768),
    (896, 672),
    (960, 640),
    (1024, 576),
    (1088, 544),
]
BUCKETS += [(736, 1472), (768, 1376), (832, 1248), (864, 1152), (1024, 1024), (1152, 864), (1248, 832), (1376, 768)]
BUCKETS += [(1472, 736)]
"""Width x height in pixels of the paper's 27 buckets (arXiv 2605.21573, section 3.1)."""


def block_inputs(
    block_dim: int, axes: tuple[int, ...], shapes: Sequence[tuple[int, int]], lengths: Sequence[int]
) -> tuple:
    layout = Layout.build(shapes, text_lengths=lengths)
    generator = torch.Generator().manual_seed(len(shapes))
    image = torch.randn(layout.num_image_tokens, block_dim, generator=generator, requires_grad=True)
    text = torch.randn(layout.num_text_tokens, block_dim, generator=generator, requires_grad=True)
    temb = torch.randn(len(shapes), block_dim, generator=generator)
    return image, text, temb, RotaryEmbedding3D(axes)(layout), layout


def mixes() -> list[tuple[list[tuple[int, int]], list[int]]]:
    """The 27 buckets, two samples each, then 50 random mixes."""
    generator = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    cases = [([(height // 16, width // 16)] * 2, [integer(2, 40), integer(2, 40)]) for width, height in BUCKETS]
    for _ in range(50):
        count = integer(2, 5)
        shapes = [(integer(2, 12), integer(2, 12)) for _ in range(count)]
        cases.append((shapes, [integer(2, 30) for _ in range(count)]))
    return cases


def count_graphs(backend: str, cases: Sequence[tuple[list[tuple[int, int]], list[int]]], tolerance: float) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    block = DualStreamBlock(16, 2)
    compiled = torch.compile(block, backend=backend, dynamic=True, fullgraph=True)
    assert len(BUCKETS) == 27
    for shapes, lengths in cases:
        image, text, temb, rotary, layout = block_inputs(16, (2, 2, 4), shapes, lengths)
        outputs = compiled(image, text, temb, rotary, layout)
        expected = block(image, text, temb, rotary, layout)
        assert_close(outputs, expected, tolerance)
        directions = upstreams(outputs)
        leaves = [image, text, *block.parameters()]
        assert_close(gradients(outputs, directions, leaves), gradients(expected, directions, leaves), 10 * tolerance)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_one_compiled_graph_serves_every_mixture() -> None:
    cases = mixes()
    assert count_graphs("eager", [cases[0], *cases[27::9]], 1e-5) == 1


@pytest.mark.slow
def test_one_compiled_graph_serves_27_buckets_and_50_mixes() -> None:
    assert count_graphs("eager", mixes(), 1e-5) == 1


@pytest.mark.slow
def test_one_inductor_graph_serves_several_mixtures() -> None:
    # Above 2048 tokens a decomposition of small products in inductor's CPU backend asks for a second graph.
    assert count_graphs("inductor", mixes()[27::12], 1e-4) == 1


@pytest.mark.slow
def test_compiled_blocks_of_a_model_share_one_graph_and_agree() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model().compile_blocks(backend="eager")
    for seed in range(3):
        batch = mixed(seed=seed)
        # The last block leaves its text out, which is a second graph.
        assert_close(run(model, batch), run(MODEL32, batch), 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# --- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_single_layers": 2}, "num_single_layers"),
        ({"gate_mlp": False}, "gate_mlp"),
        ({"rms_norm": False}, "rms_norm"),
        ({"multi_layer_encoder_feature": False}, "multi_layer_encoder_feature"),
        ({"inner_dim": 17}, "inner_dim.*num_attention_heads.*attention_head_dim"),
        ({"axes_dims_rope": [2, 2, 2]}, "axes_dims_rope.*attention_head_dim"),
        ({"axes_dims_rope": [3, 2, 3]}, "axes_dims_rope"),
        ({"axes_dims_rope": [4, 4]}, "axes_dims_rope"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": 2.5}, "num_layers"),
        ({"selected_layer_index": []}, "selected_layer_index"),
        ({"in_channels": "8"}, "in_channels"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LensConfig.from_dict({**CONFIG, **changes})


def test_config_ignores_what_diffusers_adds_and_survives_a_round_trip() -> None:
    config = LensConfig.from_dict({**CONFIG, "_class_name": "LensTransformer2DModel", "_diffusers_version": "0.36.0"})
    assert config == LensConfig.from_dict(CONFIG) == LensConfig.from_dict(config.to_dict())
    assert config.to_dict() == CONFIG
    for dim, hidden in ((16, 42), (64, 170), (1536, 4096)):
        assert (
            LensConfig(num_attention_heads=dim // 8, attention_head_dim=8, axes_dims_rope=(2, 2, 4)).mlp_dim == hidden
        )


def test_strict_loading_names_missing_and_unexpected_keys() -> None:
    model = LensTransformer(LensConfig.from_dict(CONFIG))
    weights = dict(WEIGHTS)
    moved = weights.pop("proj_out.bias")
    with pytest.raises(RuntimeError, match=r"proj_out\.bias"):
        model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="surplus"):
        model.load_state_dict({**weights, "proj_out.bias": moved, "surplus": moved})


def test_shape_errors_name_the_argument() -> None:
    batch = mixed()
    x, t, features, mask = batch.latents, batch.t, batch.text_features, batch.text_mask
    cases: list[tuple[str, tuple]] = [
        ("^latents", (torch.zeros(3, 8, 2), t, features, mask)),
        ("^latents", ([*x[:2], torch.zeros(7, 2, 2)], t, features, mask)),
        ("^latents", ([], t, features, mask)),
        ("latents|image_tokens.*c=8", ([torch.zeros(9, 2, 2)] * 3, t, features, mask)),
        ("^t:", (x, t[:2], features, mask)),
        ("^t:", (x, t[:, None], features, mask)),
        ("^t:", (x, None, features, mask)),
        ("^t:.*int64", (x, torch.tensor([1, 2, 3]), features, mask)),
        ("^text_features:", (x, t, features[:1], mask)),
        (r"^text_features\[1\]", (x, t, [features[0], features[1][:, :3]], mask)),
        ("^text_mask:", (x, t, features, mask[:2])),
        ("^text_mask:", (x, t, features, mask.float())),
        ("text_features and text_mask", (x, t, features, None)),
        ("text_tokens|text_features", (x, t, [torch.zeros(3, 4, 5)] * 2, mask)),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            MODEL32(*arguments)
    with pytest.raises(ValueError, match="capture_blocks"):
        run(MODEL32, batch, capture_blocks=(2,))
    with pytest.raises(ValueError, match="early_stop"):
        run(MODEL32, batch, early_stop=True)
    with pytest.raises(ValueError, match=r"modulation\.image"):
        run(MODEL32, batch, modulation=MODEL32.modulation(t[:2]))
    layout = Layout.build(batch.grids, text_mask=mask)
    with pytest.raises(ValueError, match="^image_tokens"):
        MODEL32.forward_packed(torch.zeros(5, 8), t, pack_text(features, mask), layout)
    with pytest.raises(ValueError, match="^text_tokens"):
        MODEL32.forward_packed(pack(x), t, torch.zeros(1, 2, 6), layout)
