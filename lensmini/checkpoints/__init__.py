"""Weights in and out: the transformer, low-rank adapters and the text encoder, in the ecosystem's formats."""

from lensmini.checkpoints.export import export_diffusers, save_single_file, save_transformer
from lensmini.checkpoints.files import CheckpointError
from lensmini.checkpoints.lora import (
    LoRA,
    LoRALayer,
    MergedLoRA,
    apply_lora,
    load_lora,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from lensmini.checkpoints.mxfp4 import unpack_mxfp4
from lensmini.checkpoints.text_loading import load_text_encoder
from lensmini.checkpoints.transformer import load_transformer

__all__ = [
    "CheckpointError",
    "LoRA",
    "LoRALayer",
    "MergedLoRA",
    "apply_lora",
    "export_diffusers",
    "load_lora",
    "load_text_encoder",
    "load_transformer",
    "merge_lora",
    "save_lora",
    "save_single_file",
    "save_transformer",
    "unmerge_lora",
    "unpack_mxfp4",
]
