"""Merged weights against closed forms, one adapter in every format, exact removal, and files nobody should trust."""

import json
import math
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lensmini.checkpoints.files import CheckpointError
from lensmini.checkpoints.lora import LoRA, apply_lora, load_lora, merge_lora, save_lora, unmerge_lora
from lensmini.nn import LensConfig, LensTransformer
from tests.strategies import seeds, tensor

CONFIG = LensConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=8,
    selected_layer_index=(1, 3),
)
PATHS = {
    "transformer_blocks.0.attn.img_qkv": (32, 96),
    "transformer_blocks.1.attn.to_out.0": (32, 32),
    "transformer_blocks.1.img_mlp.w2": (85, 32),
    "time_text_embed.timestep_embedder.linear_1": (256, 32),
    "norm_out.linear": (32, 64),
}
ALPHAS = dict(zip(PATHS, (4.0, 2.5, 1.0, 8.0, 4.0), strict=True))
RANKS = dict(zip(PATHS, (4, 2, 4, 1, 4), strict=True))


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return LensTransformer(CONFIG).to(dtype)


def halves(seed=0, dtype=torch.float32):
    return {
        path: (tensor((RANKS[path], i), seed + n, dtype), tensor((o, RANKS[path]), seed + n + 50, dtype))
        for n, (path, (i, o)) in enumerate(PATHS.items())
    }


def adapter(seed=0, dtype=torch.float32):
    return LoRA({path: (a, b, ALPHAS[path]) for path, (a, b) in halves(seed, dtype).items()})


def same(left, right):
    assert left.layers.keys() == right.layers.keys()
    for path, layer in left.layers.items():
        other = right.layers[path]
        assert torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up), path
        assert layer.down.dtype == other.down.dtype and layer.alpha == pytest.approx(other.alpha, rel=1e-12), path
    return True


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_bits(model, expected):
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@settings(max_examples=15)
@given(seed=seeds(), scale=st.floats(-2, 2))
def test_a_merged_layer_is_the_base_plus_the_scaled_low_rank_path(seed, scale):
    model, lora = make_model(), adapter(seed)
    base = state(model)
    merge_lora(model, lora, scale=scale)
    for path, (i, _) in PATHS.items():
        layer, (down, up) = model.get_submodule(path), halves(seed)[path]
        x = tensor((3, i), seed + 99)
        plain = torch.nn.functional.linear(x, base[f"{path}.weight"], base.get(f"{path}.bias"))
        expected = plain + scale * ALPHAS[path] / RANKS[path] * ((x @ down.T) @ up.T)
        assert (layer(x) - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max().item())
    touched = {f"{path}.weight" for path in PATHS}
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if k not in touched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_merged_weight_is_the_exact_one_rounded_once(dtype):
    model, lora = make_model(dtype), adapter(3, torch.bfloat16)
    base = state(model)
    merge_lora(model, lora, scale=0.3)
    for path in PATHS:
        layer = lora.layers[path]
        exact = base[f"{path}.weight"].double() + 0.3 * ALPHAS[path] / RANKS[path] * (
            layer.up.double() @ layer.down.double()
        )
        weight = model.get_submodule(path).weight
        spacing = torch.finfo(dtype).eps * exact.abs()
        # Half a unit of the weight's dtype, and a few of float32 for the sum before it.
        bound = 0.5 * spacing + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert weight.dtype == dtype and bool(((weight.double() - exact).abs() <= bound).all()), path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stacked_adapters_come_off_in_reverse_to_the_same_bits(dtype):
    model, originals = make_model(dtype), []
    parameters = [*model.parameters()]
    for seed in range(3):
        originals.append((state(model), merge_lora(model, adapter(seed), scale=0.7)))
    for before, merged in reversed(originals):
        assert not equal_bits(model, before)
        unmerge_lora(model, merged)
        assert equal_bits(model, before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "optimisers hold the parameters"


def test_an_adapter_below_another_does_not_come_off_and_nothing_changes():
    model = make_model()
    first, second = merge_lora(model, adapter(0)), merge_lora(model, adapter(1))
    stacked = state(model)
    with pytest.raises(ValueError, match=r"reverse order.*img_qkv has changed since"):
        unmerge_lora(model, first)
    assert equal_bits(model, stacked)
    unmerge_lora(model, second)
    unmerge_lora(model, first)
    with pytest.raises(ValueError, match="each once"):
        unmerge_lora(model, first)


def test_adapters_of_different_layers_come_off_in_any_order():
    model, (one, *_), (*_, two) = make_model(), PATHS, PATHS
    before, lora = state(model), adapter()
    first = merge_lora(model, LoRA({one: lora.layers[one]}))
    second = merge_lora(model, LoRA({two: lora.layers[two]}))
    unmerge_lora(model, first)
    unmerge_lora(model, second)
    assert equal_bits(model, before)


@pytest.mark.parametrize("change", ["swap rows", "swap columns", "one bit"])
def test_a_weight_that_changed_since_is_noticed(change):
    model = make_model()
    merged = merge_lora(model, adapter())
    weight = model.norm_out.linear.weight.data
    if change == "swap rows":
        weight[[0, 1]] = weight[[1, 0]].clone()
    elif change == "swap columns":
        weight[:, [3, 7]] = weight[:, [7, 3]].clone()
    else:
        weight[5, 5] = torch.nextafter(weight[5, 5], torch.tensor(torch.inf))
    with pytest.raises(ValueError, match=r"norm_out\.linear has changed since"):
        unmerge_lora(model, merged)


def test_unmerging_survives_replaced_parameters_and_refuses_another_dtype():
    model = make_model()
    before = state(model)
    merged = merge_lora(model, adapter())
    model.load_state_dict(state(model), assign=True)
    unmerge_lora(model, merged)
    assert equal_bits(model, before)
    merged = merge_lora(model, adapter())
    with pytest.raises(ValueError, match="another shape or dtype"):
        unmerge_lora(model.bfloat16(), merged)


def test_the_context_takes_the_adapter_off_after_an_error_too():
    model = make_model()
    before = state(model)
    with apply_lora(model, adapter(), scale=0.5):
        assert not equal_bits(model, before)
    assert equal_bits(model, before)
    with pytest.raises(ZeroDivisionError), apply_lora(model, adapter()):
        raise ZeroDivisionError
    assert equal_bits(model, before)


def test_a_layer_that_does_not_fit_leaves_all_weights_alone():
    model, good = make_model(), dict(adapter().layers)
    before = state(model)
    bad = {
        "transformer_blocks.7.attn.img_qkv": (torch.ones(2, 32), torch.ones(96, 2), 2.0),
        "img_in": (torch.ones(2, 32), torch.ones(32, 2), 2.0),
        "transformer_blocks.0": (torch.ones(2, 32), torch.ones(32, 2), 2.0),
    }
    with pytest.raises(
        ValueError, match=r"7\.attn\.img_qkv is not in.*img_in.*\[32, 16\].*\[32, 32\].*blocks\.0 is not"
    ):
        merge_lora(model, LoRA({**good, **bad}))
    with pytest.raises(ValueError, match="scale"):
        merge_lora(model, adapter(), scale=math.nan)
    assert equal_bits(model, before)
    with pytest.raises(ValueError, match="without floating-point data"):
        merge_lora(LensTransformer(CONFIG).to("meta"), adapter())


def test_an_error_on_the_way_restores_what_had_changed(monkeypatch):
    model = make_model()
    before, calls = state(model), []

    def fails_late(weight):
        calls.append(weight)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr("lensmini.checkpoints.lora._checksum", fails_late)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(model, adapter())
    assert equal_bits(model, before)


def peft_settings(**kwargs):
    ranks = {path: rank for path, rank in RANKS.items() if rank != 4}
    alphas = {path: alpha for path, alpha in ALPHAS.items() if alpha != 4.0}
    common = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "rank_pattern": ranks, "alpha_pattern": alphas}
    return {**common, "bias": "none", "use_dora": False, "init_lora_weights": True, **kwargs}


def write_peft(folder, settings=None, adapter_name="", **extra):
    keys = {}
    for path, (down, up) in halves().items():
        keys[f"base_model.model.{path}.lora_A{adapter_name}.weight"] = down
        keys[f"base_model.model.{path}.lora_B{adapter_name}.weight"] = up
    folder.mkdir(exist_ok=True)
    save_file({**keys, **extra}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings or peft_settings()))
    return folder


def write_keys(file, down, up, *, alpha=True, rename=str, **metadata):
    keys = {}
    for path, (a, b) in halves().items():
        keys[down.format(rename(path))], keys[up.format(rename(path))] = a, b
        if alpha:
            keys[down.format(rename(path)).partition(".lora")[0] + ".alpha"] = torch.tensor(ALPHAS[path])
    save_file(keys, file, metadata or None)
    return file


def underscored(path):
    return path.replace(".", "_")


FORMS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", str),
    "named": ("transformer.{}.lora_A.default.weight", "transformer.{}.lora_B.default.weight", str),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight", str),
    "comfyui": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", str),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", str),
    "peft keys": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", str),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", underscored),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_an_adapter_reads_as_the_same(form, tmp_path):
    down, up, rename = FORMS[form]
    assert same(load_lora(write_keys(tmp_path / "a.safetensors", down, up, rename=rename)), adapter())


@pytest.mark.parametrize("adapter_name", ["", ".default"])
def test_peft_folders_read_as_the_same(adapter_name, tmp_path):
    assert same(load_lora(write_peft(tmp_path, adapter_name=adapter_name)), adapter())


def test_patterns_may_be_the_ends_of_paths_or_anchored(tmp_path):
    patterns = {"to_out.0": 2.5, "^transformer_blocks\\.1\\.img_mlp\\.w2$": 1.0, "linear_1": 8, "^linear": 77}
    assert same(load_lora(write_peft(tmp_path, peft_settings(alpha_pattern=patterns))), adapter())


def test_alphas_in_diffusers_metadata_count_and_without_any_the_scale_is_one(tmp_path):
    down, up, _ = FORMS["diffusers"]
    packed = json.dumps({f"transformer.{key}": value for key, value in peft_settings().items()})
    file = write_keys(tmp_path / "a.safetensors", down, up, alpha=False, lora_adapter_metadata=packed)
    assert same(load_lora(file), adapter())
    plain = load_lora(write_keys(tmp_path / "b.safetensors", down, up, alpha=False))
    assert all(plain.scaling(path) == 1.0 for path in PATHS)


def test_rank_stabilised_adapters_scale_by_the_root_of_the_rank(tmp_path):
    lora = load_lora(write_peft(tmp_path, peft_settings(use_rslora=True)))
    for path in PATHS:
        assert lora.scaling(path) == pytest.approx(ALPHAS[path] / math.sqrt(RANKS[path]), rel=1e-12)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_saved_is_read_back(form, dtype, tmp_path):
    lora = adapter(5, dtype)
    save_lora(lora, tmp_path / "out", form=form)
    assert same(load_lora(tmp_path / "out"), lora)
    save_lora(adapter(6), tmp_path / "out", form=form)
    assert same(load_lora(tmp_path / "out"), adapter(6)), "files are replaced"
    prefix = {"diffusers": "transformer.", "peft": "base_model.model."}[form]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert set(load_file(file)) == {f"{prefix}{path}.lora_{half}.weight" for path in PATHS for half in "AB"}
    assert not [*(tmp_path / "out").glob(".*")], "no temporary files stay"


def test_pefts_own_model_computes_the_merged_output(tmp_path):
    peft = pytest.importorskip("peft")
    save_lora(adapter(), tmp_path, form="peft")
    theirs = peft.PeftModel.from_pretrained(torch.nn.ModuleDict({"inner": make_model()}).inner, tmp_path)
    ours = make_model()
    merge_lora(ours, adapter())
    for path, (i, _) in PATHS.items():
        x = tensor((3, i), 7)
        expected = theirs.base_model.model.get_submodule(path)(x)
        torch.testing.assert_close(ours.get_submodule(path)(x), expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_peft_saves_are_read(tmp_path):
    peft = pytest.importorskip("peft")
    alphas, ranks = {"img_qkv": 6, "w2": 3}, {"w2": 2}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["img_qkv", "w2", "proj_out"], rank_pattern=ranks, alpha_pattern=alphas,
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make_model(), config)
    theirs.save_pretrained(tmp_path)
    lora, ours = load_lora(tmp_path), make_model()
    merge_lora(ours, lora)
    assert len(lora.layers) == 2 * 3 + 1
    for path in lora.layers:
        x = tensor((3, ours.get_submodule(path).in_features), 7)
        expected = theirs.base_model.model.get_submodule(path)(x)
        torch.testing.assert_close(ours.get_submodule(path)(x), expected, rtol=1e-4, atol=1e-4)


def test_diffusers_configures_peft_from_what_is_saved(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from diffusers.utils.peft_utils import _create_lora_config

    save_lora(adapter(), tmp_path / "a.safetensors")
    keys, metadata = load_file(tmp_path / "a.safetensors"), load_metadata(tmp_path / "a.safetensors")
    inner = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    config = _create_lora_config(keys, None, inner, {}, is_unet=False)
    assert set(config.target_modules) == set(PATHS) and config.r == 4
    assert {**dict.fromkeys(PATHS, config.lora_alpha), **config.alpha_pattern} == ALPHAS


def load_metadata(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        return json.loads(reader.metadata()["lora_adapter_metadata"])


ONE = {"transformer.img_in.lora_A.weight": torch.ones(2, 16), "transformer.img_in.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"transformer.nothing.lora_A.weight": torch.ones(2, 3)}, ["transformer.nothing.lora_A.weight", "no linear"]),
        ({"transformer.transformer_blocks.01.img_mlp.w1.lora_A.weight": torch.ones(2, 3)}, ["blocks.01", "no linear"]),
        ({"text_encoder.layers.0.lora_A.weight": torch.ones(2, 3)}, ["text_encoder.layers.0"]),
        ({"transformer.img_norm1.lora_A.weight": torch.ones(2, 3)}, ["img_norm1", "no linear"]),
        ({"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(2, 3)}, ["single_blocks_0"]),
        ({"transformer.proj_out.lora_B.weight": torch.ones(2, 3)}, ["proj_out has no down"]),
        ({"transformer.proj_out.alpha": torch.tensor(3.0)}, ["proj_out has no down", "proj_out has no up"]),
        ({"transformer.img_in.lora_magnitude_vector.weight": torch.ones(32)}, ["magnitude_vector", "DoRA"]),
        ({"lora_unet_img_in.dora_scale": torch.ones(32)}, ["dora_scale", "DoRA"]),
        ({"lora_unet_img_in.hada_w1_a": torch.ones(32, 2)}, ["LoHa"]),
        ({"lora_unet_img_in.lokr_w1": torch.ones(32, 2)}, ["LoKr"]),
        ({"transformer.proj_out.lora_A.weight": torch.ones(2, 3, 1, 1)}, ["convolution"]),
        ({"img_in.lora_A.weight": torch.ones(2, 16)}, ["second down of img_in"]),
        ({"transformer.img_in.alpha": torch.ones(2)}, ["alpha that is not one"]),
        ({"transformer.img_in.alpha": torch.tensor(torch.inf)}, ["finite alpha"]),
        ({"transformer.img_in.lora_A.weight": torch.full((2, 16), torch.nan)}, ["finite numbers in down"]),
        ({"transformer.img_in.lora_A.weight": torch.ones(3, 16)}, ["img_in: up", "r=3"]),
        ({"transformer.img_in.lora_A.weight": torch.ones(2, 16).byte()}, ["float16", "uint8"]),
        ({"transformer.img_in.lora_A.weight": torch.ones(2, 16).to(torch.float8_e4m3fn)}, ["float8"]),
        ({"transformer.img_in.lora_A.weight": torch.ones(16)}, ["img_in: down", "[r i]"]),
        ({"img_mod.lora_A.x.weight": torch.ones(1), "proj_out.lora_A.a.weight": torch.ones(1, 2),
          "proj_out.lora_B.b.weight": torch.ones(2, 1)}, ["2 adapters: a, b"]),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_named(extra, words, tmp_path):
    save_file({**ONE, **extra}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_lora(tmp_path / "a.safetensors")
    assert all(word in str(caught.value) for word in ["a.safetensors", *words]), str(caught.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["img_in"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "not a module name"),
        ({"rank_pattern": ["img_qkv"]}, "not an object"),
        ({"lora_alpha": "4"}, "not all numbers"),
        ({"rank_pattern": {}}, "to_out.0 has rank 2, its settings say 4"),
    ],
)
def test_settings_beyond_a_plain_lora_are_refused(settings, word, tmp_path):
    with pytest.raises(CheckpointError, match="adapter_model") as caught:
        load_lora(write_peft(tmp_path, peft_settings(**settings)))
    assert word in str(caught.value)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    files = {
        "p.safetensors": pickle.dumps({"a": [1] * 99}),
        "t.safetensors": b"\x10" + bytes(7) + b"{}",
        "e.safetensors": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "z.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    (tmp_path / "w.bin").write_bytes(b"x")
    for name, word in {
        "p.safetensors": "pickle", "z.safetensors": "pickle", "t.safetensors": "truncated", "e.safetensors": "truncated",
        "none.safetensors": "none", "w.bin": "no other kind", "": "found 0 of them",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=word):
            load_lora(tmp_path / name)
    folder = write_peft(tmp_path / "peft")
    for text in ("[" * 100_000, "[1]", '{"r": NaN}', '{"r": 1, "r": 2}'):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            load_lora(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_lora(folder)


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_file_gives_one_error_or_a_whole_adapter(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    file = write_keys(folder / "a.safetensors", *FORMS["diffusers"][:2])
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(3000, len(content) - 1)))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    refused, lora = "", None
    try:
        lora = load_lora(file)
    except CheckpointError as error:
        refused = str(error)
    assert (lora is None) == ("a.safetensors" in refused)
    assert lora is None or all(layer.down.isfinite().all() for layer in lora.layers.values())


def test_saving_refuses_what_it_cannot_mean(tmp_path):
    with pytest.raises(ValueError, match="form"):
        save_lora(adapter(), tmp_path / "a", form="kohya")
    with pytest.raises(ValueError, match="folder"):
        save_lora(adapter(), tmp_path / "a.safetensors", form="peft")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="at least one"):
        LoRA({})
    with pytest.raises(ValueError, match="rank of at least 1"):
        LoRA({"img_in": (torch.ones(0, 16), torch.ones(32, 0), 1.0)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merge_that_its_dtype_cannot_hold_changes_nothing(dtype):
    model, lora = make_model(dtype), adapter()
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    with pytest.raises(ValueError, match=r"lora: .* would hold infinite numbers or NaN in torch\.(b)?float16"):
        merge_lora(model, lora, scale=1e38 if dtype == torch.bfloat16 else 1e8)
    assert equal_bits(model, before)


def test_a_merge_that_is_not_kept_has_the_same_weights_and_no_second_copy():
    model, other = make_model(), make_model()
    kept, left = merge_lora(model, adapter()), merge_lora(other, adapter(), keep=False)
    assert equal_bits(other, state(model))
    assert sum(tensor.numel() for tensor in kept.originals.values()) > 0
    assert not left.originals and not left.checksums
    with pytest.raises(ValueError, match="merged: .*keep=False"):
        unmerge_lora(other, left)
    assert equal_bits(other, state(model))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_alpha_may_be_stored_as_a_whole_number(dtype, shape, tmp_path):
    down, up = torch.randn(4, 8), torch.randn(6, 4)
    for name, alpha in {"plain": torch.full(shape, 2.0), "whole": torch.full(shape, 2, dtype=dtype)}.items():
        tensors = {"transformer.img_in.lora_A.weight": down, "transformer.img_in.lora_B.weight": up}
        save_file(tensors | {"transformer.img_in.alpha": alpha}, tmp_path / f"{name}.safetensors")
    plain, whole = (load_lora(tmp_path / f"{name}.safetensors") for name in ("plain", "whole"))
    assert plain.scaling("img_in") == whole.scaling("img_in") == 0.5


def test_a_saved_adapter_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        save_lora(adapter(), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
