"""The transformer against the published numbers: outputs, inner tensors, gradients, bf16, a sampling run, the keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lensmini.nn import LensConfig, LensTransformer, fuse_text_layers
from lensmini.nn.latents import LatentNormalizer, unpatchify
from lensmini.packed import Layout, pack, pack_text
from lensmini.sampling import empirical_mu, guide, sample_ode, time_grid
from tests.golden_cases import golden

DIT_CASES = ["dit_a_square", "dit_b_blocks_odd", "dit_c_eps_holes"]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def load_model(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Any:
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
        tokens = pack_text(features, mask)
        streams = fuse_text_layers(tokens, model.txt_norm, model.txt_in)
    assert error(streams, tensors["outputs.txt_in"][mask]) < 5e-5


def test_published_streams_after_every_block() -> None:
    tensors, meta = golden("dit_b_blocks_odd")
    model = load_model(tensors, meta)
    latents, t, features, mask = model_inputs(tensors, meta)
    with torch.no_grad():
        captured = model(latents, t, features, mask, capture_blocks=range(3))
    assert set(captured.hidden_states) == {0, 1, 2}
    for index, (image, text) in captured.hidden_states.items():
        assert error(image.unflatten(0, (len(latents), -1)), tensors[f"outputs.block.{index}.img"]) < 5e-5
        assert error(text, tensors[f"outputs.block.{index}.txt"][mask]) < 5e-5
    assert error(to_tokens(captured.velocity), tensors["outputs.sample"]) < 3e-5


def test_published_attention_outputs_and_final_norm() -> None:
    tensors, meta = golden("dit_b_blocks_odd")
    model = load_model(tensors, meta)
    latents, t, features, mask = model_inputs(tensors, meta)
    seen: list[tuple[Tensor, Tensor | None]] = []
    normed: list[Tensor] = []
    for block in model.transformer_blocks:
        block.attn.register_forward_hook(lambda module, args, output: seen.append(output))
    model.norm_out.register_forward_hook(lambda module, args, output: normed.append(output))
    with torch.no_grad():
        model(latents, t, features, mask)
    for index, (image, text) in enumerate(seen):
        assert error(image.unflatten(0, (len(latents), -1)), tensors[f"outputs.attn.{index}.img"]) < 5e-5
        if text is None:
            assert index == len(seen) - 1, "only the last block may leave the text out"
        else:
            assert error(text, tensors[f"outputs.attn.{index}.txt"][mask]) < 5e-5
    assert error(normed[0].unflatten(0, (len(latents), -1)), tensors["outputs.norm_out"]) < 5e-5


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_published_gradients(form: str) -> None:
    tensors, meta = golden("dit_a_square_grads")
    inputs, case = golden(meta["forward_case"])
    model = load_model(inputs, case)
    latents, t, features, mask = model_inputs(inputs, case)
    latents.requires_grad_()
    output = model(latents if form == "tensor" else list(latents), t, features, mask)
    output = output if form == "tensor" else torch.stack(output)
    loss = (to_tokens(output) - tensors["inputs.target"]).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(tensors["outputs.loss"].item(), rel=1e-5)
    dead = set(meta["zero_gradient_parameters"])
    named = dict(model.named_parameters())
    assert dead < named.keys() and {f"grads.{name}" for name in named} <= tensors.keys()
    for name, parameter in named.items():
        expected = tensors[f"grads.{name}"]
        if name in dead:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None and error(parameter.grad, expected) < 2e-4, name
    assert latents.grad is not None
    assert error(to_tokens(latents.grad), tensors["grads.inputs.hidden_states"]) < 2e-4


def test_published_bf16_velocity_given_the_rounded_time() -> None:
    tensors, meta = golden("dit_a_square")
    model = load_model(tensors, meta).bfloat16()
    latents, t, features, mask = model_inputs(tensors, meta)
    rounded = t.bfloat16().float()
    with torch.no_grad():
        output = model(latents.bfloat16(), rounded, [layer.bfloat16() for layer in features], mask)
        exact_time = model(latents.bfloat16(), t, [layer.bfloat16() for layer in features], mask)
    expected = tensors["outputs_bf16.sample"]
    assert output.dtype == torch.bfloat16
    distance = [((to_tokens(x).float() - expected).norm() / expected.norm()).item() for x in (output, exact_time)]
    assert distance[0] < 0.015
    assert distance[1] > 0.03, "the unrounded time must not be rounded by the model"


def test_published_bf16_velocity_of_a_bf16_model_given_bf16_time() -> None:
    tensors, meta = golden("dit_a_square")
    model = load_model(tensors, meta).bfloat16()
    latents, t, features, mask = model_inputs(tensors, meta)
    with torch.no_grad():
        output = model(latents.bfloat16(), t.bfloat16(), [layer.bfloat16() for layer in features], mask)
    expected = tensors["outputs_bf16.sample"]
    assert ((to_tokens(output).float() - expected).norm() / expected.norm()).item() < 0.015


@pytest.mark.parametrize("form", ["tensor", "list", "packed", "separate"])
def test_published_sampling_run(form: str) -> None:
    tensors, meta = golden("denoise_loop_a")
    model = load_model(tensors, meta)
    height, width = meta["height"] // 16, meta["width"] // 16
    features = [tensors[f"inputs.prompt_embeds.{i}"] for i in range(4)]
    prompt_mask = tensors["inputs.prompt_mask"].bool()
    both = [torch.cat([layer, torch.zeros_like(layer)]) for layer in features]
    mask = torch.cat([prompt_mask, torch.zeros_like(prompt_mask)])
    assert mask.equal(tensors["inputs_seen.text_mask"].bool())
    noise = to_latents(tensors["inputs.latents"], height)
    mu = empirical_mu(height * width, meta["steps"])
    assert mu == pytest.approx(meta["mu"], rel=1e-6)
    grid = time_grid(meta["steps"], mu)
    calls = iter(range(meta["steps"]))

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        step = next(calls)
        doubled, times = torch.cat([latents, latents]), torch.cat([t, t])
        assert (times - tensors["inputs_seen.timestep"][step]).abs().max() < 1e-6
        if form == "tensor":
            output = model(doubled, times, both, mask)
        elif form == "list":
            output = torch.stack(model(list(doubled), times, both, mask))
        elif form == "separate":
            cond, uncond = model(latents, t, features, prompt_mask), model(latents, t)
            output = torch.cat([cond, uncond])
        else:
            layout = Layout.build([(height, width)] * 2, text_mask=mask)
            packed = model.forward_packed(pack(doubled), times, pack_text(both, mask), layout)
            output = to_latents(packed.unflatten(0, (2, -1)), height)
        assert error(to_tokens(output), tensors[f"outputs.model_output.{step}"]) < 1e-4
        guided = guide(*output.chunk(2), meta["guidance_scale"], channel_dim=1)
        assert error(to_tokens(guided), tensors[f"outputs.guided.{step}"]) < 1e-4
        return guided

    states: list[Tensor] = []
    with torch.no_grad():
        final = sample_ode(velocity, noise, grid, callback=lambda index, state: states.append(state))
    for index, state in enumerate(states):
        assert error(to_tokens(state), tensors[f"outputs.latents.{index + 1}"]) < 1e-4
    assert len(states) == meta["steps"] and error(to_tokens(final), tensors["outputs.final_latents"]) < 1e-4
    normaliser = LatentNormalizer(tensors["bn.running_mean"], tensors["bn.running_var"], eps=meta["batch_norm_eps"])
    decoded = unpatchify(normaliser.denormalize(final))
    assert error(decoded, tensors["outputs.vae_latent"]) < 1e-4


def test_released_keys_shapes_and_parameter_count() -> None:
    _, meta = golden("released_state_dict")
    with torch.device("meta"):
        model = LensTransformer(LensConfig.from_dict(meta["model_config"]))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == meta["tensors"] and len(shapes) == meta["tensor_count"] == 1264
    assert sum(parameter.numel() for parameter in model.parameters()) == meta["parameter_count"] == 4_104_225_152
    assert LensConfig() == LensConfig.from_dict(meta["model_config"]), "the defaults are the released model's"
