"""Verdicts a second of a judge on a server that takes 50 ms, against asking one question after the other.

``python -m benchmarks.judge`` (about half a minute; ``--questions`` and ``--rounds`` for less).

A local server in a process of its own waits 50 ms and answers every question. Ours is ``ChatJudge`` with its defaults (16
questions in flight) from pictures to verdicts: encoding, opaque ids, parsing, durable caches. The peer is the ``openai``
client in a loop, with requests that are ready made, and no parsing or cache. "cached" asks ours again for what it
knows. Every round has pictures of its own. Goal: 8 times the loop.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.timing import interleaved, report
from lensmini.endpoint import Endpoint
from lensmini.rewards import lens_rubric
from lensmini.rewards.judges import ChatJudge, JudgeRequest, VerdictCache

RUBRIC = lens_rubric("A grey wall.", {f"attribute accuracy {n}": f"Detail {n} is right." for n in range(1, 11)})
LATENCY_S = 0.05


def serve(pipe: Connection) -> None:
    """A server that takes its time, until the other end closes."""
    from tests.chat_server import ChatServer, Fault, text_of

    def answer(body):  # noqa: ANN001, ANN202
        return json.dumps(dict.fromkeys(re.findall(r'"(c[0-9a-f]{7})"', text_of(body)), 1))

    with ChatServer(answer, lambda body, number: Fault(delay_s=LATENCY_S)) as server:
        pipe.send(server.url)
        pipe.poll(None)


def questions(num: int, start: int, side: int = 256) -> list[JudgeRequest]:
    """Eleven about each picture; pictures that were never asked about."""
    asked = []
    for number in itertools.count(start):
        generator = torch.Generator().manual_seed(number)
        image = torch.randint(256, (3, side // 8, side // 8), generator=generator, dtype=torch.uint8)
        image = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
        asked += [JudgeRequest(image=image, prompt=RUBRIC.prompt, criterion=c) for c in RUBRIC.all_criteria]
        if len(asked) >= num:
            return asked[:num]
    raise AssertionError


def loop(url: str, judge: ChatJudge, num: int) -> Callable[[], object]:
    """The plain client, one question at a time."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chats = judge.questions(questions(num, 0))

    def run() -> None:
        for chat in chats:
            client.chat.completions.create(model="judge", **chat.parameters())

    return run


def main(num: int = 220, rounds: int = 5) -> None:
    """Start the server, take turns, and print the table and the result line."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    url = here.recv()
    with tempfile.TemporaryDirectory() as folder:
        endpoint = Endpoint("judge", base_url=url, cache=Path(folder) / "replies.sqlite")
        judge = ChatJudge(endpoint, cache=VerdictCache(Path(folder) / "verdicts.sqlite"))
        fresh = itertools.count(1_000_000, num)

        def ours() -> None:
            verdicts = judge.score(questions(num, next(fresh)))
            if any(verdict.score != 1.0 or verdict.cached for verdict in verdicts):
                raise RuntimeError("a verdict is missing")

        seconds = interleaved({"ours": ours, "loop": loop(url, judge, num)}, rounds=rounds)
        known = questions(num, 0)
        judge.score(known)
        started = time.perf_counter()
        hits = judge.score(known)
        cached = num / (time.perf_counter() - started)
        if not all(verdict.cached for verdict in hits):
            raise RuntimeError("a known verdict was asked again")
        endpoint.close()
    server.kill()
    ratio = seconds["loop"] / seconds["ours"]
    rates = {who: num / time for who, time in seconds.items()} | {"cached": cached}
    print("  ".join(f"{who} {rate:.0f}/s" for who, rate in rates.items()))
    details = {
        "verdicts_per_second": {who: round(rate, 1) for who, rate in rates.items()},
        "latency_ms": 1000 * LATENCY_S,
    }
    report("judge", ratio=ratio, goal=8.0, better="higher", holds=ratio >= 8.0, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Verdicts a second through the judge against a sequential client.")
    parser.add_argument("--questions", type=int, default=220)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    main(options.questions, options.rounds)
