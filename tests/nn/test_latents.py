"""Patch layout and channel statistics against the published latents, loops and torch's batch norm."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.nn.latents import LatentNormalizer, patchify, unpatchify
from tests.golden_cases import golden
from tests.strategies import seeds, tensor

sides = st.integers(1, 4)
patch_sizes = st.integers(1, 3)


def error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def to_tokens(latents):
    return latents.movedim(1, -1).flatten(1, 2)


def from_tokens(tokens, height):
    return tokens.unflatten(1, (height, -1)).movedim(-1, 1)


def test_published_latents_decode_to_the_autoencoders():
    tensors, meta = golden("latents_a")
    normalizer = LatentNormalizer.from_batch_norm({k: v for k, v in tensors.items() if k.startswith("bn.")})
    assert normalizer.eps == meta["batch_norm_eps"]
    latents = from_tokens(tensors["decode.tokens"], meta["grid"][0])
    assert error(unpatchify(normalizer.denormalize(latents)), tensors["decode.vae_latent"]) <= 1e-6


def test_the_autoencoders_latents_encode_to_published_tokens():
    tensors, meta = golden("latents_a")
    normalizer = LatentNormalizer(tensors["bn.running_mean"], tensors["bn.running_var"], eps=meta["batch_norm_eps"])
    patches = patchify(tensors["encode.vae_latent"])
    assert torch.equal(patches, tensors["encode.patchified"])
    assert error(to_tokens(normalizer.normalize(patches)), tensors["encode.tokens"]) <= 1e-6


def test_the_layout_is_the_published_one():
    tensors, meta = golden("latents_a")
    assert torch.equal(to_tokens(patchify(tensors["layout.vae_latent"])), tensors["layout.tokens"])
    back = unpatchify(from_tokens(tensors["layout.tokens"], meta["grid"][0]))
    assert torch.equal(back, tensors["layout.vae_latent"])


@given(b=sides, c=sides, h=sides, w=sides, p=patch_sizes)
def test_channel_index_is_channel_then_row_then_column_of_the_patch(b, c, h, w, p):
    latents = torch.arange(b * c * h * p * w * p).reshape(b, c, h * p, w * p)
    patches = patchify(latents, p)
    assert patches.shape == (b, c * p * p, h, w)
    for channel in range(c):
        for dy in range(p):
            for dx in range(p):
                assert torch.equal(patches[:, channel * p * p + dy * p + dx], latents[:, channel, dy::p, dx::p])
    assert torch.equal(unpatchify(patches, p), latents)


@given(seed=seeds(), k=st.integers(1, 5), h=sides, w=sides, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_normalizing_is_batch_norm_in_evaluation(seed, k, h, w, dtype):
    batch_norm = torch.nn.BatchNorm2d(k, eps=1e-4, affine=False, dtype=dtype).eval()
    batch_norm.running_mean = tensor([k], seed, dtype)
    batch_norm.running_var = 1e-4 * tensor([k], seed + 1, dtype).square()
    normalizer = LatentNormalizer.from_batch_norm(batch_norm)
    latents = tensor([2, k, h, w], seed + 2, dtype)
    normal = normalizer.normalize(latents)
    assert normal.dtype == dtype
    torch.testing.assert_close(normal, batch_norm(latents), rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(normalizer.denormalize(normal), latents, rtol=1e-5, atol=1e-5)


@given(seed=seeds(), k=st.integers(1, 5), n=st.integers(1, 6))
def test_tokens_are_normalized_as_images_are(seed, k, n):
    normalizer = LatentNormalizer(tensor([k], seed), tensor([k], seed + 1).square())
    tokens = tensor([n, k], seed + 2)
    images = tokens.t()[None, :, None]
    assert torch.equal(normalizer.normalize(tokens), normalizer.normalize(images)[0, :, 0].t())
    assert torch.equal(normalizer.denormalize(tokens), normalizer.denormalize(images)[0, :, 0].t())


@given(seed=seeds())
def test_half_precision_is_rounded_only_at_the_end(seed):
    mean, var = 30 + tensor([3], seed), tensor([3], seed + 1).square() + 0.1
    latents = (30 + tensor([2, 3, 2, 2], seed + 2)).bfloat16()
    normalizer, before = LatentNormalizer(mean, var), latents.clone()
    for method in ("normalize", "denormalize"):
        result = getattr(normalizer, method)(latents)
        assert torch.equal(result, getattr(normalizer, method)(latents.float()).bfloat16())
    assert torch.equal(latents, before)


@given(seed=seeds(), k=st.integers(1, 4), widths=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_fitting_in_pieces_is_fitting_at_once(seed, k, widths):
    # The mean is large beside the deviation: sums of squares would lose the variance to rounding.
    offset = 3e4
    batches = [offset + tensor([2, k, 3, width], seed + i, torch.float64) for i, width in enumerate([*widths, 2])]
    pooled = torch.cat([batch.movedim(1, 0).flatten(1) for batch in batches], dim=1)
    normalizer = LatentNormalizer.fit(iter(batches), eps=1e-3)
    assert normalizer.mean.dtype == torch.float32 and normalizer.eps == 1e-3
    torch.testing.assert_close(normalizer.mean.double(), pooled.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(normalizer.var.double(), pooled.var(1, correction=0), rtol=1e-5, atol=0)


def test_fitted_latents_have_zero_mean_and_unit_variance():
    scale = torch.tensor([0.1, 1.0, 20.0]).view(1, 3, 1, 1)
    latents = tensor([4, 3, 16, 16], 0) * scale + scale
    normal = LatentNormalizer.fit(latents.split(1), eps=0.0).normalize(latents)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.var((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_statistics_are_buffers_that_do_not_learn_and_are_copies():
    mean, var = torch.zeros(3), torch.ones(3)
    normalizer = LatentNormalizer(mean, var)
    mean.fill_(7)
    assert not list(normalizer.parameters()) and normalizer.mean.eq(0).all()
    restored = LatentNormalizer(torch.ones(3), torch.ones(3))
    restored.load_state_dict(normalizer.state_dict(), strict=True)
    assert restored.mean.eq(0).all()


def test_works_in_one_compiled_graph():
    normalizer = LatentNormalizer(tensor([8], 0), tensor([8], 1).square())

    def round_trip(latents):
        return unpatchify(normalizer.denormalize(normalizer.normalize(patchify(latents))))

    latents = tensor([2, 2, 4, 6], 2)
    compiled = torch.compile(round_trip, backend="eager", fullgraph=True)
    assert torch.equal(compiled(latents), round_trip(latents))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(4, 2, 2)), r"latents: expected shape \[b c H W\], got \[4, 2, 2\]"),
        (
            lambda: patchify(torch.zeros(1, 4, 3, 2)),
            r"latents: expected sides divisible by 2, got shape \[1, 4, 3, 2\]",
        ),
        (lambda: patchify(torch.zeros(1, 4, 2, 3)), r"latents: expected sides divisible by 2"),
        (lambda: patchify(torch.zeros(1, 4, 2, 2), 0), r"patch_size: expected at least 1, got 0"),
        (lambda: unpatchify(torch.zeros(1, 6, 2, 2)), r"latents: expected channels divisible by 4"),
        (lambda: unpatchify(torch.zeros(1, 6, 2, 2), -1), r"patch_size: expected at least 1, got -1"),
        (lambda: LatentNormalizer(torch.zeros(3), torch.ones(2)), r"var: expected shape \[k\] with k=3, got \[2\]"),
        (lambda: LatentNormalizer(torch.zeros(3), -torch.ones(3)), r"var: expected finite var >= 0"),
        (lambda: LatentNormalizer(torch.zeros(3), torch.zeros(3), eps=0.0), r"var \+ eps > 0"),
        (lambda: LatentNormalizer(torch.zeros(3), torch.ones(3), eps=-0.5), r"eps >= 0"),
        (lambda: LatentNormalizer(torch.full((3,), torch.nan), torch.ones(3)), r"mean: expected finite"),
        (lambda: LatentNormalizer(torch.zeros(3).long(), torch.ones(3)), r"mean: expected floating point"),
        (
            lambda: LatentNormalizer.from_batch_norm({"mean": torch.zeros(3)}),
            r"running_mean and running_var.*\['mean'\]",
        ),
        (lambda: LatentNormalizer.from_batch_norm(torch.nn.Identity()), r"batch_norm: expected running_mean"),
        (lambda: LatentNormalizer.fit([]), r"batches: expected at least one value"),
        (lambda: LatentNormalizer.fit([torch.zeros(2, 3), torch.zeros(2, 4)]), r"batches\[1\]: .* k=3, got \[2, 4\]"),
        (lambda: LatentNormalizer.fit([torch.full((2, 3), torch.inf)]), r"batches\[0\]: expected finite"),
        (
            lambda: LatentNormalizer(torch.zeros(3), torch.ones(3)).normalize(torch.zeros(2, 4, 1, 1)),
            r"latents: .* k=3",
        ),
        (
            lambda: LatentNormalizer(torch.zeros(3), torch.ones(3)).denormalize(torch.zeros(2, 3).int()),
            r"latents: .* floating",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
