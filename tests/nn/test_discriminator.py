"""Laws of the discriminator head: one logit per picture whatever its size, gradient for the student, none for the teacher."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

from lensmini.nn import DiscriminatorHead, LensConfig, LensTransformer
from lensmini.objectives import generator_loss
from lensmini.packed import Layout
from tests.strategies import layouts, seeds, tensor

DIM, CHANNELS = 16, 4


def teacher(num_layers=4):
    config = LensConfig(
        num_layers=num_layers,
        num_attention_heads=2,
        attention_head_dim=8,
        axes_dims_rope=(2, 2, 4),
        in_channels=CHANNELS,
        out_channels=1,
        enc_hidden_dim=6,
        selected_layer_index=(0, 1),
    )
    return LensTransformer(config).init_weights(0, gate=0.3).requires_grad_(False)


def features(layout, seed, blocks=(1, 3)):
    return {
        block: (
            tensor((layout.num_image_tokens, DIM), seed + block),
            tensor((layout.num_text_tokens, DIM), seed + 9 + block),
        )
        for block in blocks
    }


@given(layouts(), seeds())
def test_it_is_the_mean_vote_of_tokens_and_blocks_written_out(layout, seed):
    head = DiscriminatorHead(DIM, [1, 3], hidden_dim=5).init_weights(seed)
    states = features(layout, seed)
    got = head(states, layout)
    start = 0
    for sample, length in enumerate(layout.image_lengths):
        votes = []
        for index, block in enumerate((1, 3)):
            for token in states[block][0][start : start + length]:
                normed = token / (token.square().mean() + 1e-6).sqrt()
                hidden = F.silu(head.hidden[index].weight @ normed + head.hidden[index].bias)
                votes.append(head.logits[index].weight[0] @ hidden + head.logits[index].bias[0])
        torch.testing.assert_close(got[sample], torch.stack(votes).mean(), rtol=1e-4, atol=1e-5)
        start += length


@given(layouts(), seeds())
def test_a_sample_does_not_depend_on_its_batch_mates(layout, seed):
    head = DiscriminatorHead(DIM, [1, 3]).init_weights(0)
    states = features(layout, seed)
    got = head(states, layout)
    grids = layout.grids.tolist()
    pieces = {block: image.split(layout.image_lengths) for block, (image, _) in states.items()}
    for sample, grid in enumerate(grids):
        alone = {block: (parts[sample], torch.zeros(0, DIM)) for block, parts in pieces.items()}
        torch.testing.assert_close(head(alone, Layout.build([tuple(grid)])), got[sample : sample + 1])


def test_a_frozen_teacher_still_hands_the_students_gradient_on():
    model, head = teacher(), DiscriminatorHead(DIM, [1, 2], hidden_dim=8).init_weights(0)
    layout = Layout.build([(2, 3), (1, 4)], text_lengths=[3, 0])
    clean = tensor((layout.num_image_tokens, CHANNELS), 0).requires_grad_()
    time, text = torch.tensor([0.3, 0.8]), tensor((3, 2, 6), 1)
    noisy = (1 - layout.expand(time))[:, None] * clean
    states = model.forward_packed(noisy, time, text, layout, capture_blocks=head.blocks, early_stop=True).hidden_states
    generator_loss(head(states, layout)).sum().backward()
    assert clean.grad is not None and (clean.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


def test_an_early_stop_gives_the_features_of_the_whole_pass():
    model = teacher()
    layout = Layout.build([(2, 3), (1, 4)], text_lengths=[3, 1])
    inputs = tensor((layout.num_image_tokens, CHANNELS), 0), torch.tensor([0.3, 0.8]), tensor((4, 2, 6), 1), layout
    head = DiscriminatorHead(DIM, [0, 2]).init_weights(1)
    short, whole = (
        model.forward_packed(*inputs, capture_blocks=head.blocks, early_stop=stop) for stop in (True, False)
    )
    assert short.velocity is None and torch.equal(head(short.hidden_states, layout), head(whole.hidden_states, layout))


def test_initial_weights_are_a_function_of_seed_and_name():
    one, same, other = (DiscriminatorHead(DIM, [1, 3]).init_weights(seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert name.endswith(("bias", "norms.0.weight", "norms.1.weight")) == torch.equal(a, c)
    assert not torch.equal(one.hidden[0].weight, one.hidden[1].weight)
    bound = (6 / (DIM + 256)) ** 0.5
    assert 0.9 * bound < one.hidden[0].weight.abs().max() <= bound


def test_low_precision_features_and_float32_votes():
    head = DiscriminatorHead(DIM, [1, 3]).init_weights(0)
    layout = Layout.build([(2, 3), (1, 4)])
    states = features(layout, 0)
    low = {block: (image.bfloat16(), text) for block, (image, text) in states.items()}
    torch.testing.assert_close(head(low, layout), head(states, layout), rtol=0.05, atol=0.02)
    half = DiscriminatorHead(DIM, [1, 3]).init_weights(0).to(torch.bfloat16)(low, layout)
    assert half.dtype == torch.float32


def test_what_does_not_fit_is_named():
    for blocks in ([], [1, 1], [-1]):
        with pytest.raises(ValueError, match="blocks"):
            DiscriminatorHead(DIM, blocks)
    head, layout = DiscriminatorHead(DIM, [1, 3]), Layout.build([(2, 3)])
    with pytest.raises(ValueError, match=r"lacks \[3\]"):
        head(features(layout, 0, blocks=(1,)), layout)
    with pytest.raises(ValueError, match=r"hidden_states\[1\]"):
        head(features(Layout.build([(1, 1)]), 0), layout)
    assert isinstance(head, nn.Module)
