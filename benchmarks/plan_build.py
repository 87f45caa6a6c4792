"""Time and memory to build the sample index from a Parquet manifest.

``python -m benchmarks.plan_build`` (100 million samples; takes about 6 GB of disk at its peak, an estimate).

The manifest is made first, by another process, and not timed: sizes of an assumed web mix (the ratios of cameras, phones
and screens, lognormal areas), lognormal captions, four sources, shards of 10,000 samples. It is still in the page cache
when this process builds the index, opens it and looks up one batch of 1,024 samples.

The claims: at most 60 s for 100 million to that batch (for other numbers in proportion), and at most 8 bytes of private
memory a sample. Private is anonymous resident memory (``RssAnon``: no file pages) over what the process had before the
build, the highest seen, looking every 5 ms; what lives for less can be missed. It is the memory of a chunk and hardly
grows, so a figure per sample means something for many samples only: both are printed.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import report
from lensmini.data.buckets import LENS_BUCKETS
from lensmini.data.index import SampleIndex

# Width over height: squares, 4:3, 3:2, 16:9 and 2:1 screens, 4:5 and 9:16 phones.
ASPECTS = np.array([1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 2, 4 / 5])
SHARES = np.array([0.2, 0.15, 0.1, 0.2, 0.1, 0.1, 0.05, 0.02, 0.08])
GROUP = 1_000_000


def make_manifest(path: Path, num_samples: int, seed: int = 0) -> None:
    """A synthetic manifest with all the columns that an index keeps but ``sample_id``, written in row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    names = pa.array(["art", "graphic", "photo", "web"])
    kinds = {"height": pa.int32(), "width": pa.int32(), "text_tokens": pa.int32()}
    kinds |= {"source": pa.dictionary(pa.int8(), pa.string()), "shard": pa.int32(), "offset": pa.int64()}
    with pq.ParquetWriter(path, pa.schema(kinds.items())) as writer:
        for start in range(0, num_samples, GROUP):
            num = min(GROUP, num_samples - start)
            area = np.exp(rng.normal(np.log(1.5e6), 0.8, num))
            aspect = rng.choice(ASPECTS, num, p=SHARES) * np.exp(rng.normal(0, 0.03, num))
            row = start + np.arange(num)
            columns = {
                "height": np.clip(np.sqrt(area / aspect), 16, 20_000),
                "width": np.clip(np.sqrt(area * aspect), 16, 20_000),
                "text_tokens": np.clip(np.exp(rng.normal(np.log(150), 0.5, num)), 1, 2_000),
                "source": pa.DictionaryArray.from_arrays(rng.integers(0, 4, num, np.int8), names),
                "shard": row // 10_000,
                "offset": row % 10_000 * 250_000,
            }
            arrays = [
                column if isinstance(column, pa.Array) else pa.array(column.astype(kinds[name].to_pandas_dtype()))
                for name, column in columns.items()
            ]
            writer.write_table(pa.table(dict(zip(columns, arrays, strict=True)), schema=writer.schema))


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


class PeakMemory:
    """Highest anonymous memory over that at the start, sampled in a thread."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, anonymous_bytes())
        self.done.set()
        self.thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start


def main(num_samples: int, folder: str | None) -> None:
    """Build once and print the result line."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        manifest = Path(scratch) / "manifest.parquet"
        make = f"from benchmarks.plan_build import *; make_manifest(Path({str(manifest)!r}), {num_samples})"
        subprocess.run([sys.executable, "-c", make], check=True)
        print(f"manifest: {num_samples:,} samples, {manifest.stat().st_size:,} bytes", flush=True)
        import pyarrow.parquet  # noqa: F401  its own memory is not the index's

        with PeakMemory() as memory:
            start = time.perf_counter()
            index = SampleIndex.build(manifest, Path(scratch) / "index", LENS_BUCKETS, small="drop")
            built = time.perf_counter() - start
            batch = index.lookup(np.random.default_rng(1).integers(0, len(index), 1024))
            ready = time.perf_counter() - start
        start = time.perf_counter()
        index = SampleIndex(Path(scratch) / "index")
        opened = time.perf_counter() - start
    assert (np.array([bucket.height for bucket in LENS_BUCKETS])[batch["bucket"]] <= batch["height"]).all()
    goal, private = 60 * num_samples / 1e8, memory.growth / num_samples
    details = {
        "samples": num_samples,
        "kept": len(index),
        "seconds_to_first_batch": round(ready, 3),
        "seconds_allowed_in_proportion": goal,
        "seconds_of_lookup": round(ready - built, 5),
        "seconds_to_open_again": round(opened, 5),
        "private_bytes_peak": memory.growth,
        "private_bytes_per_sample": round(private, 3),
        "mapped_bytes": index.mapped_bytes,
        "mapped_bytes_per_sample": round(index.mapped_bytes / len(index), 2),
        "left_out": index.left_out,
    }
    for name, value in details.items():
        print(f"{name:32s} {value}")
    holds = ready <= goal and private <= 8
    report("plan_build", ratio=ready / goal, goal=1.0, better="lower", holds=holds, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time and memory to build the sample index")
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--folder", help="where to put manifest and index; the system's temporary folder by default")
    arguments = parser.parse_args()
    main(arguments.samples, arguments.folder)
