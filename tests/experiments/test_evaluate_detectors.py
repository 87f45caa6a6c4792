"""Laws of detectors and colour names from folders of transformers, against the models themselves."""

import json

import pytest
import torch

from experiments.evaluation.boxes import COLOURS, Found
from experiments.evaluation.detectors import clip_colours, open_detector
from tests.experiments.test_generate import run  # noqa: F401


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector with drawn weights, saved as transformers saves one."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "mouse", 1: "dog", 2: "cat"}
    config = YolosConfig(**sizes, image_size=[32, 48], patch_size=16, num_detection_tokens=6, id2label=names)
    model = YolosForObjectDetection(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 48}
    YolosImageProcessor(
        size=size, do_resize=True, do_pad=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder, model.eval()


class TestDetectors:
    def test_a_loaded_detector_gives_the_models_boxes_in_pixels_of_the_picture(self, detector):
        folder, model = detector
        picture = torch.randint(256, (3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        found = open_detector(folder, wanted=["computer mouse", "dog"], local_files_only=True, threshold=0.3)(picture)
        with torch.no_grad():
            output = model(pixel_values=(picture[None] / 255 - 0.5) / 0.5)
        expected = []
        for logits, (x, y, w, h) in zip(output.logits[0].softmax(-1), output.pred_boxes[0].tolist(), strict=True):
            score, label = logits[:-1].max(0)
            if score > 0.3:
                name = ("computer mouse", "dog", "cat")[int(label)]
                box = ((x - w / 2) * 48, (y - h / 2) * 32, (x + w / 2) * 48, (y + h / 2) * 32)
                expected.append((name, score.item(), *box))
        assert expected
        for one, (name, *numbers) in zip(found, expected, strict=True):
            assert one.label == name and (one.score, *one.box) == pytest.approx(numbers, abs=1e-3)

    def test_classes_it_does_not_know_and_pickles_are_refused(self, detector, tmp_path):
        folder, model = detector
        with pytest.raises(ValueError, match="detector: expected one that knows zebra, got"):
            open_detector(folder, wanted=["dog", "zebra"], local_files_only=True)
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            open_detector(tmp_path, local_files_only=True)

    def test_clip_names_the_colour_whose_sentences_are_most_like_the_crop(self, tmp_path):
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

        letters = [chr(c) for c in range(97, 123)] + ["-"]
        tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
        vocab = {token: index for index, token in enumerate(tokens)}
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**sizes, **special, "vocab_size": len(vocab), "max_position_embeddings": 64},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path)
        processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer)
        processor.save_pretrained(tmp_path)
        picture = torch.randint(256, (3, 24, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        found = [Found("dog", 0.9, box) for box in ((0, 0, 16, 16), (16, 4, 32, 20), (2, 3, 38, 23))]
        named = clip_colours(tmp_path, local_files_only=True)(picture)(found, "dog")

        def logits(box, texts):
            crop = picture[:, box[1] : box[3], box[0] : box[2]]
            inputs = processor(text=texts, images=[crop], return_tensors="pt", padding=True)
            with torch.no_grad():
                output = model(**inputs)
            return output.text_embeds, output.image_embeds[0]

        expected = []
        for one in found:
            scores = []
            for colour in COLOURS:
                texts, image = logits(
                    one.box,
                    [
                        f"a photo of a {colour} dog",
                        f"a photo of a {colour}-colored dog",
                        f"a photo of a {colour} object",
                    ],
                )
                mean = texts.mean(0)
                scores.append((image @ mean / mean.norm()).item())
            expected.append(COLOURS[max(range(10), key=scores.__getitem__)])
        assert named == expected
