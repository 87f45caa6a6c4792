"""The Lens transformer and the pieces it is made of."""

from lensmini.nn.attention import packed_attention
from lensmini.nn.autoencoder import Autoencoder, from_uint8, load_autoencoder, to_uint8
from lensmini.nn.blocks import DualStreamBlock, JointAttention
from lensmini.nn.config import LensConfig
from lensmini.nn.discriminator import DiscriminatorHead
from lensmini.nn.embeddings import TimestepEmbedding, timestep_sinusoid
from lensmini.nn.fusion import MultiLayerTextFusion, fuse_text_layers
from lensmini.nn.latents import LatentNormalizer, patchify, unpatchify
from lensmini.nn.mlp import SwiGLU, silu_gate
from lensmini.nn.modulation import gated_residual, modulated_norm
from lensmini.nn.norm import RMSNorm, rms_normalise
from lensmini.nn.rope import RotaryEmbedding3D, RotaryTable, apply_rotary
from lensmini.nn.strips import check_decodes_in_strips, decode_in_strips
from lensmini.nn.text_encoder import TextEncoder, pad_text
from lensmini.nn.transformer import Captured, LensTransformer, Modulation

__all__ = [
    "Autoencoder",
    "Captured",
    "DiscriminatorHead",
    "DualStreamBlock",
    "JointAttention",
    "LatentNormalizer",
    "LensConfig",
    "LensTransformer",
    "Modulation",
    "MultiLayerTextFusion",
    "RMSNorm",
    "RotaryEmbedding3D",
    "RotaryTable",
    "SwiGLU",
    "TextEncoder",
    "TimestepEmbedding",
    "apply_rotary",
    "check_decodes_in_strips",
    "decode_in_strips",
    "from_uint8",
    "fuse_text_layers",
    "gated_residual",
    "load_autoencoder",
    "modulated_norm",
    "packed_attention",
    "pad_text",
    "patchify",
    "rms_normalise",
    "silu_gate",
    "timestep_sinusoid",
    "to_uint8",
    "unpatchify",
]
