"""Samples a second in random order from our shards, against webdataset and against one safetensors file a sample.

``python -m benchmarks.shards`` (about 15 seconds; ``--samples`` and ``--rounds`` for less).

20,000 samples, a JPEG of about 30 KB and a caption each, in the page cache. All hand out the undecoded members, except
in the cells named "decoded", where all decode the JPEG with Pillow. Ours and safetensors read in the order of a
:class:`BatchPlan`, a different stretch every round. webdataset reads the same tars the way it is meant to: shards in a
shuffled order, one after another, through a shuffle buffer of 1,000, which is the weaker shuffle. The peers check
nothing, so "ours" does not either (``check=False``); "ours, checked" compares a CRC-32 of every sample, the default. One
process, no workers. Goal: twice the better of the two peers, undecoded, like against like.
"""

import argparse
import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import interleaved, report
from lensmini.data import BatchPlan, Bucket
from lensmini.data.shard_writer import ShardSample, write_shards
from lensmini.data.shards import ShardReader

BUCKETS = (Bucket(256, 256), Bucket(192, 320), Bucket(320, 192))
SIDE_NOISE = 24


def make_pictures(num: int = 48) -> list[tuple[int, bytes]]:
    """Bucket and JPEG of about 30 KB."""
    rng, found = np.random.default_rng(0), []
    for number in range(num):
        bucket = BUCKETS[number % 3]
        noise = rng.normal(128, SIDE_NOISE, (bucket.height, bucket.width, 3)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "jpeg", quality=85)
        found.append((number % 3, file.getvalue()))
    return found


def make_samples(num: int) -> Iterator[ShardSample]:
    """The data set."""
    pictures = make_pictures()
    for number in range(num):
        bucket, data = pictures[number % len(pictures)]
        caption = f"Sample {number}: " + "a picture of noise, " * 10
        size = BUCKETS[bucket]
        members = {"jpg": data, "txt": caption.encode()}
        yield ShardSample(f"{number:08d}", bucket, size.height, size.width, 40, members)


def write_files(num: int, folder: Path) -> None:
    """One safetensors file a sample, a hundred to a folder."""
    from safetensors.torch import save_file

    for number, sample in enumerate(make_samples(num)):
        path = file_of(folder, number)
        path.parent.mkdir(exist_ok=True)
        save_file({k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in sample.members.items()}, path)


def file_of(folder: Path, number: int) -> Path:
    """Where a sample's file is."""
    return folder / str(number // 100) / f"{number}.safetensors"


def consume(samples: Iterable[dict[str, bytes]], num: int, *, decode: bool) -> int:
    """Take so many samples and return their bytes."""
    total = 0
    for members in itertools.islice(samples, num):
        total += len(members["jpg"]) + len(members["txt"])
        if decode:
            with Image.open(io.BytesIO(members["jpg"])) as image:
                image.load()
    if not total:
        raise RuntimeError("no sample came")
    return total


def stretches(num: int) -> Callable[[], Iterator[int]]:
    """Each call goes on in the order of a plan over all samples."""
    # Sample numbers of the plan are rows of the manifest: both go bucket by bucket.
    plan = BatchPlan([(num + 2 - j) // 3 for j in range(3)], [256, 240, 240], num_slots=1, images_per_slot=8, seed=0)
    order = itertools.chain.from_iterable(plan.assign(k, k + 64)[0].tolist() for k in itertools.count(0, 64))
    return lambda: order


def contestants(folder: Path, num: int, take: int, *, decode: bool) -> dict[str, Callable[[], object]]:
    """What reads ``take`` samples a call."""
    from safetensors import safe_open
    from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]

    reader, checked = ShardReader(folder / "shards", check=False), ShardReader(folder / "shards")
    ours, ours_checked, theirs = stretches(num), stretches(num), stretches(num)
    urls = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    stream = iter(WebDataset(urls, shardshuffle=len(urls), seed=0).repeat().shuffle(1000, initial=1000))

    def read_file(number: int) -> dict[str, bytes]:
        with safe_open(file_of(folder / "files", number), "np") as file:
            return {name: file.get_tensor(name).tobytes() for name in ("jpg", "txt")}

    return {
        "ours": lambda: consume((reader[row].members for row in ours()), take, decode=decode),
        "ours, checked": lambda: consume((checked[row].members for row in ours_checked()), take, decode=decode),
        "webdataset": lambda: consume(stream, take, decode=decode),
        "safetensors": lambda: consume(map(read_file, theirs()), take, decode=decode),
    }


def main(num: int = 20_000, rounds: int = 7) -> None:
    """Write the data, warm the cache, and print the table and the result line."""
    cells: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_shards(make_samples(num), folder / "shards", BUCKETS, shard_bytes=2**26)
        (folder / "files").mkdir()
        write_files(num, folder / "files")
        for decode, take in ((False, max(num // 10, 1)), (True, max(num // 100, 1))):
            seconds = interleaved(contestants(folder, num, take, decode=decode), rounds=rounds)
            cells["decoded" if decode else "members"] = {who: take / time for who, time in seconds.items()}
    for kind, cell in cells.items():
        print(f"{kind:8s}", "  ".join(f"{who} {rate:9.0f}/s" for who, rate in cell.items()))
    over = {kind: {who: cell["ours"] / cell[who] for who in cell if who != "ours"} for kind, cell in cells.items()}
    ratio = min(over["members"][who] for who in ("webdataset", "safetensors"))
    details = {
        "samples_per_second": {kind: {who: round(rate) for who, rate in cell.items()} for kind, cell in cells.items()},
        "ratios": {kind: {who: round(value, 3) for who, value in cell.items()} for kind, cell in over.items()},
        "bytes_per_sample": round(files.num_bytes / num),
        "shards": len(files.shards),
    }
    report("shards", ratio=ratio, goal=2.0, better="higher", holds=ratio >= 2.0, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Random reads from shards against webdataset and files.")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.samples, options.rounds)
