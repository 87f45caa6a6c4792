"""Pictures a second through all pixel filters, against a plain version with Pillow and numpy.

``python -m benchmarks.filters`` (about 10 seconds).

Area, clarity, entropy and luminance of decoded pictures of 512^2 to 1024^2 pixels, of the same definitions and with the
same results to rounding. The peer is what one writes with Pillow and numpy, one line a score, on Pillow images; ours
takes uint8 tensors. One thread each, and ours with two as well. Goal: three times the peer, one thread.
"""

import argparse

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import interleaved, report
from lensmini.data.filters import pixel_scores

SIZES = ((512, 512), (768, 768), (512, 1024), (832, 640), (1024, 1024))


def make_pictures(num: int) -> list[torch.Tensor]:
    """Pictures with structure at several scales."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(num):
        height, width = SIZES[number % len(SIZES)]
        image = torch.zeros(1, 3, height, width)
        for cells in (4, 16, 64, 256):
            noise = torch.rand(1, 3, cells, cells, generator=generator)
            image += torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear") / 4
        found.append((image[0] * 255).to(torch.uint8))
    return found


def plain_scores(image: Image.Image) -> tuple[float, float, float, float]:
    """Area, clarity, entropy and luminance with Pillow and numpy."""
    gray = image.convert("L")
    scale = 256 / min(gray.size)
    small = np.asarray(gray.resize((round(gray.width * scale), round(gray.height * scale)), Image.Resampling.BILINEAR))
    g = small.astype(np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    counts = np.bincount(np.asarray(gray).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    luminance = np.asarray(image).max(axis=2).mean() / 255
    return float(image.width * image.height), float(laplacian.var()), float(entropy), float(luminance)


def main(num: int = 20, rounds: int = 7) -> None:
    """Check that all agree, and print the table and the result line."""
    tensors = make_pictures(num)
    images = [Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy()) for tensor in tensors]
    scores = pixel_scores(tensors)
    for index, image in enumerate(images):
        ours = [values[index].item() for values in scores.values()]
        if not np.allclose(ours, plain_scores(image), rtol=0.05, atol=0.02):
            raise RuntimeError(f"scores differ: {ours} and {plain_scores(image)}")

    def two_threads() -> None:
        torch.set_num_threads(2)
        pixel_scores(tensors)
        torch.set_num_threads(1)

    torch.set_num_threads(1)
    contestants = {
        "ours": lambda: pixel_scores(tensors),
        "ours, 2 threads": two_threads,
        "plain": lambda: [plain_scores(image) for image in images],
    }
    seconds = interleaved(contestants, rounds=rounds)
    rates = {who: num / time for who, time in seconds.items()}
    print("  ".join(f"{who} {rate:.0f}/s" for who, rate in rates.items()))
    ratio = rates["ours"] / rates["plain"]
    details = {"pictures_per_second": {who: round(rate) for who, rate in rates.items()}}
    report("filters", ratio=ratio, goal=3.0, better="higher", holds=ratio >= 3.0, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pixel filters against Pillow and numpy.")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    main(options.pictures, options.rounds)
