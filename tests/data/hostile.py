"""Folders and tars of good and hostile pictures, with what must become of each file."""

import io
import json
import os
import struct
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


@dataclass
class Expected:
    """By file name: "kept", a cause, or "either"; the pixels of kept ones and how far they may be off; caption problems."""

    fates: dict[str, str] = field(default_factory=dict)
    pixels: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)


def smooth(rng: np.random.Generator) -> np.ndarray:
    """uint8 [h, w, 3], a random low-frequency picture with different sides."""
    height, width = int(rng.integers(17, 40)), int(rng.integers(41, 64))
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(6, 15) + y / rng.uniform(6, 15) + rng.uniform(0, 6)) for _ in range(3)]
    return np.rint(127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + rest


def text_bomb() -> bytes:
    """A good little PNG with text that inflates to 80 MB."""
    data = encode(np.zeros((4, 4, 3), np.uint8), "PNG")
    return data[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9)) + data[33:]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(3):
        changed[int(rng.integers(20, len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def good_picture(kind: int, rng: np.random.Generator) -> tuple[str, bytes, np.ndarray, int]:
    """Suffix, bytes, true upright pixels [h, w, 3], tolerance."""
    pixels = smooth(rng)
    grey = pixels[..., 0]
    three = np.repeat(grey[..., None], 3, -1)
    image = Image.fromarray(pixels)
    if kind < 8:  # all orientations; Pillow's own upright picture is the truth
        exif = Image.Exif()
        exif[0x0112] = kind + 1
        form = ("PNG", "WEBP", "TIFF")[int(rng.integers(3))]
        options = {"lossless": True} if form == "WEBP" else {}
        turns = [None, 0, 3, 1, 5, 4, 6, 2]  # Pillow's transpositions, in EXIF's order
        upright = pixels if kind == 0 else np.asarray(image.transpose(Image.Transpose(turns[kind])))
        return form.lower(), encode(image, form, exif=exif, **options), upright, 0
    if kind == 8:
        return "jpg", encode(image, "JPEG", quality=97, subsampling=0), pixels, 12
    if kind == 9:
        return "bmp", encode(image, "BMP"), pixels, 0
    if kind == 10:
        return "ppm", encode(image, "PPM"), pixels, 0
    if kind == 11:
        return "gif", encode(Image.fromarray(grey), "GIF"), three, 0
    if kind == 12:
        return "png", encode((grey.astype(np.uint16) * 257), "PNG"), three, 0
    if kind == 13:
        return "jpg", encode(Image.merge("CMYK", [*Image.fromarray(255 - pixels).split(), Image.new("L", image.size)]),
                             "JPEG", quality=97, subsampling=0), pixels, 14  # fmt: skip
    if kind == 14:
        palette = image.quantize(32)
        return "png", encode(palette, "PNG"), np.asarray(palette.convert("RGB")), 0
    if kind == 15:
        opaque = np.where(grey > 127, 255, 0).astype(np.uint8)
        whitened = np.where(opaque[..., None] == 255, pixels, 255).astype(np.uint8)
        return "png", encode(np.dstack([pixels, opaque]), "PNG"), whitened, 0
    if kind == 16:
        frames = [Image.fromarray(255 - grey)]
        return "gif", encode(Image.fromarray(grey), "GIF", save_all=True, append_images=frames), three, 0
    if kind == 17:
        bits = Image.fromarray(grey).convert("1")
        return "tif", encode(bits, "TIFF"), np.asarray(bits.convert("RGB")), 0
    if kind == 18:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        return "png", encode(image, "PNG", icc_profile=profile), pixels, 0
    if kind == 19:
        return "png", encode(image, "PNG", icc_profile=b"not a profile at all"), pixels, 0
    if kind == 20:
        return "txt.jpg", encode(image, "PNG"), pixels, 0  # a wrong extension
    return "tif", encode(image, "TIFF", compression="tiff_lzw"), pixels, 0


NUM_GOOD_KINDS = 22


def bad_picture(kind: int, rng: np.random.Generator) -> tuple[str, bytes, str]:
    """Suffix, bytes, fate."""
    pixels = smooth(rng)
    if kind < 3:
        form = ("JPEG", "PNG", "WEBP")[kind]
        data = encode(pixels, form)
        return form.lower(), data[: int(rng.integers(40, len(data) - 13))], "truncated"
    if kind < 6:
        form = ("JPEG", "PNG", "WEBP")[kind - 3]
        return form.lower(), flipped(encode(pixels, form), rng), "either"
    plain = [
        ("png", b"", "empty file"),
        ("png", claimed_png(60_000, 60_000), "too many pixels"),
        ("gif", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0), "too many pixels"),
        ("jpg", b"this is only text", "no picture"),
        ("png", b"<!DOCTYPE html><html></html>", "no picture"),
        ("png", b"PK\x03\x04" + bytes(60), "no picture"),
        ("jpg", b"%PDF-1.7 " + bytes(60), "unsupported format"),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run\n", "unsupported format"),
    ]
    return plain[kind - 6]


NUM_BAD_KINDS = 14


def write_hostile_folder(out: Path, *, seed: int, num: int) -> Expected:
    """Write about ``num`` files, half of them good, and every hostile thing that only a file system can hold."""
    rng, expected = np.random.default_rng(seed), Expected()
    out.mkdir(parents=True, exist_ok=True)
    captions = [
        (b"\xff\xfe caf\xe9", "not UTF-8"),
        (b"a\0b", "NUL character"),
        (b"x" * 70_000, "too long"),
        (b" \n\t", "empty"),
        ("\ufeffa  red\ncircle".encode(), ""),
    ]
    for number in range(num):
        name = f"{number % 7}/{number:05d}"
        (out / str(number % 7)).mkdir(exist_ok=True)
        if number % 2 == 0:
            suffix, data, pixels, tolerance = good_picture(number // 2 % NUM_GOOD_KINDS, rng)
            file = f"{name}.{suffix}"
            expected.fates[file], expected.pixels[file] = "kept", (pixels, tolerance)
            if number % 6 == 0:
                text, problem = captions[number // 6 % len(captions)]
                (out / f"{file}.TXT").write_bytes(text)
                expected.captions[file] = problem
        else:
            suffix, data, fate = bad_picture(number // 2 % NUM_BAD_KINDS, rng)
            file = f"{name}.{suffix}"
            expected.fates[file] = fate
        (out / file).write_bytes(data)
    once = {
        "bomb_text.png": (text_bomb(), "chunk bomb"),
        "bomb_real.png": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "too many pixels"),
        "long.png": (encode(np.zeros((1, 10_000, 3), np.uint8), "PNG"), "kept"),
        "alone.txt": (b"a caption without a picture", "no picture for this caption"),
    }
    for file, (data, fate) in once.items():
        (out / file).write_bytes(data)
        expected.fates[file] = fate
    expected.pixels["long.png"] = (np.zeros((1, 10_000, 3), np.uint8), 0)
    os.mkfifo(out / "pipe.png")
    (out / "folder.png").mkdir()
    (out / "broken.png").symlink_to("nowhere.png")
    (out / "outside.png").symlink_to("/etc/hostname")
    (out / ".hidden.png").write_bytes(b"")
    expected.fates |= {"pipe.png": "not a regular file", "folder.png": "not a regular file"}
    expected.fates |= {"broken.png": "broken link", "outside.png": "link out of the folder"}
    rows = [{"file_name": "long.png", "text": "a line", "licence": "CC0"}, {"file_name": "gone.png", "text": "x"}]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    expected.fates |= {"metadata.jsonl#2": "no picture for this caption", "metadata.jsonl#3": "bad metadata row"}
    expected.captions["long.png"] = ""
    return expected


def write_hostile_tar(path: Path, *, seed: int, cut: bool = False) -> Expected:
    """Write a tar with good samples, double names, unsafe names, links and a device; perhaps cut in its last member."""
    rng, expected, name = np.random.default_rng(seed), Expected(), path.name
    with tarfile.open(path, "w") as tar:

        def add(member: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(member)
            info.size, info.type, info.linkname = len(data), kind, "a/0.png" if kind != tarfile.REGTYPE else ""
            tar.addfile(info, io.BytesIO(data))

        for number in range(5):
            pixels = smooth(rng)
            add(f"a/{number}.png", encode(pixels, "PNG"))
            add(f"a/{number}.txt", b"number %d" % number)
            expected.fates[f"{name}/a/{number}"], expected.pixels[f"{name}/a/{number}"] = "kept", (pixels, 0)
        add("a/4.json", b'{"licence": "CC0"}')
        add("a/4.png", encode(smooth(rng), "PNG"))
        expected.fates[f"{name}/a/4.png"] = "duplicate key"
        for member, kind, cause in (
            ("../up.png", tarfile.REGTYPE, "unsafe name"),
            ("/etc/root.png", tarfile.REGTYPE, "unsafe name"),
            ("soft.png", tarfile.SYMTYPE, "link in a tar"),
            ("hard.png", tarfile.LNKTYPE, "link in a tar"),
            ("device.png", tarfile.CHRTYPE, "special member"),
            ("pipe.png", tarfile.FIFOTYPE, "special member"),
        ):
            add(member, b"" if kind != tarfile.REGTYPE else b"x", kind)
            expected.fates[f"{name}/{member}"] = cause
        add("b.txt", b"no picture")
        expected.fates[f"{name}/b"] = "no picture for this caption"
        add("big.png", bytes(3_000_000))
        expected.fates[f"{name}/big"] = "too large"
        add("last.png", encode(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), "PNG"))
        end = tar.offset
    if cut:
        with open(path, "r+b") as file:
            file.truncate(end - 4000)
        expected.fates[f"{name}/last"] = "no picture for this caption"
        expected.fates[name] = "truncated tar"
    else:
        expected.fates[f"{name}/last"] = "kept"
        # The same key once more, not beside the first: appended behind what is there.
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("a/0.jpg")
            data = encode(smooth(rng), "JPEG")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return expected


__all__ = ["Expected", "write_hostile_folder", "write_hostile_tar"]
