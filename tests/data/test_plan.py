"""Laws of the plan: every sample in turn, on any number of ranks, from any step, never over the cap."""

from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lensmini.cost import train_flops
from lensmini.data.balance import measure_steps
from lensmini.data.plan import BatchPlan

MODES = ("bucket", "packed", "same_bucket")
MODEL = SimpleNamespace(
    num_layers=48,
    inner_dim=1536,
    mlp_dim=4096,
    num_attention_heads=24,
    attention_head_dim=64,
    in_channels=128,
    out_channels=32,
    patch_size=2,
    enc_hidden_dim=2880,
    num_text_layers=4,
)


@st.composite
def plans(draw, modes=MODES, max_size=40, weighted=None):
    """A plan of empty, tiny and skewed buckets, with a cap that it fits or none."""
    num_buckets = draw(st.integers(1, 6))
    entries = st.one_of(st.sampled_from([0, 1, 1, 2]), st.integers(0, max_size))
    sizes = draw(st.lists(entries, min_size=num_buckets, max_size=num_buckets).filter(any))
    tokens = draw(st.lists(st.integers(1, 30), min_size=num_buckets, max_size=num_buckets))
    mode, slots, text = draw(st.sampled_from(modes)), draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.integers(0, 5))
    options = {"num_slots": slots, "mode": mode, "text_tokens": text, "seed": draw(st.integers(-5, 2**40))}
    options["window"] = draw(st.one_of(st.none(), st.integers(1, 10)))
    if draw(st.booleans()):
        options["max_tokens"] = draw(st.integers(2 * (30 + text), 6 * (30 + text)))
    elif mode == "packed":
        options["images_per_slot"] = draw(st.integers(1, 4))
    else:
        options["images_per_slot"] = draw(st.lists(st.integers(1, 4), min_size=num_buckets, max_size=num_buckets))
    if mode == "packed" and draw(st.booleans()):
        generator = np.random.default_rng(draw(st.integers(0, 999)))
        options["text_lengths"] = generator.integers(0, text + 1, sum(sizes))
    if draw(st.booleans()) if weighted is None else weighted:
        options["sources"] = draw(st.lists(st.integers(0, 2), min_size=num_buckets, max_size=num_buckets))
        held = [sum(n for n, s in zip(sizes, options["sources"], strict=True) if s == label) for label in range(3)]
        options["weights"] = [draw(st.floats(0.01, 1)) if count else 0.0 for count in held]
    return BatchPlan(sizes, tokens, **options)


def starts_of(plan):
    return np.cumsum(plan.sizes) - plan.sizes


def all_samples(plan, start, stop):
    return np.concatenate([plan.step(k).samples for k in range(start, stop)])


def same(first, second):
    return np.array_equal(first.samples, second.samples) and np.array_equal(first.offsets, second.offsets)


@given(plans(), st.integers(1, 12))
def test_each_sample_comes_once_before_any_comes_twice(plan, steps):
    seen = np.bincount(all_samples(plan, 0, steps), minlength=plan.sizes.sum())
    assert len(seen) == plan.sizes.sum()
    for start, size in zip(starts_of(plan), plan.sizes, strict=True):
        if size:
            assert seen[start : start + size].max() - seen[start : start + size].min() <= 1


@given(plans(weighted=False), st.integers(1, 25))
def test_without_weights_all_buckets_are_in_the_same_epoch_but_for_a_batch_or_two(plan, steps):
    drawn = np.bincount(plan.bucket_of(all_samples(plan, 0, steps)), minlength=len(plan.sizes))
    units = steps * plan.schedule.units
    rates = [Fraction(int(n), int(b)) for n, b in zip(plan.sizes, plan.images_per_slot, strict=True)]
    batch = plan.images_per_slot * (plan.num_slots if plan.mode == "same_bucket" else 1)
    for count, rate, unit in zip(drawn, rates, batch, strict=True):
        assert abs(count - rate / sum(rates) * units * int(unit)) <= plan.schedule.deviation * unit


def test_an_epoch_that_divides_evenly_is_every_sample_once():
    plan = BatchPlan([24, 12, 0, 6], [1, 2, 9, 4], num_slots=2, images_per_slot=[4, 2, 1, 1], seed=3)
    # 6 + 6 + 6 slots, two a step.
    assert sorted(all_samples(plan, 0, 9)) == list(range(42))
    assert sorted(all_samples(plan, 9, 18)) == list(range(42))
    assert all_samples(plan, 0, 9).tolist() != all_samples(plan, 9, 18).tolist()


@given(plans(weighted=True), st.integers(1, 12), st.integers(0, 10**9))
def test_weighted_sources_deviate_by_one_batch_at_most(plan, steps, far):
    # Three sources: the bound of the tree is one unit.
    assert plan.schedule.deviation <= 1
    held = Counter()
    for source, size in zip(plan.sources, plan.sizes, strict=True):
        held[source] += int(size)
    rates = [
        Fraction(plan.weights[source]) * int(n) / max(1, held[source]) / int(b)
        for source, n, b in zip(plan.sources, plan.sizes, plan.images_per_slot, strict=True)
    ]
    drawn = np.bincount(plan.bucket_of(all_samples(plan, 0, steps)), minlength=len(plan.sizes))
    per_unit = plan.images_per_slot * (plan.num_slots if plan.mode == "same_bucket" else 1)
    for step, units in ((steps, drawn // per_unit), (far, plan.schedule.counts(far))):
        for label in set(plan.sources):
            mine = [index for index, source in enumerate(plan.sources) if source == label]
            share = sum(rates[index] for index in mine) / sum(rates)
            assert abs(sum(int(units[index]) for index in mine) - share * step * plan.schedule.units) <= 1


@given(plans(), st.integers(0, 10**12))
def test_ranks_share_a_step_without_overlap_and_in_one_order(plan, k):
    step = plan.step(k)
    for world_size in (size for size in (1, 2, 4, 8, 16) if plan.num_slots % size == 0):
        shares = [step.share(rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {plan.micro_steps(world_size)} == {plan.num_slots // world_size}
        in_order = [slot for micro in zip(*shares, strict=True) for slot in micro]
        assert np.array_equal(np.concatenate(in_order), step.samples)
        assert [len(slot) for slot in in_order] == np.diff(step.offsets).tolist()
        assert min(len(slot) for slot in in_order) >= 1


@given(plans(max_size=400), st.integers(0, 10**6))
def test_ranks_are_disjoint_within_an_epoch(plan, k):
    samples = plan.step(k).samples
    counts = np.bincount(plan.bucket_of(samples), minlength=len(plan.sizes))
    for bucket in np.flatnonzero(counts):
        # As often as epochs begin in the step, and no more.
        mine = Counter(samples[plan.bucket_of(samples) == bucket].tolist())
        assert max(mine.values()) <= -(-int(counts[bucket]) // int(plan.sizes[bucket])) + 1


def test_ranks_are_disjoint_where_an_epoch_holds_whole_steps():
    plan = BatchPlan([64, 64], [1, 2], num_slots=8, images_per_slot=4, seed=0)
    for k in range(12):
        assert len(set(plan.step(k).samples.tolist())) == 32


@given(plans(), st.integers(0, 10**12), st.integers(1, 9))
def test_steps_at_once_are_the_single_steps(plan, start, number):
    samples, offsets = plan.assign(start, start + number)
    steps = [plan.step(k) for k in range(start, start + number)]
    assert np.array_equal(samples, np.concatenate([step.samples for step in steps]))
    assert np.array_equal(np.diff(offsets), np.concatenate([np.diff(step.offsets) for step in steps]))


@given(plans(), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_step_does_not_know_what_was_asked_before(plan, order):
    again = {k: plan.step(k) for k in order}
    assert all(same(plan.step(k), again[k]) for k in reversed(order))


@given(plans(), st.integers(0, 10**9))
def test_no_slot_is_over_the_cap(plan, k):
    assume(plan.max_tokens is not None)
    step = plan.step(k)
    for index in range(plan.num_slots):
        image, text = plan.lengths(step.slot(index))
        assert (image + text).sum() <= plan.max_tokens


@given(plans(modes=["bucket", "same_bucket"]), st.integers(0, 10**9))
def test_a_slot_holds_one_bucket_and_its_images(plan, k):
    step = plan.step(k)
    buckets = [plan.bucket_of(step.slot(index)) for index in range(plan.num_slots)]
    assert all((slot == slot[0]).all() and len(slot) == plan.images_per_slot[slot[0]] for slot in buckets)
    if plan.mode == "same_bucket":
        assert len({int(slot[0]) for slot in buckets}) == 1


def test_every_slot_gets_every_bucket_in_its_turn():
    plan = BatchPlan([300, 100], [1, 1], num_slots=4, images_per_slot=1, seed=0)
    buckets = plan.bucket_of(plan.assign(0, 2000)[0]).reshape(-1, 4)
    # One slot of the four holds bucket 1, each as often: 500 of 2000, standard deviation 19.4.
    assert buckets.sum(1).mean() == 1
    assert np.abs(buckets.sum(0) - 500).max() < 70


def test_samples_are_shuffled_anew_every_epoch_and_by_the_seed():
    plans_by_seed = [BatchPlan([1000], [1], num_slots=1, images_per_slot=10, seed=seed) for seed in (0, 1)]
    orders = [all_samples(plan, start, start + 100) for plan in plans_by_seed for start in (0, 100)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert max((a == b).sum() for index, a in enumerate(orders) for b in orders[:index]) <= 9
    assert (np.abs(np.diff(orders[0])) == 1).mean() < 0.02


def test_buckets_of_one_size_have_orders_of_their_own():
    plan = BatchPlan([500, 500], [1, 1], num_slots=2, images_per_slot=1, seed=0)
    samples = all_samples(plan, 0, 500)
    first, second = (samples[plan.bucket_of(samples) == bucket] % 500 for bucket in (0, 1))
    assert (first == second).sum() <= 9


def test_windows_keep_reads_near_each_other():
    plan = BatchPlan([10_000], [1], num_slots=4, images_per_slot=5, seed=0, window=100)
    samples = plan.assign(0, 500)[0]
    assert sorted(samples) == list(range(10_000))
    # Twenty samples a step and windows of a hundred: a step touches one.
    assert all(len(set(step // 100)) == 1 for step in samples.reshape(500, 20))


def test_a_token_budget_fills_slots_as_far_as_they_surely_hold():
    plan = BatchPlan([9, 9, 9], [1024, 2304, 4096], num_slots=4, max_tokens=24576, seed=0)
    assert plan.images_per_slot.tolist() == [24, 10, 6]
    with_text = BatchPlan([9, 9, 9], [1024, 2304, 4096], num_slots=4, max_tokens=24576, text_tokens=150, seed=0)
    assert with_text.images_per_slot.tolist() == [20, 10, 5]


@pytest.mark.parametrize(
    "mix", [[4096] * 3, [1024, 4096], [256, 1024, 4096], [1024, 2304, 4096, 8100]], ids=["one", "two", "three", "four"]
)
def test_packed_slots_are_balanced_as_the_published_mixes_allow(mix):
    random = np.random.default_rng(0)
    sizes = [100_000] * len(mix)
    text = np.clip(random.lognormal(np.log(150), 0.4, sum(sizes)), 8, 400).astype(np.uint16)
    plan = BatchPlan(
        sizes, mix, num_slots=128, seed=0, mode="packed", images_per_slot=8, text_tokens=400, text_lengths=text,
        model=MODEL,
    )  # fmt: skip
    assert plan.report(8).balance >= 0.99
    plain = BatchPlan(sizes, mix, num_slots=128, seed=0, images_per_slot=8, model=MODEL)
    assert len(set(mix)) == 1 or plain.report(8).balance < 0.7


@given(plans(), st.integers(1, 7), st.integers(0, 50))
def test_the_report_is_the_slow_count(plan, steps, start):
    world_size = max(1, plan.num_slots // 2)
    report = plan.report(range(start, start + steps), world_size=world_size)
    useful = slowest = padded = held = most = 0
    exposure, images, texts, pictures = Counter(), 0, 0, 0
    for k in range(start, start + steps):
        step = plan.step(k)
        for micro in zip(*[step.share(rank, world_size) for rank in range(world_size)], strict=True):
            loads = []
            for slot in micro:
                image, text = plan.lengths(slot)
                both = [int(a) + int(b) for a, b in zip(image, text, strict=True)]
                loads.append(sum(both))
                padded += max(both) * len(both)
                exposure.update(plan.bucket_of(slot).tolist())
                images, pictures, texts = images + len(both), pictures + int(image.sum()), texts + int(text.sum())
            useful, slowest, held = useful + sum(loads), slowest + world_size * max(loads), held + sum(loads)
            most = max(most, *loads)
    assert report.balance == pytest.approx(useful / slowest)
    assert report.worst_balance <= report.balance + 1e-12
    assert report.padding == pytest.approx(1 - held / padded)
    assert report.most_slot_tokens == most
    assert (report.images, report.image_tokens) == (pytest.approx(images / steps), pytest.approx(pictures / steps))
    assert report.text_tokens == pytest.approx(texts / steps)
    assert report.exposure == tuple(exposure[bucket] for bucket in range(len(plan.sizes)))
    assert report.epochs == pytest.approx([exposure[b] / max(1, n) for b, n in enumerate(plan.sizes.tolist())])


def test_costs_are_the_models_training_flops():
    plan = BatchPlan([2], [4096], num_slots=1, images_per_slot=1, seed=0, text_tokens=150, model=MODEL)
    expected = train_flops(MODEL, 4096, 150)
    assert plan.costs(np.array([4096]), np.array([150])).tolist() == [expected]


BASE = {"num_slots": 4, "images_per_slot": 2, "seed": 0, "mode": "packed", "max_tokens": 400, "text_tokens": 3}


def test_the_fingerprint_tells_orders_apart():
    def make(sizes=(30, 20), tokens=(5, 9), **changes):
        return BatchPlan(list(sizes), list(tokens), **{**BASE, **changes}).fingerprint()

    assert make() == make()
    lengths = np.full(50, 2)
    others = [
        make(sizes=(31, 20)), make(tokens=(5, 10)), make(seed=1), make(mode="bucket"), make(num_slots=8),
        make(images_per_slot=3), make(max_tokens=401), make(text_tokens=2), make(window=4), make(model=MODEL),
        make(weights=[1, 2]), make(weights=[1, 1]), make(text_lengths=lengths), make(text_lengths=lengths - 1),
    ]  # fmt: skip
    assert len({make(), *others}) == 15
    assert all(len(digits) == 32 and int(digits, 16) >= 0 for digits in others)


def test_the_order_itself_is_pinned():
    # No law: a checkpoint of an older release must go on in its order, or the fingerprint must say that it cannot.
    plan = BatchPlan([5, 3], [1, 2], num_slots=2, images_per_slot=[2, 1], seed=7)
    assert [plan.step(k).samples.tolist() for k in range(4)] == [[6, 2, 0], [3, 1, 7], [5, 4, 3], [0, 2, 6]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [0, 0]}, "at least one sample"),
        ({"sizes": [-1, 2]}, "sizes: expected integers"),
        ({"tokens": [0, 2]}, "tokens: expected integers"),
        ({"tokens": [1]}, "one entry per bucket"),
        ({"mode": "mixed"}, "mode"),
        ({"num_slots": 0}, "num_slots"),
        ({"window": 0}, "window"),
        ({"text_lengths": np.zeros(3, int)}, "text_lengths: expected 50 entries"),
        ({"images_per_slot": None, "max_tokens": None}, "expected it or max_tokens"),
        ({"images_per_slot": [2, 2]}, "one number in mode packed"),
        ({"images_per_slot": 0}, "images_per_slot: expected at least 1, got 0"),
        ({"images_per_slot": 1.5}, "images_per_slot: expected an integer, got 1.5"),
        ({"mode": "bucket", "images_per_slot": [1.5, 2]}, "images_per_slot: expected an integer, got 1.5"),
        ({"max_tokens": 400.0}, "max_tokens: expected an integer, got 400.0"),
        ({"sources": [0.9, 1.2]}, "sources: expected an integer, got 0.9"),
        ({"seed": 1.0}, "seed: expected an integer, got 1.0"),
        ({"mode": "bucket", "images_per_slot": [1, 0]}, "got 0 for bucket 1"),
        ({"mode": "bucket", "images_per_slot": [1]}, "one per bucket, 2, got 1"),
        ({"mode": "bucket", "images_per_slot": 34}, "34 images of bucket 1 have up to 408 tokens with text, a slot"),
        ({"mode": "bucket", "images_per_slot": None, "max_tokens": 11}, "1 images of bucket 1 have up to 12 tokens"),
        ({"images_per_slot": 60}, "240 images a step may not fit into 4 slots of 400 tokens; [0-9]+ are enough"),
        ({"images_per_slot": None, "max_tokens": 11}, "may not hold even one image each"),
        ({"weights": [1.0]}, "labels 0 to 0"),
        ({"weights": [1.0, -1.0]}, "weights"),
    ],
)
def test_bad_arguments_are_named_when_the_plan_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**{"sizes": [30, 20], "tokens": [5, 9], **BASE, **changes})


@pytest.mark.parametrize("mode", ["packed", "bucket"])
def test_numpy_integers_are_integers_and_never_overflow(mode):
    options = {"num_slots": 128, "images_per_slot": 4, "seed": 3, "max_tokens": 2000, "text_tokens": 3, "window": 7}
    wide = {name: np.int64(value) for name, value in options.items()}
    sizes, weights = [800_000_000, 77, 3], [0.5, 0.3, 0.2]
    plan, other = (BatchPlan(sizes, [4, 9, 16], mode=mode, weights=weights, **given) for given in (options, wide))
    assert plan.fingerprint() == other.fingerprint()
    for k in (1, 10**7, 10**12):
        assert same(plan.step(k), other.step(np.int64(k)))
    assert plan.schedule.counts(np.int64(10**9)) == plan.schedule.counts(10**9)
    with pytest.raises(ValueError, match="k: expected an integer, got 1.5"):
        plan.step(1.5)


def test_ranks_that_would_not_share_a_step_evenly_are_refused():
    step = make_step(4)
    for rank, world_size in ((0, 3), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank, world_size: expected a divisor of 4 slots"):
            step.share(rank, world_size)
    for index in (-1, 4):
        with pytest.raises(ValueError, match="index: expected a slot from 0 to 3"):
            step.slot(index)


def make_step(num_slots):
    return BatchPlan([50], [1], num_slots=num_slots, images_per_slot=2, seed=0).step(0)


def test_a_cap_that_an_error_names_is_enough():
    plan = BatchPlan([30, 20], [5, 9], **{**BASE, "images_per_slot": 60, "max_tokens": 800})
    assert plan.schedule.units == 240


def test_bad_arguments_are_named_later():
    plan = BatchPlan([30, 20], [5, 9], **{**BASE, "text_lengths": np.full(50, 4)})
    with pytest.raises(ValueError, match="text_lengths: expected 0 to text_tokens = 3, got 4 to 4"):
        plan.step(0)
    with pytest.raises(ValueError, match="k: expected at least 0, got -1"):
        plan.step(-1)
    with pytest.raises(ValueError, match="start, stop: expected 0 <= start < stop, got 3, 3"):
        plan.assign(3, 3)
    with pytest.raises(ValueError, match="divisor of num_slots = 4, got 3"):
        plan.micro_steps(3)
    with pytest.raises(ValueError, match="steps"):
        measure_steps(plan, range(0), 4)


@example(800_000_000)
@given(st.integers(10**8, 10**9))
def test_hundreds_of_millions_of_samples_take_no_memory_and_no_time(total):
    plan = BatchPlan([total, 1, 0], [1024, 4096, 2304], num_slots=128, images_per_slot=[24, 6, 10], seed=0)
    last = total // 24 // 128
    assert plan.step(last).samples.max() < total + 1
