import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lensmini.packed import Layout, pack, pack_text, unpack
from tests.strategies import grids, layouts, seeds, tensor, text_masks

TENSORS = ["grids", "image_offsets", "text_offsets", "joint_offsets", "image_samples", "text_samples"]
TENSORS += ["text_positions", "joint_order", "joint_inverse"]
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
TRAILING = st.lists(st.integers(1, 3), max_size=2)


def same(first: Layout, second: Layout) -> bool:
    tensors = all(torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS)
    return tensors and first.image_lengths == second.image_lengths and first.text_lengths == second.text_lengths


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


# pack, unpack, pack_text


@given(grids(), st.integers(1, 3), seeds())
def test_packed_tokens_are_the_pixels_row_by_row(pairs, channels, seed):
    images = [tensor((channels, h, w), seed + i) for i, (h, w) in enumerate(pairs)]
    rows = [image[:, y, x] for image, (h, w) in zip(images, pairs, strict=True) for y in range(h) for x in range(w)]
    assert torch.equal(pack(images), torch.stack(rows))


@given(grids(), st.integers(1, 3), seeds(), DTYPES)
def test_unpacking_undoes_packing(pairs, channels, seed, dtype):
    images = [tensor((channels, h, w), seed + i, dtype) for i, (h, w) in enumerate(pairs)]
    back = unpack(pack(images), Layout.build(pairs))
    assert [image.shape for image in back] == [image.shape for image in images]
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(back, images, strict=True))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), seeds())
def test_a_batch_packs_like_the_list_of_its_images(batch, height, width, seed):
    latents = tensor((batch, 2, height, width), seed)
    assert torch.equal(pack(latents), pack([*latents]))


def test_unpacked_images_share_memory_with_the_tokens():
    tokens = tensor((11, 4), 0)
    images = unpack(tokens, Layout.build([(2, 3), (1, 5)]))
    images[1][:, 0, 4] = 7.0
    assert tokens[10].tolist() == [7.0] * 4


@given(st.data(), st.integers(1, 4), st.integers(1, 3), seeds())
def test_packed_text_is_the_valid_tokens_in_order_with_their_layers(data, batch, num_layers, seed):
    mask = data.draw(text_masks(batch))
    layers = [tensor((*mask.shape, 2), seed + i) for i in range(num_layers)]
    rows = [torch.stack([layer[i, j] for layer in layers]) for i, j in mask.nonzero().tolist()]
    expected = torch.stack(rows) if rows else torch.empty(0, num_layers, 2)
    assert torch.equal(pack_text(layers, mask), expected)
    assert torch.equal(pack_text(layers, mask.long()), expected)


# the layout's fields


@given(grids(), st.data())
def test_a_mask_and_a_loop_over_its_slots_agree(pairs, data):
    mask = data.draw(text_masks(len(pairs)))
    layout = Layout.build(pairs, text_mask=mask)
    samples, positions = [], []
    for sample, row in enumerate(mask.tolist()):
        for slot, valid in enumerate(row):
            if valid:
                samples.append(sample)
                positions.append(slot)
    assert layout.text_samples.tolist() == samples
    assert layout.text_positions.tolist() == positions
    assert layout.text_lengths == tuple(samples.count(i) for i in range(len(pairs)))
    assert same(layout, Layout.build(pairs, text_mask=mask.to(torch.uint8)))


@given(grids(), st.data())
def test_lengths_are_a_mask_without_holes(pairs, data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=len(pairs), max_size=len(pairs)))
    mask = torch.tensor([[slot < length for slot in range(6)] for length in lengths])
    assert same(Layout.build(pairs, text_lengths=lengths), Layout.build(pairs, text_mask=mask))
    if not any(lengths):
        assert same(Layout.build(pairs), Layout.build(pairs, text_mask=mask))


@given(grids())
def test_grids_may_be_pairs_or_a_tensor(pairs):
    layout = Layout.build(pairs)
    assert layout.grids.tolist() == [list(pair) for pair in pairs]
    assert layout.image_lengths == tuple(height * width for height, width in pairs)
    assert same(layout, Layout.build(torch.tensor(pairs, dtype=torch.int32)))


@given(layouts())
def test_offsets_are_the_running_sums_of_the_lengths(layout):
    for stream, total in (("image", layout.num_image_tokens), ("text", layout.num_text_tokens), ("joint", None)):
        offsets, lengths = getattr(layout, f"{stream}_offsets"), layout.lengths(stream)
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == [sum(lengths[:i]) for i in range(layout.batch_size + 1)]
        assert total is None or offsets[-1] == total
        if stream != "joint":
            samples = getattr(layout, f"{stream}_samples")
            assert samples.dtype == torch.int64
            assert samples.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert layout.joint_lengths == tuple(map(sum, zip(layout.image_lengths, layout.text_lengths, strict=True)))


@given(layouts())
def test_the_joint_order_is_image_then_text_of_each_sample(layout):
    image = iter(range(layout.num_image_tokens))
    text = iter(range(layout.num_image_tokens, layout.num_image_tokens + layout.num_text_tokens))
    expected = []
    for image_length, text_length in zip(layout.image_lengths, layout.text_lengths, strict=True):
        expected += [next(image) for _ in range(image_length)] + [next(text) for _ in range(text_length)]
    assert layout.joint_order.tolist() == expected
    assert layout.joint_order[layout.joint_inverse].tolist() == [*range(len(expected))]
    assert layout.joint_inverse[layout.joint_order].tolist() == [*range(len(expected))]


@given(layouts())
def test_a_layout_survives_pickle_copy_and_to(layout):
    assert same(pickle.loads(pickle.dumps(layout)), layout)
    assert same(copy.deepcopy(layout), layout)
    assert same(layout.to("cpu"), layout)


def test_to_moves_every_tensor_and_leaves_the_original():
    mask = torch.tensor([[True, False, True]])
    layout = Layout.build([(2, 3)], text_mask=mask)
    for moved in (layout.to("meta"), Layout.build([(2, 3)], text_mask=mask, device="meta")):
        assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
        assert (moved.image_lengths, moved.text_lengths) == ((6,), (2,))
    assert {getattr(layout, name).device.type for name in TENSORS} == {"cpu"}


@pytest.mark.gpu
def test_a_layout_follows_its_mask_to_the_gpu_and_pins():
    mask = torch.tensor([[True, False, True]])
    layout = Layout.build([(2, 3)], text_mask=mask)
    on_gpu = Layout.build([(2, 3)], text_mask=mask.cuda())
    assert on_gpu.joint_order.is_cuda and same(on_gpu.to("cpu"), layout)
    pinned = layout.pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in TENSORS) and same(pinned, layout)


def collate(samples):
    pairs, lengths = zip(*samples, strict=True)
    return Layout.build(pairs, text_lengths=lengths)


def test_a_data_worker_can_build_a_layout():
    samples = [((2, 3), 4), ((1, 5), 0), ((3, 3), 2)]
    batches = [*DataLoader(samples, batch_size=2, num_workers=1, collate_fn=collate)]
    assert same(batches[0], collate(samples[:2]))
    assert same(batches[1], collate(samples[2:]))


# expand and mean, against loops over samples


def expand_loop(per_sample, lengths):
    rows = [per_sample[i] for i, length in enumerate(lengths) for _ in range(length)]
    return torch.stack(rows) if rows else per_sample.new_empty(0, *per_sample.shape[1:])


def tolerance(dtype):
    return {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}


@given(layouts(), st.sampled_from(["image", "text"]), TRAILING, seeds(), DTYPES)
def test_expand_repeats_each_row_and_its_gradient_sums_them(layout, stream, trailing, seed, dtype):
    lengths = layout.lengths(stream)
    values = tensor((layout.batch_size, *trailing), seed, dtype).requires_grad_()
    expanded = layout.expand(values, stream)
    assert expanded.dtype == dtype
    assert torch.equal(expanded, expand_loop(values, lengths))
    weight = tensor(expanded.shape, seed + 1, dtype)
    (gradient,) = torch.autograd.grad(expanded, values, weight)
    sums = torch.stack([piece.double().sum(0) for piece in weight.split(lengths)])
    if dtype == torch.bfloat16:
        # Rounded once, from a wider sum: 2^-8 of the result, not of its terms.
        torch.testing.assert_close(gradient.double(), sums, rtol=2**-8, atol=1e-6)
    else:
        torch.testing.assert_close(gradient.double(), sums, **tolerance(dtype))


@given(layouts(), TRAILING, seeds(), DTYPES)
def test_mean_is_the_mean_over_tokens_and_trailing_axes(layout, trailing, seed, dtype):
    values = tensor((layout.num_image_tokens, *trailing), seed, dtype).requires_grad_()
    mean = layout.mean(values)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    pieces = values.detach().double().split(layout.image_lengths)
    expected = torch.stack([piece.sum() / piece.numel() for piece in pieces])
    torch.testing.assert_close(mean.double(), expected, **tolerance(mean.dtype))
    weight = tensor(mean.shape, seed + 1, mean.dtype)
    (gradient,) = torch.autograd.grad(mean, values, weight)
    assert gradient.dtype == dtype
    for piece, source, share in zip(gradient.split(layout.image_lengths), pieces, weight.double(), strict=True):
        rounding = {"rtol": 2**-8, "atol": 1e-9} if dtype == torch.bfloat16 else tolerance(dtype)
        torch.testing.assert_close(piece.double(), (share / source.numel()).expand_as(piece), **rounding)


def test_mean_of_bfloat16_accumulates_in_float32():
    # Near 256 bfloat16 has steps of two: a sum kept in it would lose nearly all of these ones.
    values = torch.cat([torch.full((1, 1), 256.0), torch.ones(767, 1)]).bfloat16()
    layout = Layout.build([(24, 32)])
    assert layout.mean(values).item() == pytest.approx(1023 / 768, rel=1e-6)
    assert compiled(layout.mean)(values).item() == pytest.approx(1023 / 768, rel=1e-6)


@given(grids(min_size=2), seeds(), st.data())
def test_nothing_leaks_from_one_sample_into_another(pairs, seed, data):
    bad = data.draw(st.integers(0, len(pairs) - 1))
    layout = Layout.build(pairs)
    values = tensor((layout.num_image_tokens, 2), seed)
    poisoned = values.clone()
    poisoned[layout.image_offsets[bad]] = data.draw(st.sampled_from([torch.nan, torch.inf]))
    clean = [i for i in range(len(pairs)) if i != bad]
    poisoned_mean = layout.mean(poisoned)
    assert torch.equal(poisoned_mean[clean], layout.mean(values)[clean])
    assert not poisoned_mean[bad].isfinite()


# the compiled path: custom operators instead of loops over samples


@pytest.mark.parametrize("mask", [[[True, False, True], [False, False, False]], [[False], [False]], [[True], [True]]])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_compiled_expand_and_mean_equal_the_eager_ones(mask, trailing):
    layout = Layout.build([(2, 3), (4, 1)], text_mask=torch.tensor(mask))
    values = tensor((2, *trailing), 0).requires_grad_()
    tokens = tensor((10, *trailing), 1).requires_grad_()

    def everything(rows, per_token):
        return layout.expand(rows), layout.expand(rows, "text"), layout.mean(per_token)

    eager = everything(values, tokens)
    weights = [tensor(result.shape, 2) for result in eager]
    results = compiled(everything)(values, tokens)
    for result, expected in zip(results, eager, strict=True):
        torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(results, [values, tokens], weights)
    for gradient, expected in zip(gradients, torch.autograd.grad(eager, [values, tokens], weights), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_one_graph_serves_every_mixture():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def residual(layout, rows, tokens):
        return layout.mean((tokens - layout.expand(rows)).square()) + layout.mean(tokens * layout.expand(rows))

    torch.compiler.reset()
    step = torch.compile(residual, backend=count, fullgraph=True, dynamic=True)
    for seed, pairs in enumerate([[(2, 3), (4, 4)], [(5, 2), (3, 3), (2, 2)], [(1, 7), (2, 2)], [(3, 5)] * 5]):
        layout = Layout.build(pairs, text_lengths=[3 + seed] * len(pairs))
        rows, tokens = tensor((len(pairs), 4), seed), tensor((layout.num_image_tokens, 4), seed + 1)
        torch.testing.assert_close(step(layout, rows, tokens), residual(layout, rows, tokens))
    assert len(graphs) == 1


@given(layouts(), seeds())
def test_inputs_are_not_modified(layout, seed):
    before = copy.deepcopy(layout)
    rows, tokens = tensor((layout.batch_size, 2), seed), tensor((layout.num_image_tokens, 2), seed)
    rows_before, tokens_before = rows.clone(), tokens.clone()
    layout.expand(rows)
    layout.mean(tokens)
    assert torch.equal(rows, rows_before) and torch.equal(tokens, tokens_before) and same(layout, before)


# errors


@pytest.mark.parametrize(
    ("grids", "options", "match"),
    [
        ([], {}, "grids"),
        ([(2, 0)], {}, "grids.*positive"),
        ([(-1, 2)], {}, "grids.*positive"),
        ([(2.5, 2)], {}, "grids.*integers"),
        ([(2, 2, 2)], {}, "grids"),
        ([(2, 2), (2,)], {}, "grids"),
        ([2, 2], {}, "grids"),
        (torch.ones(2, 3, dtype=torch.int64), {}, "grids"),
        (torch.ones(2, dtype=torch.int64), {}, "grids"),
        (torch.ones(0, 2, dtype=torch.int64), {}, "grids"),
        (torch.ones(1, 2), {}, "grids.*integers"),
        ([(2, 2)], {"text_lengths": [1, 2]}, "text_lengths: expected 1 non-negative"),
        ([(2, 2)], {"text_lengths": []}, "text_lengths"),
        ([(2, 2)], {"text_lengths": [-1]}, "text_lengths"),
        ([(2, 2)], {"text_lengths": [1.5]}, "text_lengths"),
        ([(2, 2)], {"text_mask": torch.ones(2, 3).bool()}, "text_mask.*b=1"),
        ([(2, 2)], {"text_mask": torch.ones(3).bool()}, "text_mask"),
        ([(2, 2)], {"text_mask": torch.ones(1, 3)}, "text_mask.*float32"),
        ([(2, 2)], {"text_mask": torch.full((1, 3), 2)}, "text_mask.*int64"),
        ([(2, 2)], {"text_mask": torch.ones(1, 3).bool(), "text_lengths": [3]}, "got both"),
    ],
)
def test_a_bad_layout_is_refused_by_name(grids, options, match):
    with pytest.raises(ValueError, match=match):
        Layout.build(grids, **options)


LAYOUT = Layout.build([(2, 3), (1, 5)], text_lengths=[2, 0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pack(torch.zeros(4, 2, 3)), r"latents: expected shape \[b c h w\]"),
        (lambda: pack([]), "latents"),
        (lambda: pack([torch.zeros(4, 2, 3), torch.zeros(5, 2, 3)]), r"latents\[1\].*c=4"),
        (lambda: pack([torch.zeros(4, 2)]), r"latents\[0\]"),
        (lambda: unpack(torch.zeros(10, 4), LAYOUT), "image_tokens.*N=11"),
        (lambda: unpack(torch.zeros(11), LAYOUT), "image_tokens"),
        (lambda: pack_text([], torch.ones(1, 2).bool()), "text_features"),
        (lambda: pack_text([torch.zeros(1, 3, 8)], torch.ones(1, 2).bool()), r"text_features\[0\].*l=2"),
        (lambda: pack_text([torch.zeros(1, 2, 8), torch.zeros(1, 2, 7)], torch.ones(1, 2).bool()), "features.1.*e=8"),
        (lambda: pack_text([torch.zeros(1, 2, 8)], torch.ones(1, 2)), "text_mask.*float32"),
        (lambda: pack_text([torch.zeros(1, 2, 8)], torch.ones(2).bool()), "text_mask"),
        (lambda: LAYOUT.expand(torch.zeros(3)), "per_sample.*b=2"),
        (lambda: LAYOUT.expand(torch.zeros(())), "per_sample"),
        (lambda: LAYOUT.expand(torch.zeros(2), "joint"), "stream.*'joint'"),
        (lambda: LAYOUT.mean(torch.zeros(10, 4)), "per_token.*N=11"),
        (lambda: LAYOUT.lengths("audio"), "stream.*'audio'"),
    ],
)
def test_a_bad_argument_is_refused_by_name(call, match):
    with pytest.raises(ValueError, match=match):
        call()
