"""The slow reference against the published numbers: what the other tests lean on is proved first."""

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.golden_cases import golden

DIT_CASES = ["dit_a_square", "dit_b_blocks_odd", "dit_c_eps_holes"]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def weights_of(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k.removeprefix("weights."): v.to(dtype) for k, v in tensors.items() if k.startswith("weights.")}


def run_case(meta: dict, tensors: dict[str, Tensor], weights: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    config = meta["model_config"]
    num = len(config["selected_layer_index"])
    mask = tensors["inputs.encoder_hidden_states_mask"].bool()
    results = []
    for i in range(len(image)):
        features = [tensors[f"inputs.encoder_hidden_states.{j}"][i].to(image.dtype) for j in range(num)]
        grid = tuple(meta["img_shapes"][0][1:])
        t = tensors["inputs.timestep"][i]
        results.append(reference.lens_forward(weights, config, image[i], grid, t, features, mask[i]))
    return reference.stack_samples(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIT_CASES)
def test_reference_reproduces_every_published_tensor(name: str, dtype: torch.dtype) -> None:
    tensors, meta = golden(name)
    seen = run_case(meta, tensors, weights_of(tensors, dtype), tensors["inputs.hidden_states"].to(dtype))
    expected = {k.removeprefix("outputs."): v for k, v in tensors.items() if k.startswith("outputs.")}
    assert expected.keys() <= seen.keys() and "sample" in expected
    for key, value in expected.items():
        assert error(seen[key], value) < (3e-5 if key == "sample" else 5e-5), key


def test_reference_reproduces_the_published_gradients() -> None:
    tensors, meta = golden("dit_a_square_grads")
    inputs, case = golden(meta["forward_case"])
    weights = {k: v.requires_grad_() for k, v in weights_of(inputs, torch.float64).items()}
    image = inputs["inputs.hidden_states"].double().requires_grad_()
    loss = (run_case(case, inputs, weights, image)["sample"] - tensors["inputs.target"]).square().mean()
    assert loss.item() == pytest.approx(tensors["outputs.loss"].item(), rel=1e-5)
    leaves = {**weights, "inputs.hidden_states": image}
    gradients = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    for key, gradient in zip(leaves, gradients, strict=True):
        expected = tensors[f"grads.{key}"]
        if key in meta["zero_gradient_parameters"]:
            assert (gradient is None or not gradient.any()) and not expected.any(), key
        else:
            assert error(gradient, expected) < 2e-4, key


def test_reference_reproduces_the_published_rope_tables_and_rotation() -> None:
    tensors, meta = golden("rope_a")
    axes = tuple(meta["axes_dims_rope"])
    for grid in meta["grids"]:
        angles = reference.rope_angles(grid["height"], grid["width"], grid["text_len"], axes, meta["theta"])
        for stream, rows in zip(("img", "txt"), angles, strict=True):
            table = torch.tensor(rows, dtype=torch.float64)
            assert (table.cos() - tensors[f"{grid['key']}.{stream}_cos"]).abs().max() < 5e-5
            assert (table.sin() - tensors[f"{grid['key']}.{stream}_sin"]).abs().max() < 5e-5
    apply = meta["apply"]
    angles = reference.rope_angles(apply["height"], apply["width"], apply["text_len"], axes, meta["theta"])
    for stream, rows in zip(("img", "txt"), angles, strict=True):
        x, expected = tensors[f"apply.x_{stream}"], tensors[f"apply.y_{stream}"]
        for sample in range(x.shape[0]):
            for head in range(x.shape[2]):
                rotated = reference.rotate(x[sample, :, head].double(), rows)
                assert (rotated - expected[sample, :, head]).abs().max() < 5e-5


def test_reference_reproduces_the_published_time_embedding() -> None:
    tensors, _ = golden("timestep_a")
    weights = weights_of(tensors, torch.float64)
    for i, t in enumerate(tensors["inputs.timestep"]):
        assert (reference.sinusoid(t) - tensors["outputs.sinusoid"][i]).abs().max() < 2e-4
        temb = reference.time_embedding(t, weights, "timestep_embedder")
        assert error(temb, tensors["outputs.temb"][i]) < 1e-4


def test_reference_knows_every_released_tensor() -> None:
    _, meta = golden("released_state_dict")
    shapes = reference.tensor_shapes(meta["model_config"])
    assert shapes == {key: tuple(shape) for key, shape in meta["tensors"].items()}
