"""The nine filters of the paper as scores; thresholds are the caller's."""

from lensmini.data.filters.duplicates import Duplicates, find_duplicates
from lensmini.data.filters.models import (
    ModelFilter,
    convert_head,
    load_aesthetic,
    load_embedder,
    load_nsfw,
    load_watermark,
)
from lensmini.data.filters.pixels import filter_area, filter_clarity, filter_entropy, filter_luminance, pixel_scores
from lensmini.data.filters.thresholds import FILTER_CAUSES, Thresholds, judge

__all__ = [
    "FILTER_CAUSES",
    "Duplicates",
    "ModelFilter",
    "Thresholds",
    "convert_head",
    "filter_area",
    "filter_clarity",
    "filter_entropy",
    "filter_luminance",
    "find_duplicates",
    "judge",
    "load_aesthetic",
    "load_embedder",
    "load_nsfw",
    "load_watermark",
    "pixel_scores",
]
