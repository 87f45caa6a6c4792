"""Streamed weights: order of events, how many visit at once, that a module never runs without its own."""

import gc
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lensmini.nn.text_encoder import _LastLayerDone
from lensmini.pipeline import draw_noise, paint_packed
from lensmini.pipeline.offload import StreamedModules, spread
from lensmini.pipeline.passes import FastEngine
from tests.pipeline.test_call import features, tiny_transformer


def layers(num):
    torch.manual_seed(0)
    return [nn.Linear(3, 3) for _ in range(num)]


@given(num=st.integers(1, 6), prefetch=st.integers(0, 7), rounds=st.integers(1, 3), data=st.data())
def test_every_module_is_there_when_used_and_few_are_there_at_once(num, prefetch, rounds, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, num - 1))))
    modules, events = layers(num), []
    streamed = StreamedModules(modules, "cpu", streamed=chosen, prefetch=prefetch, on_event=lambda *e: events.append(e))
    host = {index: modules[index].weight.data_ptr() for index in chosen}
    values = [module.weight.clone() for module in modules]
    x = torch.ones(1, 3)
    expected = x
    for module in modules * rounds:
        expected = module(expected)
    for _ in range(rounds):
        for index, module in enumerate(modules):
            with streamed(index):
                if index in host:
                    assert module.weight.data_ptr() != host[index], "runs on the host's copy"
                x = module(x)
    assert torch.equal(x, expected)
    present, most = set(), 0
    for kind, index in events:
        if kind == "fetch":
            assert index not in present, "fetched twice"
            present.add(index)
        elif kind == "use":
            assert index in present, "used before it was fetched"
        else:
            present.remove(index)
        most = max(most, len(present))
    assert most <= min(len(chosen), prefetch + 1)
    uses = [index for kind, index in events if kind == "use"]
    assert uses == chosen * rounds
    if len(chosen) > 1 and prefetch:
        # Each fetch but the first is made while an earlier module has not run yet: that is what hides it.
        for index in chosen[1:]:
            earlier = chosen[chosen.index(index) - 1]
            assert events.index(("fetch", index)) < events.index(("use", earlier))
    if len(chosen) > 1 and prefetch and rounds > 1:
        # So is the first one's of the next round: it is under way before the last one of this round runs.
        again = [place for place, event in enumerate(events) if event == ("fetch", chosen[0])][1]
        assert again < events.index(("use", chosen[-1]))
    streamed.release()
    assert all(modules[index].weight.data_ptr() == host[index] for index in chosen)
    assert all(torch.equal(module.weight, value) for module, value in zip(modules, values, strict=True))
    fetches, drops = (sum(kind == wanted for kind, _ in events) for wanted in ("fetch", "drop"))
    assert fetches == drops


@pytest.mark.parametrize("change", ["data", "parameter", "layer"])
def test_weights_replaced_between_rounds_are_the_ones_that_visit(change):
    modules = [nn.Sequential(layer) for layer in layers(3)]
    streamed, x = StreamedModules(modules, "cpu"), torch.ones(1, 3)

    def walk():
        y = x
        for index, module in enumerate(modules):
            with streamed(index):
                y = module(y)
        streamed.release()
        return y

    walk()
    layer = modules[1][0]
    if change == "data":
        layer.weight.data = layer.weight.data + 1
    elif change == "parameter":
        layer.weight = nn.Parameter(layer.weight.detach() + 1)
    else:
        modules[1][0] = nn.Linear(3, 3)
    kept = modules[1][0].weight.clone()
    expected = nn.Sequential(*modules)(x)
    for _ in range(2):
        assert torch.equal(walk(), expected)
    assert torch.equal(modules[1][0].weight, kept)


def test_a_failing_module_of_a_hooked_loop_is_dropped_once_and_at_once():
    modules, events, unraisable = layers(3), [], []
    host = [module.weight.data_ptr() for module in modules]
    streamed = StreamedModules(modules, "cpu", on_event=lambda *e: events.append(e))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", lambda found: unraisable.append(found.exc_value))
        remove = streamed.hook(modules)
        with pytest.raises(RuntimeError):
            nn.Sequential(*modules)(torch.ones(1, 4))
        remove()
        del remove
        gc.collect()
    assert [module.weight.data_ptr() for module in modules] == host and not unraisable
    assert events.count(("drop", 0)) == 1


def test_a_failing_module_leaves_nothing_behind():
    modules = layers(3)
    host = [module.weight.data_ptr() for module in modules]
    streamed = StreamedModules(modules, "cpu")
    with pytest.raises(RuntimeError, match="broken"), streamed(1):
        raise RuntimeError("broken")
    streamed.release()
    assert [module.weight.data_ptr() for module in modules] == host


def test_parameters_stay_the_same_objects_under_the_same_names():
    module = nn.Sequential(*layers(2))
    before = dict(module.named_parameters())
    with StreamedModules(list(module), "cpu")(0):
        assert all(before[name] is parameter for name, parameter in module.named_parameters())
        assert module.state_dict().keys() == before.keys()


def test_hooks_surround_a_loop_of_somebody_else_and_come_off():
    modules, events = layers(3), []
    streamed = StreamedModules(modules, "cpu", on_event=lambda *e: events.append(e))
    expected = nn.Sequential(*modules)(torch.ones(1, 3))
    remove = streamed.hook(modules)
    assert torch.equal(nn.Sequential(*modules)(torch.ones(1, 3)), expected)
    assert [index for kind, index in events if kind == "use"] == [0, 1, 2]

    def stop(*_):
        raise _LastLayerDone

    # The text encoder leaves the loop from a hook of its last layer, which runs after ours.
    handle = modules[1].register_forward_hook(stop)
    with pytest.raises(_LastLayerDone):
        nn.Sequential(*modules)(torch.ones(1, 3))
    handle.remove()
    remove()
    events.clear()
    nn.Sequential(*modules)(torch.ones(1, 3))
    assert not events and all(len(module._forward_hooks) == 0 for module in modules)


@pytest.mark.parametrize("resident", [0, 1, 2])
@pytest.mark.parametrize("chunked", [False, True])
def test_pictures_of_a_streamed_model_are_bit_equal(resident, chunked):
    model, seen = tiny_transformer(), []
    inputs = draw_noise([(2, 3), (4, 4)], 16, seeds=[0, 1]), [features(3), features(5)], [features(0)] * 2
    options = {"num_steps": 3, "guidance_scale": 4.0}
    expected = paint_packed(model, *inputs, engine=FastEngine(chunked=chunked), **options)
    streamed = StreamedModules(
        list(model.transformer_blocks), "cpu", streamed=spread(2, resident), on_event=lambda *e: seen.append(e)
    )
    found = paint_packed(model, *inputs, engine=FastEngine(chunked=chunked, around=streamed), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [index for kind, index in seen if kind == "use"] == spread(2, resident) * 3


@given(num=st.integers(1, 50), data=st.data())
def test_streamed_modules_are_evenly_spread(num, data):
    resident = data.draw(st.integers(0, num))
    chosen = spread(num, resident)
    assert len(chosen) == num - resident and chosen == sorted(set(chosen)) and all(0 <= i < num for i in chosen)
    # Behind the last one comes the first again.
    gaps = [b - a for a, b in pairwise([*chosen, *(chosen[:1] and [chosen[0] + num])])]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="prefetch: expected at least 0, got -1"):
        StreamedModules(layers(2), "cpu", prefetch=-1)
    for wrong in ([1, 0], [0, 0], [2]):
        with pytest.raises(ValueError, match="streamed: expected ascending indices of 2 modules"):
            StreamedModules(layers(2), "cpu", streamed=wrong)
    with pytest.raises(ValueError, match="resident: expected 0 to 3, got 4"):
        spread(3, 4)
