"""Scores by models: NSFW, aesthetics, watermarks, and the embeddings of near-duplicates (arXiv 2605.21573, section 2.1).

Axes: b pictures, d embedding width, h and w pixels.

All take local folders or Hub repositories, read safetensors only and run no code of a checkpoint. What is known of each
model is from its public files; what is our assumption is said so.
"""

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["ModelFilter", "convert_head", "load_aesthetic", "load_embedder", "load_nsfw", "load_watermark"]

NSFW_LEVELS = ("neutral", "low", "medium", "high")


class ModelFilter:
    """A model that gives every picture a score, or an embedding. The loaders of this module make them.

    Args:
        processor: of transformers; takes PIL images.
        model: takes what the processor makes.
        score: from the model's output to float ``[b]`` or ``[b, d]``.
        batch_size: pictures of one forward pass.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(1, 1)
        >>> model.forward = lambda pixel_values: pixel_values
        >>> processor = lambda images, return_tensors: {"pixel_values": torch.tensor([[i.width / 1.0] for i in images])}
        >>> ModelFilter(processor, model, lambda output: output[:, 0])(torch.zeros(2, 3, 4, 5, dtype=torch.uint8))
        tensor([5., 5.])
    """

    def __init__(
        self, processor: Any, model: nn.Module, score: Callable[[Any], Tensor], *, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size}")
        self.processor, self.model, self.score, self.batch_size = processor, model.eval(), score, batch_size
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @torch.inference_mode()
    def __call__(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Scores of pictures of any sizes.

        Args:
            images: uint8 ``[b, 3, h, w]`` or a list of ``[3, h, w]``.

        Returns:
            float32 ``[b]``, or ``[b, d]`` of an embedder, on the CPU. A picture that the model makes NaN of stays NaN.

        Raises:
            ValueError: if a picture has another shape or dtype.
        """
        found, source = [], _to_pil(images)
        while pictures := list(islice(source, self.batch_size)):
            inputs = self.processor(images=pictures, return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device, self.dtype)
            found.append(self.score(self.model(pixel_values=pixels)).float().cpu())
        return torch.cat(found) if found else torch.zeros(0)


def load_nsfw(
    path_or_repo: str | os.PathLike[str] = "Freepik/nsfw_image_detector",
    *,
    level: Literal["low", "medium", "high"] = "medium",
    **options: Any,
) -> ModelFilter:
    """The paper's NSFW classifier: EVA-02 base at 448 pixels, a timm model in transformers' wrapper.

    Its labels are four levels, neutral, low, medium and high; the score is the probability of at least ``level``, as its
    card sums them. Which level the paper drops is not stated; medium is ours.

    Args:
        path_or_repo: folder or repository.
        level: the lowest one that counts.
        **options: ``device``, ``dtype``, ``batch_size``, ``revision``, ``local_files_only``.

    Returns:
        From pictures to float32 ``[b]`` in [0, 1].

    Raises:
        ValueError: if there are no safetensors, or not these labels.
        ImportError: without timm.

    Example:
        >>> load_nsfw("no/such/folder", level="some")
        Traceback (most recent call last):
        ValueError: level: expected one of ('low', 'medium', 'high'), got 'some'
    """
    if level not in NSFW_LEVELS[1:]:
        raise ValueError(f"level: expected one of {NSFW_LEVELS[1:]}, got {level!r}")
    try:
        import timm  # noqa: F401  # transformers' wrapper needs it
    except ImportError as error:
        raise ImportError("the NSFW classifier needs timm: pip install lensmini[data]") from error
    wanted = NSFW_LEVELS[NSFW_LEVELS.index(level) :]
    return _load_classifier(path_or_repo, NSFW_LEVELS, wanted, **options)


def load_watermark(path_or_repo: str | os.PathLike[str], *, label: str = "watermark", **options: Any) -> ModelFilter:
    """A watermark classifier: the paper fine-tuned SigLIP2; any image classification model of transformers will do.

    Args:
        path_or_repo: folder or repository; the paper's own is not public, so there is no default.
        label: the class that says so, upper or lower case.
        **options: ``device``, ``dtype``, ``batch_size``, ``revision``, ``local_files_only``.

    Returns:
        From pictures to float32 ``[b]``, the label's probability.

    Raises:
        ValueError: if there are no safetensors, or no such label.

    Example:
        >>> load_watermark("no/such/folder", local_files_only=True)
        Traceback (most recent call last):
        ValueError: no/such/folder: expected an image classification model in safetensors, but ...
    """
    return _load_classifier(path_or_repo, (label,), (label,), **options)


def load_aesthetic(
    path_or_repo: str | os.PathLike[str] = "google/siglip-so400m-patch14-384",
    *,
    head: str | os.PathLike[str],
    **options: Any,
) -> ModelFilter:
    """Aesthetic Predictor V2.5: SigLIP's pooled embedding, made unit, through five linear layers to a score.

    Args:
        path_or_repo: the SigLIP model.
        head: safetensors of the layers, ``scoring_head.0`` to ``scoring_head.8``; see :func:`convert_head`.
        **options: ``device``, ``dtype``, ``batch_size``, ``revision``, ``local_files_only``.

    Returns:
        From pictures to float32 ``[b]``, about 1 to 10; the paper drops what is below 3.

    Raises:
        ValueError: if there are no safetensors, or the head does not fit.

    Example:
        >>> load_aesthetic(head="no_such.safetensors")
        Traceback (most recent call last):
        ValueError: no_such.safetensors: expected the layers of an aesthetic head in safetensors, but ...
    """
    layers = _read_head(Path(head))
    from transformers import SiglipVisionModel

    processor, model, batch_size = _load(SiglipVisionModel, "a SigLIP vision model", path_or_repo, **options)
    width = model.config.hidden_size
    if layers[0].in_features != width:
        raise ValueError(f"{head}: expected a head for embeddings of {width}, found {layers[0].in_features}")
    layers = layers.to(model.device)

    def score(output: Any) -> Tensor:
        pooled = output.pooler_output.float()
        return layers(pooled / torch.linalg.vector_norm(pooled, dim=1, keepdim=True))[:, 0]

    return ModelFilter(processor, model, score, batch_size=batch_size)


def load_embedder(
    path_or_repo: str | os.PathLike[str] = "openai/clip-vit-large-patch14", **options: Any
) -> ModelFilter:
    """CLIP's image embeddings of unit length, for :func:`lensmini.data.filters.find_duplicates`.

    Args:
        path_or_repo: a CLIP model; the paper's is ViT-L/14.
        **options: ``device``, ``dtype``, ``batch_size``, ``revision``, ``local_files_only``.

    Returns:
        From pictures to float32 ``[b, d]``.

    Raises:
        ValueError: if there are no safetensors.

    Example:
        >>> load_embedder("no/such/folder", local_files_only=True)
        Traceback (most recent call last):
        ValueError: no/such/folder: expected a CLIP vision model in safetensors, but ...
    """
    from transformers import CLIPVisionModelWithProjection

    processor, model, batch_size = _load(CLIPVisionModelWithProjection, "a CLIP vision model", path_or_repo, **options)
    unit = lambda output: nn.functional.normalize(output.image_embeds.float(), dim=1)  # noqa: E731
    return ModelFilter(processor, model, unit, batch_size=batch_size)


def convert_head(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Turn the aesthetic head's published ``.pth`` into safetensors, once; only tensors are read from it.

    Args:
        source: the file of the predictor's authors.
        target: safetensors for :func:`load_aesthetic`.

    Raises:
        ValueError: if the file holds anything but the head's tensors.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     head = nn.Sequential(nn.Linear(8, 4), nn.Dropout(), nn.Linear(4, 1))
        ...     torch.save({f"scoring_head.{k}": v for k, v in head.state_dict().items()}, f"{folder}/a.pth")
        ...     convert_head(f"{folder}/a.pth", f"{folder}/a.safetensors")
        ...     len(_read_head(Path(folder, "a.safetensors")))
        2
    """
    from safetensors.torch import save_file

    try:
        values = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or broken pickle makes torch stumble over
        raise ValueError(f"{source}: expected tensors only, but {_short(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{source}: expected tensors by name, found {type(values).__name__}")
    _to_layers({str(name): value for name, value in values.items()}, str(source))
    save_file({str(name): value.float().contiguous().clone() for name, value in values.items()}, target)


def _read_head(path: Path) -> nn.Sequential:
    try:
        with safe_open(path, framework="pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        hint = "; convert_head makes one of the published .pth" if path.suffix in (".pth", ".pt") else ""
        raise ValueError(
            f"{path}: expected the layers of an aesthetic head in safetensors, but {_short(error)}{hint}"
        ) from error
    return _to_layers(values, str(path))


def _to_layers(values: dict[str, Tensor], where: str) -> nn.Sequential:
    """Linear layers in the order of their numbers; dropout between them does nothing in use."""
    weights = {name: value for name, value in values.items() if name.endswith(".weight") and value.ndim == 2}
    order = sorted(weights, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    layers = []
    for name in order:
        bias = values.get(f"{name.removesuffix('weight')}bias")
        outputs, inputs = weights[name].shape
        follows = not layers or layers[-1].out_features == inputs
        if bias is None or bias.shape != (outputs,) or not follows:
            raise ValueError(f"{where}: expected linear layers that follow each other, found {name} of another shape")
        layer = nn.Linear(inputs, outputs)
        layer.load_state_dict({"weight": weights[name], "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1 or len(values) != 2 * len(layers):
        raise ValueError(f"{where}: expected linear layers down to one score, found {sorted(values)[:12]}")
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _load_classifier(
    path_or_repo: str | os.PathLike[str], labels: Sequence[str], wanted: Sequence[str], **options: Any
) -> ModelFilter:
    from transformers import AutoModelForImageClassification

    kind = "an image classification model"
    processor, model, batch_size = _load(AutoModelForImageClassification, kind, path_or_repo, **options)
    names = {str(name).casefold(): int(index) for index, name in model.config.id2label.items()}
    missing = [label for label in labels if label.casefold() not in names]
    if missing:
        raise ValueError(f"{path_or_repo}: expected labels {list(labels)}, found {sorted(names)}")
    chosen = [names[label.casefold()] for label in wanted]
    score = lambda output: output.logits.float().softmax(1)[:, chosen].sum(1)  # noqa: E731
    return ModelFilter(processor, model, score, batch_size=batch_size)


def _load(
    kind: Any,
    what: str,
    path_or_repo: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Any, Any, int]:
    from transformers import AutoImageProcessor

    name = os.fspath(path_or_repo)
    hub: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": False}
    try:
        processor = AutoImageProcessor.from_pretrained(name, **hub)
        hub.pop("trust_remote_code") if kind.__name__[:4] != "Auto" else None
        model, report = kind.from_pretrained(name, use_safetensors=True, dtype=dtype, output_loading_info=True, **hub)
    except Exception as error:  # transformers raise whatever a broken folder makes them stumble over
        raise ValueError(f"{name}: expected {what} in safetensors, but {_short(error)}") from error
    misfits = [*report["missing_keys"], *report["mismatched_keys"]]
    if misfits:
        raise ValueError(f"{name}: expected the weights of {type(model).__name__}, found none for {misfits[:8]}")
    return processor, model.to(device).eval().requires_grad_(False), batch_size


def _to_pil(images: Tensor | Sequence[Tensor]) -> Any:
    from PIL import Image

    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or image.dtype != torch.uint8:
            raise ValueError(f"images[{index}]: expected uint8 [3, h, w], got {image.dtype} {list(image.shape)}")
        yield Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
