"""Pictures in exactly the folders that each official scorer reads; what is there already and still right is left alone.

- GenEval (``evaluation/evaluate_images.py``): ``00000/metadata.jsonl``, one JSON object, and ``00000/samples/0000.png``;
  folders are numbered like the lines of the metadata file, four pictures of each prompt.
- OneIG (``scripts/utils/utils.py``): ``CLASS/MODEL/ID.webp``, a grid of m x n pictures, row by row, of which wholly black
  ones do not count; ``--image_grid`` says the m,n. Two by two is usual.
- LongText (``textbench/evaluate_text_reward.py``): ``0000_1.png`` to ``0000_4.png`` in one folder, by ``prompt_id``.
- CVTG (``unified_metrics_eval.py``): ``CVTG/2/0.png``, by set, number of regions and ``index``; one picture of each.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.evaluation.prompt_files import Benchmark, BenchmarkPrompt
from experiments.runs import append_jsonl, read_jsonl

__all__ = ["PICTURES", "check_number", "load_picture", "load_pictures", "picture_files", "split_grid", "write_layout"]

PICTURES: dict[Benchmark, int] = {"geneval": 4, "oneig": 4, "longtext": 4, "cvtg": 1}
"""Of each prompt, as the scorers' authors have them."""


def picture_files(benchmark: Benchmark, prompt: BenchmarkPrompt, number: int, model: str) -> list[str]:
    """Where the pictures of a prompt lie below the folder of pictures.

    Args:
        benchmark: which one.
        prompt: whose pictures.
        number: of pictures.
        model: name of the model, of which OneIG makes a folder.

    Returns:
        One file for each picture; with OneIG a single one, their grid.

    Example:
        >>> [picture_files(name, BenchmarkPrompt("0007", "", "", {}), 2, "m") for name in ("geneval", "longtext")]
        [['0007/samples/0000.png', '0007/samples/0001.png'], ['0007_1.png', '0007_2.png']]
        >>> picture_files("oneig", BenchmarkPrompt("anime/004", "", "", {}), 4, "lens")
        ['anime/lens/004.webp']
    """
    if benchmark == "geneval":
        return [f"{prompt.key}/samples/{index:04d}.png" for index in range(number)]
    if benchmark == "longtext":
        return [f"{prompt.key}_{index + 1}.png" for index in range(number)]
    if benchmark == "oneig":
        folder, name = prompt.key.split("/")
        return [f"{folder}/{model}/{name}.webp"]
    return [f"{prompt.key}.png"]


def check_number(benchmark: Benchmark, number: int) -> None:
    """Refuse numbers of pictures that a layout has no room for.

    Raises:
        ValueError: if CVTG is to have more than one, or OneIG's would make no square grid.
    """
    if benchmark == "cvtg" and number != 1:
        raise ValueError(
            f"num_images_per_prompt: expected 1, since CVTG's layout has one picture of a prompt, got {number}"
        )
    if benchmark == "oneig" and math.isqrt(number) ** 2 != number:
        raise ValueError(f"num_images_per_prompt: expected 1, 4, 9 or 16, for OneIG's square grid, got {number}")


def write_layout(
    benchmark: Benchmark,
    prompts: Sequence[BenchmarkPrompt],
    painted: Mapping[str, Sequence[Path]],
    images: Path,
    model: str,
) -> int:
    """Lay out what was painted.

    Args:
        benchmark: which one.
        prompts: its prompts.
        painted: for each key the files of its pictures, in order; prompts without any (refused by a rewriter) stay out.
        images: folder of the layout. ``layout.jsonl`` beside it says which picture each file was made of.
        model: its name.

    Returns:
        How many files were written; the others were right already.
    """
    record = images.with_name(f"{images.name}.layout.jsonl")
    made = {row["file"]: row["of"] for row in read_jsonl(record)}
    written = 0
    for prompt in prompts:
        sources = painted.get(prompt.key, ())
        if not sources:
            continue
        if benchmark == "geneval":
            _write(images / prompt.key / "metadata.jsonl", json.dumps(prompt.facts).encode() + b"\n")
        targets = picture_files(benchmark, prompt, len(sources), model)
        groups = [list(sources)] if benchmark == "oneig" else [[source] for source in sources]
        for name, group in zip(targets, groups, strict=True):
            of = [[source.name, source.stat().st_size, source.stat().st_mtime_ns] for source in group]
            if made.get(name) == of and (images / name).is_file():
                continue
            _write(images / name, _grid(group) if benchmark == "oneig" else group[0].read_bytes())
            append_jsonl(record, {"file": name, "of": of})
            written += 1
    return written


def load_picture(path: Path) -> Tensor:
    """A picture file as ``[3, h, w]`` uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def load_pictures(
    benchmark: Benchmark, prompt: BenchmarkPrompt, images: Path, number: int, model: str
) -> Iterator[tuple[Path, Tensor]]:
    """The pictures of a prompt that are there, each with its file; wholly black parts of OneIG's grids are not.

    Args:
        benchmark: which one.
        prompt: whose pictures.
        images: folder of the layout.
        number: pictures of each prompt.
        model: folder in OneIG's layout.

    Yields:
        File and picture ``[3, h, w]`` uint8.
    """
    for name in picture_files(benchmark, prompt, number, model):
        if (images / name).is_file():
            picture = load_picture(images / name)
            for part in split_grid(picture, math.isqrt(number)) if benchmark == "oneig" else [picture]:
                # The official scorer leaves wholly black parts of a grid out.
                if benchmark != "oneig" or part.any():
                    yield images / name, part


def split_grid(picture: Tensor, side: int) -> list[Tensor]:
    """The pictures of a square grid, row by row.

    Args:
        picture: ``[3, h, w]``.
        side: pictures in a row and in a column.

    Returns:
        ``side ** 2`` times ``[3, h / side, w / side]``, rounded down.

    Example:
        >>> [part.shape[1:] == (2, 3) for part in split_grid(torch.zeros(3, 4, 6), 2)]
        [True, True, True, True]
    """
    height, width = picture.shape[1] // side, picture.shape[2] // side
    places = ((row * height, column * width) for row in range(side) for column in range(side))
    return [picture[:, top : top + height, left : left + width] for top, left in places]


def _grid(files: Sequence[Path]) -> bytes:
    from io import BytesIO

    from PIL import Image

    side = math.isqrt(len(files))
    parts: list[Any] = [Image.open(file).convert("RGB") for file in files]
    width, height = parts[0].size
    if any(part.size != (width, height) for part in parts):
        raise ValueError(f"expected pictures of one size for a grid, got {[part.size for part in parts]}")
    sheet = Image.new("RGB", (side * width, side * height))
    for index, part in enumerate(parts):
        sheet.paste(part, (index % side * width, index // side * height))
    buffer = BytesIO()
    # Pillow's own settings, as the official generation script has them.
    sheet.save(buffer, "WEBP")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; a file that holds this already is left alone."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)
