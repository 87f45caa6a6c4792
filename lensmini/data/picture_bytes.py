"""What a picture file's bytes say before a decoder sees them: its format, its size, and whether it is whole."""

import re
import struct
import zlib

__all__ = ["PICTURE_CAUSES", "BadPicture", "check_bytes", "picture_format"]

PICTURE_CAUSES = (
    "empty file",
    "no picture",
    "unsupported format",
    "truncated",
    "corrupt",
    "too many pixels",
    "too elongated",
    "chunk bomb",
)
"""Why a picture cannot be read."""

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker inside entropy-coded data: neither a stuffed zero, nor a restart, nor a fill byte."""

_OTHERS = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "Photoshop"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x01\x00", "Windows icon"),
    (b"gimp xcf", "XCF"),
    (b"qoif", "QOI"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance"),
    (b"SIMPLE  =", "FITS"),
)


class BadPicture(ValueError):
    """A picture that cannot be used.

    Args:
        cause: one of ``PICTURE_CAUSES``.
        detail: the decoder's words or the offending numbers.

    Example:
        >>> BadPicture("truncated", "no end marker").cause
        'truncated'
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        if cause not in PICTURE_CAUSES:
            raise ValueError(f"cause: expected one of {PICTURE_CAUSES}, got {cause!r}")
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


def picture_format(data: bytes) -> str:
    """The format of a picture, told by its first bytes.

    Args:
        data: the file's content, or at least its first 64 bytes.

    Returns:
        "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF" or "PPM".

    Raises:
        BadPicture: "empty file", "unsupported format" for other picture formats, "no picture" for anything else.

    Example:
        >>> picture_format(bytes.fromhex("ffd8ffe0"))
        'JPEG'
    """
    if not data:
        raise BadPicture("empty file")
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM" and len(data) >= 18 and 12 <= int.from_bytes(data[14:18], "little") <= 256:
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data[4:8] == b"ftyp":
        length = min(max(int.from_bytes(data[:4], "big"), 16), 64)
        if any(brand in data[8:length] for brand in (b"avif", b"avis")):
            return "AVIF"
        raise BadPicture("unsupported format", f"brand {data[8:12]!r}")
    if re.match(rb"P[1-6][ \t\r\n#]", data):
        return "PPM"
    for start, name in _OTHERS:
        if data.startswith(start):
            raise BadPicture("unsupported format", name)
    if b"<svg" in data[:1024].lower():
        raise BadPicture("unsupported format", "SVG")
    raise BadPicture("no picture", f"starts with {data[:8]!r}")


def check_bytes(data: bytes, kind: str) -> tuple[int, int] | None:
    """Check that a JPEG, PNG or WebP is whole, and read the size where the bytes tell it before decoding.

    Args:
        data: the file's content.
        kind: what ``picture_format`` says.

    Returns:
        (width, height) in pixels as stored, None where the decoder's own header reading is as cheap.

    Raises:
        BadPicture: "truncated" or "corrupt".

    Example:
        >>> check_bytes(b"GIF89a" + bytes([2, 0, 1, 0, 0, 0, 0]), "GIF")
        (2, 1)
    """
    if kind == "JPEG":
        return _check_jpeg(data)
    if kind == "PNG":
        return _check_png(data)
    if kind == "WEBP":
        return _check_webp(data)
    if kind == "GIF":
        if len(data) < 13:
            raise BadPicture("truncated", "the header is cut")
        return struct.unpack_from("<HH", data, 6)
    return None


def _check_jpeg(data: bytes) -> tuple[int, int] | None:
    """Walk the segments up to the end marker of the first picture; what follows is nobody's."""
    at, size = 2, None
    while True:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes may stand before a marker
            at += 1
        if at + 2 > len(data):
            raise BadPicture("truncated", "no end marker")
        if data[at] != 0xFF:
            # Decoders look for the next marker after stray bytes between segments.
            found = _JPEG_MARKER.search(data, at)
            at = found.start() if found else len(data)
            continue
        marker = data[at + 1]
        if marker == 0xD9:
            return size
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        if at + 4 > len(data):
            raise BadPicture("truncated", "no end marker")
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            raise BadPicture("corrupt", f"a segment of length {length}")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 9 <= len(data) and size is None:
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        at += 2 + length
        if marker == 0xDA:
            found = _JPEG_MARKER.search(data, at)
            at = found.start() if found else len(data)


def _check_png(data: bytes) -> tuple[int, int]:
    """Verify every chunk's checksum up to the end chunk."""
    view, at, size = memoryview(data), 8, None
    while True:
        if at + 12 > len(data):
            raise BadPicture("truncated", "no end chunk")
        length = int.from_bytes(view[at : at + 4], "big")
        name, end = bytes(view[at + 4 : at + 8]), at + 8 + length
        if not name.isalpha() or length > 2**31 - 1:
            raise BadPicture("corrupt", f"a chunk named {name!r} of length {length}")
        if end + 4 > len(data):
            raise BadPicture("truncated", f"the chunk {name.decode()} is cut")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise BadPicture("corrupt", f"the chunk {name.decode()} has a wrong checksum")
        if size is None:
            if name != b"IHDR" or length != 13:
                raise BadPicture("corrupt", f"starts with the chunk {name.decode()} of length {length}")
            size = struct.unpack_from(">II", data, at + 8)
        if name == b"IEND":
            return size
        at = end + 4


def _check_webp(data: bytes) -> tuple[int, int] | None:
    """The RIFF length must be there; the canvas is read here since the decoder allocates it when it opens."""
    if len(data) < 30 or 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise BadPicture("truncated", f"{len(data)} bytes of {8 + int.from_bytes(data[4:8], 'little')}")
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise BadPicture("corrupt", f"starts with the chunk {chunk!r}")
