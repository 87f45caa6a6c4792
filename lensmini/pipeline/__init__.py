"""From prompts to pictures: the assembled call, and the pieces it is made of."""

from lensmini.pipeline.call import LensPipeline, LensPipelineOutput
from lensmini.pipeline.canvas import bucket_size, check_size, nearest_size, picture_sizes
from lensmini.pipeline.painting import draw_noise, paint_packed
from lensmini.pipeline.picture import read_metadata, save_png, to_picture
from lensmini.pipeline.prompt_cache import PromptCache, encoder_fingerprint
from lensmini.pipeline.prompt_features import encode_prompts

__all__ = [
    "LensPipeline",
    "LensPipelineOutput",
    "PromptCache",
    "bucket_size",
    "check_size",
    "draw_noise",
    "encode_prompts",
    "encoder_fingerprint",
    "nearest_size",
    "paint_packed",
    "picture_sizes",
    "read_metadata",
    "save_png",
    "to_picture",
]
