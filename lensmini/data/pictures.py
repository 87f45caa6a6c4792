"""Pictures from bytes nobody vouches for: an upright sRGB tensor, or the cause why not.

h and w are the picture's height and width in pixels after turning it upright.

The format is told by the content, the size is read before anything is decoded, and only Pillow's own decoders run.
What a decoder repairs in silence stays unseen: many flipped bits in a JPEG (or a cut JPEG that somebody closed with an
end marker) decode to a wrong picture without an error. A PNG's checksums are all verified, so flips there are found.
"""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lensmini.data.picture_bytes import PICTURE_CAUSES, BadPicture, check_bytes, picture_format
from lensmini.shapes import check_shape

__all__ = ["PICTURE_CAUSES", "PICTURE_NOTES", "BadPicture", "Picture", "encode_picture", "read_picture"]

PICTURE_NOTES = (
    "animated",
    "turned",
    "transparent",
    "palette",
    "one bit",
    "sixteen bit",
    "cmyk",
    "colours converted",
    "profile ignored",
    "exif ignored",
)
"""What may have happened to a picture that was read."""

_ORIENTATION = 0x0112
_TURNS = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True)} | {
    8: (1, False)
}
"""EXIF orientation to (quarter turns anticlockwise, mirrored left-right afterwards)."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that could be read.

    Args:
        image: uint8 ``[3, h, w]``, upright, sRGB, over white where it was transparent.
        format: "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF" or "PPM", told from the content.
        notes: some of ``PICTURE_NOTES``.
        plain: the bytes can be stored as they are: 8-bit grey or RGB in JPEG, PNG or WebP, upright, opaque, one frame,
            sRGB.

    Example:
        >>> picture = read_picture(encode_picture(torch.zeros(3, 2, 4, dtype=torch.uint8), "png"))
        >>> list(picture.image.shape), picture.format, picture.plain
        ([3, 2, 4], 'PNG', True)
    """

    image: Tensor
    format: str
    notes: frozenset[str]
    plain: bool


def read_picture(data: bytes, *, max_pixels: int = 178_956_970, max_ratio: float | None = None) -> Picture:
    """Decode a picture to upright sRGB over white, within bounded memory.

    Sixteen-bit grey ``v`` becomes ``round(v / 257)``; an opacity ``a`` in [0, 1] gives ``a * colour + (1 - a) * 255``.
    Of an animation the first frame is taken. A colour profile that is not sRGB is applied, a broken one is ignored.

    Args:
        data: the file's content.
        max_pixels: largest height times width that is decoded; decoding takes about 16 bytes a pixel.
        max_ratio: longest side over shortest that is accepted, at least 1; None accepts all.

    Raises:
        BadPicture: with a ``cause`` of ``PICTURE_CAUSES``, whatever a decoder raises. Running out of memory is not
            the picture's fault and stays a ``MemoryError``.
        ValueError: if ``max_pixels`` or ``max_ratio`` is out of range.
        RuntimeError: if somebody set ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES``, with which truncation goes unseen.

    Example:
        >>> read_picture(b"GIF89a")
        Traceback (most recent call last):
        lensmini.data.picture_bytes.BadPicture: truncated: the header is cut
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels: expected at least 1, got {max_pixels}")
    if max_ratio is not None and not max_ratio >= 1:
        raise ValueError(f"max_ratio: expected None or at least 1, got {max_ratio}")
    ImageFile = _pillow("ImageFile")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated pictures would pass for whole ones")
    kind = picture_format(data)
    size = check_bytes(data, kind)
    if size is not None:
        _check_size(size, max_pixels, max_ratio)
    try:
        with _open(data, kind) as image:
            _check_size(image.size, max_pixels, max_ratio)
            image.load()
            _check_size(image.size, max_pixels, max_ratio)
            return _finish(image, kind, sixteen=kind == "PNG" and data[24] == 16)
    except (BadPicture, MemoryError):
        raise
    except Exception as error:  # decoders raise anything at all on hostile bytes
        raise _explain(error) from error


def encode_picture(image: Tensor, format: Literal["png", "jpeg", "webp"], *, quality: int = 95) -> bytes:
    """Encode a picture; the same picture gives the same bytes.

    Args:
        image: uint8 ``[3, h, w]``, sRGB.
        format: "png" is lossless, "jpeg" keeps full chroma resolution, "webp" is lossy.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        ValueError: if ``image``, ``format`` or ``quality`` is not so, or the format cannot hold that size.

    Example:
        >>> encode_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), "jpeg")[:3].hex()
        'ffd8ff'
    """
    sizes = check_shape("image", image, "3 h w")
    if image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(f"image: expected uint8 with at least one pixel, got {image.dtype} {list(image.shape)}")
    if format not in ("png", "jpeg", "webp") or not 1 <= quality <= 100:
        raise ValueError(f'format, quality: expected "png", "jpeg" or "webp" and 1 to 100, got {format!r}, {quality}')
    longest = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}[format]
    if max(sizes["h"], sizes["w"]) > longest:
        raise ValueError(f"image: {format} holds at most {longest} pixels a side, got {sizes['h']} x {sizes['w']}")
    options: dict[str, Any] = {
        "png": {"compress_level": 6},
        "jpeg": {"quality": quality, "subsampling": 0},
        "webp": {"quality": quality, "method": 4},
    }[format]
    out = BytesIO()
    pixels = image.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    _pillow("Image").fromarray(pixels).save(out, format.upper(), **options)
    return out.getvalue()


def _pillow(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"PIL.{module}")
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install pillow") from error


def _open(data: bytes, kind: str) -> Any:
    """The decoder's own class: ``Image.open`` would try others, and warn or refuse by a process-wide limit."""
    if kind == "AVIF" and not _pillow("features").check("avif"):
        raise BadPicture("unsupported format", "this Pillow was built without AVIF")
    module, name = {
        "JPEG": ("JpegImagePlugin", "JpegImageFile"),
        "PNG": ("PngImagePlugin", "PngImageFile"),
        "WEBP": ("WebPImagePlugin", "WebPImageFile"),
        "GIF": ("GifImagePlugin", "GifImageFile"),
        "BMP": ("BmpImagePlugin", "BmpImageFile"),
        "TIFF": ("TiffImagePlugin", "TiffImageFile"),
        "AVIF": ("AvifImagePlugin", "AvifImageFile"),
        "PPM": ("PpmImagePlugin", "PpmImageFile"),
    }[kind]
    return getattr(_pillow(module), name)(BytesIO(data))


def _check_size(size: tuple[int, int], max_pixels: int, max_ratio: float | None) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadPicture("corrupt", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise BadPicture("too many pixels", f"{width} x {height}, at most {max_pixels}")
    if max_ratio is not None and max(size) > max_ratio * min(size):
        raise BadPicture("too elongated", f"{width} x {height}, at most {max_ratio}:1")


def _explain(error: Exception) -> BadPicture:
    text = f"{type(error).__name__}: {error}"
    words = text.lower()
    if "DecompressionBomb" in text:
        return BadPicture("too many pixels", text)
    if "text_chunk" in words or "text_memory" in words or "decompressed data too large" in words:
        return BadPicture("chunk bomb", text)
    if isinstance(error, EOFError) or any(
        w in words for w in ("truncated", "not enough", "end of file", "reached eof")
    ):
        return BadPicture("truncated", text)
    if isinstance(error, NotImplementedError) or "unsupported" in words or "unknown" in words:
        return BadPicture("unsupported format", text)
    return BadPicture("corrupt", text)


def _finish(image: Any, kind: str, *, sixteen: bool) -> Picture:
    """A loaded Pillow image to the tensor."""
    notes: set[str] = {"sixteen bit"} if sixteen or image.mode.startswith(("I", "F")) else set()
    notes |= {"palette"} if image.mode in ("P", "PA") else set()
    notes |= {"one bit"} if image.mode == "1" else set()
    notes |= {"cmyk"} if image.mode == "CMYK" else set()
    plain_mode = image.mode in ("L", "RGB")
    orientation = 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # the tags are broken, the pixels are not
        notes.add("exif ignored")
    try:
        animated = bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception:  # there is a second frame, and it is broken
        animated = True
    notes |= {"animated"} if animated else set()
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _pillow("Image").fromarray(_eight_bits(np.asarray(image)))
    opacity = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opacity = np.asarray(image.getchannel("A"))
        image = image.convert("RGB")
    image = _to_srgb(image, profile, notes)
    pixels = np.array(image, np.uint8)  # a copy, since torch wants to own writable memory
    if opacity is not None and int(opacity.min()) < 255:
        notes.add("transparent")
        pixels = _over_white(pixels, opacity)
    quarters, mirrored = _TURNS.get(orientation if isinstance(orientation, int) else 1, (0, False))
    if quarters or mirrored:
        notes.add("turned")
        pixels = np.rot90(pixels, quarters)
        pixels = pixels[:, ::-1] if mirrored else pixels
    changed = {"animated", "turned", "sixteen bit", "colours converted", "profile ignored"}
    plain = kind in ("JPEG", "PNG", "WEBP") and plain_mode and opacity is None and not notes & changed
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return Picture(tensor, kind, frozenset(notes), plain)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits to 8: integers count from 0 to 65,535; floats to 1, to 255 or to 65,535."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadPicture("corrupt", "samples that are not finite")
    if low < 0 or high > 65_535:
        raise BadPicture("unsupported format", f"samples from {low:g} to {high:g}, expected 0 to 65535")
    full = 65_535.0
    if values.dtype.kind == "f" and high <= 255:
        full = 1.0 if high <= 1 else 255.0
    return np.rint(values.astype(np.float32) * (255.0 / full)).astype(np.uint8)


def _over_white(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    opaque = opacity[:, :, None].astype(np.uint16)
    # 255 * 255 fits 16 bits, and so does half of the divisor on top of it.
    return ((pixels * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)


def _to_srgb(image: Any, profile: bytes | None, notes: set[str]) -> Any:
    """RGB by the embedded profile if it is a usable one of the right kind, otherwise as Pillow converts."""
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGB")
    if profile and image.mode in ("L", "RGB", "CMYK"):
        space = _profile_space(profile)
        if image.mode == "L" and space == "RGB":
            image = image.convert("RGB")
        if space != image.mode:
            notes.add("profile ignored")
        elif not _is_srgb(profile, image.mode):
            notes.add("colours converted")
            return _convert(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert(image: Any, profile: bytes) -> Any:
    cms = _pillow("ImageCms")
    return cms.profileToProfile(image, BytesIO(profile), cms.createProfile("sRGB"), outputMode="RGB")


@lru_cache(maxsize=64)
def _profile_space(profile: bytes) -> str | None:
    """Mode of the pictures that a profile is for, None if it cannot be used."""
    try:
        opened = _pillow("ImageCms").ImageCmsProfile(BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip())
        if mode is not None:
            _convert(_pillow("Image").new(mode, (1, 1)), profile)
        return mode
    except MemoryError:
        raise
    except Exception:  # a profile is optional, so whatever is wrong with it costs only its colours
        return None


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes, mode: str) -> bool:
    """Whether a profile moves no colour of a coarse grid by more than two levels."""
    if mode == "CMYK":
        return False
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    axes = np.meshgrid(levels, levels, levels) if mode == "RGB" else [levels[None]] * 3
    colours = np.stack(axes, -1).reshape(1, -1, 3)
    given = _pillow("Image").fromarray(np.ascontiguousarray(colours if mode == "RGB" else colours[..., 0]))
    moved = np.asarray(_convert(given, profile)).astype(np.int16) - colours
    return bool(np.abs(moved).max() <= 2)
