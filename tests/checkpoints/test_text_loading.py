"""Features of loaded checkpoints against stock models; MXFP4 unpacked, and why; nothing but safetensors is read."""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from lensmini.checkpoints import export_diffusers, text_loading
from lensmini.checkpoints.files import CheckpointError
from lensmini.checkpoints.text_loading import load_text_encoder
from lensmini.nn import LensConfig, LensTransformer
from tests.golden_cases import golden
from tests.nn.test_text_encoder import make_model, make_tokenizer

IDS = torch.arange(3, 12)[None]
MASK = torch.ones(1, 9, dtype=torch.bool)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens"]}


def save(folder, model, *, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small GPT-OSS in float32 with a tokenizer."""
    return save(tmp_path_factory.mktemp("gpt_oss"), make_model("GptOss"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The same network twice: experts packed as the released files have them, and the floats that they stand for."""
    folder, floats = tmp_path_factory.mktemp("mxfp4"), tmp_path_factory.mktemp("floats")
    model = make_model("GptOss", hidden_size=32, intermediate_size=64)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for index, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(layer.mlp.experts, name)
            experts, inputs, outputs = parameter.shape
            codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
            scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator)
            rows = E2M1[codes] * 2.0 ** (scales[..., None] - 127)
            parameter.data = rows.flatten(2).transpose(1, 2).contiguous()
            place = f"model.layers.{index}.mlp.experts.{name}"
            tensors[f"{place}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            tensors[f"{place}_scales"] = scales.to(torch.uint8)
    save(floats, model)
    shutil.copytree(floats, folder, dirs_exist_ok=True)
    kept = {key: value for key, value in load_file(floats / "model.safetensors").items() if not key.endswith("_proj")}
    save_file({**kept, **tensors}, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config=QUANTIZED)
    return folder, floats


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def copy(folder, target, **changes):
    shutil.copytree(folder, target)
    return edit(target, **changes)


def stock_features(folder, layers, dtype=torch.float32, encode=IDS):
    """Residual streams by hooks on the whole stock model."""
    model = GptOssForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    outputs = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, args, out, index=index: outputs.update({index: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(encode)
    return [outputs[layer] for layer in layers]


def error(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("layers", [(3, 0), (1, 2)])
def test_loaded_features_are_the_stock_models(checkpoint, dtype, limit, layers):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encoder = load_text_encoder(checkpoint, dtype=dtype, layers=layers)
    features, _ = encoder.encode_tokens(IDS, MASK)
    for actual, expected in zip(features, stock_features(checkpoint, layers, dtype), strict=True):
        assert error(actual, expected) <= limit
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def test_published_features_come_from_a_saved_checkpoint(tmp_path):
    tensors, meta = golden("text_features_a")
    model = GptOssForCausalLM(GptOssConfig(**meta["model_config"], attn_implementation="eager")).float()
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=False)
    save(tmp_path, model, tokenizer=False)
    # The released config.json has the older names; a loader that does not know them has plain positions.
    scaling = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    edit(tmp_path, rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_text_encoder(tmp_path, tokenizer=False, dtype=torch.float32, layers=meta["selected_layers"])
    features, mask = encoder.encode_tokens(tensors["inputs.input_ids"], tensors["inputs.attention_mask"])
    for index, layer in enumerate(features):
        assert error(layer[mask], tensors[f"outputs.features.{index}"][mask]) <= 5e-5


def test_position_scaling_that_gets_lost_is_an_error(checkpoint, monkeypatch):
    real = transformers.AutoModel.from_pretrained

    def forgets(*args, **kwargs):
        model, report = real(*args, **kwargs)
        table = model.rotary_emb
        table.inv_freq = 150000.0 ** -(torch.arange(len(table.inv_freq)) / len(table.inv_freq))
        return model, report

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", forgets)
    with pytest.raises(CheckpointError, match="expected yarn position scaling to be on, found plain"):
        load_text_encoder(checkpoint, layers=(0, 1))


def test_only_what_the_features_need_is_loaded(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        encoder = load_text_encoder(checkpoint, layers=(1, 0))
    names = [name for name, _ in encoder.model.named_parameters()]
    assert len(encoder.model.layers) == 2 and not any("lm_head" in name or "layers.2" in name for name in names)
    assert "LOAD REPORT" not in caplog.text
    assert not logging.getLogger("transformers.modeling_utils").filters


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_other_language_models_load_too(family, tmp_path):
    model = make_model(family)
    with torch.no_grad():
        stock = model(IDS, output_hidden_states=True).hidden_states
    encoder = load_text_encoder(save(tmp_path, model), dtype=torch.float32, layers=(0, 2))
    features, _ = encoder.encode_tokens(IDS, MASK)
    assert error(features[0], stock[1]) <= 1e-5 and error(features[1], stock[3]) <= 1e-5


@pytest.mark.parametrize("quantization", ["auto", "dequantize"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_unpacked_mxfp4_is_the_floats_that_it_stands_for(packed, quantization, dtype, limit):
    folder, floats = packed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = load_text_encoder(folder, dtype=dtype, layers=(1, 3), quantization=quantization)
    said = [str(w.message) for w in caught if "MXFP4" in str(w.message)]
    assert len(said) == (quantization == "auto")
    assert not said or ("are unpacked" in said[0] and "device is cpu" in said[0] and str(folder) in said[0])
    experts = encoder.model.layers[2].mlp.experts
    expected = load_file(floats / "model.safetensors")["model.layers.2.mlp.experts.down_proj"]
    assert torch.equal(experts.down_proj.detach().float(), expected), "these numbers are exact in bfloat16"
    features, _ = encoder.encode_tokens(IDS, MASK)
    for actual, exact in zip(features, stock_features(floats, (1, 3), dtype), strict=True):
        assert error(actual, exact) <= limit


@pytest.mark.filterwarnings("ignore:.*are unpacked")
def test_an_unpacked_encoder_that_is_exported_loads_again_with_the_same_features(packed, tmp_path):
    encoder = load_text_encoder(packed[0], dtype=torch.bfloat16, layers=(1, 3))
    size = {"num_layers": 1, "num_attention_heads": 1, "enc_hidden_dim": 32, "selected_layer_index": (1, 3)}
    export_diffusers(tmp_path / "pipe", transformer=LensTransformer(LensConfig(**size)), text_encoder=encoder)
    again = load_text_encoder(tmp_path / "pipe", subfolder="text_encoder", layers=(1, 3))
    for one, other in zip(encoder.encode_tokens(IDS, MASK)[0], again.encode_tokens(IDS, MASK)[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "kernels-community/evil@main:run"},
        {"_attn_implementation": "someone/else"},
        {"experts_implementation": {"text_config": "kernels-community/evil"}},
        {"text_config": {"num_hidden_layers": 4, "attn_implementation": "a/b"}},
    ],
    ids=str,
)
def test_a_configuration_cannot_name_code_to_fetch(checkpoint, tmp_path, changes):
    folder = copy(checkpoint, tmp_path / "hostile", **changes)
    with pytest.raises(CheckpointError, match="implementation.* to be a plain name, found"):
        load_text_encoder(folder, layers=(0,))
    plain = copy(checkpoint, tmp_path / "plain", attn_implementation="eager")
    load_text_encoder(plain, layers=(0,))


def test_packed_insists_and_says_what_is_missing(packed, checkpoint):
    with pytest.raises(CheckpointError, match="keep MXFP4 packed, but the device is cpu, and it takes a GPU"):
        load_text_encoder(packed[0], layers=(0,), quantization="packed")
    with pytest.raises(CheckpointError, match="found none that are quantised"):
        load_text_encoder(checkpoint, layers=(0,), quantization="packed")


def offline_gpu(monkeypatch, *, capability=(9, 0), triton=True, accelerate=True, kernels=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("transformers.utils.import_utils.is_triton_available", lambda *version: triton)
    monkeypatch.setattr("transformers.utils.import_utils.is_accelerate_available", lambda: accelerate)
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: kernels)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("machine", "cause"),
    [
        ({"capability": (7, 0)}, "compute capability 7.0"),
        ({"triton": False}, "Triton"),
        ({"accelerate": False}, "pip install accelerate"),
        ({"kernels": False}, "pip install kernels"),
        ({}, "offline, and kernels-community/.* is not in the Hub cache"),
    ],
)
def test_every_missing_piece_has_a_name(monkeypatch, machine, cause, tmp_path):
    offline_gpu(monkeypatch, **machine)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = text_loading.packed_obstacle(torch.device("cuda"), offline=False)
    assert found is not None
    with pytest.raises(CheckpointError, match=cause):
        raise CheckpointError(found)


def test_kernels_that_do_not_load_end_in_unpacking_with_the_cause(packed, monkeypatch):
    folder, floats = packed
    monkeypatch.setattr(text_loading, "packed_obstacle", lambda device, offline: None)
    real = transformers.AutoModel.from_pretrained

    def no_kernels(*args, **kwargs):
        if not kwargs["quantization_config"].dequantize:
            raise ConnectionError("kernels-community is not reachable")
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", no_kernels)
    with pytest.warns(UserWarning, match="are unpacked.*kernels-community is not reachable"):
        encoder = load_text_encoder(folder, dtype=torch.float32, layers=(1,))
    features, _ = encoder.encode_tokens(IDS, MASK)
    assert error(features[0], stock_features(floats, (1,))[0]) <= 1e-5
    with pytest.raises(CheckpointError, match="keep MXFP4 packed, but .*kernels-community is not reachable"):
        load_text_encoder(folder, dtype=torch.float32, layers=(1,), quantization="packed")


def test_transformers_own_fallback_is_not_mistaken_for_packed(packed, monkeypatch):
    monkeypatch.setattr(text_loading, "packed_obstacle", lambda device, offline: None)
    with pytest.raises(CheckpointError, match="packed"):
        load_text_encoder(packed[0], layers=(0,), quantization="packed")


@pytest.mark.slow
def test_everything_works_with_the_hub_switched_off(packed, tmp_path):
    script = (
        "import sys, torch, warnings; torch.set_num_threads(1); warnings.simplefilter('ignore')\n"
        "from lensmini.checkpoints.text_loading import load_text_encoder\n"
        "encoder = load_text_encoder(sys.argv[1], layers=(0, 1))\n"
        "print(encoder(['a red cube'])[1].sum().item())\n"
        "try:\n    load_text_encoder('openai/gpt-oss-20b', cache_dir=sys.argv[2])\n"
        "except ValueError as error:\n    print(type(error).__name__, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(packed[0]), str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert lines[0] == "25" and lines[1].startswith("CheckpointError openai/gpt-oss-20b: "), run.stderr[-2000:]


def test_a_pipeline_folder_has_its_tokenizer_beside_the_model(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "text_encoder", ignore=shutil.ignore_patterns("*token*", "chat*"))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    expected, _ = load_text_encoder(checkpoint, layers=(0, 1))(["a red cube"])
    for place in (
        {"path_or_repo": tmp_path},
        {"path_or_repo": tmp_path, "subfolder": "text_encoder"},
        {"path_or_repo": tmp_path / "text_encoder"},
        {"path_or_repo": tmp_path / "text_encoder", "tokenizer": str(tmp_path / "tokenizer")},
        {"path_or_repo": tmp_path / "text_encoder", "tokenizer": make_tokenizer()},
    ):
        features, _ = load_text_encoder(**place, layers=(0, 1))(["a red cube"])
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=r"expected a tokenizer.*tokenizer_config.*pass tokenizer="):
        load_text_encoder(tmp_path, layers=(0, 1))


def test_a_repository_is_read_from_the_cache_without_the_network(checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: asked.append(args) or 1 / 0)
    commit, root = "a" * 40, tmp_path / "models--someone--tiny"
    shutil.copytree(checkpoint, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    where = {"cache_dir": tmp_path, "local_files_only": True, "layers": (0, 1)}
    features, _ = load_text_encoder("someone/tiny", **where)(["a red cube"])
    expected, _ = load_text_encoder(checkpoint, layers=(0, 1))(["a red cube"])
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    with pytest.raises(CheckpointError, match="someone/else.*fetched before"):
        load_text_encoder("someone/else", **where)
    assert asked == []


def test_an_adapter_does_not_name_the_model_that_is_loaded(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "bad")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
    with pytest.raises(CheckpointError, match="expected a whole model, found an adapter"):
        load_text_encoder(folder, layers=(0,))


def test_settings_reach_the_encoder(checkpoint):
    encoder = load_text_encoder(checkpoint, layers=(2, 0), max_length=60, date="1999-12-01")
    assert encoder.layers == (2, 0) and encoder.max_length == 60 and "1999-12-01" in encoder.render("a")


@pytest.mark.parametrize("layers", [(), (0, 0), (4,), (-1,), (5, 11, 17, 23)])
def test_layers_are_checked_before_weights_are_read(checkpoint, layers, monkeypatch):
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"layers: expected distinct layers in 0\.\.3"):
        load_text_encoder(checkpoint, layers=layers)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"model_type": "nothing_known"}, "nothing_known"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}, "remote"),
        ({"transformers_weights": "../evil.bin"}, "transformers_weights"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"num_local_experts": 10**7}, "num_local_experts of at most 4096"),
        ({"hidden_size": 10**7, "intermediate_size": 10**7}, "expected weights that fit the [0-9]{10,} numbers"),
        ({"vocab_size": 10**12}, "expected weights that fit the [0-9]{12,} numbers"),
        ({"hidden_size": 10**18}, "overflow"),
        ({"hidden_size": 24}, "expected weights that fit"),
        ({"num_local_experts": 4}, "expected weights that fit"),
        ({"intermediate_size": 12}, "expected weights that fit"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_error(checkpoint, changes, word, tmp_path):
    folder = copy(checkpoint, tmp_path / "bad", **changes)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="bad.*" + word):
        load_text_encoder(folder, layers=(0, 3))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("rename", "word"),
    [
        ({"model.layers.1.self_attn.sinks": None}, r"missing 1 \(layers\.1\.self_attn\.sinks\)"),
        ({"model.embed_tokens.weight": None}, "missing 1 .embed_tokens"),
        ({"model.layers.0.extra": torch.zeros(1)}, "unexpected 1 .*layers.0.extra"),
        ({"model.layers.3.extra": torch.zeros(1)}, None),
    ],
)
def test_weights_that_do_not_fit_are_listed(checkpoint, rename, word, tmp_path):
    folder = copy(checkpoint, tmp_path / "bad")
    tensors = {**load_file(folder / "model.safetensors"), **rename}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if word is None:
        load_text_encoder(folder, layers=(0, 1))
    else:
        with pytest.raises(CheckpointError, match=word):
            load_text_encoder(folder, layers=(0, 1))


@pytest.mark.parametrize(
    "shard", ["../gpt_oss.safetensors", "/etc/passwd", "pytorch_model.bin", None, "none.safetensors"]
)
def test_an_index_names_nothing_but_safetensors_beside_it(checkpoint, shard, tmp_path):
    folder = copy(checkpoint, tmp_path / "bad")
    make_model("GptOss").save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    load_text_encoder(folder, layers=(0,))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.embed_tokens.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json: expected names of safetensors beside it, found 1"):
        load_text_encoder(folder, layers=(0,))


def test_only_safetensors_are_read(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only 1 \(pytorch_model.bin\), which could run code"):
        load_text_encoder(folder, layers=(0,))
    shutil.move(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        load_text_encoder(folder, layers=(0,))
    (folder / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load_text_encoder(folder, layers=(0,))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(checkpoint, name, tmp_path):
    folder = copy(checkpoint, tmp_path / "links")
    outside = shutil.move(folder / name, tmp_path / f"outside-{name}")
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="expected a file inside its folder"):
        load_text_encoder(folder, layers=(0,))


def test_places_with_nothing_there_are_named(checkpoint, tmp_path):
    for place in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(CheckpointError, match="none|a/b/c"):
            load_text_encoder(place)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_text_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="found a file"):
        load_text_encoder(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="subfolder inside"):
        load_text_encoder(checkpoint, subfolder="../../etc")
    with pytest.raises(ValueError, match="quantization: expected one of auto, packed, dequantize"):
        load_text_encoder(checkpoint, quantization="4bit")


def test_deleting_the_encoder_frees_the_model(checkpoint):
    import gc
    import weakref

    encoder = load_text_encoder(checkpoint, layers=(0, 1))
    encoder(["a red cube"])
    model = weakref.ref(encoder.model)
    assert isinstance(model(), nn.Module)
    del encoder
    gc.collect()
    assert model() is None
