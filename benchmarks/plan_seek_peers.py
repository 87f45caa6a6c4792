"""Time to the first sample of a resumed epoch, of mosaicml-streaming and webdataset, in an environment of their own.

``.venv-peers/bin/python -m benchmarks.plan_seek_peers FOLDER``: what :mod:`benchmarks.plan_seek` starts. Data sets of integers
are written to FOLDER first, not timed. The last line is JSON: by package its version, the number of samples and the median
seconds at each place. Needs neither lensmini nor its packages.
"""

import argparse
import importlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = (0.0, 0.5, 0.9)


def medians(first: Callable[[float], None], repeats: int) -> dict[str, float]:
    """Median seconds until the first sample, place by place, places taking turns."""
    seconds: dict[float, list[float]] = {place: [] for place in PLACES}
    for _ in range(repeats):
        for place in PLACES:
            start = time.perf_counter()
            first(place)
            seconds[place].append(time.perf_counter() - start)
    return {str(place): statistics.median(values) for place, values in seconds.items()}


def measure_streaming(folder: Path, num_samples: int, repeats: int) -> dict[str, object]:
    """A shuffled StreamingDataset given the state of a run that has had so many samples of the epoch."""
    import streaming
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"number": "int"}, size_limit=1 << 26) as writer:
        for number in range(num_samples):
            writer.write({"number": number})
    used = []

    def first(place: float) -> None:
        dataset = StreamingDataset(
            local=str(folder), shuffle=True, shuffle_seed=1, batch_size=10, num_canonical_nodes=1
        )
        used.append(dataset)
        if place:
            state = {"epoch": 0, "sample_in_epoch": int(place * num_samples), "shuffle_seed": 1}
            dataset.load_state_dict({**state, "num_canonical_nodes": 1, "initial_physical_nodes": 1})
        next(iter(dataset))

    first(0.0)
    return {"version": streaming.__version__, "samples": num_samples, "seconds": medians(first, repeats)}


def measure_webdataset(folder: Path, num_samples: int, repeats: int) -> dict[str, object]:
    """A WebDataset with shuffled shards and its usual buffer of 1,000; it keeps no place, so it reads and discards."""
    webdataset: Any = importlib.import_module("webdataset")  # its names are found at run time

    shards = max(1, num_samples // 10_000)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=-(-num_samples // shards), verbose=0) as writer:
        for number in range(num_samples):
            writer.write({"__key__": f"{number:09d}", "txt": str(number)})
    tars = sorted(str(path) for path in folder.glob("*.tar"))

    def first(place: float) -> None:
        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=1).shuffle(1000)
        next(itertools.islice(iter(dataset), int(place * num_samples), None))

    first(0.0)
    return {"version": webdataset.__version__, "samples": num_samples, "seconds": medians(first, repeats)}


def main(folder: Path, num_samples: int, tar_samples: int) -> None:
    """Measure both and print JSON; a package that fails says why instead."""
    result: dict[str, object] = {}
    contestants = {"mosaicml-streaming": measure_streaming, "webdataset": measure_webdataset}
    settings = {"mosaicml-streaming": (num_samples, 5), "webdataset": (tar_samples, 1)}
    for name, measure in contestants.items():
        data = folder / name
        data.mkdir()
        try:
            result[name] = measure(data, *settings[name])
        except Exception as error:
            result[name] = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Time to the first sample of a resumed epoch: streaming and webdataset"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=2_000_000, help="of mosaicml-streaming")
    parser.add_argument("--tar-samples", type=int, default=50_000, help="of webdataset")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.samples, arguments.tar_samples)
