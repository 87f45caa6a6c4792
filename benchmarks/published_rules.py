"""How other stacks form batches and how they resume, as small functions written from what they publish.

No code of theirs is here and none was translated: each function models the behaviour that a project documents (its
manual, its docstrings on the web, its issues), and says where the model is our reading. Samples are numbers from 0.
Needs nothing but numpy, so that it also runs in an environment that holds a peer's pins.

Axes: n samples, r ranks, s micro-batches of a step over all ranks.

Batching rules return ``(samples, offsets)`` like ``BatchPlan.assign``: batch ``i`` is
``samples[offsets[i] : offsets[i + 1]]``, and step k of r ranks is the batches ``k r`` to ``(k + 1) r - 1``.

Resuming rules are :data:`benchmarks.peers_scenarios.Run`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers_scenarios import Run

__all__ = [
    "bagel_batches",
    "bagel_resume",
    "greedy_fill",
    "mixed_batches",
    "nemo_batches",
    "nemo_resume",
    "open_sora_batches",
    "open_sora_resume",
    "pixart_batches",
    "pixart_resume",
    "token_budget",
]

Integers = NDArray[np.int64]
Batches = tuple[Integers, Integers]


def pixart_batches(buckets: Integers, num_ranks: int, images: int, rng: np.random.Generator) -> Batches:
    """PixArt, kohya and PRX: a batch is of one bucket, every bucket has the same batch size, ranks draw their own.

    Published: PixArt's and Sana's aspect-ratio batch sampler collects shuffled samples bucket by bucket and hands out a
    bucket when it holds ``batch_size`` of them; kohya's ``enable_bucket`` has one ``batch_size`` for all resolutions
    and shuffles the batches; PRX has a stream per ratio, ``device_per_stream`` batching and one micro-batch size.
    Our reading: all three give each rank a batch of a bucket drawn in proportion to its images; short batches are
    dropped.

    Args:
        buckets: ``[n]`` bucket of each sample.
        num_ranks: ranks.
        images: of a batch.
        rng: of the order.
    """
    return _one_bucket_each(buckets, num_ranks, dict.fromkeys(np.unique(buckets).tolist(), images), rng)


def token_budget(tokens: Integers, budget: float) -> Integers:
    """Most samples that a token budget holds, bucket by bucket, at least one."""
    return np.maximum(1, (budget // tokens).astype(np.int64))


def open_sora_batches(
    buckets: Integers, images_of_bucket: Integers, num_ranks: int, rng: np.random.Generator
) -> Batches:
    """Open-Sora 2: a batch is of one bucket with that bucket's own batch size, ranks of a step draw different buckets.

    Published: ``bucket_config`` gives a batch size for each resolution and length, chosen by hand so that all take
    about as long (256px: 50, 768px: 11, 1024px: 7); the batches of all buckets are shuffled together. Our reading:
    what a hand would choose is a token budget (:func:`token_budget`), text included.

    Args:
        buckets: ``[n]`` bucket of each sample.
        images_of_bucket: ``[j]`` batch size of each bucket.
        num_ranks: ranks.
        rng: of the order.
    """
    return _one_bucket_each(buckets, num_ranks, dict(enumerate(images_of_bucket.tolist())), rng)


def nemo_batches(buckets: Integers, num_ranks: int, images: int, rng: np.random.Generator) -> Batches:
    """NeMo Automodel: all ranks draw from the same bucket until it is used up, then from the next.

    Published: ``SequentialBucketSampler`` "processes all images in bucket A before moving to bucket B", "drops
    incomplete batches at end of each bucket" and "guarantees equal batch counts across all ranks"; buckets and
    samples inside are shuffled, and the batch size is fixed unless ``dynamic_batch_size`` is set (the default is not).
    Our reading: what is left of a bucket and does not fill a batch on every rank is dropped.

    Args:
        buckets: ``[n]`` bucket of each sample.
        num_ranks: ranks.
        images: of a batch.
        rng: of the order.
    """
    return _concatenate([batch for chunk in _nemo_chunks(buckets, num_ranks, images, rng) for batch in chunk])


def greedy_fill(
    stream: Iterable[int],
    tokens: Integers,
    *,
    target: float,
    cap: float,
    buffer_size: int = 50,
    prefer_buffer_before: float | None = None,
) -> Iterator[list[int]]:
    """BAGEL: fill one packed sequence after another from a stream, up to a target, never over a cap.

    Published: sequences aim at ``expected_num_tokens`` (32,768) and never exceed ``max_num_tokens`` (36,864); a sample
    that does not fit any more waits in a buffer of ``max_buffer_size`` (50), from which the next sequence takes before
    it reads on while it holds fewer than ``prefer_buffer_before`` (16,384) tokens. Our reading: a sequence ends when
    it reaches the target, or when neither it nor the buffer can take the sample at hand; that sample opens the next
    sequence (BAGEL's pull request 308 reports that one popped from the buffer was lost there, which we do not model).
    A stream that ends is followed by what the buffer holds.

    Args:
        stream: sample numbers.
        tokens: ``[n]`` tokens of each sample, at most ``cap``.
        target: tokens at which a sequence is done.
        cap: most tokens of a sequence.
        buffer_size: most samples that wait.
        prefer_buffer_before: tokens below which a sequence takes from the buffer first; half the target by default.
    """
    prefer_buffer_before = target / 2 if prefer_buffer_before is None else prefer_buffer_before
    reader, waiting, sequence, held = iter(stream), [], [], 0
    while True:
        from_buffer = bool(waiting) and held < prefer_buffer_before
        sample = waiting.pop(0) if from_buffer else next(reader, None)
        if sample is None and waiting:
            from_buffer, sample = True, waiting.pop(0)
        if sample is None:
            break
        size = int(tokens[sample])
        if size > cap:
            raise ValueError(f"cap: expected room for every sample, got {cap} and a sample of {size} tokens")
        if held + size > cap:
            if not from_buffer and len(waiting) < buffer_size:
                waiting.append(sample)
                continue
            yield sequence
            sequence, held = [], 0
        sequence.append(sample)
        held += size
        if held >= target:
            yield sequence
            sequence, held = [], 0
    if sequence:
        yield sequence


def bagel_batches(tokens: Integers, num_ranks: int, target: float, cap: float, rng: np.random.Generator) -> Batches:
    """BAGEL's packing (:func:`greedy_fill`) on every rank, each over its own part of a shuffled pool.

    Nothing balances ranks against each other. The run ends when the first rank runs out.

    Args:
        tokens: ``[n]`` tokens of each sample, image and text.
        num_ranks: ranks.
        target: tokens at which a sequence is done.
        cap: most tokens of a sequence.
        rng: of the order.
    """
    order = rng.permutation(len(tokens))
    streams = [order[rank::num_ranks].tolist() for rank in range(num_ranks)]
    ranks = [list(greedy_fill(stream, tokens, target=target, cap=cap)) for stream in streams]
    # The last sequence of a rank is what happened to be left.
    steps = min(len(sequences) for sequences in ranks) - 1
    return _concatenate([np.array(sequences[k], np.int64) for k in range(steps) for sequences in ranks])


def mixed_batches(num_samples: int, num_ranks: int, images: int, rng: np.random.Generator) -> Batches:
    """A control of ours, nobody's rule: every rank takes the next ``images`` samples, whatever their shapes.

    Padded to the largest it is the naive mixed batch; packed it is packing without balancing.

    Args:
        num_samples: n.
        num_ranks: ranks.
        images: of a batch.
        rng: of the order.
    """
    num_batches = num_samples // (images * num_ranks) * num_ranks
    return rng.permutation(num_samples)[: num_batches * images], np.arange(num_batches + 1) * images


def _one_bucket_each(buckets: Integers, num_ranks: int, images: dict[int, int], rng: np.random.Generator) -> Batches:
    batches = _shuffled_batches(buckets, images, rng)
    return _concatenate(batches[: len(batches) // num_ranks * num_ranks])


def _shuffled_batches(buckets: Integers, images: dict[int, int], rng: np.random.Generator) -> list[Integers]:
    batches = []
    for bucket in np.unique(buckets).tolist():
        members, size = rng.permutation(np.flatnonzero(buckets == bucket)), images[bucket]
        batches += list(members[: len(members) // size * size].reshape(-1, size))
    return [batches[index] for index in rng.permutation(len(batches)).tolist()]


def _nemo_chunks(buckets: Integers, num_ranks: int, images: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """One ``[r, images]`` array for each batch that all ranks draw together."""
    chunks = []
    for bucket in rng.permutation(np.unique(buckets)).tolist():
        members = rng.permutation(np.flatnonzero(buckets == bucket))
        whole = len(members) // (num_ranks * images)
        chunks += list(members[: whole * num_ranks * images].reshape(whole, num_ranks, images))
    return chunks


def _concatenate(batches: Sequence[Integers]) -> Batches:
    if not batches:
        raise ValueError("batches: expected samples for at least one batch on every rank, got fewer")
    return np.concatenate(batches), np.concatenate([[0], np.cumsum([len(batch) for batch in batches])])


def pixart_resume(buckets: Integers, *, images: int = 4, num_slots: int = 16, seed: int = 0) -> Run:
    """PixArt, Sana, kohya and the diffusers scripts: a checkpoint holds no place in the data.

    Published: the samplers keep no state; a resumed script knows the epoch (diffusers' restore nothing else) and
    starts it again from its first batch. Our reading, in their favour: the shuffle is seeded by the epoch, so that
    the order itself comes back.

    Args:
        buckets: ``[n]`` bucket of each sample.
        images: of a micro-batch.
        num_slots: micro-batches of a step over all ranks; fewer ranks accumulate more.
        seed: of the order.
    """
    sizes = dict.fromkeys(np.unique(buckets).tolist(), images)
    batches = _shuffled_batches(buckets, sizes, np.random.default_rng(seed))

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        del state, num_ranks
        return _steps_of(batches, 0, num_steps, num_slots), {"epoch": 0}

    return run


def nemo_resume(buckets: Integers, *, images: int = 4, num_slots: int = 16, seed: int = 0) -> Run:
    """NeMo Automodel: the state is a number of batches to skip, counted since the process started.

    Published: the documented sampler keeps ``_batches_yielded`` and ``_batches_to_skip`` and no rank count. Our
    reading, and what a run of it showed: what is saved counts the batches of one rank since the last resume, so a
    first resume is exact, a second one goes back, and on other ranks the same count is another place.

    Args:
        buckets: ``[n]`` bucket of each sample.
        images: of a micro-batch.
        num_slots: micro-batches of a step over all ranks; fewer ranks accumulate more.
        seed: of the order.
    """

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        micro_steps = _micro_steps(num_slots, num_ranks)
        chunks = _nemo_chunks(buckets, num_ranks, images, np.random.default_rng(seed))
        skip = 0 if state is None else state["batches"]
        steps = _steps_of([chunk.reshape(-1) for chunk in chunks], skip, num_steps, micro_steps)
        return steps, {"batches": num_steps * micro_steps}

    return run


def open_sora_resume(
    buckets: Integers, *, images_of_bucket: Integers, num_slots: int = 16, fetched_ahead: int = 0, seed: int = 0
) -> Run:
    """Open-Sora 2: the state is step times ranks, from which another rank count recomputes its place.

    Published: batches consumed by all ranks are restored, also on another number of them; the loader's own count is
    wrong under prefetching, so the caller should pass the true step. Our reading: the recomputed place is that
    product divided by the new ranks, rounded down.

    Args:
        buckets: ``[n]`` bucket of each sample.
        images_of_bucket: ``[j]`` batch size of each bucket.
        num_slots: micro-batches of a step over all ranks; fewer ranks accumulate more.
        fetched_ahead: batches that a rank's loader had fetched and nobody had used, if its own count is
            saved: workers times prefetch factor; 0 is the true step.
        seed: of the order.
    """
    batches = _shuffled_batches(buckets, dict(enumerate(images_of_bucket.tolist())), np.random.default_rng(seed))

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        micro_steps = _micro_steps(num_slots, num_ranks)
        begin = 0 if state is None else state["consumed"] // num_ranks
        steps = _steps_of(batches, begin * num_ranks, num_steps, num_slots)
        return steps, {"consumed": (begin + num_steps * micro_steps + fetched_ahead) * num_ranks}

    return run


def bagel_resume(
    tokens: Integers, sources: Integers, *, target: float, cap: float, num_slots: int = 16, seed: int = 0
) -> Run:
    """BAGEL: each rank's place in its files is saved; the buffer of samples and the random state are not.

    Published: a list of reader positions for each rank and worker goes into the checkpoint; data sets are mixed at
    random by weight. Our reading: a resumed rank reads on where its readers stopped, with an empty buffer and
    the choice of data sets starting over from the seed; a rank that the checkpoint does not know starts its files
    from the beginning. Every rank has one reader for each data set.

    Args:
        tokens: ``[n]`` tokens of each sample, image and text.
        sources: ``[n]`` data set of each sample.
        target: tokens at which a sequence is done.
        cap: most tokens of a sequence.
        num_slots: sequences of a step over all ranks; fewer ranks accumulate more.
        seed: of the order.
    """
    shuffled = np.random.default_rng(seed).permutation(len(tokens))
    files = [shuffled[sources[shuffled] == source] for source in np.unique(sources)]

    def read(places: list[int], rank: int, num_ranks: int) -> Iterator[int]:
        choose = np.random.default_rng([seed, rank])
        while True:
            source = int(choose.integers(len(files)))
            mine = files[source][rank::num_ranks]
            sample = int(mine[places[source] % len(mine)])
            places[source] += 1
            yield sample

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        micro_steps = _micro_steps(num_slots, num_ranks)
        saved = {} if state is None else state
        places = {rank: list(saved.get(rank, [0] * len(files))) for rank in range(num_ranks)}
        steps: list[list[int]] = [[] for _ in range(num_steps)]
        for rank in range(num_ranks):
            sequences = greedy_fill(read(places[rank], rank, num_ranks), tokens, target=target, cap=cap)
            for index, sequence in zip(range(num_steps * micro_steps), sequences, strict=False):
                steps[index // micro_steps] += sequence
        return steps, places

    return run


def _micro_steps(num_slots: int, num_ranks: int) -> int:
    if num_slots % num_ranks:
        raise ValueError(f"num_ranks: expected a divisor of num_slots = {num_slots}, got {num_ranks}")
    return num_slots // num_ranks


def _steps_of(batches: Sequence[Integers], begin: int, num_steps: int, size: int) -> list[list[int]]:
    if begin + num_steps * size > len(batches):
        raise ValueError(f"batches: expected {begin + num_steps * size} in an epoch, got {len(batches)}")
    starts = (begin + step * size for step in range(num_steps))
    return [np.concatenate(batches[start : start + size]).tolist() for start in starts]
