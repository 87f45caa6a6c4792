"""The numbers of arXiv 2605.21573, tables of its section 3 and appendix with every model in them, to stand beside ours.

Lens and Lens-Turbo were scored with GPT-5.5 as a rewriter under a system prompt for each benchmark (GenEval's also read
the metadata); "Lens, no rewriter" is the ablation without one. Images per prompt, seeds and sizes are not stated.
"""

from collections.abc import Iterable

from experiments.evaluation.prompt_files import Benchmark
from experiments.evaluation.texts import Language

__all__ = ["PROMPTS", "paper_rows", "paper_table"]

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
            "Seedream 3.0": (0.990, 0.960, 0.910, 0.930, 0.470, 0.800, 0.843),
            "Seedream 4.0": (0.990, 0.920, 0.720, 0.910, 0.760, 0.740, 0.840),
            "GPT Image 1 High": (0.990, 0.920, 0.850, 0.920, 0.750, 0.610, 0.840),
            "Janus-Pro": (0.990, 0.890, 0.590, 0.900, 0.790, 0.660, 0.800),
            "HiDream-I1-Full": (1.000, 0.980, 0.790, 0.910, 0.600, 0.720, 0.833),
            "SD3.5 Large": (0.980, 0.890, 0.730, 0.830, 0.340, 0.470, 0.710),
            "FLUX.1 dev": (0.980, 0.810, 0.740, 0.790, 0.220, 0.450, 0.660),
            "FLUX.2-Klein": (0.931, 0.957, 0.828, 0.915, 0.718, 0.740, 0.848),
            "Z-Image-Turbo": (1.000, 0.950, 0.770, 0.890, 0.650, 0.680, 0.823),
            "Z-Image": (1.000, 0.940, 0.780, 0.930, 0.620, 0.770, 0.840),
            "Qwen-Image": (0.990, 0.920, 0.890, 0.880, 0.760, 0.770, 0.868),
            "Hunyuan-Image-3.0": (1.000, 0.920, 0.480, 0.820, 0.420, 0.630, 0.720),
            "LongCat-Image": (0.990, 0.980, 0.860, 0.860, 0.750, 0.730, 0.870),
        },
    ),
    ("oneig", "en"): (
        _ONEIG,
        {
            "Lens": (0.891, 0.960, 0.343, 0.404, 0.186, 0.557),
            "Lens-Turbo": (0.884, 0.972, 0.349, 0.383, 0.180, 0.554),
            "Kolors 2.0": (0.820, 0.427, 0.262, 0.360, 0.300, 0.434),
            "Seedream 3.0": (0.818, 0.865, 0.275, 0.413, 0.277, 0.530),
            "Seedream 4.0": (0.892, 0.983, 0.347, 0.453, 0.191, 0.573),
            "GPT Image 1 High": (0.851, 0.857, 0.345, 0.462, 0.151, 0.533),
            "Nano Banana 2.0": (0.888, 0.944, 0.334, 0.481, 0.245, 0.578),
            "Janus-Pro": (0.553, 0.001, 0.139, 0.276, 0.365, 0.267),
            "BAGEL": (0.769, 0.244, 0.173, 0.367, 0.251, 0.361),
            "HiDream-I1-Full": (0.829, 0.707, 0.317, 0.347, 0.186, 0.477),
            "SD3.5 Large": (0.809, 0.629, 0.294, 0.353, 0.225, 0.462),
            "FLUX.1 dev": (0.786, 0.523, 0.253, 0.368, 0.238, 0.434),
            "FLUX.2-Klein": (0.887, 0.866, 0.312, 0.442, 0.156, 0.532),
            "Z-Image-Turbo": (0.840, 0.994, 0.298, 0.368, 0.139, 0.528),
            "Z-Image": (0.881, 0.987, 0.280, 0.387, 0.194, 0.546),
            "Qwen-Image": (0.882, 0.891, 0.306, 0.418, 0.197, 0.539),
        },
    ),
    ("oneig", "zh"): (
        ("overall",),
        {
            "Lens": (0.525,),
            "Lens-Turbo": (0.519,),
            "Kolors 2.0": (0.426,),
            "Seedream 3.0": (0.528,),
            "Seedream 4.0": (0.554,),
            "GPT Image 1 High": (0.474,),
            "Nano Banana 2.0": (0.567,),
            "Janus-Pro": (0.240,),
            "BAGEL": (0.370,),
            "HiDream-I1-Full": (0.337,),
            "FLUX.2-Klein": (0.430,),
            "Z-Image-Turbo": (0.507,),
            "Z-Image": (0.535,),
            "Qwen-Image": (0.548,),
        },
    ),
    ("longtext", "en"): (
        ("text",),
        {
            "Lens": (0.937,),
            "Lens-Turbo": (0.927,),
            "Kolors 2.0": (0.258,),
            "Seedream 3.0": (0.896,),
            "Seedream 4.0": (0.921,),
            "GPT Image 1 High": (0.956,),
            "Nano Banana 2.0": (0.981,),
            "Janus-Pro": (0.019,),
            "BAGEL": (0.373,),
            "HiDream-I1-Full": (0.543,),
            "FLUX.1 dev": (0.607,),
            "FLUX.2-Klein": (0.864,),
            "Z-Image-Turbo": (0.917,),
            "Z-Image": (0.935,),
            "Qwen-Image": (0.943,),
        },
    ),
    ("cvtg", "en"): (
        _CVTG,
        {
            "Lens": (0.897, 0.881, 0.872, 0.827, 0.869, 0.951, 0.814),
            "Lens-Turbo": (0.893, 0.892, 0.894, 0.878, 0.889, 0.965, 0.815),
            "Seedream 3.0": (0.628, 0.596, 0.604, 0.561, 0.592, 0.854, 0.782),
            "Seedream 4.0": (0.890, 0.915, 0.899, 0.887, 0.892, 0.951, 0.785),
            "GPT Image 1 High": (0.878, 0.866, 0.873, 0.822, 0.857, 0.948, 0.798),
            "SD3.5 Large": (0.729, 0.683, 0.657, 0.594, 0.655, 0.847, 0.780),
            "FLUX.1 dev": (0.609, 0.553, 0.466, 0.432, 0.496, 0.688, 0.740),
            "Z-Image-Turbo": (0.887, 0.866, 0.863, 0.835, 0.859, 0.928, 0.805),
            "Z-Image": (0.901, 0.872, 0.865, 0.851, 0.867, 0.937, 0.797),
            "Qwen-Image": (0.837, 0.836, 0.831, 0.816, 0.829, 0.930, 0.806),
            "Hunyuan-Image-3.0": (0.830, 0.764, 0.738, 0.728, 0.765, 0.877, 0.812),
            "LongCat-Image": (0.913, 0.874, 0.856, 0.831, 0.866, 0.936, 0.786),
        },
    ),
}
_WITHOUT_REWRITER: dict[tuple[Benchmark, Language], dict[str, float]] = {
    ("geneval", "en"): {"overall": 0.843},
    ("oneig", "en"): {"overall": 0.532},
    ("longtext", "en"): {"text": 0.893},
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


def paper_table(benchmark: Benchmark, language: Language = "en") -> str:
    """The same as a Markdown table, as it stands in ``docs/evaluate.md``.

    Example:
        >>> print(paper_table("longtext")[:39])
        | model | text |
        | --- | --- |
        | Lens |
    """
    rows = paper_rows(benchmark, language)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    body = [line([name, *(f"{row[c]:.3f}" if c in row else "-" for c in columns)]) for name, row in rows.items()]
    return "\n".join([line(["model", *columns]), line("---" for _ in range(len(columns) + 1)), *body])
