"""The Lens transformer and the pieces it is made of."""

from lensmini.nn.attention import packed_attention
from lensmini.nn.blocks import DualStreamBlock, JointAttention
from lensmini.nn.config import LensConfig
from lensmini.nn.embeddings import TimestepEmbedding, timestep_sinusoid
from lensmini.nn.fusion import MultiLayerTextFusion, fuse_text_layers
from lensmini.nn.mlp import SwiGLU, silu_gate
from lensmini.nn.modulation import gated_residual, modulated_norm
from lensmini.nn.norm import RMSNorm, rms_normalise
from lensmini.nn.rope import RotaryEmbedding3D, RotaryTable, apply_rotary
from lensmini.nn.transformer import LensTransformer

__all__ = [
    "DualStreamBlock",
    "JointAttention",
    "LensConfig",
    "LensTransformer",
    "MultiLayerTextFusion",
    "RMSNorm",
    "RotaryEmbedding3D",
    "RotaryTable",
    "SwiGLU",
    "TimestepEmbedding",
    "apply_rotary",
    "fuse_text_layers",
    "gated_residual",
    "modulated_norm",
    "packed_attention",
    "rms_normalise",
    "silu_gate",
    "timestep_sinusoid",
]
