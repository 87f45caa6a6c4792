"""Pictures from prompts, with a trained run or a released checkpoint: text features, guided sampling, autoencoder.

    P="one object on a white background . a large red circle at the top left ."
    python -m experiments.generate "$P"                                           newest run of the quickstart
    python -m experiments.generate --prompts FILE --num-images-per-prompt 4       one prompt per line, or .jsonl
    echo "$P" | python -m experiments.generate -                                  from standard input
    python -m experiments.generate ratios "$P" --guidance-scale 2                 on many canvases
    python -m experiments.generate mini "$P" --checkpoint runs/mini --height 40 --width 24
    python -m experiments.generate turbo "a fox" --checkpoint FOLDER --aspect-ratio 16:9 --device cuda
    python -m experiments.generate base "a fox" --checkpoint FILE.safetensors --text-encoder DIR --autoencoder DIR
    python -m experiments.generate lens --prompts FILE --compare A B              side by side from the same noise
    python -m experiments.generate lens --prompts FILE --checkpoint A --shard 0/2 and 1/2 in a second process
    python -m experiments.generate "a red circle" --rewriter runs/rewriter-*      short requests, rewritten first
    python -m experiments.generate turbo "a fox" --checkpoint A --rewriter gpt-oss-20b --rewriter-url http://localhost:8000/v1

The miniature follows full descriptions like P, in the words of its captions; bare requests are strange to it, unless a
rewriter makes descriptions of them. Seconds on one CPU core. ``OUT`` holds one PNG per picture, ``pictures.jsonl`` with its
settings and ``grid.png`` of the pictures asked for last. The same command again paints only what is missing; another one
adds to the directory. Prompts are streamed, and a kill loses at most the chunk that was being painted.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any, TypeVar

import tyro

from experiments.checkpoints import find_checkpoint, load_checkpoint, unknown_words
from experiments.generate_config import PRESETS, UNSEEN_CANVASES, GenerateConfig
from experiments.painters import Painter, PaintSettings, open_painter
from experiments.picture_requests import Prompts, expand, shard_of
from experiments.picture_store import PictureStore, claim, picture_key
from experiments.pictures import save_grid
from experiments.rewriting import RewrittenPrompts, open_rewriter
from experiments.runs import progress

__all__ = [
    "PRESETS",
    "UNSEEN_CANVASES",
    "GenerateConfig",
    "find_checkpoint",
    "generate",
    "load_checkpoint",
    "read_config",
    "stream",
    "unknown_words",
]

_WINDOW = 4096
_GRID = 96
_REPORTED = 20
_SAMPLING = ("num_steps", "guidance_scale", "rescale", "mu")

Config = TypeVar("Config")


def generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """Paint what is missing.

    Args:
        config: what and how.

    Returns:
        For each picture asked for, in the order checkpoint, prompt, canvas, seed, its row of ``pictures.jsonl``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if there is no prompt, a line or a file is broken, a setting or a size does not suit the
            checkpoint, or another process paints into the directory.
    """
    return list(stream(config))


def stream(config: GenerateConfig) -> Iterator[dict[str, Any]]:
    """As :func:`generate`, a row at a time, for jobs whose rows should not all be in memory."""
    prompts: Any = Prompts(config.texts, config.prompts)
    if config.rewriter is not None:
        prompts = _rewritten(prompts, config)
    sizes, negative = _check_prompts(prompts, config)
    checkpoints = (config.checkpoint,) if config.compare is None else config.compare
    if checkpoints == (None,) and config.height is None and not config.canvases:
        raise ValueError("checkpoint: expected a pipeline folder, a .safetensors file or a Hub repository, got none")
    painters = [open_painter(checkpoint, config) for checkpoint in checkpoints]
    for painter in painters:
        for (height, width), number in sizes.items():
            _check_size(painter, height, width, number)
        if negative and not painter.takes_negatives:
            raise ValueError(f"negative_prompt: expected none (prompt {negative}), since {painter.name} is no pipeline")
        _report_unknown(prompts, painter)
        _report_bare(prompts, painter)
    with claim(config.out, config.part):
        yield from _fill(painters, [_rows(prompts, config, painters, index) for index in range(len(painters))], config)


Rows = Callable[[], Iterator[dict[str, Any]]]


def _fill(painters: Sequence[Painter], jobs: Sequence[Rows], config: GenerateConfig) -> Iterator[dict[str, Any]]:
    store = PictureStore(config.out, config.part)
    wanted = sum(1 for rows in jobs for _ in rows())
    missing = len({picture_key(row) for rows in jobs for row in rows() if row not in store})
    if missing < wanted:
        print(f"generate: {wanted - missing} of {wanted} pictures are there already", flush=True)
    shown: list[list[dict[str, Any]]] = [[] for _ in painters]
    with progress(missing, 0, "paint") as bar:
        # One checkpoint after the other, so that two large ones need not be loaded at once.
        for painter, rows, first in zip(painters, jobs, shown, strict=True):
            for row in _paint_missing(painter, rows(), store, config.chunk, bar):
                if len(first) < _GRID // len(painters):
                    first.append(row)
                yield row
            painter.close()
    pairs = [row for group in zip_longest(*shown) for row in group if row is not None]
    number, shards = config.part
    grid = config.out / ("grid.png" if shards == 1 else f"grid-{number}-of-{shards}.png")
    if pairs:
        save_grid([store.load(row) for row in pairs], [_label(row, config) for row in pairs], grid)
    shown_as = "all" if wanted == len(pairs) else f"the first {len(pairs)}"
    print(f"generate: {wanted} pictures in {config.out}, {shown_as} on {grid}", flush=True)


def _paint_missing(
    painter: Painter, rows: Iterator[dict[str, Any]], store: PictureStore, chunk: int, bar: Any
) -> Iterator[dict[str, Any]]:
    while window := list(islice(rows, _WINDOW)):
        missing = {picture_key(row): row for row in window if row not in store}
        settings = PaintSettings(**{name: window[0].get(name) for name in _SAMPLING})  # pyright: ignore
        todo = [{**row, "checkpoint": painter.name, "file": store.name()} for row in missing.values()]
        # Equal shapes next to each other run as one.
        todo.sort(key=lambda row: (row["height"], row["width"], len(row["prompt"].split())))
        for first in range(0, len(todo), chunk):
            chosen = todo[first : first + chunk]
            painted = painter.paint(
                [row["prompt"] for row in chosen],
                [(row["height"], row["width"]) for row in chosen],
                [row["seed"] for row in chosen],
                settings,
                negatives=[row.get("negative_prompt", "") for row in chosen],
            )
            for row, picture in zip(chosen, painted, strict=True):
                store.add(row, picture)
                bar.update()
        yield from map(store.find, window)


def _rows(prompts: Prompts, config: GenerateConfig, painters: Sequence[Painter], index: int) -> Rows:
    """The pictures asked of one painter, without file names; to go through as often as needed."""
    painter = painters[index]
    steps, guidance = config.num_steps, config.guidance_scale
    if steps is None or guidance is None:
        own_steps, own_guidance = painter.defaults()
        steps, guidance = own_steps if steps is None else steps, own_guidance if guidance is None else guidance
    shared = {"num_steps": steps, "guidance_scale": guidance, "rescale": config.rescale, **painter.fields}
    # The same weights twice are two pictures all the same, or a comparison could not find them equal.
    twin = sum(other.fields == painter.fields for other in painters[:index])
    shared |= {"repeat": twin} if twin else {}
    number, shards = config.part
    options = {"seed": config.seed, "num_images": config.num_images_per_prompt}

    def rows() -> Iterator[dict[str, Any]]:
        for item in prompts:
            for request in expand(item, config.sizes, negative_prompt=config.negative_prompt, **options):
                if shards == 1 or shard_of(request, shards) == number:
                    yield {**request, **shared}

    return rows


def _rewritten(prompts: Prompts, config: GenerateConfig) -> RewrittenPrompts:
    rewriter = open_rewriter(
        str(config.rewriter),
        url=config.rewriter_url,
        key_env=config.rewriter_key_env,
        system_prompt=config.system_prompt,
        device=config.device,
        cache=config.out / "replies.sqlite",
    )
    return RewrittenPrompts(prompts, rewriter, config.out / "rewrites.jsonl")


def _check_prompts(prompts: Prompts, config: GenerateConfig) -> tuple[dict[tuple[int, int], int], int]:
    """Read every prompt once; the sizes asked for with the first prompt of each, and the first with a negative one."""
    found: dict[tuple[int, int], int] = {}
    number, negative = 0, 0
    for number, item in enumerate(prompts, 1):
        for height, width in config.sizes:
            found.setdefault((item.get("height", height), item.get("width", width)), number)
        if not negative and item.get("negative_prompt", config.negative_prompt).strip():
            negative = number
    if not number:
        raise ValueError("prompts: expected some as arguments, in --prompts FILE or on standard input (-), got none")
    return found, negative


def _check_size(painter: Painter, height: int, width: int, number: int) -> None:
    try:
        painter.check_size(height, width)
    except ValueError as error:
        raise ValueError(f"{error} (prompt {number})") from None


def _report_unknown(prompts: Prompts, painter: Painter) -> None:
    known = painter.vocabulary()
    if not known:
        return
    unknown = ((number, painter.unknown_words(item["prompt"])) for number, item in enumerate(prompts, 1))
    told = 0
    for number, words in unknown:
        if words and (told := told + 1) <= _REPORTED:
            print(f"prompt {number}: the language model does not know {', '.join(map(repr, words))}", file=sys.stderr)
    if told > _REPORTED:
        print(f"and {told - _REPORTED} more prompts have such words", file=sys.stderr)
    if told:
        print(f"it knows: {' '.join(known)}", file=sys.stderr)


def _report_bare(prompts: Prompts, painter: Painter) -> None:
    """A description has a sentence for the whole and one for each object."""
    if not painter.example:
        return
    first, number = "", 0
    for item in prompts:
        if sum(1 for part in item["prompt"].split(" .") if part.strip()) < 2:
            first, number = first or item["prompt"], number + 1
    if number:
        others = f" and {number - 1} more" if number > 1 else ""
        print(
            f"bare requests are not followed ({first!r}{others}); describe it like: {painter.example}", file=sys.stderr
        )


def _label(row: dict[str, Any], config: GenerateConfig) -> str:
    label = f"{row['file'][:-4]} | {row['height']}x{row['width']}, seed {row['seed']} | {row['prompt']}"
    return label if config.compare is None else f"{row['checkpoint']} | {label}"


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
        for _ in stream(read_config(PRESETS, "python -m experiments.generate", arguments)):
            pass
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"generate: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("generate: stopped; the same command goes on from here") from None


if __name__ == "__main__":
    cli()
