"""Every fast pass against the plain one: mixtures, guidance, callbacks, chunks of any size, the published run."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.nn import LensConfig, LensTransformer, RotaryTable
from lensmini.nn.chunk_cuts import cut_groups, cut_stream
from lensmini.nn.chunk_space import Workspace
from lensmini.nn.chunked import chunk_obstacle, run_chunked
from lensmini.packed import Layout
from lensmini.pipeline import draw_noise, paint_packed
from lensmini.pipeline.passes import FastEngine
from lensmini.pipeline.schedule_modulation import schedule_modulation
from lensmini.sampling import empirical_mu, time_grid
from tests.golden_cases import golden
from tests.nn.test_golden import error, load_model, to_latents, to_tokens
from tests.pipeline.test_call import features, tiny_pipeline, tiny_transformer
from tests.strategies import seeds, tensor

ENGINES = {"once per run": partial(FastEngine, chunked=False), "in chunks": FastEngine}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@st.composite
def runs(draw):
    """Grids, text lengths and lengths of negatives (None: no guidance) of a few pictures, equal neighbours among them."""
    sides = st.sampled_from([(1, 1), (2, 3), (3, 2), (4, 4), (2, 3)])
    grids = draw(st.lists(sides, min_size=1, max_size=4))
    lengths = st.lists(st.sampled_from([0, 3, 3, 7]), min_size=len(grids), max_size=len(grids))
    return grids, draw(lengths), draw(st.none() | lengths)


def paint(model, run, seed, **options):
    grids, lengths, negatives = run
    noise = draw_noise(grids, 16, seeds=range(seed, seed + len(grids)))
    texts = [features(length, seed + index) for index, length in enumerate(lengths)]
    without = None if negatives is None else [features(length, seed + 50) for length in negatives]
    scale = 1.0 if negatives is None else 4.0
    return paint_packed(model, noise, texts, without, num_steps=3, guidance_scale=scale, **options)


@engines
@given(run=runs(), seed=seeds(), size=st.integers(1, 40), group=st.just("sample") | st.integers(1, 60))
@example(run=([(4, 4)], [0], None), seed=0, size=1, group=2048)
@example(run=([(1, 1)] * 4, [0] * 4, [0, 3, 0, 3]), seed=0, size=6, group="sample")
@example(run=([(2, 3), (2, 3)], [3, 3], [0, 0]), seed=0, size=4, group=18)
@example(run=([(2, 3), (2, 3)], [3, 7], [7, 3]), seed=0, size=40, group=2048)
def test_a_run_of_any_mixture_equals_the_plain_one(engine, run, seed, size, group):
    model = tiny_transformer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Workspace.__init__.__kwdefaults__, "chunk_tokens", size)
        fast = paint(model, run, seed, engine=engine(group=group))
    for a, b in zip(fast, paint(model, run, seed), strict=True):
        assert error(a, b) < 1e-5


@engines
def test_the_published_run(engine):
    tensors, meta = golden("denoise_loop_a")
    embeds = torch.stack([tensors[f"inputs.prompt_embeds.{i}"][0] for i in range(4)], dim=1)
    embeds = embeds[tensors["inputs.prompt_mask"][0].bool()]
    states = []
    final = paint_packed(
        load_model(tensors, meta),
        list(to_latents(tensors["inputs.latents"], meta["height"] // 16)),
        [embeds],
        [embeds[:0]],
        num_steps=meta["steps"],
        guidance_scale=meta["guidance_scale"],
        on_step=lambda index, t, latents: states.append(latents[0].clone()),
        engine=engine(),
    )
    assert error(to_tokens(final[0][None]), tensors["outputs.final_latents"]) < 1e-4
    for step, state in enumerate(states):
        assert error(to_tokens(state[None]), tensors[f"outputs.latents.{step + 1}"]) < 1e-4


@engines
def test_a_callback_changes_the_latents_of_the_next_pass(engine):
    run, model = ([(2, 3), (4, 4)], [3, 7], [0, 3]), tiny_transformer()
    paths = []
    for options in ({}, {"engine": engine()}):
        seen = []

        def halve(index, t, latents, seen=seen):
            seen.append([x.clone() for x in latents])
            return [x / 2 for x in latents]

        paint(model, run, 5, on_step=halve, **options)
        paths.append(seen)
    for plain, fast in zip(*paths, strict=True):
        assert all(error(b, a) < 1e-5 for a, b in zip(plain, fast, strict=True))


@engines
def test_one_engine_serves_runs_of_other_schedules_models_and_weights(engine):
    fast, first, second = engine(keep_schedule=True), tiny_transformer(), tiny_transformer()
    with torch.no_grad():
        second.transformer_blocks[0].img_mod[1].weight.mul_(2)
    run = ([(2, 3), (2, 3)], [3, 3], [0, 0])
    for model, mu in ((first, None), (first, None), (first, 0.0), (second, 0.0)):
        assert error(paint(model, run, 1, mu=mu, engine=fast)[0], paint(model, run, 1, mu=mu)[0]) < 1e-5
    paint(first, run, 1, engine=fast)  # its schedule is the one that is kept
    with torch.no_grad():
        first.transformer_blocks[1].txt_mod[1].bias.add_(1)
    again = paint(first, run, 1, engine=fast)
    assert error(again[0], paint(first, run, 1)[0]) < 1e-5


def past_autograd(layer):
    layer.weight.data += 1


def other_data(layer):
    layer.weight.data = layer.weight.data + 1


def scaled(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = [past_autograd, other_data, scaled]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_any_way_between_runs_are_seen(change):
    run, model, engine = ([(2, 3)], [3], [0]), tiny_transformer(), FastEngine()
    before = paint(model, run, 1, engine=engine)[0]
    change(model.transformer_blocks[1].img_mod[1])
    expected = paint(model, run, 1)[0]
    assert error(expected, before) > 1e-2
    assert error(paint(model, run, 1, engine=engine)[0], expected) < 1e-5


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_any_way_between_calls_are_seen(change):
    call = {"prompt": "a blue circle", "height": 32, "width": 24, "seeds": 0, "num_inference_steps": 2}
    pictures = []
    for pipe in (tiny_pipeline(fast=True), tiny_pipeline()):
        pipe(**call, output_type="latent")
        change(pipe.transformer.transformer_blocks[1].img_mod[1])
        pictures.append(pipe(**call, output_type="latent").images)
    assert error(*pictures) < 1e-5


def test_batches_of_one_call_share_the_modulation():
    pipe, rows = tiny_pipeline(fast=True), []
    pipe.transformer.transformer_blocks[0].img_mod.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    call = {"prompt": "a", "height": 32, "width": 24, "num_images_per_prompt": 4, "batch_size": 2, "seeds": 0}
    for _ in range(2):
        pipe(**call, num_inference_steps=3, output_type="latent")
    assert rows == [3, 3]


@engines
def test_compiled_blocks_paint_the_same(engine):
    run, model = ([(2, 3), (4, 4)], [3, 7], [0, 3]), tiny_transformer()
    expected = paint(model, run, 2)
    model.compile_blocks(backend="eager")
    assert "compiled" in (chunk_obstacle(model.transformer_blocks) or "")
    assert all(error(a, b) < 1e-5 for a, b in zip(paint(model, run, 2, engine=engine()), expected, strict=True))


@engines
def test_in_bfloat16_it_is_as_near_to_the_exact_pictures_as_the_plain_way(engine):
    run = ([(2, 3), (4, 4), (2, 3)], [3, 7, 0], [0, 3, 3])
    exact, low = paint(tiny_transformer(), run, 2), tiny_transformer(torch.bfloat16)
    plain, fast = paint(low, run, 2), paint(low, run, 2, engine=engine())
    for a, b, c in zip(fast, plain, exact, strict=True):
        assert error(b, c) > 1e-3 and error(a, c) < 1.1 * error(b, c)


def test_passes_can_be_asked_in_any_order_and_change_no_input():
    model, layout = tiny_transformer(), Layout.build([(2, 3), (2, 2)], text_lengths=[3, 2])
    tokens, text = tensor((10, 16), 0), features(5)
    times = torch.tensor([[1.0, 0.9], [0.5, 0.3], [0.2, 0.1]])
    before = tokens.clone(), text.clone()
    for engine in ENGINES.values():
        passes = engine()(model, text, layout, times)
        for step in (2, 0, 2, 1):
            expected = model.forward_packed(tokens, times[step], text, layout)
            assert error(passes(step, tokens), expected) < 1e-5
    assert torch.equal(tokens, before[0]) and torch.equal(text, before[1])


def test_modulation_runs_once_for_a_run_and_a_repeated_schedule_not_at_all():
    model, calls = tiny_transformer(), []
    for name, module in model.named_modules():
        if name.endswith(("img_mod", "txt_mod")) or name == "txt_in":
            module.register_forward_hook(lambda module, args, output, name=name: calls.append((name, len(args[0]))))
    engine, run = FastEngine(keep_schedule=True), ([(2, 3), (2, 3), (4, 4)], [3, 3, 3], [0, 0, 0])
    paint(model, run, 0, engine=engine)
    # Three steps; all start at time 1 and two grids differ after it: 1 + 2 * 2 distinct times for 6 samples.
    assert [rows for name, rows in calls if name.endswith("_mod")] == [5] * 4
    assert [rows for name, rows in calls if name == "txt_in"] == [9]
    calls.clear()
    paint(model, run, 1, engine=engine)
    assert {name for name, _ in calls} == {"txt_in"}


def test_a_step_of_the_table_is_the_models_modulation_of_that_step():
    model = tiny_transformer()
    times = torch.stack([time_grid(4, empirical_mu(n, 4))[:-1] for n in (6, 6, 16)], dim=1)
    found = schedule_modulation(model, times)
    assert found.table.output.shape[0] == 1 + 3 * 2
    for step, t in enumerate(times):
        for a, b in zip(found.step(step), model.modulation(t), strict=True):
            assert a.shape == b.shape and error(a, b) < 1e-6


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    other=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    size=st.integers(1, 12),
)
@example(lengths=[4, 0, 4], other=[2, 2, 2, 1, 1, 1], size=12)
@example(lengths=[4, 4, 4], other=[2, 1, 1, 1, 1, 1], size=12)
def test_chunks_cover_every_token_once_in_order(lengths, other, size):
    pairs = list(zip(lengths, other, strict=False))
    rows, tokens = 0, []
    for chunk in cut_stream(pairs, lengths, size):
        assert chunk.rows.start == rows and 0 < chunk.rows.stop - rows <= size
        inside = 0
        for piece in chunk.pieces:
            assert piece.rows.start == inside and piece.rows.stop - inside == piece.samples * piece.length
            assert len({pairs[piece.sample + k] for k in range(piece.samples)}) == 1
            for k in range(piece.samples):
                tokens += [(piece.sample + k, piece.position + i) for i in range(piece.length)]
            inside = piece.rows.stop
        rows += inside
    assert tokens == [(sample, i) for sample, length in enumerate(lengths) for i in range(length)]


def test_what_cannot_run_in_chunks_runs_block_by_block():
    run = ([(2, 3), (4, 4)], [3, 7], [0, 3])
    wrapped, hooked, half = tiny_transformer(), tiny_transformer(), tiny_transformer(torch.bfloat16)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    wrapped.transformer_blocks[0].img_mlp.w2.__class__ = Doubled
    hooked.transformer_blocks[1].attn.img_qkv.register_forward_hook(lambda module, args, output: output / 2)
    whole, patched = tiny_transformer(), tiny_transformer()
    whole.transformer_blocks[0].register_forward_hook(lambda module, args, output: (output[0] / 2, output[1]))
    mlp = patched.transformer_blocks[0].img_mlp
    mlp.forward = lambda *args, original=mlp.forward, **options: original(*args, **options) / 2
    models = (wrapped, "wrapped"), (hooked, "hooked"), (whole, "hooked"), (patched, "hooked"), (half, "bfloat16")
    for model, reason in models:
        assert reason in (chunk_obstacle(model.transformer_blocks) or "")
        expected = paint(model, run, 3)
        limit = 2e-2 if model is half else 1e-5
        assert all(
            error(a, b) < limit for a, b in zip(paint(model, run, 3, engine=FastEngine()), expected, strict=True)
        )


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), size=st.integers(1, 20))
def test_groups_are_as_full_as_they_may_be(lengths, size):
    groups = [lengths[part] for part in cut_groups(lengths, size)]
    assert [length for group in groups for length in group] == lengths and all(groups)
    assert all(len(group) == 1 or sum(group) <= size for group in groups)
    for group, after in itertools.pairwise(groups):
        assert sum(group) + after[0] > size


@pytest.mark.parametrize("group", [1, 16, 60, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_in_chunks_equal_the_blocks(dtype, group):
    config = LensConfig(num_layers=3, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    torch.manual_seed(0)
    model = LensTransformer(config).to(dtype)
    layout = Layout.build([(3, 5), (3, 5), (2, 2), (9, 7)], text_lengths=[4, 4, 0, 11])
    tables = [RotaryTable(*(x.to(dtype) for x in table)) for table in model.rotary(layout)]
    image, text = tensor((97, 32), 0, dtype), tensor((19, 32), 1, dtype)
    modulation = model.modulation(torch.tensor([0.1, 0.9, 0.5, 0.4], dtype=dtype))
    expected, words = image, text
    with torch.no_grad():
        for index, block in enumerate(model.transformer_blocks):
            vectors = (modulation.image[index], modulation.text[index])
            expected, words = block(expected, words, None, tables, layout, modulation=vectors)
        space = Workspace(layout, 32, 2, config.mlp_dim, dtype=dtype, chunk_tokens=16, group_tokens=group)
        blocks = list(model.transformer_blocks)
        for _ in range(2):  # the buffers are used again
            found = run_chunked(blocks, image.clone(), text.clone(), modulation[:2], tables, space)
            assert error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-13)


def test_errors_name_the_argument():
    layout = Layout.build([(2, 2)], text_lengths=[1])
    with pytest.raises(ValueError, match="chunk_tokens: expected at least 1, got 0"):
        Workspace(layout, 32, 2, 85, chunk_tokens=0)
    with pytest.raises(ValueError, match="group_tokens: expected at least 1, got 0"):
        Workspace(layout, 32, 2, 85, group_tokens=0)
    for wrong in (0, -3, "picture", 2.5):
        with pytest.raises(ValueError, match='group: expected a positive number of tokens or "sample"'):
            FastEngine(group=wrong)
    with pytest.raises(ValueError, match="times"):
        FastEngine()(tiny_transformer(), features(1), layout, torch.ones(3, 2))
    with pytest.raises(ValueError, match="text_tokens"):
        FastEngine()(tiny_transformer(), features(2), layout, torch.ones(3, 1))
    with pytest.raises(ValueError, match="image_tokens"):
        FastEngine()(tiny_transformer(), features(1), layout, torch.ones(3, 1))(0, torch.zeros(5, 16))


def test_the_pipeline_paints_the_same_pictures_with_and_without():
    calls = {"prompt": ["a blue circle", "two big"], "negative_prompt": "a red cube", "height": [32, 24]}
    calls |= {"width": [40, 56], "seeds": [3, 4], "num_inference_steps": 3, "guidance_scale": 4.0}
    plain, fast = (tiny_pipeline(fast=fast)(**calls, output_type="latent").images for fast in (False, True))
    assert all(error(a, b) < 1e-5 for a, b in zip(fast, plain, strict=True))
