"""Laws of the model filters: the libraries' own scores, whatever the batch, and nothing but safetensors."""

import os
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lensmini.data.filters.models import (
    NSFW_LEVELS,
    convert_head,
    load_aesthetic,
    load_embedder,
    load_nsfw,
    load_watermark,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 16, "patch_size": 4}
LOCAL = {"local_files_only": True}


def pictures(num=5):
    generator = torch.Generator().manual_seed(0)
    shapes = [(20 + 7 * n, 40 - 5 * n) for n in range(num)]
    return [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in shapes]


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def spread(model):
    """Weights large enough that scores differ between pictures."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    spread(SiglipVisionModel(SiglipVisionConfig(**SIZES))).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    spread(CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=12, **SIZES))).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def make_watermark(folder, labels):
    config = SiglipConfig(vision_config=SIZES, text_config={**SIZES, "vocab_size": 8})
    config.id2label, config.label2id = dict(enumerate(labels)), {label: n for n, label in enumerate(labels)}
    model = spread(SiglipForImageClassification(config))
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def nsfw(tmp_path_factory):
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    folder = tmp_path_factory.mktemp("nsfw")
    cfg = {"input_size": [3, 160, 160], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 1.0}
    cfg |= {"interpolation": "bicubic", "crop_mode": "squash", "fixed_input_size": True, "num_classes": 4}
    timm_style = {"architecture": "test_vit", "num_classes": 4, "label_names": list(NSFW_LEVELS), "pretrained_cfg": cfg}
    config = TimmWrapperConfig.from_dict(timm_style)
    torch.manual_seed(0)
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    return folder


def make_head(width=16):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, 8), nn.Dropout(0.5), nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 1)).eval()


def head_state(head):
    return {f"scoring_head.{name}": value for name, value in head.state_dict().items()}


def test_nsfw_is_the_probability_of_at_least_a_level_as_timm_computes_it(nsfw):
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("test_vit", num_classes=4)
    weights = {name.removeprefix("timm_model."): value for name, value in load_file(nsfw / "model.safetensors").items()}
    model.load_state_dict(weights)
    data = {"input_size": (3, 160, 160), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    transform = timm.data.create_transform(**data, interpolation="bicubic", crop_mode="squash")
    with torch.inference_mode():
        logits = model.eval()(torch.stack([transform(pil(image)) for image in pictures()]))
    shares = logits.softmax(1)
    for first, level in enumerate(NSFW_LEVELS[1:], start=1):
        found = load_nsfw(nsfw, level=level, **LOCAL)(pictures())
        assert found == pytest.approx(shares[:, first:].sum(1), abs=1e-5)


def test_watermark_is_the_probability_of_its_label_wherever_it_stands(tmp_path):
    for number, labels in enumerate((["clean", "Watermark"], ["watermark", "a", "b"])):
        model = make_watermark(tmp_path / str(number), labels)
        processor = SiglipImageProcessor.from_pretrained(tmp_path / str(number))
        with torch.inference_mode():
            inputs = processor(images=[pil(image) for image in pictures()], return_tensors="pt")
            shares = model.eval()(**inputs).logits.softmax(1)[:, 1 - number]
        found = load_watermark(tmp_path / str(number), **LOCAL)(pictures())
        assert found == pytest.approx(shares, abs=1e-5) and found.std() > 1e-3
    with pytest.raises(ValueError, match=r"expected labels \['logo'\], found \['a', 'b', 'watermark'\]"):
        load_watermark(tmp_path / "1", label="logo", **LOCAL)


def test_aesthetics_are_the_head_on_the_unit_embedding(siglip, tmp_path):
    head = make_head()
    save_file(head_state(head), tmp_path / "head.safetensors")
    model = SiglipVisionModel.from_pretrained(siglip).eval()
    processor = SiglipImageProcessor.from_pretrained(siglip)
    with torch.inference_mode():
        inputs = processor(images=[pil(image) for image in pictures()], return_tensors="pt")
        embedding = model(**inputs).pooler_output
        expected = head(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
    found = load_aesthetic(siglip, head=tmp_path / "head.safetensors", **LOCAL)(pictures())
    assert found == pytest.approx(expected, abs=1e-5) and found.shape == (5,) and found.dtype == torch.float32


def test_embeddings_are_clips_own_of_unit_length(clip):
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    processor = CLIPImageProcessor.from_pretrained(clip)
    with torch.inference_mode():
        inputs = processor(images=[pil(image) for image in pictures()], return_tensors="pt")
        expected = nn.functional.normalize(model(**inputs).image_embeds)
    found = load_embedder(clip, **LOCAL)(pictures())
    assert (found - expected).abs().max() < 1e-5 and found.shape == (5, 12)


def test_a_picture_scores_the_same_in_any_batch_and_batches_are_full(clip):
    embedder, calls = load_embedder(clip, batch_size=2, **LOCAL), []
    embedder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = embedder(pictures())
    assert len(calls) == 3
    alone = torch.cat([embedder([image]) for image in pictures()])
    assert (together - alone).abs().max() < 1e-5
    assert embedder([]).numel() == 0 and len(calls) == 8
    stacked = torch.stack([pictures()[0]] * 2)
    assert (embedder(stacked) - alone[:1]).abs().max() < 1e-5


def test_bfloat16_is_close(clip):
    exact, rough = (
        load_embedder(clip, **LOCAL)(pictures()),
        load_embedder(clip, dtype=torch.bfloat16, **LOCAL)(pictures()),
    )
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().max() < 0.05


def test_a_model_that_gives_nan_is_not_silent(clip, tmp_path):
    import shutil

    folder = shutil.copytree(clip, tmp_path / "nan")
    model = CLIPVisionModelWithProjection.from_pretrained(folder)
    model.visual_projection.weight.data[:] = float("nan")
    model.save_pretrained(folder)
    assert load_embedder(folder, **LOCAL)(pictures(2)).isnan().all()


class Ran:
    def __reduce__(self):
        return (os.mkdir, (os.environ["RAN"],))


@pytest.mark.parametrize("disguise", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_refused_and_do_not_run(clip, disguise, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    folder = shutil.copytree(clip, tmp_path / "bad")
    (folder / "model.safetensors").unlink()
    (folder / disguise).write_bytes(pickle.dumps(Ran()))
    with pytest.raises(ValueError, match="bad: expected a CLIP vision model in safetensors"):
        load_embedder(folder, **LOCAL)
    (tmp_path / "head.pth").write_bytes(pickle.dumps(Ran()))
    with pytest.raises(ValueError, match=r"head\.pth: expected tensors only"):
        convert_head(tmp_path / "head.pth", tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="convert_head"):
        load_aesthetic(folder, head=tmp_path / "head.pth", **LOCAL)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "head.safetensors").exists()


def test_the_published_head_converts(tmp_path, siglip):
    torch.save(head_state(make_head()), tmp_path / "head.pth")
    convert_head(tmp_path / "head.pth", tmp_path / "head.safetensors")
    save_file(head_state(make_head()), tmp_path / "same.safetensors")
    scores = [
        load_aesthetic(siglip, head=tmp_path / f"{name}.safetensors", **LOCAL)(pictures()) for name in ("head", "same")
    ]
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"extra": torch.zeros(1)},
        lambda state: {name: value for name, value in state.items() if name != "scoring_head.2.bias"},
        lambda state: state | {"scoring_head.4.weight": torch.zeros(2, 4), "scoring_head.4.bias": torch.zeros(2)},
        lambda state: state | {"scoring_head.2.weight": torch.zeros(4, 9)},
        lambda state: {},
    ],
)
def test_a_head_that_does_not_fit_is_named(change, siglip, tmp_path):
    save_file(change(head_state(make_head())), tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors: expected"):
        load_aesthetic(siglip, head=tmp_path / "head.safetensors", **LOCAL)
    save_file(head_state(make_head(24)), tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="embeddings of 16, found 24"):
        load_aesthetic(siglip, head=tmp_path / "head.safetensors", **LOCAL)


def test_weights_that_are_missing_are_named(clip, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(clip, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="visual_projection"):
        load_embedder(folder, **LOCAL)


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(4, 4).byte(), torch.zeros(3, 0, 4).byte()])
def test_what_is_no_picture_is_refused(clip, image):
    with pytest.raises(ValueError, match=r"images\[0\]"):
        load_embedder(clip, **LOCAL)([image])
