"""Pictures of released checkpoints: pipelines, or a transformer with the other parts named beside it."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.painters import PainterConfig, PaintSettings, lora_row, merge_adapter
from experiments.weights_digest import digest_weights
from lensmini.checkpoints.autoencoder import AUTOENCODER_FILES, load_checked_autoencoder
from lensmini.checkpoints.folders import find_source
from lensmini.checkpoints.text_folders import find_model_folder
from lensmini.pipeline.folder import default_sampling, find_pipeline, guess_variant

if TYPE_CHECKING:
    from lensmini.pipeline import LensPipeline

__all__ = ["PipelinePainter"]


class PipelinePainter:
    """Anything that ``LensPipeline.from_pretrained`` reads; loaded when the first picture is wanted."""

    takes_negatives = True
    example = ""

    def __init__(self, path: Path, config: PainterConfig) -> None:
        if config.mu is not None:
            raise ValueError(
                f"mu: expected none, since {path} is no run of ours and a pipeline has its own schedule, got {config.mu};"
                " start with one of the presets lens, base and turbo"
            )
        self._config, self._loaded = config, None
        self.name = path.as_posix()
        self.source = _part(path)
        self._check_parts()
        named = [part.expanduser() for part in (config.text_encoder, config.autoencoder) if part is not None]
        _check_device(config.device)
        # What the Hub has is named by its content once it is here.
        self._steps, self._scale = default_sampling(self._fetch())
        self.digest = digest_weights(self.source, without=_named_apart(config), revision=config.revision)
        self.fields = {"dtype": config.dtype or "bfloat16", "weights_sha256": self.digest, **lora_row(config)}
        if named:
            self.fields["parts_sha256"] = [digest_weights(str(part)) for part in named]
        self.fields |= {name: True for name in ("published_bf16", "fp8") if getattr(config, name)}

    def defaults(self) -> tuple[int, float]:
        return self._steps, self._scale

    def check_size(self, height: int, width: int) -> None:
        from lensmini.pipeline.canvas import check_size

        if not self._config.any_size:
            check_size(height, width)
        elif min(height, width) < 1:
            raise ValueError(f"height, width: expected positive sides, got {height} x {width}")

    def unknown_words(self, prompt: str) -> list[str]:
        return []

    def vocabulary(self) -> list[str]:
        return []

    def paint(
        self,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        settings: PaintSettings,
        *,
        negatives: Sequence[str],
    ) -> list[Tensor]:
        painted: dict[int, Tensor] = {}
        # One negative that is not blank sends all of its call through the template, so the two kinds do not mix.
        for blank in (True, False):
            chosen = [index for index, negative in enumerate(negatives) if (not negative.strip()) == blank]
            if not chosen:
                continue
            result: Any = self._load()(
                [prompts[index] for index in chosen],
                None if blank else [negatives[index] for index in chosen],
                height=[sizes[index][0] for index in chosen],
                width=[sizes[index][1] for index in chosen],
                seeds=[seeds[index] for index in chosen],
                num_inference_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                rescale_guidance=settings.rescale,
                published_bf16=self._config.published_bf16,
            )
            for index, image in zip(chosen, result.images, strict=True):
                painted[index] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return [painted[index] for index in range(len(prompts))]

    def close(self) -> None:
        self._loaded = None
        gc.collect()

    @property
    def _is_transformer_alone(self) -> bool:
        path = Path(self.source)
        return path.is_file() or (path.is_dir() and not (path / "model_index.json").exists())

    def _check_parts(self) -> None:
        config = self._config
        if not self._is_transformer_alone:
            return
        if config.autoencoder is None or (config.text_encoder is None and config.prompt_cache is None):
            raise ValueError(
                f"text_encoder, autoencoder: expected the folder or repository of each, since {self.source} holds a"
                f" transformer alone, got {config.text_encoder} and {config.autoencoder}"
            )

    def _fetch(self) -> str | None:
        """Bring what is on the Hub here and tell the variant, with no weights in memory."""
        config = self._config
        offline: dict[str, Any] = {"local_files_only": config.local_files_only}
        if config.text_encoder is not None and not config.text_encoder.expanduser().exists():
            find_model_folder(config.text_encoder.as_posix(), None, {"revision": None, "cache_dir": None, **offline})
        if config.autoencoder is not None and not config.autoencoder.expanduser().exists():
            find_source(config.autoencoder.as_posix(), allow_patterns=AUTOENCODER_FILES, **offline)
        if self._is_transformer_alone:
            return guess_variant(Path(self.source).stem)
        own = {"text_encoder": config.text_encoder is None, "autoencoder": config.autoencoder is None}
        return find_pipeline(self.source, **own, revision=config.revision, **offline)[1]

    def _load(self) -> "LensPipeline":
        if self._loaded is None:
            from lensmini.pipeline import LensPipeline
            from lensmini.pipeline.prompt_cache import PromptCache, encoder_fingerprint

            config = self._config
            options: dict[str, Any] = {
                "check_sizes": not config.any_size,
                "memory": config.memory,
                "strips": config.strips,
            }
            place = {"dtype": getattr(torch, config.dtype or "bfloat16"), "device": config.device}
            if self._is_transformer_alone:
                self._loaded = _assemble(self.source, config, place, options)
            else:
                self._loaded = LensPipeline.from_pretrained(
                    self.source,
                    text_encoder=True if config.text_encoder is None else _part(config.text_encoder),
                    autoencoder=True if config.autoencoder is None else _part(config.autoencoder),
                    revision=config.revision,
                    local_files_only=config.local_files_only,
                    **place,
                    **options,
                )
            if config.prompt_cache is not None:
                encoder = self._loaded.text_encoder
                # Without an encoder the directory says itself whose features it has.
                whose = None if encoder is None else encoder_fingerprint(encoder)
                self._loaded.prompt_cache = PromptCache(config.prompt_cache.expanduser(), fingerprint=whose)
            merge_adapter(self._loaded.transformer, config)
            if config.fp8:
                from lensmini.pipeline.low_precision import quantize_fp8

                quantize_fp8(self._loaded.transformer)
            if config.compile:
                self._loaded.transformer.compile_blocks()
                if self._loaded.autoencoder is not None:
                    self._loaded.autoencoder.compile_decoder()
        return self._loaded


def _assemble(source: str, config: PainterConfig, place: dict[str, Any], options: dict[str, Any]) -> "LensPipeline":
    from lensmini.checkpoints import load_transformer
    from lensmini.checkpoints.text_loading import load_text_encoder
    from lensmini.pipeline import LensPipeline

    device = place["device"]
    if config.memory is not None:
        place = {**place, "device": "cpu"}
    transformer = load_transformer(source, **place)
    place = {**place, "local_files_only": config.local_files_only}
    encoder = None
    if config.text_encoder is not None:
        within = "text_encoder" if (config.text_encoder.expanduser() / "text_encoder").is_dir() else None
        layers = transformer.config.selected_layer_index
        encoder = load_text_encoder(_part(config.text_encoder), subfolder=within, layers=layers, **place)
    assert config.autoencoder is not None
    autoencoder = load_checked_autoencoder(_part(config.autoencoder), **place)
    variant = guess_variant(Path(source).stem)
    return LensPipeline(transformer, autoencoder, encoder, variant=variant, device=device, **options)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that works here, got {device!r}: {cause}") from None


def _part(path: Path) -> str:
    return str(path.expanduser()) if path.expanduser().exists() else path.as_posix()


def _named_apart(config: PainterConfig) -> tuple[str, ...]:
    apart = {"text_encoder": config.text_encoder, "tokenizer": config.text_encoder, "vae": config.autoencoder}
    return tuple(folder for folder, part in apart.items() if part is not None)
