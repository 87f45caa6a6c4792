"""The numbers of arXiv 2605.21573, tables of its section 3 and appendix, to stand beside ours.

Lens and Lens-Turbo were scored with GPT-5.5 as a rewriter under a system prompt for each benchmark (GenEval's also read
the metadata); "Lens, no rewriter" is the ablation without one. Images per prompt, seeds and sizes are not stated.
"""

from experiments.evaluation.prompt_files import Benchmark
from experiments.evaluation.texts import Language

__all__ = ["PROMPTS", "paper_rows"]

PROMPTS: dict[tuple[Benchmark, Language], int] = {
    ("geneval", "en"): 553,
    ("oneig", "en"): 1120,
    ("oneig", "zh"): 1320,
    ("longtext", "en"): 160,
    ("cvtg", "en"): 2000,
}
"""Prompts of each benchmark, as its authors state; OneIG's Chinese set adds 200 of multilingualism."""

_GENEVAL = ("single", "two", "count", "colour", "position", "attribute", "overall")
_ONEIG = ("align", "text", "reasoning", "style", "diversity", "overall")
_CVTG = ("2", "3", "4", "5", "average", "ned", "clip")

_TABLES: dict[tuple[Benchmark, Language], tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    ("geneval", "en"): (
        _GENEVAL,
        {
            "Lens": (0.994, 0.970, 0.909, 0.923, 0.915, 0.868, 0.930),
            "Lens-Turbo": (0.997, 0.947, 0.909, 0.891, 0.895, 0.845, 0.914),
            "Qwen-Image": (0.990, 0.920, 0.890, 0.880, 0.760, 0.770, 0.868),
        },
    ),
    ("oneig", "en"): (
        _ONEIG,
        {
            "Lens": (0.891, 0.960, 0.343, 0.404, 0.186, 0.557),
            "Lens-Turbo": (0.884, 0.972, 0.349, 0.383, 0.180, 0.554),
            "Qwen-Image": (0.882, 0.891, 0.306, 0.418, 0.197, 0.539),
        },
    ),
    ("oneig", "zh"): (("overall",), {"Lens": (0.525,), "Lens-Turbo": (0.519,), "Qwen-Image": (0.548,)}),
    ("longtext", "en"): (
        ("text",),
        {"Lens": (0.937,), "Lens-Turbo": (0.927,), "Lens, no rewriter": (0.893,), "Qwen-Image": (0.943,)},
    ),
    ("cvtg", "en"): (
        _CVTG,
        {
            "Lens": (0.897, 0.881, 0.872, 0.827, 0.869, 0.951, 0.814),
            "Lens-Turbo": (0.893, 0.892, 0.894, 0.878, 0.889, 0.965, 0.815),
            "Qwen-Image": (0.837, 0.836, 0.831, 0.816, 0.829, 0.930, 0.806),
        },
    ),
}
_WITHOUT_REWRITER: dict[tuple[Benchmark, Language], dict[str, float]] = {
    ("geneval", "en"): {"overall": 0.843},
    ("oneig", "en"): {"overall": 0.532},
    ("cvtg", "en"): {"average": 0.849, "ned": 0.933, "clip": 0.796},
}


def paper_rows(benchmark: Benchmark, language: Language = "en") -> dict[str, dict[str, float]]:
    """What the paper prints for a benchmark.

    Args:
        benchmark: which one.
        language: which of its sets; the paper has none of LongText in Chinese.

    Returns:
        Rows by model, each with numbers by column.

    Example:
        >>> paper_rows("geneval")["Lens"]["position"], paper_rows("longtext", "zh")
        (0.915, {})
    """
    if (benchmark, language) not in _TABLES:
        return {}
    columns, rows = _TABLES[benchmark, language]
    found = {model: dict(zip(columns, numbers, strict=True)) for model, numbers in rows.items()}
    without = _WITHOUT_REWRITER.get((benchmark, language))
    return found | ({"Lens, no rewriter": dict(without)} if without else {})
