"""The one-page Lens equals the library: same weights, same velocity, same loss, same samples."""

from pathlib import Path

import pytest
import torch

from experiments.nano_lens import NanoLens, angles, flow_loss, main, read, sample
from lensmini.data import SCENE_VOCABULARY
from lensmini.nn import LensConfig, LensTransformer, RotaryEmbedding3D
from lensmini.objectives import flow_matching_loss
from lensmini.packed import Layout, pack
from lensmini.paths import interpolate, velocity_target
from lensmini.pipeline.painting import paint_packed


def twins(seed=0):
    """Both models with the same random weights, none of them zero."""
    config = LensConfig(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        axes_dims_rope=(4, 14, 14),
        in_channels=12,
        out_channels=3,
        enc_hidden_dim=6,
        selected_layer_index=(0, 1),
    )
    whole = LensTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    nano = NanoLens(channels=12, text_dim=6, text_layers=2, dim=64, heads=2, layers=2)
    nano.load_state_dict(whole.state_dict(), strict=True)
    return nano, whole


def inputs(height, width, num=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(num, 12, height, width, generator=generator) for _ in range(2))
    text = [torch.randn(num, 5, 6, generator=generator) for _ in range(2)]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])[:num]
    return latents, noise, torch.rand(num, generator=generator), text, mask


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (7, 2)])
def test_same_weights_give_the_same_velocity(height, width):
    nano, whole = twins()
    latents, _, t, text, mask = inputs(height, width)
    torch.testing.assert_close(nano(latents, t, text, mask), whole(latents, t, text, mask), rtol=1e-4, atol=1e-4)


def test_weights_go_both_ways():
    nano, whole = twins()
    whole.load_state_dict(NanoLens(channels=12, text_dim=6, text_layers=2, dim=64, heads=2, layers=2).state_dict())
    bias = whole.transformer_blocks[0].img_mod[1].bias.detach().view(6, 64)
    assert not whole.proj_out.weight.any() and not bias[[0, 1, 3, 4]].any() and bool((bias[[2, 5]] == 0.1).all())
    assert list(nano.state_dict()) and set(nano.state_dict()) == set(whole.state_dict())


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3)])
def test_rotary_angles_are_the_library_s(height, width):
    image, text = RotaryEmbedding3D((4, 14, 14))(Layout.build([(height, width)], text_lengths=[4]))
    mine = angles(height, width, 4, (4, 14, 14))
    for table, angle in zip((image, text), mine, strict=True):
        torch.testing.assert_close(angle.cos(), table.cos, rtol=0, atol=1e-5)
        torch.testing.assert_close(angle.sin(), table.sin, rtol=0, atol=1e-5)


def test_the_loss_is_the_library_s():
    nano, whole = twins()
    clean, noise, t, text, mask = inputs(3, 4)
    expected = flow_matching_loss(whole(interpolate(clean, noise, t), t, text, mask), velocity_target(clean, noise))
    torch.testing.assert_close(flow_loss(nano, clean, noise, t, text, mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_are_the_pipeline_s(guidance):
    nano, whole = twins()
    with torch.no_grad():
        whole.proj_out.weight.mul_(0.1)  # keeps the walk tame
        nano.load_state_dict(whole.state_dict())
    _, noise, _, text, mask = inputs(3, 4, num=2)
    mine = sample(nano, noise, text, mask, steps=5, guidance=guidance, mu=0.7)
    words = [torch.stack([layer[i][mask[i]] for layer in text], 1) for i in range(2)]
    theirs = paint_packed(
        whole, list(noise), words, [w[:0] for w in words], num_steps=5, guidance_scale=guidance, mu=0.7
    )
    torch.testing.assert_close(mine, torch.stack(list(theirs)), rtol=1e-3, atol=1e-3)
    assert pack(theirs).isfinite().all()


def test_words_are_looked_up_and_padding_is_masked():
    vectors = torch.arange(float(len(SCENE_VOCABULARY)))[:, None]
    (layer,), mask = read(["a red circle", "two"], vectors)
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert layer[0, :, 0].tolist() == [SCENE_VOCABULARY.index(word) for word in ("a", "red", "circle")]


def test_a_short_run_learns_something_and_paints(tmp_path, capsys):
    main(steps=8, batch=2, out=tmp_path)
    said = capsys.readouterr().out
    first, last = (float(line.split("loss ")[1]) for line in said.splitlines() if "loss" in line)
    assert last < first and (tmp_path / "samples.png").stat().st_size > 1000


def test_it_is_one_page():
    lines = Path("experiments/nano_lens.py").read_text().splitlines()
    assert len(lines) <= 200
