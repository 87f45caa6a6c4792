"""Pictures from prompts with a trained checkpoint: text features, guided sampling, autoencoder.

    P="one object on a white background . a large red circle at the top left ."
    python -m experiments.generate "$P"                                           newest run of the quickstart
    python -m experiments.generate --prompts FILE --num-images-per-prompt 4       one prompt per line
    echo "$P" | python -m experiments.generate -                                  from standard input
    python -m experiments.generate ratios "$P" --guidance-scale 2                 on many canvases
    python -m experiments.generate mini "$P" --checkpoint runs/mini --height 40 --width 24

The miniature follows full descriptions like P, in the words of its captions; bare requests are strange to it. Seconds on
one CPU core. ``OUT`` holds one PNG per picture, ``pictures.jsonl`` with its settings and ``grid.png`` of the
pictures asked for last. The same command again paints only what is missing; another one adds to the directory.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from experiments.miniature.autoencoder import AutoencoderConfig
from experiments.miniature.language_model import LanguageModelConfig
from experiments.miniature.world import Miniature, MiniatureConfig, prepare_miniature
from experiments.pictures import save_grid
from experiments.runs import append_jsonl, latest_checkpoint, progress, read_jsonl
from experiments.scoring import paint_prompts
from experiments.training import read_run
from lensmini.data import MINIATURE_CANVASES, SCENE_VOCABULARY
from lensmini.nn import LensConfig, LensTransformer

__all__ = [
    "UNSEEN_CANVASES",
    "GenerateConfig",
    "find_checkpoint",
    "generate",
    "load_checkpoint",
    "read_config",
    "unknown_words",
]

UNSEEN_CANVASES = ((28, 36), (36, 28), (28, 40), (40, 28), (24, 44))
"""Sizes (height, width) between the trained ones, that no stage of the miniature ever saw."""
_RUNS = (Path("runs/quickstart"), Path("runs/mini"))
_CHUNK = 24
_GRID = 96

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Prompts, a checkpoint, and how to sample."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts; - reads more of them from standard input, one per line."""
    prompts: Path | None = None
    """File with one prompt per line; - is standard input."""
    checkpoint: Path | None = None
    """A step-N directory, or a run, whose newest is taken; by default runs/quickstart, else runs/mini."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights or the last ones."""
    out: Path = Path("runs/generate")
    """Directory of the pictures."""
    seed: int = 0
    """Seed of a prompt's first picture; the next ones count on."""
    num_images_per_prompt: int = 1
    """Pictures of each prompt and canvas."""
    height: int = 32
    """Pixels."""
    width: int = 32
    """Pixels."""
    canvases: tuple[tuple[int, int], ...] = ()
    """Heights and widths instead of the one above: every prompt on each of them."""
    num_steps: int = 12
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Guidance; 1 follows the text without it at half the cost."""
    rescale: bool = True
    """Restore the norms after guidance, as the released model does."""
    mu: float | None = 1.8
    """Time shift of the schedule; none is the released model's rule, 0 equal steps."""

    def __post_init__(self) -> None:
        if self.num_images_per_prompt < 1 or self.num_steps < 1 or self.seed < 0:
            raise ValueError(
                "num_images_per_prompt, num_steps, seed: expected at least 1, 1 and 0, got "
                f"{self.num_images_per_prompt}, {self.num_steps}, {self.seed}"
            )
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: expected a finite number of at least 0, got {self.guidance_scale}")


def mini() -> GenerateConfig:
    """Square pictures of the miniature world."""
    return GenerateConfig()


def ratios() -> GenerateConfig:
    """Every prompt on the five trained canvases and on five that no stage ever saw."""
    return GenerateConfig(canvases=(*MINIATURE_CANVASES, *UNSEEN_CANVASES))


PRESETS: tuple[Callable[[], GenerateConfig], ...] = (mini, ratios)


def find_checkpoint(path: Path | None) -> Path:
    """The ``step-N`` directory that a path means.

    Args:
        path: such a directory, or a run, whose newest one is taken; None looks into the runs that make one.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: if there is none; the message names the command that makes one.
    """
    for run in _RUNS if path is None else (path,):
        if (run / "run.json").is_file():
            return run
        found = latest_checkpoint(run)
        if found is not None:
            return found[0]
    where = path if path is not None else " or ".join(run.as_posix() for run in _RUNS)
    raise FileNotFoundError(
        f"no checkpoint in {where}: train one with `python -m experiments.quickstart` (about 8 minutes on two cores)"
        " or name one with --checkpoint"
    )


def load_checkpoint(path: Path, weights: str = "ema", *, quiet: bool = False) -> tuple[LensTransformer, Miniature]:
    """Load a ``step-N`` directory.

    Args:
        path: the directory.
        weights: "ema" or "model".
        quiet: say nothing about the stages beneath.

    Returns:
        The transformer, frozen, in the dtype that it was trained in, and the parts beneath, found beside the run (or
        trained again if they are gone).
    """
    if weights not in ("ema", "model"):
        raise ValueError(f'weights: expected "ema" or "model", got {weights!r}')
    config = read_run(path)["config"]
    beneath = config["miniature"]
    canvases = tuple(map(tuple, beneath["autoencoder"]["canvases"]))
    world = MiniatureConfig(
        language_model=LanguageModelConfig(**beneath["language_model"]),
        autoencoder=AutoencoderConfig(**{**beneath["autoencoder"], "canvases": canvases}),
        layers=tuple(beneath["layers"]),
        max_length=beneath["max_length"],
        strict=beneath["strict"],
    )
    model = LensTransformer(LensConfig.from_dict(json.loads((path / "config.json").read_text())))
    model.load_state_dict(load_file(path / f"{weights}.safetensors"), strict=True)
    model = model.to(getattr(torch, config["optim"]["dtype"])).requires_grad_(False).eval()
    return model, prepare_miniature(world, path.resolve().parent.parent, quiet=quiet)


def read_prompts(config: GenerateConfig) -> list[str]:
    """All prompts of a config, in order: arguments, then the file; blank lines are left out.

    Raises:
        ValueError: if there is none, or the file cannot be read.
    """
    found: list[str] = []
    sources = [*config.texts, *([] if config.prompts is None else [config.prompts])]
    for source in sources:
        if str(source) == "-":
            found += sys.stdin.read().splitlines()
        elif isinstance(source, Path):
            try:
                found += source.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"prompts: expected a text file, got {source} ({type(error).__name__})") from error
        else:
            found.append(source)
    found = [" ".join(line.split()) for line in found]
    if not any(found):
        raise ValueError("prompts: expected some as arguments, in --prompts FILE or on standard input (-), got none")
    return [line for line in found if line]


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of a prompt that the tokenizer maps to its token for unknown ones, each once.

    Example:
        >>> from experiments.miniature.tokenizer import build_tokenizer
        >>> unknown_words(build_tokenizer(), "a Mauve circle near a hexagon")
        ['Mauve', 'near', 'hexagon']
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return list(dict.fromkeys(prompt[start:end] for token, (start, end) in pairs if token == tokenizer.unk_token_id))


def generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """Paint what is missing.

    Args:
        config: what and how.

    Returns:
        For each picture asked for, in the order prompt, canvas, seed, its row of ``pictures.jsonl``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if there is no prompt or a size does not suit the autoencoder.
    """
    prompts = read_prompts(config)
    checkpoint = find_checkpoint(config.checkpoint)
    model, world = load_checkpoint(checkpoint, config.weights)
    _check_sizes(config, world)
    _report_unknown(prompts, world)
    digest = hashlib.sha256((checkpoint / f"{config.weights}.safetensors").read_bytes()).hexdigest()[:12]
    names = ("num_steps", "guidance_scale", "rescale", "mu", "weights")
    shared = {name: getattr(config, name) for name in names} | {"weights_sha256": digest}
    wanted = [
        {"prompt": prompt, "seed": config.seed + number, "height": height, "width": width, **shared}
        for prompt in prompts
        for height, width in _canvases(config)
        for number in range(config.num_images_per_prompt)
    ]
    index = config.out / "pictures.jsonl"
    last = {row["file"]: row for row in read_jsonl(index)}
    done = {_key(row): row for row in last.values() if (config.out / row["file"]).is_file()}
    # A number is used once, whatever was painted first: what a stopped call left out gets the same files later.
    taken = {row["file"] for row in done.values()}
    free = (name for name in map("{:05d}.png".format, range(len(taken) + len(wanted))) if name not in taken)
    missing = [
        {**row, "checkpoint": checkpoint.as_posix(), "file": next(free)}
        for key, row in {_key(row): row for row in wanted}.items()
        if key not in done
    ]
    if len(missing) < len(wanted):
        print(f"generate: {len(wanted) - len(missing)} of {len(wanted)} pictures are there already", flush=True)
    missing.sort(key=lambda row: (row["height"], row["width"], len(row["prompt"].split())))
    with progress(len(missing), 0, "paint") as bar:
        for first in range(0, len(missing), _CHUNK):
            rows = missing[first : first + _CHUNK]
            sizes, seeds = [(row["height"], row["width"]) for row in rows], [row["seed"] for row in rows]
            texts = [row["prompt"] for row in rows]
            painted = paint_prompts(model, world, texts, sizes, config, seeds=seeds, rescale=config.rescale)
            for row, picture in zip(rows, painted, strict=True):
                _save_picture(picture, config.out / row["file"])
                append_jsonl(index, row)
                done[_key(row)] = row
                bar.update()
    rows = [done[_key(row)] for row in wanted]
    shown = rows[:_GRID]
    labels = [
        f"{row['file'][:-4]} | {row['height']}x{row['width']}, seed {row['seed']} | {row['prompt']}" for row in shown
    ]
    save_grid([_load_picture(config.out / row["file"]) for row in shown], labels, config.out / "grid.png")
    shown_as = "all" if len(rows) == len(shown) else f"the first {len(shown)}"
    print(f"generate: {len(rows)} pictures in {config.out}, {shown_as} on {config.out / 'grid.png'}", flush=True)
    return rows


def _canvases(config: GenerateConfig) -> tuple[tuple[int, int], ...]:
    return config.canvases or ((config.height, config.width),)


def _check_sizes(config: GenerateConfig, world: Miniature) -> None:
    side = world.autoencoder.downsample
    for height, width in _canvases(config):
        if min(height, width) < side or height % side or width % side:
            raise ValueError(f"height, width: expected positive multiples of {side}, got {height} x {width}")


def _report_unknown(prompts: Sequence[str], world: Miniature) -> None:
    tokenizer: Any = world.encoder.tokenizer
    unknown = {number: words for number, text in enumerate(prompts, 1) if (words := unknown_words(tokenizer, text))}
    for number, words in unknown.items():
        print(f"prompt {number}: the language model does not know {', '.join(map(repr, words))}", file=sys.stderr)
    if unknown:
        vocabulary = tokenizer.get_vocab()
        print(f"it knows: {' '.join(word for word in SCENE_VOCABULARY if word in vocabulary)}", file=sys.stderr)


def _key(row: dict[str, Any]) -> str:
    kept = {name: value for name, value in row.items() if name not in ("file", "checkpoint")}
    return json.dumps(kept, sort_keys=True)


def _save_picture(picture: Tensor, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(temporary, format="PNG")
    temporary.replace(path)


def _load_picture(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_config(presets: Sequence[Callable[[], Config]], prog: str, arguments: Sequence[str] | None = None) -> Config:
    """Read ``PRESET --overrides`` from the command line; without a preset's name the first one is meant.

    Args:
        presets: functions that return configs; their names are the commands and their docstrings the help.
        prog: the script's name, for the help.
        arguments: instead of the command line's.

    Returns:
        The config.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    names = [make.__name__ for make in presets]
    if not given or given[0] not in (*names, "-h", "--help"):
        given = [names[0], *given]
    choices = {make.__name__: (make.__doc__ or "", make()) for make in presets}
    return tyro.extras.overridable_config_cli(choices, args=given, prog=prog)


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and paint; what a person can mend ends in one line."""
    try:
        generate(read_config(PRESETS, "python -m experiments.generate", arguments))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"generate: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("generate: stopped; the same command goes on from here") from None


if __name__ == "__main__":
    cli()
