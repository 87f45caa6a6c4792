"""Object detectors and colour names for GenEval's rules, from transformers' folders or repositories: safetensors only.

GenEval itself uses Mask2Former of mmdetection with masks and CLIP ViT-L/14 on the masked crop. Neither its checkpoint
(a pickle) nor mmdetection is used here: boxes come from any model of ``AutoModelForObjectDetection``, and colours from the
whole box. Scores are near the official ones at best, and not to be printed beside them without saying so.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.evaluation.boxes import COLOURS, Found, NameColours

__all__ = ["NAMES", "Detect", "clip_colours", "open_detector", "pixel_colours"]

Detect = Callable[[Tensor], list[Found]]
"""From a picture ``[3, h, w]`` uint8 to what is in it."""

NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""COCO's classes, in the words of its older lists too, that GenEval calls otherwise."""

PALETTE = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "brown": (139, 69, 19),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
"""CSS's colours of GenEval's names; brown is saddlebrown."""

_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


def open_detector(
    path_or_repo: str | os.PathLike[str],
    *,
    wanted: Iterable[str] = (),
    device: torch.device | str = "cpu",
    threshold: float = 0.05,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Detect:
    """Load a detector, such as PekingU/rtdetr_r50vd or facebook/detr-resnet-50.

    Args:
        path_or_repo: folder or Hub repository in transformers' layout.
        wanted: classes that it has to know, in GenEval's words.
        device: where to run.
        threshold: detections below it are not even listed; the rules have thresholds of their own.
        revision: branch, tag or commit.
        local_files_only: never ask the network.

    Returns:
        The detector, in float32.

    Raises:
        ValueError: if it does not know a class.
        OSError: if there is no such model, or none in safetensors.
    """
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    hub: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": False}
    name = os.fspath(path_or_repo)
    processor: Any = AutoImageProcessor.from_pretrained(name, **hub)
    model: Any = AutoModelForObjectDetection.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **hub)
    model = model.to(device).eval().requires_grad_(False)
    labels = {int(index): NAMES.get(label, label) for index, label in model.config.id2label.items()}
    if unknown := sorted(set(wanted) - set(labels.values())):
        raise ValueError(f"detector: expected one that knows {', '.join(unknown)}, got {name}")

    @torch.inference_mode()
    def detect(picture: Tensor) -> list[Found]:
        inputs = processor(images=picture, return_tensors="pt", input_data_format="channels_first").to(device)
        sizes = torch.tensor([picture.shape[1:]])
        (found,) = processor.post_process_object_detection(model(**inputs), threshold=threshold, target_sizes=sizes)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Found(labels[label], score, tuple(box)) for label, score, box in rows]  # pyright: ignore

    return detect


def pixel_colours(picture: Tensor) -> NameColours:
    """Names colours without a model: the name to which most pixels in the middle of a box are nearest.

    The middle half of either side, so that little background is in it; nearest in RGB to :data:`PALETTE`. Right for flat
    colours, blind for what a thing looks like in a photo's light.

    Args:
        picture: ``[3, h, w]`` uint8.

    Returns:
        The names of detections in it.

    Example:
        >>> picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> picture[2] = 250
        >>> pixel_colours(picture)([Found("car", 0.9, (0, 0, 8, 8))], "car")
        ['blue']
    """
    palette = torch.tensor([PALETTE[name] for name in COLOURS], dtype=torch.float32)

    def name_colours(found: Sequence[Found], name: str) -> list[str]:
        del name
        names = []
        for one in found:
            left, top, right, bottom = one.box
            middle = _crop(
                picture,
                ((3 * left + right) / 4, (3 * top + bottom) / 4),
                ((left + 3 * right) / 4, (top + 3 * bottom) / 4),
            )
            nearest = torch.cdist(middle.flatten(1).t().float(), palette).argmin(1)
            names.append(COLOURS[int(nearest.bincount(minlength=len(COLOURS)).argmax())])
        return names

    return name_colours


def clip_colours(
    path_or_repo: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Callable[[Tensor], NameColours]:
    """Names colours as GenEval does, by CLIP: the colour whose three sentences are together most like the crop.

    Args:
        path_or_repo: GenEval's is openai/clip-vit-large-patch14.
        device: where to run.
        revision: branch, tag or commit.
        local_files_only: never ask the network.

    Returns:
        From a picture ``[3, h, w]`` uint8 to the names of detections in it.

    Raises:
        OSError: if there is no such model, or none in safetensors.
    """
    from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

    hub: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": False}
    name_of_model = os.fspath(path_or_repo)
    processor: Any = AutoProcessor.from_pretrained(name_of_model, **hub)
    model: Any = AutoModelForZeroShotImageClassification.from_pretrained(name_of_model, use_safetensors=True, **hub)
    model = model.to(device).eval().requires_grad_(False)
    known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def sentences(name: str) -> Tensor:
        if name not in known:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in _TEMPLATES]
            inputs = processor(text=texts, return_tensors="pt", padding=True).to(device)
            each = _unit(_features(model.get_text_features(**inputs))).unflatten(0, (len(COLOURS), len(_TEMPLATES)))
            known[name] = _unit(each.mean(1))
        return known[name]

    def of_picture(picture: Tensor) -> NameColours:
        @torch.inference_mode()
        def name_colours(found: Sequence[Found], name: str) -> list[str]:
            crops = [_crop(picture, one.box[:2], one.box[2:]) for one in found]
            inputs = processor(images=crops, return_tensors="pt", input_data_format="channels_first").to(device)
            similar = _unit(_features(model.get_image_features(**inputs))) @ sentences(name).t()
            return [COLOURS[index] for index in similar.argmax(1).tolist()]

        return name_colours

    return of_picture


def _crop(picture: Tensor, start: Sequence[float], end: Sequence[float]) -> Tensor:
    """At least one pixel, within the picture."""
    height, width = picture.shape[1:]
    left, top = (min(max(int(value), 0), size - 1) for value, size in zip(start, (width, height), strict=True))
    right, bottom = (min(round(value), size) for value, size in zip(end, (width, height), strict=True))
    return picture[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _features(output: Any) -> Tensor:
    # transformers 5 wraps them.
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
