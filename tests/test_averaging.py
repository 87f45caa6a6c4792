"""Laws of moving parameters towards others: exact ends, geometric decay, names, dtypes, and nothing else touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lensmini.averaging import lerp_parameters_
from tests.strategies import seeds, tensor


def network(seed):
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.set_rng_state(torch_state)
    model[1].running_mean.fill_(seed)
    return model


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@given(seeds(), st.floats(0, 1))
def test_one_step_is_the_weighted_mean_of_old_and_new(seed, weight):
    target, source = tensor((5, 3), seed, torch.float64), tensor((5, 3), seed + 1, torch.float64)
    expected = (1 - weight) * target + weight * source
    lerp_parameters_([target], [source], weight)
    torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_steps_towards_a_constant_decay_geometrically(decay):
    target, source = network(0).double(), network(1).double()
    old, new = parameters(target), parameters(source)
    for _ in range(7):
        lerp_parameters_(target, source, 1 - decay)
    for name, value in parameters(target).items():
        torch.testing.assert_close(value, new[name] + decay**7 * (old[name] - new[name]), rtol=1e-12, atol=1e-12)


def test_it_is_torchs_own_exponential_moving_average():
    target, source = network(0), network(1)
    theirs = [value.clone() for value in parameters(target).values()]
    get_ema_multi_avg_fn(0.75)(theirs, [*parameters(source).values()], 0)
    lerp_parameters_(target, source, 0.25)
    for ours, expected in zip(target.parameters(), theirs, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_zero_and_one_are_bit_exact_even_beside_infinities(dtype):
    hostile = torch.tensor([0.1, -0.0, torch.inf, torch.nan, 1e-30, 3e38], dtype=dtype)
    plain = torch.tensor([0.3, 0.7, 1.0, 2.0, 1e30, -3e38], dtype=dtype)
    for start, end in ((hostile, plain), (plain, hostile)):
        kept, copied = start.clone(), start.clone()
        lerp_parameters_([kept], [end], 0)
        lerp_parameters_([copied], [end], 1)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(kept.view(bits), start.view(bits))
        assert torch.equal(copied.view(bits), end.view(bits))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_source_and_target_never_share_memory_and_source_stays(weight):
    target, source = network(0), network(1)
    before = parameters(source)
    lerp_parameters_(target, source, weight)
    pointers = {value.data_ptr() for value in source.parameters()}
    assert not pointers & {value.data_ptr() for value in target.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in parameters(source).items())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_buffers_move_only_when_given(weight):
    target, source = network(3), network(5)
    lerp_parameters_(target, source, weight)
    assert torch.equal(target[1].running_mean, torch.full((4,), 3.0))
    lerp_parameters_([target[1].running_mean], [source[1].running_mean], weight)
    torch.testing.assert_close(target[1].running_mean, torch.full((4,), 3.0 + 2 * weight))


def test_a_float32_average_of_bfloat16_weights_keeps_float32_digits():
    target, source = torch.full((4,), 1.0), torch.full((4,), 1.0078125, dtype=torch.bfloat16)
    for _ in range(10):
        lerp_parameters_([target], [source], 1e-3)
    expected = 1.0078125 + (1 - 1e-3) ** 10 * (1.0 - 1.0078125)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.full((4,), expected), rtol=0, atol=1e-6)
    assert target[0] > 1.00005


def test_names_decide_not_the_order():
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    lerp_parameters_(target, {"b": torch.full((2,), 4.0), "a": torch.full((2,), 8.0)}, 0.5)
    assert target["a"].tolist() == [4, 4] and target["b"].tolist() == [2, 2]


@pytest.mark.parametrize("form", ["module", "mapping", "list", "generator"])
def test_every_form_of_the_source_gives_the_same_average(form):
    target, source = network(0), network(1)
    forms = {
        "module": source,
        "mapping": parameters(source),
        "list": [*source.parameters()],
        "generator": source.parameters(),
    }
    expected = {name: torch.lerp(value, parameters(source)[name], 0.5) for name, value in parameters(target).items()}
    lerp_parameters_(target, forms[form], 0.5)
    for name, value in parameters(target).items():
        torch.testing.assert_close(value, expected[name])


def test_a_tied_parameter_moves_once():
    target, source = network(0), network(1)
    for model in (target, source):
        model.append(nn.Linear(4, 2))
        model[3].weight = model[2].weight
    expected = torch.lerp(target[2].weight.detach(), source[2].weight.detach(), 0.5)
    lerp_parameters_(target, source, 0.5)
    torch.testing.assert_close(target[2].weight.detach(), expected)
    assert target[3].weight is target[2].weight


def test_training_goes_on_through_the_average():
    target, source = network(0), network(1)
    target(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = [value.grad.clone() for value in target.parameters()]
    lerp_parameters_(target, source, 0.5)
    assert all(value.requires_grad and value.is_leaf for value in target.parameters())
    assert all(torch.equal(v.grad, g) for v, g in zip(target.parameters(), gradients, strict=True))
    assert all(value.grad is None for value in source.parameters())


@pytest.mark.parametrize(
    ("target", "source", "weight", "message"),
    [
        ({"a": (2,)}, {"b": (2,)}, 0.5, r"lacks \['a'\] and has besides \['b'\]"),
        ({"a": (2,)}, {"a": (2,), "b": (2,)}, 0.5, r"lacks \[\] and has besides \['b'\]"),
        ({"a": (2,), "b": (3,)}, {"a": (2,), "b": (1,)}, 0.5, r"b: \[3\] against \[1\]"),
        ({"a": (4, 1)}, {"a": (1, 4)}, 1.0, r"a: \[4, 1\] against \[1, 4\]"),
        ({"a": (2,)}, {"a": (2,)}, 1.5, r"weight: expected a number in \[0, 1\], got 1.5"),
        ({"a": (2,)}, {"a": (2,)}, -0.1, "weight"),
        ({"a": (2,)}, {"a": (2,)}, float("nan"), "weight"),
        ({"a": (2,), "b": (3,)}, {"a": (2,), "b": (1,)}, 0.0, "against"),
    ],
)
def test_a_mismatch_is_named_and_changes_nothing(target, source, weight, message):
    old = {name: torch.zeros(shape) for name, shape in target.items()}
    with pytest.raises(ValueError, match=message):
        lerp_parameters_(old, {name: torch.ones(shape) for name, shape in source.items()}, weight)
    assert all(not value.any() for value in old.values())


def test_lists_must_have_one_length_and_names_help_where_one_side_has_them():
    with pytest.raises(ValueError, match="expected 2 tensors as in target, got 1"):
        lerp_parameters_([torch.zeros(2), torch.zeros(2)], [torch.zeros(2)], 0.5)
    with pytest.raises(ValueError, match=r"0.weight: \[1\] against \[4, 3\]"):
        lerp_parameters_([torch.zeros(1)] * 6, network(0), 0.5)


def test_counters_are_refused():
    state = network(0).state_dict()
    with pytest.raises(ValueError, match=r"floating point tensors, got others at \['1.num_batches_tracked'\]"):
        lerp_parameters_(state, network(1).state_dict(), 0.5)
