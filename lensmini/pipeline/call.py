"""From prompts to pictures with a released or a trained model: text features, guided sampling, autoencoder.

Axes: b pictures, P prompts, l text tokens, k text layers, e text feature width, c latent channels, h and w latent
height and width, H and W pixels.
"""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from lensmini import __version__
from lensmini.nn import Autoencoder, LensTransformer, TextEncoder, check_decodes_in_strips
from lensmini.pipeline.canvas import picture_sizes
from lensmini.pipeline.decoding import LensPipelineOutput, finish_pictures, stack_equal
from lensmini.pipeline.folder import VARIANTS, default_sampling, load_components
from lensmini.pipeline.memory import workload
from lensmini.pipeline.painting import paint_packed
from lensmini.pipeline.passes import Engine, FastEngine, plain_passes
from lensmini.pipeline.placement import Arranger, Phases, Placement, Unplaced
from lensmini.pipeline.prompt_features import FeatureCache, encode_prompts, is_blank
from lensmini.pipeline.request import (
    check_options,
    check_parts,
    check_sizes,
    choose_noise,
    for_each,
    latent_sizes,
    read_features,
    read_prompts,
)
from lensmini.pipeline.rewriting import rewrite_prompts

__all__ = ["LensPipeline", "LensPipelineOutput"]

StepCallback = Callable[["LensPipeline", int, Tensor, dict[str, Any]], Mapping[str, Any] | None]


class LensPipeline:
    """Text to images with the argument names of diffusers, exact by default, as published on request.

    Args:
        transformer: predicts the velocity.
        autoencoder: decodes; without it only ``output_type="latent"`` works, at 16 pixels a latent position.
        text_encoder: encodes prompts; without it prompts must be cached or given as features.
        variant: "Lens-Base", "Lens" or "Lens-Turbo", for the default steps and guidance; None is the released
            pipeline's own 50 and 4.0.
        prompt_cache: keeps text features between calls.
        check_sizes: refuse sizes that the released model was not made for
            (:func:`lensmini.pipeline.canvas.check_size`). Without it sides need only be multiples of the
            autoencoder's, as small models want.
        free_after_encoding: drop the text encoder as soon as the first call has encoded its prompts.
        fast: do once per run what no step changes (:class:`lensmini.pipeline.passes.FastEngine`): the same pictures up
            to rounding, which then may depend on what is painted beside them. ``memory`` brings it along. Not used with
            ``published_bf16``, unless ``memory`` wants it.
        memory: fit into a card: "auto" for what is free on the device, or "8GiB", "12GiB", "16GiB", "24GiB"; None leaves
            every part where it is. A call prints what it chose (:mod:`lensmini.pipeline.memory`); pictures do not change.
        device: where calls run under ``memory``; by default where the transformer is.
        strips: decode in strips of rows (:mod:`lensmini.nn.strips`): the same pictures in less than half of decoding's memory.
            ``memory`` does so by itself where it helps.

    Raises:
        ValueError: if the parts do not fit together, or the variant is unknown.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> config = LensConfig(num_layers=1, in_channels=16, out_channels=4, enc_hidden_dim=8, **sizes)
        >>> pipe = LensPipeline(LensTransformer(config).init_weights(0), None, None, variant="Lens-Turbo")
        >>> pipe(
        ...     prompt_embeds=[torch.zeros(5, 4, 8)], height=64, width=96, seeds=[0], output_type="latent"
        ... ).images.shape
        torch.Size([1, 16, 4, 6])
    """

    def __init__(
        self,
        transformer: LensTransformer,
        autoencoder: Autoencoder | None,
        text_encoder: TextEncoder | None,
        *,
        variant: str | None = None,
        prompt_cache: FeatureCache | None = None,
        check_sizes: bool = True,
        free_after_encoding: bool = False,
        fast: bool = False,
        memory: str | None = None,
        device: torch.device | str | None = None,
        strips: bool = False,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {[*VARIANTS]} or None, got {variant!r}")
        check_parts(transformer, autoencoder, None if text_encoder is None else len(text_encoder.layers))
        if strips and autoencoder is not None:
            check_decodes_in_strips(autoencoder.vae)
        self.strips = strips
        self.transformer = transformer.eval()
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.variant = variant
        self.prompt_cache = prompt_cache
        self.check_sizes = check_sizes
        self.free_after_encoding = free_after_encoding
        self.engine: Engine = FastEngine(keep_schedule=True) if fast or memory is not None else plain_passes
        here = transformer.img_in.weight.device if device is None else device
        self.arranger = None if memory is None else Arranger(memory, here)
        self.downsample = 16 if autoencoder is None else autoencoder.downsample
        self.num_inference_steps, self.guidance_scale = default_sampling(variant)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        text_encoder: TextEncoder | bool | str | os.PathLike[str] = True,
        autoencoder: Autoencoder | bool | str | os.PathLike[str] = True,
        quantization: Literal["auto", "packed", "dequantize"] = "auto",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        prompt_cache: FeatureCache | None = None,
        free_text_encoder: bool = False,
        check_sizes: bool = True,
        fast: bool = False,
        memory: str | None = None,
        strips: bool = False,
    ) -> "LensPipeline":
        """Load a released pipeline, or one that :func:`lensmini.checkpoints.export_diffusers` wrote; no code of it runs.

        Args:
            path_or_repo: folder with ``model_index.json`` and a folder per component, or Hub repository.
            dtype: of every component.
            device: where to put them.
            text_encoder: True for the pipeline's own, False for none, or an encoder, its folder or repository.
            autoencoder: likewise.
            quantization: as of :func:`lensmini.checkpoints.load_text_encoder`.
            variant: for the default steps and guidance; by default the one that ``model_index.json`` or the name says.
            revision: branch, tag or commit of the repository.
            cache_dir: the Hub's cache folder.
            local_files_only: never ask the network.
            prompt_cache: keeps text features between calls.
            free_text_encoder: drop the encoder as soon as the first call has encoded its prompts.
            check_sizes: as in the constructor.
            fast: as in the constructor.
            memory: as in the constructor; the parts are then loaded into host memory first, except an encoder whose
                experts stay packed.
            strips: as in the constructor.

        Returns:
            The pipeline.

        Raises:
            CheckpointError: (a ``ValueError``) naming the file, what was expected and what was found.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        parts = load_components(
            path_or_repo,
            dtype=dtype,
            device=device if memory is None else "cpu",
            text_device=device,
            text_encoder=text_encoder,
            autoencoder=autoencoder,
            quantization=quantization,
            **hub,
        )
        return cls(
            parts.transformer,
            parts.autoencoder,
            parts.text_encoder,
            variant=variant or parts.variant,
            prompt_cache=prompt_cache,
            check_sizes=check_sizes,
            free_after_encoding=free_text_encoder,
            fast=fast,
            memory=memory,
            device=None if memory is None else device,
            strips=strips,
        )

    @property
    def device(self) -> torch.device:
        """Where the transformer is, under ``memory`` where it runs."""
        return self.transformer.img_in.weight.device if self.arranger is None else self.arranger.device

    def to(self, device: torch.device | str) -> "LensPipeline":
        """Move every component, or under ``memory`` say where to run from now on; returns the pipeline itself."""
        if self.arranger is not None:
            self.arranger = self.arranger.moved(device)
            return self
        for part in (self.transformer, self.autoencoder, self.text_encoder):
            if part is not None:
                part.to(device)
        return self

    def free_text_encoder(self) -> None:
        """Drop the text encoder and its memory; later calls need cached features or ``prompt_embeds``."""
        self.text_encoder = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode_prompt(
        self, prompts: str | Sequence[str], *, too_long: Literal["warn", "error"] = "warn", name: str = "prompt"
    ) -> list[Tensor]:
        """Text features of prompts, for ``prompt_embeds``; see :func:`lensmini.pipeline.prompt_features.encode_prompts`.

        Args:
            prompts: one text or several; a blank one goes through the template like any other.
            too_long: "warn" cuts a prompt that does not fit and says what was cut, "error" refuses it.
            name: argument name for messages.

        Returns:
            For each prompt ``[l, k, e]``.
        """
        texts = [prompts] if isinstance(prompts, str) else [*prompts]
        if not texts:
            raise ValueError(f"{name}: expected at least one, got none")
        return encode_prompts(self.text_encoder, texts, cache=self.prompt_cache, too_long=too_long, name=name)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        aspect_ratio: str | Sequence[str] | None = None,
        base: int = 1024,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        return_dict: bool = True,
        published_bf16: bool = False,
        rescale_guidance: bool = True,
        batch_size: int | None = None,
        too_long: Literal["warn", "error"] = "warn",
        rewriter: Callable[[str], Any] | None = None,
    ) -> LensPipelineOutput | tuple[Any]:
        """Paint; pictures of different sizes run packed in one forward pass.

        Sampling is float32 with the exact time, whatever the dtype of the weights.

        Args:
            prompt: one text or P of them. With ``prompt_embeds`` it goes into the metadata only.
            negative_prompt: one for all or P. If all are blank the unconditional half has no text at all; if any is
                not, all go through the template. Not read at guidance 1.
            height: pixels, for all prompts or for each.
            width: pixels, for all prompts or for each.
            aspect_ratio: instead of both, "W:H" from the released table, for all prompts or for each.
            base: side of the square of about the same area: 512, 768, 1024 or 1440.
            num_inference_steps: by default the variant's.
            guidance_scale: by default the variant's; 1 follows the text without guidance at half the cost.
            num_images_per_prompt: pictures of each prompt, next to each other: p0, p0, p1, p1.
            generator: one for all b pictures or a list of b; the noise is drawn on its device.
            seeds: one for each of the b pictures, or one that counts up from picture to picture; by default fresh ones,
                which the metadata names. The same seed gives the same noise alone and in any batch.
            latents: noise instead, ``[b, c, h, w]`` or b of ``[c, h, w]``; sizes follow from it unless given.
            prompt_embeds: for each prompt ``[l, k, e]`` (:meth:`encode_prompt`).
            negative_prompt_embeds: one for all or one for each prompt; ``[0, k, e]`` is no text.
            callback_on_step_end: ``callback(pipe, step, timestep, {"latents": ...})`` after each step; a dictionary that
                it returns may replace them. ``timestep`` is 1000 t, of each picture where sizes differ. Latents are
                ``[b, c, h, w]``, or a list where sizes differ. With ``batch_size`` steps count anew in each batch.
            callback_on_step_end_tensor_inputs: what the callback gets; only "latents" exist.
            output_type: "pil", "pt" or "np" in [0, 1], or "latent".
            return_dict: False returns ``(images,)``.
            published_bf16: round as the published bf16 pipeline does (time, guidance, state and latent statistics; see
                :mod:`lensmini.pipeline.published`) and draw noise in bf16, as its seeds want. Twice the cost at guidance 1.
            rescale_guidance: restore the norms after guidance, as the released model does.
            batch_size: pictures per forward pass; by default all.
            too_long: "warn" cuts prompts that do not fit and says what was cut, "error" refuses them.
            rewriter: turns each prompt into what is painted, such as :class:`lensmini.prompting.Rewriter`; the metadata says
                what became of it. A request that it refuses is an error. Off by default, as in the published code.

        Returns:
            The images and how each was made.

        Raises:
            ValueError: naming the argument, what was expected and what it was.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = float(self.guidance_scale if guidance_scale is None else guidance_scale)
        check_options(
            num_inference_steps=steps,
            guidance_scale=scale,
            num_images_per_prompt=num_images_per_prompt,
            batch_size=batch_size,
            output_type=output_type,
            decodes=self.autoencoder is not None,
        )
        dtype = self.transformer.img_in.weight.dtype if published_bf16 else torch.float32
        if published_bf16 and dtype != torch.bfloat16:
            raise ValueError(f"published_bf16: expected a transformer in torch.bfloat16, got {dtype}")
        if callback_on_step_end is not None and (others := {*callback_on_step_end_tensor_inputs} - {"latents"}):
            raise ValueError(f'callback_on_step_end_tensor_inputs: expected ["latents"], got also {sorted(others)}')
        prompts = read_prompts(prompt, None if prompt_embeds is None else len(prompt_embeds))
        if rewriter is not None and prompt_embeds is not None:
            raise ValueError("rewriter: expected prompts to rewrite, got prompt_embeds")
        num = len(prompts) if prompt_embeds is None else len(prompt_embeds)
        total = num * num_images_per_prompt
        negatives = for_each("negative_prompt", "" if negative_prompt is None else negative_prompt, num)
        if latents is not None and height is None and width is None and aspect_ratio is None:
            sizes = latent_sizes(latents, self.downsample)
        else:
            each = picture_sizes(num, height=height, width=width, aspect_ratio=aspect_ratio, base=base)
            sizes = [size for size in each for _ in range(num_images_per_prompt)]
        check_sizes(sizes, num=total, downsample=self.downsample, released=self.check_sizes)
        noise = choose_noise(
            [(h // self.downsample, w // self.downsample) for h, w in sizes],
            self.transformer.config.in_channels,
            seeds=seeds,
            generator=generator,
            latents=latents,
            dtype=dtype,
            device=self.device,
        )
        guided = scale != 1 or published_bf16
        prompts, rewrites = rewrite_prompts(prompts, rewriter)
        given = (
            None if prompt_embeds is None else read_features("prompt_embeds", prompt_embeds, self.transformer.config)
        )
        encodes = given is None or (guided and negative_prompt_embeds is None and not is_blank(negatives))
        phases: Phases = Unplaced()
        if self.arranger is not None:
            # Prompts are counted at their longest: how long they are is known only when they are encoded.
            longest = 512 if self.text_encoder is None else self.text_encoder.max_length
            if not encodes:
                longest = max(len(x) for x in [*(given or ()), *(negative_prompt_embeds or ())])
            shape = {"guided": guided, "text_tokens": longest, "num_steps": steps, "batch_size": batch_size or total}
            work = workload(self.transformer, sizes, self.downsample, **shape)
            phases = self.arranger.arrange(self.transformer, self.autoencoder, self.text_encoder, work)
        with phases.encode() if encodes else nullcontext():
            texts = given or self.encode_prompt(prompts, too_long=too_long)
            negative_texts = self._negative(negatives, negative_prompt_embeds, too_long) if guided else None
        dropped = isinstance(phases, Placement) and phases.plan.encoder == "free"
        if (self.free_after_encoding or dropped) and self.text_encoder is not None:
            self.free_text_encoder()
        of = [index for index in range(num) for _ in range(num_images_per_prompt)]

        painted: list[Tensor] = []
        with phases.sample() as around:
            engine = plain_passes if published_bf16 and around is None else self.engine
            if isinstance(engine, FastEngine):
                engine.around = around
                engine.forget()  # weights may have changed since the last call; batches of this one share it
            for first in range(0, total, batch_size or total):
                rows = range(first, min(first + (batch_size or total), total))
                painted += paint_packed(
                    self.transformer,
                    [noise.latents[row] for row in rows],
                    [texts[of[row]] for row in rows],
                    None if negative_texts is None else [negative_texts[of[row]] for row in rows],
                    num_steps=steps,
                    guidance_scale=scale,
                    rescale=rescale_guidance,
                    published_bf16=published_bf16,
                    on_step=self._on_step(callback_on_step_end),
                    engine=engine,
                )
        shared = {"num_inference_steps": steps, "guidance_scale": scale, "rescale_guidance": rescale_guidance}
        shared |= {"published_bf16": published_bf16, "variant": self.variant, "lensmini": __version__}
        metadata = [
            {
                "prompt": prompts[of[row]] if prompts else None,
                **({"rewrite": rewrites[of[row]]} if rewriter is not None else {}),
                "negative_prompt": negatives[of[row]] if guided and negative_prompt_embeds is None else None,
                "seed": noise.seeds[row],
                "height": sizes[row][0],
                "width": sizes[row][1],
                **shared,
            }
            for row in range(total)
        ]
        strips = self.strips or (isinstance(phases, Placement) and phases.plan.decode_strips)
        with phases.decode():
            decoding = {"published_bf16": published_bf16, "strips": strips}
            images = finish_pictures(painted, self.autoencoder, output_type, metadata, **decoding)
        return LensPipelineOutput(images, metadata) if return_dict else (images,)

    def _negative(
        self, negatives: list[str], embeds: Sequence[Tensor] | None, too_long: Literal["warn", "error"]
    ) -> list[Tensor]:
        if embeds is not None:
            features = read_features("negative_prompt_embeds", embeds, self.transformer.config, allow_empty=True)
            return for_each("negative_prompt_embeds", features, len(negatives))
        if is_blank(negatives):
            config = self.transformer.config
            none = torch.zeros(0, config.num_text_layers, config.enc_hidden_dim, device=self.device)
            return [none] * len(negatives)
        return self.encode_prompt(negatives, too_long=too_long, name="negative_prompt")

    def _on_step(self, callback: StepCallback | None) -> Callable[[int, Tensor, list[Tensor]], Any] | None:
        if callback is None:
            return None

        def on_step(index: int, t: Tensor, latents: list[Tensor]) -> Any:
            timestep = 1000 * (t[0] if bool((t == t[0]).all()) else t)
            changed = callback(self, index, timestep, {"latents": stack_equal(latents)})
            return None if changed is None else changed.get("latents")

        return on_step
