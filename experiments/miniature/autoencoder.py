"""The miniature's autoencoder: a small convolutional net behind the same class as the released autoencoders.

It halves the picture's sides once; the 2 x 2 patches that all latents of this library have make it 4 pixels per token.
The semantic variant also asks every token, by a linear head that is thrown away, what stands there.

Axes: b images, H and W pixels, c autoencoder channels, y and x positions of half the pixels, k = 4 c token channels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.miniature.gates import GateReport, require
from experiments.miniature.schedule import warmup_flat_decay
from experiments.runs import append_jsonl, progress, write_json
from lensmini.data import (
    BACKGROUNDS,
    COLOURS,
    MINIATURE_CANVASES,
    SHAPES,
    Scene,
    render_scenes,
    sample_scene,
    verify_scene,
)
from lensmini.nn.autoencoder import Autoencoder, from_uint8, to_uint8
from lensmini.nn.latents import LatentNormalizer, patchify

__all__ = [
    "AutoencoderConfig",
    "ConvolutionalAutoencoder",
    "check_autoencoder",
    "load_autoencoder_miniature",
    "smallest_autoencoder",
    "token_labels",
    "train_autoencoder",
]

HELD_OUT = 2**40
"""Number of the first scene that training never reaches."""
UNSEEN_CANVASES = ((24, 24), (32, 40), (40, 32), (40, 40), (48, 48))
"""Canvases that only the report asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """An autoencoder small enough for a minute on one core."""

    variant: Literal["plain", "semantic"] = "plain"
    """"semantic" adds a loss that makes colour and shape readable from every token by a linear map."""
    channels: int = 4
    """Autoencoder channels c; a token has 4 c."""
    width: int = 48
    """Channels of the hidden layers."""
    num_blocks: int = 2
    """Residual blocks of the decoder; the encoder has one."""
    noise: float = 0.1
    """Standard deviation of the noise on the latents in training, whose own is 1."""
    semantic_weight: float = 0.1
    """Weight of the semantic loss."""
    canvases: tuple[tuple[int, int], ...] = MINIATURE_CANVASES
    """Heights and widths to train on, one canvas a step, in turn."""
    grid: int = 2
    """Cells a side of the scenes."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 24
    """Images of a step."""
    learning_rate: float = 3e-3
    """Peak of AdamW's rate."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay_share: float = 0.4
    """Share of the steps, at the end, in which the rate falls to zero."""
    seed: int = 0
    """Of the initialisation, the scenes and the noise."""
    num_checked: int = 192
    """Held-out scenes of the gate, on every canvas."""
    min_strict: float = 0.9
    """Gate: share of reconstructions of which the verifier answers every question right, on every canvas."""
    version: int = 1
    """Of the training code: a change that gives other weights raises it, so that cached ones are not taken."""

    def __post_init__(self) -> None:
        for name in ("channels", "width", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.variant not in ("plain", "semantic"):
            raise ValueError(f'variant: expected "plain" or "semantic", got {self.variant!r}')
        if not self.canvases or any(side % 4 for canvas in self.canvases for side in canvas):
            raise ValueError(f"canvases: expected at least one, with sides divisible by 4, got {self.canvases}")


def smallest_autoencoder(variant: Literal["plain", "semantic"] = "plain") -> AutoencoderConfig:
    """An autoencoder that trains in a second and passes no gate: for tests."""
    return AutoencoderConfig(
        variant=variant,
        width=8,
        num_blocks=1,
        canvases=((16, 16), (16, 24)),
        steps=4,
        batch_size=4,
        warmup=1,
        num_checked=4,
        min_strict=0.0,
    )


class ConvolutionalAutoencoder(nn.Module):
    """Images to half-size latents and back, with the interface of diffusers' autoencoders.

    Args:
        channels: c.
        width: channels of the hidden layers.
        num_blocks: residual blocks of the decoder.
        noise: standard deviation that the posterior reports, the same everywhere.

    Example:
        >>> net = ConvolutionalAutoencoder(channels=4, width=8, num_blocks=1, noise=0.1)
        >>> latents = net.encode(torch.zeros(2, 3, 16, 24)).latent_dist.mean
        >>> latents.shape, net.decode(latents).sample.shape
        (torch.Size([2, 4, 8, 12]), torch.Size([2, 3, 16, 24]))
    """

    def __init__(self, *, channels: int, width: int, num_blocks: int, noise: float) -> None:
        super().__init__()
        self.log_variance = 2 * torch.tensor(noise).clamp(min=1e-8).log().item()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            _Block(width),
            nn.Conv2d(width, channels, 1),
            # Fixes the scale of the latents, without which the noise on them could be outgrown.
            nn.BatchNorm2d(channels, affine=False),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            *(_Block(width) for _ in range(num_blocks)),
            nn.SiLU(),
            nn.Conv2d(width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, images: Tensor) -> Any:
        """``[b, 3, H, W]`` to an object whose ``latent_dist`` has ``mean`` and ``logvar`` ``[b, c, y, x]``."""
        mean = self.encoder(images)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, self.log_variance)))

    def decode(self, latents: Tensor) -> Any:
        """``[b, c, y, x]`` to an object whose ``sample`` is ``[b, 3, H, W]``."""
        return SimpleNamespace(sample=self.decoder(latents))


class _Block(nn.Module):
    """``x + conv(silu(conv(silu(x))))``, with the second convolution zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.second(F.silu(self.first(F.silu(hidden_states))))


def train_autoencoder(
    config: AutoencoderConfig, directory: Path, *, progress: Callable[..., Any] = progress, strict: bool = True
) -> GateReport:
    """Train, save and check an autoencoder; the same config gives the same weights on one thread.

    The loss is ``mean |x - y| + mean (x - y)^2`` of images in [-1, 1], reconstructed from latents with noise.

    Args:
        config: the net and its training.
        directory: gets ``autoencoder.safetensors``, ``metrics.jsonl``, and ``autoencoder.json`` with config and gates.
        progress: makes the bar, as :func:`experiments.runs.progress`.
        strict: whether a failed gate raises; the files are written before.

    Returns:
        The gates.

    Raises:
        GateError: if a gate fails and ``strict``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(config.seed)
    net, head = build_autoencoder(config)
    parameters = [*net.parameters(), *(head.parameters() if head else ())]
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    with progress(config.steps, 0, "autoencoder") as bar:
        for step in range(1, config.steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * warmup_flat_decay(
                    step, config.steps, config.warmup, config.decay_share
                )
            height, width = config.canvases[step % len(config.canvases)]
            scenes = _scenes(config, (step - 1) * config.batch_size, config.batch_size)
            images = _pictures(scenes, height, width)
            latents = net.encoder(images)
            noise = config.noise * torch.randn(latents.shape, generator=generator)
            error = net.decoder(latents + noise) - images
            loss = reconstruction = error.abs().mean() + error.square().mean()
            if head is not None:
                loss = loss + config.semantic_weight * _semantic_loss(head, latents, scenes, height, width)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if step % 50 == 0 or step == config.steps:
                append_jsonl(directory / "metrics.jsonl", {"step": step, "loss": float(reconstruction.detach())})
                bar.set_postfix(loss=f"{float(reconstruction.detach()):.4f}", refresh=False)
            bar.update()
    autoencoder = _assemble(config, net.requires_grad_(False).eval())
    save_file({**autoencoder.state_dict()}, directory / "autoencoder.safetensors")
    report = check_autoencoder(autoencoder, config)
    write_json(directory / "autoencoder.json", {"config": config, "gates": report})
    return require(report) if strict else report


def load_autoencoder_miniature(directory: Path) -> Autoencoder:
    """Load what :func:`train_autoencoder` saved.

    Returns:
        The autoencoder, frozen: images in [-1, 1] to normalised latents ``[b, k, h, w]`` and back, 4 pixels a side
        of each position.

    Raises:
        OSError: if there is nothing to load.
    """
    settings = json.loads((Path(directory) / "autoencoder.json").read_text())["config"]
    names = {field.name for field in fields(AutoencoderConfig)}
    settings = {name: value for name, value in settings.items() if name in names}
    config = AutoencoderConfig(**{**settings, "canvases": tuple(map(tuple, settings["canvases"]))})
    net, _ = build_autoencoder(config)
    size = config.channels * 4
    autoencoder = Autoencoder(net, LatentNormalizer(torch.zeros(size), torch.ones(size)), downsample=4)
    autoencoder.load_state_dict(load_file(Path(directory) / "autoencoder.safetensors"))
    return autoencoder


def build_autoencoder(config: AutoencoderConfig) -> tuple[ConvolutionalAutoencoder, nn.Module | None]:
    """The untrained net and, for the semantic variant, its linear head, initialised from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = ConvolutionalAutoencoder(
            channels=config.channels, width=config.width, num_blocks=config.num_blocks, noise=config.noise
        )
        nothing = (len(COLOURS) + 1) + (len(SHAPES) + 1)
        head = nn.Conv2d(4 * config.channels, nothing, 1) if config.variant == "semantic" else None
    for block in net.modules():
        if isinstance(block, _Block):
            nn.init.zeros_(block.second.weight)
    return net, head


def check_autoencoder(autoencoder: Autoencoder, config: AutoencoderConfig) -> GateReport:
    """Measure reconstructions by the verifier, on every canvas and on some that were never trained.

    Args:
        autoencoder: what to measure.
        config: its config, for canvases, threshold and the number of scenes.

    Returns:
        ``strict_HxW`` and ``psnr_HxW`` (decibel, of 8-bit images, mean over images) for each canvas, and the failures.
    """
    num = config.num_checked
    numbers, least = {}, {f"strict_{h}x{w}": config.min_strict for h, w in config.canvases}
    for height, width in dict.fromkeys((*config.canvases, *UNSEEN_CANVASES)):
        scenes = _scenes(config, HELD_OUT, num, pairs="all")
        images = render_scenes(scenes, height, width)
        with torch.no_grad():
            again = to_uint8(autoencoder.decode(autoencoder.encode(from_uint8(images))))
        right = [verify_scene(image, scene).strict for image, scene in zip(again, scenes, strict=True)]
        squares = (again.float() - images.float()).square().mean((1, 2, 3))
        numbers[f"strict_{height}x{width}"] = sum(right) / num
        numbers[f"psnr_{height}x{width}"] = float((10 * (255**2 / squares.clamp(min=1e-4)).log10()).mean())
    return GateReport.judge("autoencoder", numbers, least)


def token_labels(scenes: Sequence[Scene], height: int, width: int) -> tuple[Tensor, Tensor]:
    """What stands at each token: the object that covers most of its 4 x 4 pixels, if it covers a quarter.

    Args:
        scenes: b scenes.
        height: pixels of the canvas.
        width: the same.

    Returns:
        Colours and shapes ``[b, height / 4, width / 4]`` int64, indices into COLOURS and SHAPES, or one past the
        last for the background.

    Example:
        >>> from lensmini.data import SceneObject
        >>> scene = Scene("white", (SceneObject("square", "red", "large", 0, 0),))
        >>> colours, shapes = token_labels([scene], 16, 16)
        >>> colours[0, 0, 0].item(), colours[0, 3, 3].item(), shapes[0, 0, 0].item()
        (0, 6, 1)
    """
    colours = torch.full((len(scenes), height // 4, width // 4), len(COLOURS))
    shapes = torch.full_like(colours, len(SHAPES))
    for index, scene in enumerate(scenes):
        alone = [Scene("black", (replace(thing, colour="yellow"),), scene.grid) for thing in scene.objects]
        red = render_scenes(alone, height, width)[:, 0].float()
        ground, paint = BACKGROUNDS["black"][0], COLOURS["yellow"][0]
        covered = F.avg_pool2d((red - ground) / (paint - ground), 4)
        share, which = covered.max(0)
        there = share >= 0.25
        colours[index][there] = torch.tensor([list(COLOURS).index(thing.colour) for thing in scene.objects])[
            which[there]
        ]
        shapes[index][there] = torch.tensor([SHAPES.index(thing.shape) for thing in scene.objects])[which[there]]
    return colours, shapes


def _semantic_loss(head: nn.Module, latents: Tensor, scenes: Sequence[Scene], height: int, width: int) -> Tensor:
    colours, shapes = token_labels(scenes, height, width)
    logits = head(patchify(latents)).split([len(COLOURS) + 1, len(SHAPES) + 1], dim=1)
    return F.cross_entropy(logits[0], colours) + F.cross_entropy(logits[1], shapes)


def _assemble(config: AutoencoderConfig, net: ConvolutionalAutoencoder) -> Autoencoder:
    """Measure the latents' statistics on fresh scenes of every canvas."""
    num = max(32, 4 * config.batch_size)
    with torch.no_grad():
        latents = [
            patchify(net.encoder(_pictures(_scenes(config, HELD_OUT // 2 + index * num, num), height, width)))
            for index, (height, width) in enumerate(config.canvases)
        ]
    return Autoencoder(net, LatentNormalizer.fit(latents), downsample=4)


def _scenes(config: AutoencoderConfig, first: int, num: int, pairs: Literal["seen", "all"] = "seen") -> list[Scene]:
    numbers = range(first + config.seed * 2**42, first + config.seed * 2**42 + num)
    return [sample_scene(generator=number, grid=config.grid, pairs=pairs) for number in numbers]


def _pictures(scenes: Sequence[Scene], height: int, width: int) -> Tensor:
    return from_uint8(render_scenes(scenes, height, width))
