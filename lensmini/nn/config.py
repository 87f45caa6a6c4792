"""The transformer's configuration, with the released checkpoint's field names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["LensConfig"]

_IGNORED = ("_class_name", "_diffusers_version", "_name_or_path")
_FIXED = {"gate_mlp": True, "rms_norm": True, "multi_layer_encoder_feature": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class LensConfig:
    """Sizes of a :class:`LensTransformer`; the defaults are the released 4.10B-parameter model's.

    Raises:
        ValueError: if sizes contradict each other; the message names the fields.

    Example:
        >>> LensConfig(num_layers=2).inner_dim
        1536
    """

    num_layers: int = 48
    """Double-stream blocks."""
    num_attention_heads: int = 24
    """Attention heads per block."""
    attention_head_dim: int = 64
    """Width of one head."""
    axes_dims_rope: tuple[int, int, int] = (8, 28, 28)
    """Channels of a head rotated by frame, row and column; they sum to the head width."""
    in_channels: int = 128
    """Channels of one latent token: autoencoder channels times the latent patch."""
    out_channels: int = 32
    """Autoencoder channels; the output has ``patch_size^2 * out_channels`` channels per token."""
    patch_size: int = 2
    """Side of the latent patch. It only sets the output width: the caller patchifies."""
    enc_hidden_dim: int = 2880
    """Width of each text feature layer."""
    selected_layer_index: tuple[int, ...] = (5, 11, 17, 23)
    """Zero-based language-model layers, in the order in which their features are joined."""

    def __post_init__(self) -> None:
        for name in ("axes_dims_rope", "selected_layer_index"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            low = 0 if field.name == "selected_layer_index" else 1
            if not values or any(not isinstance(v, int) or isinstance(v, bool) or v < low for v in values):
                raise ValueError(f"{field.name}: expected integers of at least {low}, got {value!r}")
        if len(self.axes_dims_rope) != 3 or any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope: expected three even widths, got {self.axes_dims_rope}")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope: expected widths that sum to attention_head_dim = {self.attention_head_dim}, "
                f"got {self.axes_dims_rope}"
            )

    @property
    def inner_dim(self) -> int:
        """Model width: heads times head width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the feed-forward layers, ``floor(8 / 3 * inner_dim)``."""
        return 8 * self.inner_dim // 3

    @property
    def num_text_layers(self) -> int:
        """Text feature layers that the model takes."""
        return len(self.selected_layer_index)

    @property
    def output_dim(self) -> int:
        """Channels of the predicted velocity per token."""
        return self.patch_size**2 * self.out_channels

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LensConfig":
        """Read a released ``config.json``.

        Args:
            values: its content. ``_class_name`` and ``_diffusers_version`` are ignored.

        Returns:
            The configuration.

        Raises:
            ValueError: for unknown names, for settings no released model uses, and if ``inner_dim`` is not heads times
                head width.

        Example:
            >>> LensConfig.from_dict({"_class_name": "LensTransformer2DModel", "num_layers": 3}).num_layers
            3
        """
        settings = {name: value for name, value in values.items() if name not in _IGNORED}
        for name, supported in _FIXED.items():
            if settings.pop(name, supported) is not supported:
                raise ValueError(
                    f"{name}: only {supported} is supported (no released checkpoint differs), got {values[name]!r}"
                )
        inner_dim = settings.pop("inner_dim", None)
        unknown = sorted(set(settings) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        config = cls(**settings)
        if inner_dim is not None and inner_dim != config.inner_dim:
            raise ValueError(
                f"inner_dim: expected num_attention_heads * attention_head_dim = {config.inner_dim}, got {inner_dim!r}"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that the published code reads.

        Example:
            >>> LensConfig.from_dict(LensConfig().to_dict()) == LensConfig()
            True
        """
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**values, "inner_dim": self.inner_dim, **_FIXED}
