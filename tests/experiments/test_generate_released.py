"""Laws of experiments.generate with released checkpoints: what is opened, and that its pictures are the pipeline's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments import generate as script
from experiments.generate import generate, read_config
from experiments.weights_digest import digest_weights
from lensmini.nn import LensConfig, LensTransformer, TextEncoder
from lensmini.pipeline import LensPipeline
from tests.nn.test_text_encoder import make_model, make_tokenizer

diffusers = pytest.importorskip("diffusers")

PROMPTS = ("a red cube", "two blue cubes", "7")


def make_transformer(seed=0):
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    text = {"enc_hidden_dim": 16, "selected_layer_index": (1, 3)}
    model = LensTransformer(LensConfig(in_channels=16, out_channels=4, **sizes, **text))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lensmini.checkpoints import export_diffusers

    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(latent_channels=4, **blocks)
    encoder = TextEncoder(make_model("GptOss"), make_tokenizer(), layers=(1, 3))
    where = tmp_path_factory.mktemp("released") / "anything"
    export_diffusers(where, transformer=make_transformer(), vae=vae, text_encoder=encoder, variant="Lens-Turbo")
    return where


@pytest.fixture
def config(folder, tmp_path):
    lens = read_config(script.PRESETS, "generate", ["lens"])
    small = {"height": 16, "width": 24, "any_size": True, "dtype": "float32", "num_steps": 2, "guidance_scale": 3.0}
    return replace(lens, texts=PROMPTS, checkpoint=folder, out=tmp_path / "pictures", **small)


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def picture(config, row):
    return pixels(config.out / row["file"])


def same(one, other):
    # Rounding of sums moves a value over the edge of its integer now and then.
    return one.shape == other.shape and np.abs(one - other).max() <= 1


def test_the_pictures_are_those_of_the_pipeline(config, folder):
    rows = generate(replace(config, num_images_per_prompt=2, canvases=((16, 24), (32, 16)), seed=3))
    pipe = LensPipeline.from_pretrained(folder, dtype=torch.float32, check_sizes=False)
    assert len(rows) == 12
    for row in rows:
        call = {"height": row["height"], "width": row["width"], "seeds": [row["seed"]]}
        [image] = pipe(row["prompt"], num_inference_steps=2, guidance_scale=3.0, **call).images
        assert same(np.array(image).astype(int), picture(config, row))
    assert {(row["checkpoint"], row["dtype"], row["num_steps"]) for row in rows} == {(folder.as_posix(), "float32", 2)}


def test_a_negative_prompt_is_its_pictures_own_whatever_the_others_have(config, folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "negative_prompt": "a cube"}, {"prompt": PROMPTS[2]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = generate(replace(config, texts=(), prompts=path))
    assert [row.get("negative_prompt") for row in rows] == [None, "a cube", None]
    pipe = LensPipeline.from_pretrained(folder, dtype=torch.float32, check_sizes=False)
    call = {"height": 16, "width": 24, "seeds": [0], "num_inference_steps": 2, "guidance_scale": 3.0}
    for row, line in zip(rows, lines, strict=True):
        expected = pipe(line["prompt"], line.get("negative_prompt"), **call).images[0]
        assert same(np.array(expected).astype(int), picture(config, row))
    [without] = generate(replace(config, texts=PROMPTS[1:2]))
    assert not same(picture(config, without), picture(config, rows[1]))


def test_what_is_there_is_not_painted_again_nor_loaded(config, monkeypatch):
    first = generate(config)
    monkeypatch.setattr(LensPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    assert generate(config) == first


def test_steps_and_guidance_of_none_are_the_checkpoints_own(config):
    [row] = generate(replace(config, texts=PROMPTS[:1], num_steps=None, guidance_scale=None))
    assert (row["num_steps"], row["guidance_scale"]) == (4, 1.0)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_transformer_alone_paints_with_parts_named_beside_it(config, folder, tmp_path, form):
    alone = folder / "transformer"
    if form == "file":
        alone = shutil.copy(next(alone.glob("*.safetensors")), tmp_path / "alone.safetensors")
        shutil.copy(folder / "transformer" / "config.json", tmp_path / "config.json")
    config = replace(config, texts=PROMPTS[:1])
    with pytest.raises(ValueError, match="text_encoder, autoencoder: expected the folder"):
        generate(replace(config, checkpoint=Path(alone), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    parts = {"text_encoder": folder, "autoencoder": folder}
    [row] = generate(replace(config, checkpoint=Path(alone), **parts))
    [whole] = generate(replace(config, out=tmp_path / "whole"))
    assert same(picture(config, row), pixels(tmp_path / "whole" / whole["file"]))
    assert len(row["parts_sha256"]) == 2


def test_a_repository_in_the_cache_paints_without_the_network(config, folder, tmp_path, monkeypatch):
    import huggingface_hub

    repository = tmp_path / "hub" / "models--someone--Lens-Turbo"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    offline = replace(config, texts=PROMPTS[:1], local_files_only=True)
    [row] = generate(replace(offline, checkpoint=Path("someone/Lens-Turbo")))
    assert row["checkpoint"] == "someone/Lens-Turbo"
    # The same weights in a folder are the same picture.
    assert generate(replace(offline, checkpoint=folder)) == [row]
    with pytest.raises(ValueError, match="someone/Lens-Other"):
        generate(replace(offline, checkpoint=Path("someone/Lens-Other")))


def test_compared_pipelines_start_from_the_same_noise(config, folder, tmp_path):
    from lensmini.checkpoints import save_transformer

    other = shutil.copytree(folder, tmp_path / "other")
    twins = generate(replace(config, checkpoint=None, compare=(folder, other)))
    assert len({row["file"] for row in twins}) == 6 and len({row["checkpoint"] for row in twins}) == 2
    for one, two in zip(twins[:3], twins[3:], strict=True):
        assert np.array_equal(picture(config, one), picture(config, two))
    shutil.rmtree(other / "transformer")
    save_transformer(make_transformer(seed=1), other / "transformer")
    rows = generate(replace(config, checkpoint=None, compare=(folder, other)))
    assert rows[:3] == twins[:3]
    assert not same(picture(config, rows[0]), picture(config, rows[3]))
    assert rows[0]["weights_sha256"] != rows[3]["weights_sha256"]


def test_two_pipelines_are_never_in_memory_together(config, folder, tmp_path, monkeypatch):
    import gc
    import weakref

    made, peaks, load = [], [], LensPipeline.__init__

    def counted(self, *args, **kwargs):
        gc.collect()
        peaks.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(self))
        load(self, *args, **kwargs)

    monkeypatch.setattr(LensPipeline, "__init__", counted)
    other = shutil.copytree(folder, tmp_path / "other")
    job = replace(config, checkpoint=None, compare=(folder, other), num_steps=None, guidance_scale=None)
    rows = generate(replace(job, texts=PROMPTS[:1]))
    assert [row["num_steps"] for row in rows] == [4, 4]
    assert peaks == [0, 0]


def test_every_picture_carries_its_row(config):
    from lensmini.pipeline import read_metadata

    for row in generate(replace(config, texts=("a red cube", "\u4e00\u53ea\u732b", "\u0642\u0637\u0629"))):
        assert read_metadata(config.out / row["file"]) == row


def test_an_adapter_changes_the_pictures_and_is_named_in_their_rows(config, tmp_path):
    from lensmini.checkpoints.lora import LoRA, save_lora

    layers = {"transformer_blocks.0.attn.img_qkv": (torch.ones(2, 32), 0.3 * torch.ones(96, 2), 2.0)}
    save_lora(LoRA(layers), tmp_path / "lora.safetensors")
    [plain] = generate(replace(config, texts=PROMPTS[:1]))
    adapted = replace(config, texts=PROMPTS[:1], lora=tmp_path / "lora.safetensors")
    [row] = generate(adapted)
    assert len(row["lora_sha256"]) == 12 and "lora_sha256" not in plain
    assert not same(picture(config, row), picture(config, plain))
    [none] = generate(replace(adapted, lora_scale=0.0))
    assert same(picture(config, none), picture(config, plain)) and none["file"] != plain["file"]


def test_cached_prompts_need_no_text_encoder(config, folder, tmp_path):
    cached = replace(config, prompt_cache=tmp_path / "features")
    rows = generate(cached)
    alone = replace(cached, checkpoint=folder / "transformer", autoencoder=folder, out=tmp_path / "again")
    for row, again in zip(rows, generate(alone), strict=True):
        assert same(picture(config, row), pixels(alone.out / again["file"]))


def test_the_published_rounding_needs_bf16_and_makes_other_pictures(config):
    half = replace(config, texts=PROMPTS[:1], dtype=None)
    [exact], [published] = generate(half), generate(replace(half, published_bf16=True))
    assert (exact["dtype"], published["dtype"]) == ("bfloat16", "bfloat16")
    assert exact["file"] != published["file"] and published["published_bf16"] is True
    assert not same(picture(config, exact), picture(config, published))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": 1.8}, "mu: expected none, .*presets lens, base and turbo"),
        ({"any_size": False}, r"the nearest legal size is .*\(prompt 1\)"),
        ({"width": 0}, "positive"),
        ({"checkpoint": Path("missing.safetensors")}, "missing.safetensors"),
    ],
)
def test_what_does_not_suit_is_refused_before_anything_is_written(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(replace(config, **change))
    assert not config.out.exists()


def test_a_broken_checkpoint_ends_in_a_sentence(config, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    path = next((broken / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])
    given = ["turbo", "a cube", "--checkpoint", str(broken), "--out", str(config.out), "--any-size"]
    with pytest.raises(SystemExit, match=r"generate: .*safetensors"):
        script.cli([*given, "--height", "16", "--width", "16"])
    assert not list(config.out.glob("*.png"))


def test_a_device_that_is_not_there_ends_in_a_sentence(config):
    with pytest.raises(ValueError, match="device: expected one that works here, got 'gpu'"):
        generate(replace(config, device="gpu"))


def test_a_digest_names_the_content_and_not_the_place(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = digest_weights(str(folder))
    assert digest_weights(str(copy)) == first
    (copy / "README.md").write_text("words")
    assert digest_weights(str(copy)) == first
    shutil.rmtree(copy / "vae")
    assert digest_weights(str(copy)) == digest_weights(str(folder), without=("vae",)) != first
    # A large file is not read whole, but every tensor of it counts.
    tensors = {f"layer.{index}": torch.zeros(300_000) for index in range(8)}
    save_file(tensors, tmp_path / "large.safetensors")
    large = digest_weights(str(tmp_path / "large.safetensors"))
    for name in tensors:
        changed = {key: value + 1e-3 if key == name else value for key, value in tensors.items()}
        save_file(changed, tmp_path / "changed.safetensors")
        assert digest_weights(str(tmp_path / "changed.safetensors")) != large
    save_file(load_file(tmp_path / "large.safetensors"), tmp_path / "again.safetensors")
    assert digest_weights(str(tmp_path / "again.safetensors")) == large
