"""How well a reader of text reads: rendered pictures with known words, scored as the benchmarks' own are.

    python -m experiments.evaluation.reader_check                  minutes on one CPU core; needs the extra ocr
    python -m experiments.evaluation.reader_check --num 100

What a reader misses here no model can win on LongText or CVTG: it is the ceiling of every own score with it. Pictures are
drawn by ``lensmini.data.text_pictures`` in the fonts that matplotlib brings along, easier than a scene's lettering.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torchvision
import tyro

from experiments.evaluate import format_rows
from experiments.evaluation.own_scores import score_texts
from experiments.evaluation.prompt_files import Benchmark, BenchmarkPrompt
from lensmini.data.text_pictures import draw_text_picture
from lensmini.rewards.judges import ReadText, rapid_reader

__all__ = ["CASES", "CheckConfig", "check_reader"]

_TEXT = (
    "open door sale river stay calm coffee winter night market garden music light street summer bridge paper house green train "
    "stone cloud silver morning ticket window friend history science water fresh bread daily under the old clock please keep "
    "quiet in library hours welcome home future begins today limited edition made with love"
)
WORDS = _TEXT.split()

LEVEL: dict[str, Any] = {"max_angle": 0.0, "max_blur": 0.0}
ANY: dict[str, Any] = {"max_angle": 30.0, "max_blur": 1.0}
CASES: Mapping[str, tuple[Benchmark, int, int, int, dict[str, Any]]] = {
    "single words, level": ("cvtg", 512, 4, 1, LEVEL),
    "single words, any angle and blur": ("cvtg", 512, 4, 1, ANY),
    "two words a line, level": ("cvtg", 512, 3, 2, LEVEL),
    "two words a line, any angle and blur": ("cvtg", 512, 3, 2, ANY),
    "long text, eight lines of four words": ("longtext", 1024, 8, 4, LEVEL),
}
"""Benchmark whose rules count, side in pixels, lines, words of a line, and what may happen to them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """How many pictures."""

    num: int = 30
    """Of each case; words that find no room are drawn again."""
    seed: int = 0
    """Of words and pictures."""


def check_reader(read_text: ReadText, config: CheckConfig) -> dict[str, dict[str, float]]:
    """Draw, read and score.

    Args:
        read_text: the reader.
        config: how many pictures.

    Returns:
        For each of :data:`CASES` the share of ``words`` that count as read, with its ``low`` and ``high``, the share
        ``apart`` once joined words are taken apart, and the number of pictures.
    """
    rows = {}
    for number, (name, (benchmark, side, lines, words, options)) in enumerate(CASES.items()):
        with TemporaryDirectory() as folder:
            endless = _draw(benchmark, side, lines, words, options, seed=1000 * config.seed + number)
            drawn = itertools.islice(endless, config.num)
            prompts = [_save(benchmark, Path(folder), index, *one) for index, one in enumerate(drawn)]
            row = score_texts(benchmark, prompts, Path(folder), 1, read_text, seed=config.seed).row
        share = row["text" if benchmark == "longtext" else "average"]
        rows[name] = {"words": share, **{key: row[key] for key in ("low", "high", "apart", "pictures")}}
    return rows


def _draw(
    benchmark: Benchmark, side: int, lines: int, words: int, options: dict[str, Any], *, seed: int
) -> Iterator[tuple[list[str], Any]]:
    random = Random(seed)
    for key in itertools.count():
        texts = [" ".join(random.choices(WORDS, k=words)) for _ in range(lines)]
        try:
            yield (
                texts,
                draw_text_picture(f"{benchmark}{key}", texts, height=side, width=side, seed=seed, **options).image,
            )
        except ValueError:  # no room
            continue


def _save(benchmark: Benchmark, folder: Path, index: int, texts: list[str], image: Any) -> BenchmarkPrompt:
    key = f"{index:04d}" if benchmark == "longtext" else f"CVTG/{len(texts)}/{index}"
    path = folder / (f"{key}_1.png" if benchmark == "longtext" else f"{key}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    torchvision.io.write_png(image, str(path))
    prompt = "Signs " + " and ".join(f"'{text}'" for text in texts)
    return BenchmarkPrompt(key, prompt, str(len(texts)), {"text": texts})


if __name__ == "__main__":
    found = check_reader(rapid_reader(), tyro.cli(CheckConfig, prog="python -m experiments.evaluation.reader_check"))
    print(format_rows(found))
    print(json.dumps(found))
