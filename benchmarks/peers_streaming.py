"""The peers of ``plan_resume`` that need an environment of their own: mosaicml-streaming and webdataset, really run.

``.venv-peers/bin/python -m benchmarks.peers_streaming`` (``make peers`` creates that environment: mosaicml-streaming
pins numpy < 2.2). The last line is JSON: package, version and wrong samples by contestant and scenario. Every rank of
streaming is a process with its own gloo rank, as the package demands; ranks of webdataset are iterators of one process,
told apart by the environment variables that it reads. Samples are integers; 64 of them make a step at any number of
ranks (a constant global batch, which streaming's elastic determinism asks for).
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.peers_scenarios import SCENARIOS, Run, count_wrong

NUM_SAMPLES, GLOBAL_BATCH, SHARDS = 3200, 64, 32
SEED = 9176


def main() -> None:
    """Run what is installed and print the result line."""
    rows: dict[str, Any] = {}
    # Shared memory is named after the folder, so a fresh one never meets what a killed run left.
    with tempfile.TemporaryDirectory() as folder:
        rows |= streaming_rows(Path(folder) / "mds")
        rows |= webdataset_rows(Path(folder) / "tar")
    print(json.dumps(rows))


def streaming_rows(folder: Path) -> dict[str, Any]:
    """StreamingDataset with its own StreamingDataLoader, its state saved and loaded on every rank."""
    try:
        from streaming import MDSWriter
    except ImportError:
        return {}
    with MDSWriter(out=str(folder), columns={"number": "int"}, size_limit=1 << 11) as out:
        for number in range(NUM_SAMPLES):
            out.write({"number": number})
    rows = {}
    for workers in (0, 2):
        run = streaming_run(folder, workers)
        name = f"mosaicml-streaming {version('mosaicml-streaming')}, {workers} workers"
        # The uninterrupted run is the same for all.
        expected, _ = run(None, SCENARIOS[0].num_steps, 8)
        rows[name] = {scenario.name: count_wrong(run, scenario, expected) for scenario in SCENARIOS}
    return rows


def streaming_run(folder: Path, workers: int) -> Run:
    """A run by as many processes as ranks."""

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        fork = multiprocessing.get_context("fork")
        results: Any = fork.Queue()
        everybody = fork.Barrier(num_ranks)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        task = (folder, workers, state, num_steps, num_ranks)
        processes = [
            fork.Process(target=streaming_rank, args=(rank, port, results, everybody, *task))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            answers = dict(results.get(timeout=60) for _ in processes)
        finally:
            for process in processes:
                process.join(5)
                process.kill()
        steps = [[number for rank in range(num_ranks) for number in answers[rank][0][k]] for k in range(num_steps)]
        return steps, answers[0][1]

    return run


def streaming_rank(
    rank: int,
    port: int,
    results: Any,
    everybody: Any,
    folder: Path,
    workers: int,
    state: Any,
    num_steps: int,
    num_ranks: int,
) -> None:
    """One rank: as a trainer would use the package."""
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in facts.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    from streaming import StreamingDataLoader, StreamingDataset

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    batch = GLOBAL_BATCH // num_ranks
    options = {"shuffle": True, "shuffle_seed": SEED, "num_canonical_nodes": 1}
    dataset = StreamingDataset(local=str(folder), batch_size=batch, **options)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers)
    if state is not None:
        loader.load_state_dict(state)
    batches = iter(loader)
    steps = [[int(number) for number in next(batches)["number"]] for _ in range(num_steps)]
    results.put((rank, (steps, loader.state_dict())))
    results.close()
    results.join_thread()
    # Ends the workers, with what they had fetched; what is left of the process goes at once, as in a crash.
    del batches
    everybody.wait()
    os._exit(0)


def webdataset_rows(folder: Path) -> dict[str, Any]:
    """WebDataset's pipelines, seeded in the ways that it offers; it has no state to save."""
    try:
        webdataset: Any = importlib.import_module("webdataset")  # its names are found at run time
    except ImportError:
        return {}
    folder.mkdir()
    shards = [str(folder / f"{shard:02d}.tar") for shard in range(SHARDS)]
    each = NUM_SAMPLES // SHARDS
    for shard, path in enumerate(shards):
        with webdataset.TarWriter(path) as out:
            for number in range(shard * each, (shard + 1) * each):
                out.write({"__key__": f"{number:06d}", "txt": str(number)})

    def resampled() -> Any:
        source = webdataset.ResampledShards(shards, deterministic=True, seed=SEED)
        tail = webdataset.tarfile_to_samples(), webdataset.detshuffle(100, seed=SEED)
        return webdataset.DataPipeline(source, webdataset.split_by_worker, *tail)

    def shuffled() -> Any:
        options = {"shardshuffle": SHARDS, "detshuffle": True, "seed": SEED}
        source = webdataset.WebDataset(shards, nodesplitter=webdataset.split_by_node, **options)
        return source.compose(webdataset.detshuffle(100, seed=SEED))

    name = f"webdataset {version('webdataset')}"
    runs = {
        f"{name}, shards resampled with replacement": webdataset_run(resampled, replay=False),
        f"{name}, shards and buffer shuffled": webdataset_run(shuffled, replay=False),
        f"{name}, the same, what was shown read again and skipped": webdataset_run(shuffled, replay=True),
    }
    return {name: {scenario.name: count_wrong(run, scenario) for scenario in SCENARIOS} for name, run in runs.items()}


def webdataset_run(make_pipeline: Any, *, replay: bool) -> Run:
    """A run over a pipeline for every rank; ``replay`` skips as many samples as a rank's share of the steps shown."""

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        shown = 0 if state is None or not replay else state
        share = GLOBAL_BATCH // num_ranks
        steps: list[list[int]] = [[] for _ in range(num_steps)]
        for rank in range(num_ranks):
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            samples = iter(make_pipeline())
            for index, sample in enumerate(islice(samples, shown * share, (shown + num_steps) * share)):
                steps[index // share].append(int(sample["txt"]))
        return steps, shown + num_steps

    return run


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
    else:
        main()
