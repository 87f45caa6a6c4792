"""Memory plans: estimates against counted bytes, the choice against all choices, every mode's pictures against plain ones."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lensmini.nn import Autoencoder, LatentNormalizer, LensConfig, LensTransformer, decode_in_strips
from lensmini.packed import Layout
from lensmini.pipeline import LensPipeline
from lensmini.pipeline import decoding as decoding_module
from lensmini.pipeline import memory as memory_module
from lensmini.pipeline import placement as placement_module
from lensmini.pipeline.memory import (
    GIB,
    MemoryPlan,
    PartSizes,
    Workload,
    budget_of,
    choose_plan,
    describe,
    part_sizes,
    peaks,
    workload,
)
from lensmini.pipeline.offload import spread
from lensmini.pipeline.passes import FastEngine
from lensmini.pipeline.placement import Arranger, Placement
from tests.live_memory import LiveMemory
from tests.pipeline.test_call import tiny_encoder, tiny_pipeline, tiny_transformer

PACKED = (int(12.6e9), int(0.5e9), int(11.4e9), False)
UNPACKED = (int(40.6e9), int(1.65e9), int(39.4e9), True)


def released(encoder=PACKED):
    with torch.device("meta"):
        model = LensTransformer(LensConfig()).bfloat16()
    return part_sizes(model)._replace(
        **dict(zip(("encoder", "encoder_layer", "encoder_layers", "encoder_moves"), encoder, strict=True)),
        autoencoder=168_000_000,
    )


def square(side, **options):
    with torch.device("meta"):
        model = LensTransformer(LensConfig(num_layers=1)).bfloat16()
    run = {"guided": True, "text_tokens": 415, "num_steps": 20, "batch_size": 1, **options}
    return workload(model, [(side, side)], 16, **run)


@pytest.mark.parametrize(("grids", "lengths"), [([(64, 64)] * 2, [400, 0]), ([(90, 90)] * 2, [200, 200])])
def test_activations_are_estimated_from_above_and_by_no_more_than_a_fifth(monkeypatch, grids, lengths):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))  # fused on a GPU
    config = LensConfig(num_layers=3)
    with torch.device("meta"):
        model = LensTransformer(config).bfloat16()
        monkeypatch.setattr(FastEngine, "_modulation", lambda self, model, times: Table(model.modulation(times[0])))
    layout = Layout.build(grids, text_lengths=lengths).to("meta")
    text = torch.empty(layout.num_text_tokens, 4, 2880, dtype=torch.bfloat16, device="meta")
    tokens = torch.empty(layout.num_image_tokens, 128, device="meta")
    times = torch.ones(1, 2, device="meta")
    passes = FastEngine()(model, text, layout, times)
    with LiveMemory(model) as live:
        passes(0, tokens)
    joint = layout.num_image_tokens + layout.num_text_tokens
    work = Workload(joint, 0, 0, 0, config.inner_dim, config.mlp_dim, 0)
    nothing = PartSizes(0, 1, 0, 0, 0, 0, 0, True, 0)
    estimate = peaks(MemoryPlan(resident_blocks=1), nothing, work)["sample"]
    assert 1.0 <= estimate / live.peak <= 1.2
    assert estimate == 2 * joint * (6 * 1536 + 3 * 4096)


class Table:
    """A schedule of one step."""

    def __init__(self, modulation):
        self.modulation = modulation

    def step(self, index):
        return self.modulation


@pytest.mark.parametrize(("height", "width"), [(512, 512), (1024, 1024), (736, 1472), (1472, 736)])
@pytest.mark.parametrize("strips", [False, True], ids=["whole", "strips"])
def test_decoding_is_estimated_from_above_and_by_no_more_than_a_tenth(monkeypatch, height, width, strips):
    diffusers = pytest.importorskip("diffusers")
    attend = lambda q, k, v, **options: torch.empty_like(q)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLFlux2().bfloat16()
    latents = torch.empty(1, 32, height // 8, width // 8, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), LiveMemory(vae) as live:
        decode_in_strips(vae, latents) if strips else vae.decode(latents)
    work = Workload(0, 0, height * width, 0, 1, 1, 0)
    plan = MemoryPlan(resident_blocks=0, decode_strips=strips)
    estimate = peaks(plan, PartSizes(0, 0, 0, 0, 0, 0, 0, True, 0), work)["decode"]
    assert 1.0 <= estimate / live.peak <= 1.1


def test_part_sizes_add_up_to_the_model():
    model = tiny_transformer()
    sizes = part_sizes(model)
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert sizes.num_blocks * sizes.block + sizes.modulation + sizes.rest == total
    pipe = tiny_pipeline()
    encoder = part_sizes(pipe.transformer, pipe.autoencoder, pipe.text_encoder)
    held = [*pipe.text_encoder.parameters(), *pipe.text_encoder.buffers()]
    assert encoder.encoder == sum(tensor.nbytes for tensor in held)
    assert 0 < encoder.encoder_layer < encoder.encoder_layers < encoder.encoder


@pytest.mark.parametrize(
    ("card", "encoder", "expected"),
    [
        ("24GiB", PACKED, MemoryPlan(resident_blocks=48)),
        ("16GiB", PACKED, MemoryPlan(resident_blocks=48, encoder="free", transformer_waits=True)),
        ("12GiB", UNPACKED, MemoryPlan(resident_blocks=48, encoder="stream", transformer_waits=True)),
        (
            "8GiB",
            UNPACKED,
            MemoryPlan(resident_blocks=48, encoder="stream", transformer_waits=True, modulation_resident=False),
        ),
    ],
)
def test_the_released_model_at_1024_by_card(card, encoder, expected):
    sizes, work = released(encoder), square(1024)
    plan = choose_plan(sizes, work, budget_of(card))
    assert plan == expected, describe(plan, sizes, peaks(plan, sizes, work))


def test_blocks_are_streamed_only_when_nothing_else_is_left():
    sizes = released()._replace(encoder=0)
    plan = choose_plan(sizes, square(1024), 4 * GIB)
    assert 0 < plan.resident_blocks < 48 and not plan.modulation_resident
    more = MemoryPlan(resident_blocks=plan.resident_blocks + 1, modulation_resident=False, decode_alone=True)
    assert max(peaks(more, sizes, square(1024)).values()) > 4 * GIB


@given(
    block=st.integers(0, 9), rest=st.integers(0, 9), modulation=st.integers(0, 20), encoder=st.integers(0, 99),
    moves=st.booleans(), pixels=st.integers(0, 1), budgets=st.lists(st.integers(0, 12 * 10**8), min_size=2, max_size=4),
)  # fmt: skip
def test_the_choice_fits_and_more_room_never_chooses_something_slower(
    block, rest, modulation, encoder, moves, pixels, budgets
):
    unit = 10**7
    layers = encoder * unit // 2
    sizes = PartSizes(block * unit, 3, modulation * unit, rest * unit, encoder * unit, layers // 3, layers, moves, unit)
    work = Workload(10, 4, pixels * 10**5, 2, 4, 8, 4)
    order = list(memory_module._candidates(sizes))
    ranks = []
    for budget in sorted(budgets):
        fitting = [plan for plan in order if max(peaks(plan, sizes, work).values()) <= budget]
        if not fitting:
            with pytest.raises(ValueError, match=r"memory: expected room for .* GiB, .* got"):
                choose_plan(sizes, work, budget)
            ranks.append(len(order))
            continue
        plan = choose_plan(sizes, work, budget)
        assert plan == fitting[0]
        ranks.append(order.index(plan))
    assert ranks == sorted(ranks, reverse=True)


def test_the_work_of_a_guided_run():
    model = tiny_transformer()
    run = {"text_tokens": 7, "num_steps": 5, "batch_size": 2}
    work = workload(model, [(32, 16), (16, 16), (48, 16)], 16, guided=True, **run)
    # Passes of 2 + 1 and of 3 image tokens, each picture with 7 text tokens, all twice; three sizes of five times each.
    assert work == Workload(2 * (3 + 14), 28, 48 * 16, 15, 32, model.config.mlp_dim, 32, 4)
    plain = workload(model, [(32, 16), (16, 16), (48, 16)], 16, guided=False, **run)
    assert (plain.tokens, plain.text_tokens) == (17, 14)


@pytest.mark.parametrize(
    ("change", "phase", "sign"),
    [
        ({"encoder": "offload"}, "sample", -1),
        ({"encoder": "offload"}, "decode", -1),
        ({"encoder": "stream"}, "encode", -1),
        ({"transformer_waits": True}, "encode", -1),
        ({"modulation_resident": False}, "sample", -1),
        ({"resident_blocks": 10}, "sample", -1),
        ({"decode_alone": True}, "decode", -1),
        ({"decode_strips": True}, "decode", -1),
        ({"decode_strips": True}, "sample", 0),
        ({"decode_alone": True}, "sample", 0),
        ({"transformer_waits": True}, "sample", 0),
    ],
)
def test_what_each_choice_changes(change, phase, sign):
    sizes, work = released(UNPACKED), square(1024)
    base = peaks(MemoryPlan(resident_blocks=48), sizes, work)[phase]
    other = peaks(MemoryPlan(**{"resident_blocks": 48, **change}), sizes, work)[phase]
    assert (other > base) - (other < base) == sign


def test_streaming_holds_two_blocks_and_no_more_than_are_left():
    sizes, work = released()._replace(encoder=0), square(512)
    need = [peaks(MemoryPlan(resident_blocks=n), sizes, work)["sample"] for n in (48, 47, 46, 0)]
    assert need[0] == need[1] == need[2] and need[2] - need[3] == 46 * sizes.block


def test_budgets_and_their_errors():
    assert budget_of("16GiB") == 16 * GIB - 3 * GIB // 4 and budget_of("auto", free=1000) == 950
    for wrong in ("16", "16GB", "GiB", "0GiB", "big"):
        with pytest.raises(ValueError, match="memory: expected"):
            budget_of(wrong)
    with pytest.raises(ValueError, match="where free memory is unknown, got auto"):
        budget_of("auto")
    with pytest.raises(ValueError, match="prompt_embeds or a prompt_cache"):
        choose_plan(released(), square(1024), budget_of("8GiB"))


CALL = {"prompt": ["a blue circle", "two big"], "negative_prompt": "a red cube", "height": [32, 24], "width": [40, 56]}
CALL |= {"seeds": [3, 4], "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}


def test_every_plan_paints_the_same_pictures(monkeypatch):
    expected = tiny_pipeline(fast=True)(**CALL).images
    sizes = PartSizes(1, 2, 1, 1, 1, 1, 1, True, 1)
    plans = list(memory_module._candidates(sizes))
    assert len(plans) == len({*plans}) == 10 * (2 + 2)
    chosen = [plans[0], plans[5], *plans[-1:-11:-3], MemoryPlan(resident_blocks=1, encoder="free")]
    assert {plan.encoder for plan in chosen} == {"resident", "offload", "stream", "free"}
    for plan in chosen:
        monkeypatch.setattr(placement_module, "choose_plan", lambda *_, plan=plan: plan)
        pipe = tiny_pipeline(memory="8GiB", device="cpu")
        found = pipe(**CALL).images
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), plan
        assert (pipe.text_encoder is None) == (plan.encoder == "free")


def test_strips_come_before_the_transformer_has_to_go_and_only_where_the_decoder_knows_them():
    sizes, work = released()._replace(encoder=0), square(1024)
    here = peaks(MemoryPlan(resident_blocks=48), sizes, work)["decode"]
    for strips, expected in (
        (True, MemoryPlan(resident_blocks=48, decode_strips=True)),
        (False, MemoryPlan(resident_blocks=48, decode_alone=True)),
    ):
        assert choose_plan(sizes._replace(strips=strips), work, here - 1) == expected
    orders = [list(memory_module._candidates(sizes._replace(strips=strips))) for strips in (True, False)]
    assert len(orders[0]) == len({*orders[0]}) == 3 * len(orders[1]) // 2
    assert not any(plan.decode_strips for plan in orders[1])


def convolving_pipeline(**options):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, **blocks)
    autoencoder = Autoencoder(vae, LatentNormalizer(torch.zeros(16), torch.ones(16)), downsample=8)
    return LensPipeline(tiny_transformer(), autoencoder, tiny_encoder(), check_sizes=False, **options)


@pytest.mark.parametrize("published_bf16", [False, True])
def test_a_pipeline_in_strips_paints_the_same(monkeypatch, published_bf16):
    options, calls = {"published_bf16": published_bf16}, []
    kept = decoding_module.decode_in_strips
    monkeypatch.setattr(decoding_module, "decode_in_strips", lambda *a: calls.append(a[1].shape) or kept(*a))

    def pipeline(**how):
        pipe = convolving_pipeline(**how)
        return pipe if not published_bf16 else low(pipe)

    def low(pipe):
        pipe.transformer.bfloat16()
        return pipe

    expected = pipeline()(**CALL, **options).images
    assert not calls
    plan = MemoryPlan(resident_blocks=2, decode_strips=True)
    monkeypatch.setattr(placement_module, "choose_plan", lambda *_: plan)
    for pipe in (pipeline(strips=True), pipeline(memory="8GiB", device="cpu")):
        found = pipe(**CALL, **options).images
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))
        assert len(calls) == 2
        calls.clear()
    with pytest.raises(ValueError, match="without decoder"):
        tiny_pipeline(strips=True)


def test_a_mode_says_once_what_it_chose_and_plans_anew_for_larger_work(capsys):
    pipe = tiny_pipeline(memory="2GiB", device="cpu")
    for _ in range(2):
        pipe(**CALL)
    said = capsys.readouterr().out
    assert said.count("memory 2GiB: text encoder resident, all blocks resident; estimated peak") == 1
    assert pipe.arranger.note == said.strip()
    with pytest.raises(ValueError, match='memory: expected "auto" or the size of a card'):
        tiny_pipeline(memory="small")
    with pytest.raises(ValueError, match="where free memory is unknown"):
        tiny_pipeline(memory="auto", device="cpu")(**CALL)


def where(module):
    return {tensor.device.type for tensor in module.parameters()}


@pytest.mark.parametrize("modulation", [True, False])
def test_what_a_plan_names_is_on_the_device(modulation):
    """The meta device stands in: weights that are on it cannot be on the host as well."""
    model = tiny_transformer()
    placement = Placement(MemoryPlan(resident_blocks=2, modulation_resident=modulation), "meta", model)
    with placement.sample() as around:
        for index, block in enumerate(model.transformer_blocks):
            with around(index):
                for name, part in block.named_children():
                    wanted = "meta" if modulation or not name.endswith("_mod") else "cpu"
                    assert where(part) == {wanted}, (index, name)
    assert where(model.img_in) == where(model.norm_out) == {"meta"}


@pytest.mark.parametrize("resident", [0, 1, 2])
def test_only_the_bodies_of_streamed_blocks_are_copied(resident):
    model = tiny_transformer()
    placement = Placement(MemoryPlan(resident_blocks=resident, modulation_resident=False), "cpu", model)
    host = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with placement.sample() as around:
        for index in range(2):
            with around(index):
                moved = {name for name, p in model.named_parameters() if p.data_ptr() != host[name]}
                bodies = {
                    name for name in host if name.startswith(f"transformer_blocks.{index}.") and "_mod." not in name
                }
                assert bodies <= moved if index in spread(2, resident) else not bodies & moved
                assert not any("_mod." in name or not name.startswith("transformer_blocks") for name in moved)
    assert all(parameter.data_ptr() == host[name] for name, parameter in model.named_parameters())


def test_of_a_streamed_encoder_nothing_is_on_the_device_outside_encoding(monkeypatch):
    pipe, moved = tiny_pipeline(), []
    encoder = pipe.text_encoder
    monkeypatch.setattr(Placement, "_move_apart", lambda self, encoder, layers, device: moved.append(str(device)))
    placement = Placement(MemoryPlan(resident_blocks=2, encoder="stream"), "cpu", pipe.transformer, None, encoder)
    layers = list(placement_module._find_decoder(encoder.model).layers)
    host = [parameter.data_ptr() for parameter in layers[0].parameters()]
    with placement.encode():
        assert moved == ["cpu"]
        with placement.layers(0):
            assert all(p.data_ptr() != at for p, at in zip(layers[0].parameters(), host, strict=True))
    assert moved == ["cpu", "cpu"] and [parameter.data_ptr() for parameter in layers[0].parameters()] == host


@pytest.mark.parametrize("kind", ["resident", "offload", "free"])
def test_the_encoder_comes_and_goes_as_the_plan_says(kind, monkeypatch):
    moved, transformer = [], tiny_transformer()

    class Text(nn.Module):
        def to(self, device):
            moved.append(str(device))
            return self

    monkeypatch.setattr(Placement, "_move_transformer", lambda self, device: moved.append(f"transformer {device}"))
    plan = MemoryPlan(resident_blocks=2, encoder=kind, transformer_waits=kind != "resident")
    placement = Placement(plan, "cpu:0", transformer, None, Text())
    with placement.encode():
        moved.append("encode")
    with placement.sample():
        moved.append("sample")
    waiting, before = ["transformer cpu"], ["cpu:0"]
    expected = {
        "resident": ["transformer cpu:0", *before, "encode"],
        "offload": [*waiting, *waiting, *before, "encode", "cpu"],
        "free": [*waiting, *waiting, *before, "encode"],
    }[kind]
    assert moved == [*expected, "transformer cpu:0", "sample"]
    assert (placement.text_encoder is None) == (kind == "free")


def test_auto_asks_for_free_memory_before_anything_is_placed(monkeypatch):
    asked = []
    monkeypatch.setattr(Arranger, "_free", lambda self, *parts: asked.append(1) or GIB)
    pipe = tiny_pipeline(memory="auto", device="cpu")
    pipe(**CALL)
    pipe(**{**CALL, "num_inference_steps": 3})
    assert asked == [1] and "of 0.95 GiB" in pipe.arranger.note
