"""A step's rollouts with judging beside the sampling, against judging after each chunk.

``python -m benchmarks.rollout`` (about four minutes; ``--chunks``, ``--size``, ``--steps`` and ``--rounds`` for less).

Both sample the same chunks of packed pictures of mixed shapes with the miniature's transformer and ask ``ChatJudge`` eleven
questions about each picture, over a local server in a process of its own. Its latency is set so that waiting for a chunk's
verdicts takes as long as sampling one, which is where overlap pays most: the bound is 2 c / (c + 1) for c chunks. Sampling
takes so many steps that latency is hundreds of milliseconds, as with real judges; with few (``--steps 6``) the client's own
work, some 10 ms of a CPU a question, is what is measured. The verdicts have to be equal. Goal: 1.5 times as fast.
"""

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.timing import interleaved, report
from experiments.pretrain_config import MINI_MODEL
from experiments.reinforce_config import mini
from experiments.reinforce_rewards import Judging
from experiments.reinforce_rollout import my_chunks, roll_out, step_samples
from lensmini.endpoint import Endpoint
from lensmini.nn import LensTransformer
from lensmini.packed import unpack
from lensmini.parallel import Group
from lensmini.rewards import Rubric, lens_rubric
from lensmini.rewards.judges import ChatJudge

RUBRIC = lens_rubric("A grey wall.", {f"attribute accuracy {n}": f"Detail {n} is right." for n in range(1, 11)})
IN_FLIGHT = 16


def serve(pipe: Connection) -> None:
    """A server that takes its time, which the other end sets, until that closes."""
    from tests.chat_server import ChatServer, Fault, text_of

    latency = [0.0]

    def answer(body):  # noqa: ANN001, ANN202
        return json.dumps(dict.fromkeys(re.findall(r'"(c[0-9a-f]{7})"', text_of(body)), 1))

    with ChatServer(answer, lambda body, number: Fault(delay_s=latency[0])) as server:
        pipe.send(server.url)
        while True:
            try:
                latency[0] = pipe.recv()
            except EOFError:
                return
            pipe.send("set")


def step(judge: ChatJudge, chunks: int, size: int, num_steps: int, *, overlap: bool | None) -> Callable[[], Any]:
    """A call that samples a step's chunks; ``overlap`` None asks nobody."""
    config = mini()
    rollout = replace(config.rollout, groups=chunks, group_size=size, chunk=size, num_steps=num_steps)
    config = replace(config, rollout=rollout)
    model = LensTransformer(MINI_MODEL).init_weights(0).requires_grad_(False)
    samples = step_samples(config.rollout, 10 * chunks, 0, 0)
    texts = [torch.zeros(30, MINI_MODEL.num_text_layers, MINI_MODEL.enc_hidden_dim)] * size
    place: dict[str, Any] = {"downsample": 4, "step": 0, "device": torch.device("cpu")}

    def run() -> Any:
        with Judging(judge, overlap=bool(overlap)) as judging:
            for chunk in my_chunks(samples, size, Group(0, 1)):
                painted = roll_out(model, chunk, texts, config, **place)
                pictures = [
                    (latents[:3] * 50 + 128).clamp(0, 255).to(torch.uint8).repeat_interleave(4, 1)
                    for latents in unpack(painted.latents, painted.layout)
                ]
                if overlap is not None:
                    rubrics: list[Rubric] = [RUBRIC] * size
                    judging.submit(pictures, rubrics)
            return [[verdict.score for verdict in row] for row in judging.results()]

    return run


def main(chunks: int = 8, size: int = 6, num_steps: int = 48, rounds: int = 5) -> None:
    """Start the server, set its latency, take turns, and print the result line."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    url = here.recv()
    judge = ChatJudge(Endpoint("judge", base_url=url, concurrency=IN_FLIGHT))
    alone = step(judge, chunks, size, num_steps, overlap=None)
    alone()
    started = time.perf_counter()
    alone()
    sampling = (time.perf_counter() - started) / chunks
    waves = -(-11 * size // IN_FLIGHT)
    here.send(sampling / waves)
    here.recv()
    contestants = {
        name: step(judge, chunks, size, num_steps, overlap=name == "overlapped")
        for name in ("overlapped", "sequential")
    }
    if contestants["overlapped"]() != contestants["sequential"]():
        raise RuntimeError("the verdicts differ")
    seconds = interleaved(contestants, rounds=rounds, warmup=0)
    server.kill()
    ratio = seconds["sequential"] / seconds["overlapped"]
    print(
        "  ".join(f"{who} {time:.2f} s" for who, time in seconds.items())
        + f"  sampling alone {chunks * sampling:.2f} s"
    )
    details = {
        "seconds": {who: round(value, 3) for who, value in seconds.items()},
        "sampling_seconds": round(chunks * sampling, 3),
        "latency_ms": round(1000 * sampling / waves, 1),
        "bound": round(2 * chunks / (chunks + 1), 3),
    }
    report("rollout", ratio=ratio, goal=1.5, better="higher", holds=ratio >= 1.5, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Judging beside the sampling against judging after each chunk.")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--size", type=int, default=6)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    main(options.chunks, options.size, options.steps, options.rounds)
