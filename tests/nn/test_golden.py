"""The transformer against the published numbers: outputs, inner tensors, gradients, bf16, the sampling loop, the keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lensmini.nn import LensConfig, LensTransformer
from lensmini.packed import Layout, pack, pack_text
from tests.golden_cases import golden

DIT_CASES = ["dit_a_square", "dit_b_blocks_odd", "dit_c_eps_holes"]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def load_model(tensors: dict[str, Tensor], meta: dict[str, Any]) -> LensTransformer:
    model = LensTransformer(LensConfig.from_dict(meta["model_config"]))
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model


def to_latents(tokens: Tensor, height: int) -> Tensor:
    """Row-major tokens [b, h*w, c] as the image [b, c, h, w]."""
    return tokens.unflatten(1, (height, -1)).movedim(-1, 1).contiguous()


def to_tokens(latents: Tensor) -> Tensor:
    return latents.movedim(1, -1).flatten(1, 2)


def model_inputs(tensors: dict[str, Tensor], meta: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Latents, time, text features and mask as the model takes them."""
    latents = to_latents(tensors["inputs.hidden_states"], meta["img_shapes"][0][1])
    layers = len(meta["model_config"]["selected_layer_index"])
    features = [tensors[f"inputs.encoder_hidden_states.{i}"] for i in range(layers)]
    return latents, tensors["inputs.timestep"], features, tensors["inputs.encoder_hidden_states_mask"].bool()


@pytest.mark.parametrize("backend", ["auto", "loop", "padded", "math"])
@pytest.mark.parametrize("name", DIT_CASES)
def test_published_velocity_from_tensor_list_and_packed_input(name: str, backend: Any) -> None:
    tensors, meta = golden(name)
    model = load_model(tensors, meta)
    latents, t, features, mask = model_inputs(tensors, meta)
    expected = tensors["outputs.sample"]
    with torch.no_grad():
        output = model(latents, t, features, mask, backend=backend)
        listed = model(list(latents), t, features, mask, backend=backend)
        layout = Layout.build([tuple(meta["img_shapes"][0][1:])] * len(latents), text_mask=mask)
        packed = model.forward_packed(pack(latents), t, pack_text(features, mask), layout, backend=backend)
    assert output.shape == (len(latents), expected.shape[-1], *latents.shape[2:])
    assert error(to_tokens(output), expected) < 3e-5
    assert isinstance(listed, list) and error(to_tokens(torch.stack(listed)), expected) < 3e-5
    assert error(packed.unflatten(0, (len(latents), -1)), expected) < 3e-5


@pytest.mark.parametrize("name", DIT_CASES)
def test_published_velocity_of_each_sample_alone(name: str) -> None:
    tensors, meta = golden(name)
    model = load_model(tensors, meta)
    latents, t, features, mask = model_inputs(tensors, meta)
    for i in range(len(latents)):
        one = slice(i, i + 1)
        with torch.no_grad():
            output = model(latents[one], t[one], [layer[one] for layer in features], mask[one])
        assert error(to_tokens(output), tensors["outputs.sample"][one]) < 3e-5


@pytest.mark.parametrize("name", DIT_CASES)
def test_published_streams_before_the_first_block(name: str) -> None:
    tensors, meta = golden(name)
    model = load_model(tensors, meta)
    latents, t, features, mask = model_inputs(tensors, meta)
    with torch.no_grad():
        assert error(model.img_in(pack(latents)).unflatten(0, (len(latents), -1)), tensors["outputs.img_in"]) < 5e-5
        assert error(model.time_text_embed(t), tensors["outputs.temb"]) < 5e-5
