"""Laws of the plan's report: rows are what the plan does, counted and priced by hand, for any number of ranks."""

import doctest
import json
import math
import re
import tracemalloc
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import plan_report, plan_report_rows
from experiments.plan_report import (
    PRESETS,
    LengthConfig,
    ManifestConfig,
    ReportConfig,
    SyntheticConfig,
    cli,
    main,
    make_report,
    synthetic_source,
)
from experiments.plan_report_rows import ClusterConfig, PlanConfig, TextLengths, make_plan, measure_slots, report_rows
from lensmini.cost import activation_bytes, train_flops
from lensmini.data import LENS_BUCKETS, Bucket
from lensmini.nn import LensConfig, LensTransformer

MODES = ("bucket", "packed", "same_bucket")
TINY = LensConfig(
    num_layers=2, num_attention_heads=2, in_channels=16, out_channels=4, enc_hidden_dim=32, selected_layer_index=(0, 1)
)
DATA = SyntheticConfig(mixes=("256+512",), num_samples=5_000, base_shares=(0.7, 0.3), text_mean=40, text_cap=90)
PLAN = PlanConfig(num_slots=8, images_per_slot=(8, 2), steps=5)
# So little traffic that only computing counts.
CLUSTER = ClusterConfig(ranks=(2, 4, 8, 16), shard_over=2, node_gb_per_s=1e6, network_gb_per_s=1e6)
FREE = {"image_gflops": 0.0, "text_gflops": 0.0}
RUN = LengthConfig(steps=1000)


def rows_of(*, data=DATA, plan=PLAN, cluster=CLUSTER, run=RUN, model=TINY):
    source = synthetic_source(data, data.mixes[0], plan.seed)
    found = report_rows(source, plan, cluster, model, steps=run.steps, images=run.images)
    return {(row["mode"], row["ranks"]): row for row in found}


@pytest.fixture(scope="module")
def rows():
    return rows_of()


def plan_of(mode, num_slots, *, data=DATA, plan=PLAN):
    return make_plan(synthetic_source(data, data.mixes[0], plan.seed), plan, TINY, mode, num_slots)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", CLUSTER.ranks)
def test_rows_say_what_the_librarys_own_report_says(rows, mode, ranks):
    row, report = rows[mode, ranks], plan_of(mode, max(8, ranks)).report(PLAN.steps, world_size=ranks)
    for name, value in (
        ("images_per_step", report.images),
        ("image_tokens_per_step", report.image_tokens),
        ("text_tokens_per_step", report.text_tokens),
        ("most_slot_tokens", report.most_slot_tokens),
        ("balance", report.balance),
        ("worst_balance", report.worst_balance),
        ("padding", report.padding),
    ):
        assert row[name] == pytest.approx(value, rel=1e-12), name
    assert len({rows[mode, ranks]["balance"] for ranks in CLUSTER.ranks}) > 1


def by_hand(plan, ranks, cluster, full):
    """Useful FLOPs, balance, seconds and the fullest slot of the first steps, sample by sample and rank by rank."""
    text, useful, waited, seconds, slots, worst = plan.text_lengths, 0, 0, 0.0, [], 1.0
    for k in range(PLAN.steps):
        shares = [plan.step(k).share(rank, ranks) for rank in range(ranks)]
        of_step = slowest = 0
        for micro in zip(*shares, strict=True):
            flops, clocks = [], []
            for samples in micro:
                pairs = [(int(plan.tokens[plan.bucket_of(i)]), int(text[int(i)])) for i in samples]
                flops.append(sum(train_flops(TINY, n, l) for n, l in pairs))
                encoders = sum(cluster.image_gflops * n + cluster.text_gflops * (l + 97) for n, l in pairs) * 1e9
                clocks.append(flops[-1] + (flops[-1] // 3 if full else 0) + encoders)
                slots.append(pairs)
            of_step += sum(flops)
            slowest += max(flops)
            seconds += max(clocks) / (cluster.peak_tflops * 1e12 * cluster.mfu)
        useful, waited, worst = useful + of_step, waited + ranks * slowest, min(worst, of_step / (ranks * slowest))
    return useful, useful / waited, worst, seconds / PLAN.steps, slots


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 8, 16])
@pytest.mark.parametrize("full", [False, True])
def test_rows_are_what_a_count_by_hand_finds(mode, ranks, full):
    plan, cluster = replace(PLAN, modes=(mode,)), replace(CLUSTER, ranks=(ranks,))
    memory = rows_of(cluster=cluster, plan=plan)[mode, ranks]["memory_gb"]
    # Room for everything, or for what full recomputation leaves and no more.
    cluster = replace(cluster, memory_gb=memory["full" if full else "none"])
    row = rows_of(cluster=cluster, plan=plan)[mode, ranks]
    useful, balance, worst, seconds, slots = by_hand(plan_of(mode, max(8, ranks)), ranks, cluster, full)
    assert row["recompute"] == ("full" if full else "none")
    assert row["balance"] == pytest.approx(balance) and row["worst_balance"] == pytest.approx(worst)
    assert row["seconds_per_step"] == pytest.approx(seconds, rel=1e-9)
    assert row["mfu"] == pytest.approx(useful / PLAN.steps / (ranks * cluster.peak_tflops * 1e12 * seconds))
    totals = [sum(n + l for n, l in slot) for slot in slots]
    assert row["most_slot_tokens"] == max(totals) == row["slot_tokens"][4] and row["slot_tokens"][0] == min(totals)
    padded = sum(len(slot) * max(n + l for n, l in slot) for slot in slots)
    assert row["padding"] == pytest.approx(1 - sum(totals) / padded)
    assert row["images_per_step"] == pytest.approx(sum(map(len, slots)) / PLAN.steps)
    assert row["micro_steps"] == max(1, 8 // ranks) and row["num_slots"] == max(8, ranks)
    assert row["steps_of_run"] * row["images_per_step"] == pytest.approx(row["images_of_run"])
    assert row["days"] == pytest.approx(row["steps_of_run"] * seconds / 86_400)
    assert row["gpu_hours"] == pytest.approx(row["days"] * 24 * ranks)


def test_memory_of_a_slot_of_two_samples_is_state_and_encoders_shared_plus_both_samples_activations():
    data = SyntheticConfig(mixes=("512",), num_samples=100, aspect_shares=(0, 0, 0, 0, 1, 0, 0, 0, 0), text_cap=300)
    cluster = ClusterConfig(ranks=(4, 8), shard_over=4, reserve_gb=1.5, encoder_gb=10.0)
    plan = PlanConfig(num_slots=4, images_per_slot=(2,), modes=("bucket",), steps=3)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LensTransformer(TINY).parameters())
    for online in (True, False):
        # Weight, gradient, average and two moments in float32.
        fixed = 1.5 + (4 + 4 + 4 + 8) * parameters / 4 / 1e9 + (10 / 4 if online else 0)
        for row in rows_of(data=data, plan=plan, cluster=replace(cluster, encoders_online=online)).values():
            assert row["fixed_gb"] == pytest.approx(fixed, rel=1e-12)
            for name in ("none", "selective", "full"):
                sample = activation_bytes(TINY, 32 * 32, 300, recompute=name)
                assert row["memory_gb"][name] == pytest.approx(fixed + 2 * sample / 1e9, rel=1e-12)


def bytes_by_hand(slots, name):
    return [sum(activation_bytes(TINY, n, l, recompute=name) for n, l in slot) for slot in slots]


@pytest.mark.parametrize("mode", ["bucket", "same_bucket"])
@pytest.mark.parametrize("weights", [(), (0, 1), (1e-9, 1)])
def test_memory_of_bucket_slots_is_that_of_their_images_with_the_longest_captions(mode, weights):
    # Slots of nine small pictures are fullest, even where they are too rare to be seen in the steps measured.
    plan = replace(PLAN, images_per_slot=(9, 2), weights=weights, modes=(mode,))
    row = rows_of(plan=plan, cluster=replace(CLUSTER, ranks=(8,)))[mode, 8]
    shapes = [bucket.tokens() for base in (256, 512) for bucket in plan_report.buckets_of(base)]
    slots = [[(n, 90)] * 9 for n in shapes[:9]] * (weights != (0, 1)) + [[(n, 90)] * 2 for n in shapes[9:]]
    assert row["memory_is"] == "bound"
    for name, gigabytes in row["memory_gb"].items():
        assert gigabytes == pytest.approx(row["fixed_gb"] + max(bytes_by_hand(slots, name)) / 1e9, rel=1e-12)
    _, _, _, _, drawn = by_hand(plan_of(mode, 8, plan=plan), 8, CLUSTER, False)
    assert max(bytes_by_hand(drawn, "none")) < (row["memory_gb"]["none"] - row["fixed_gb"]) * 1e9


def test_memory_of_packed_slots_is_the_fullest_measured_and_says_so():
    plan = replace(PLAN, modes=("packed",))
    row = rows_of(plan=plan, cluster=replace(CLUSTER, ranks=(8,)))["packed", 8]
    _, _, _, _, slots = by_hand(plan_of("packed", 8, plan=plan), 8, CLUSTER, False)
    assert row["memory_is"] == "measured" and len({sum(n + l for n, l in slot) for slot in slots}) > 1
    for name, gigabytes in row["memory_gb"].items():
        assert gigabytes == pytest.approx(row["fixed_gb"] + max(bytes_by_hand(slots, name)) / 1e9, rel=1e-12)


@given(st.integers(8_000, 40_000), st.integers(1, 2000), st.sampled_from([(1, 1), (1, 0), (0, 1)]), st.data())
def test_no_slot_under_a_cap_holds_more_than_the_bound_of_packed_slots(cap, text_cap, weights, draw):
    data = replace(DATA, text_cap=text_cap)
    plan = replace(PLAN, modes=("packed",), max_tokens=cap, weights=weights, steps=1)
    row = rows_of(data=data, plan=plan, cluster=replace(CLUSTER, ranks=(8,)))["packed", 8]
    assert row["memory_is"] == "bound"
    bases = [base for base, weight in zip((256, 512), weights, strict=True) if weight]
    shapes = [bucket.tokens() for base in bases for bucket in plan_report.buckets_of(base)]
    pairs = draw.draw(st.lists(st.tuples(st.sampled_from(shapes), st.integers(0, text_cap)), min_size=1, max_size=60))
    slot = []
    for n, l in pairs * 20:
        slot += [(n, l)] * (sum(map(sum, slot)) + n + l <= cap)
    for name, gigabytes in row["memory_gb"].items():
        (held,), bound = bytes_by_hand([slot], name), (gigabytes - row["fixed_gb"]) * 1e9
        assert held <= bound * (1 + 1e-9)
        # The worst shape alone, without text or with the longest, comes within a sample of the bound.
        fills = [[(n, l)] * (cap // (n + l)) for n in shapes for l in (0, text_cap)]
        room = max(activation_bytes(TINY, n, l, recompute=name) for n in shapes for l in (0, text_cap))
        assert bound <= max(bytes_by_hand(fills, name)) + room


def test_where_memory_is_only_measured_the_table_marks_it_and_the_notes_say_so(capsys):
    config = ReportConfig(data=DATA, plan=PLAN, cluster=replace(CLUSTER, ranks=(8,)), model=TINY)
    for modes, cap, kinds in (
        (("bucket", "packed"), None, ["bound", "measured"]),
        (("packed",), None, ["measured"]),
        (("bucket", "packed"), 8_000, ["bound", "bound"]),
    ):
        report = make_report(replace(config, plan=replace(PLAN, modes=modes, max_tokens=cap)))
        plan_report.print_report(report)
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["8"]]
        assert [row["memory_is"] for row in report["rows"]] == kinds
        assert [line[9].startswith(">") for line in lines] == [kind == "measured" for kind in kinds]
        (note,) = [note for note in report["notes"] if note.startswith("counted")]
        assert ("in the steps measured" in note) == ("measured" in kinds) and ("can be" in note) == ("bound" in kinds)


def test_the_picture_says_whose_memory_is_only_measured(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b"")))
    rows = rows_of(plan=replace(PLAN, modes=("bucket", "packed")))
    plan_report.plot_rows(list(rows.values()), tmp_path / "a.png", memory_gb=80)
    panel = drawn[0].axes[1]
    words = [label.get_text().split(", ")[-1] for label in panel.get_yticklabels()]
    assert words == ["bound", "measured"] and "in the steps measured" in panel.get_title()


def test_the_order_is_of_the_seed_stated():
    orders = [plan_of("packed", 8, plan=replace(PLAN, seed=seed)).step(0).samples.tolist() for seed in (0, 7, 7)]
    assert orders[1] == orders[2] != orders[0]
    source = synthetic_source(DATA, DATA.mixes[0], 0)
    # The seed of the captions apart, so that only the order is left to differ.
    first, second = (make_plan(source, replace(PLAN, seed=seed), TINY, "bucket", 8) for seed in (0, 7))
    assert (first.seed, second.seed) == (0, 7) and first.fingerprint() != second.fingerprint()


def test_every_mix_is_priced_for_the_images_of_the_first():
    data = replace(DATA, mixes=("256", "512", "256+512"), base_shares=())
    plan = PlanConfig(num_slots=8, slot_tokens=4096, modes=("bucket", "packed"), steps=3)
    config = ReportConfig(data=data, plan=plan, cluster=replace(CLUSTER, ranks=(4, 8)), model=TINY, run=RUN)
    # Sixteen squares of 256 fill a slot.
    assert {row["images_of_run"] for row in make_report(config)["rows"]} == {1000 * 8 * 16}
    config = replace(config, run=LengthConfig(steps=1000, images=77))
    assert {row["images_of_run"] for row in make_report(config)["rows"]} == {77}


def test_the_least_recomputation_that_fits_is_chosen():
    memory = rows_of()["packed", 8]["memory_gb"]
    assert memory["none"] > memory["selective"] > memory["full"]
    for limit, chosen in [*((memory[name], name) for name in memory), (0.99 * memory["full"], None)]:
        row = rows_of(cluster=replace(CLUSTER, memory_gb=limit))["packed", 8]
        assert row["recompute"] == chosen and row["memory_gb"] == memory


@given(st.integers(1, 10**9), st.integers(2, 50), st.sampled_from(MODES))
def test_days_are_in_proportion_to_images(images, factor, mode):
    plan = replace(PLAN, modes=(mode,), steps=2)
    once, more = (
        rows_of(plan=plan, cluster=replace(CLUSTER, ranks=(8,)), run=LengthConfig(images=number))[mode, 8]
        for number in (images, factor * images)
    )
    assert more["days"] == pytest.approx(factor * once["days"])
    assert more["epochs"] == pytest.approx({base: factor * value for base, value in once["epochs"].items()})


def test_equal_samples_take_the_days_that_their_flops_say_on_any_number_of_ranks():
    data = SyntheticConfig(mixes=("512",), aspect_shares=(0, 0, 0, 0, 1, 0, 0, 0, 0), text_spread=0.0)
    cluster = replace(CLUSTER, **FREE, ranks=(2, 8, 64), peak_tflops=100.0, mfu=0.5)
    found = rows_of(
        data=data, cluster=cluster, plan=replace(PLAN, images_per_slot=(3,)), run=LengthConfig(images=10**9)
    )
    for (_, ranks), row in found.items():
        assert row["balance"] == pytest.approx(1, rel=1e-12) and row["mfu"] == pytest.approx(0.5)
        assert row["days"] == pytest.approx(10**9 * train_flops(TINY, 1024, 150) / (ranks * 50e12) / 86_400)


def test_rows_are_priced_for_the_images_of_the_first_mode_with_the_plans_slots(rows):
    images = RUN.steps * plan_of("bucket", 8).report(PLAN.steps).images
    assert {row["images_of_run"] for row in rows.values()} == {images}
    epochs = rows["bucket", 2]["epochs"]
    assert epochs["256"] * 3500 + epochs["512"] * 1500 == pytest.approx(images)
    # Without weights every sample comes as often.
    assert epochs["256"] == pytest.approx(epochs["512"], rel=0.2)


def test_more_ranks_than_slots_make_a_larger_step_and_fewer_take_slots_in_turn(rows):
    for mode in MODES:
        assert [rows[mode, ranks]["micro_steps"] for ranks in CLUSTER.ranks] == [4, 2, 1, 1]
        assert [rows[mode, ranks]["num_slots"] for ranks in CLUSTER.ranks] == [8, 8, 8, 16]
    assert rows["packed", 16]["images_per_step"] == 2 * rows["packed", 8]["images_per_step"]
    row = rows_of(plan=replace(PLAN, modes=("packed",)), cluster=replace(CLUSTER, ranks=(12,)))["packed", 12]
    assert (row["num_slots"], row["images_per_step"] / 12) == (12, rows["packed", 8]["images_per_step"] / 8)


def test_a_slow_network_sets_the_pace():
    cluster = replace(CLUSTER, ranks=(2, 4, 16), node_gb_per_s=0.02, network_gb_per_s=0.01)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LensTransformer(TINY).parameters())
    for (_, ranks), row in rows_of(cluster=cluster).items():
        # A rank of two sends half: bfloat16 weights twice and float32 gradients. Its half of the gradients then goes round
        # all nodes there and back.
        inside = {2: 4, 4: 2, 16: 1}[ranks] * parameters / 2 * (2 + 2 + 4) / 0.02e9
        across = 2 * (parameters / 2 * 4) * {2: 0, 4: 1 / 2, 16: 7 / 8}[ranks] / 0.01e9
        assert row["communication_seconds"] == pytest.approx(inside + across)
        assert row["seconds_per_step"] == pytest.approx(inside + across) and inside > row["compute_seconds"] > 0


def test_800_million_synthetic_samples_take_hardly_any_memory():
    tracemalloc.start()
    source = synthetic_source(SyntheticConfig(), "512+768+1024", 0)
    plan = make_plan(source, PlanConfig(mean_images=4), TINY, "packed", 16)
    table = measure_slots(plan, TINY, 4)
    assert len(plan.fingerprint()) == 32
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.sizes.sum() == len(source.text_lengths) == 800_000_000 and table.images.sum() == 4 * 16 * 4
    # A byte for each sample would be 800 MB.
    assert peak < 60e6


@pytest.mark.parametrize(("mean", "spread", "cap"), [(150, 0.5, 415), (60, 1.0, 10_000), (200, 0.0, 415)])
def test_synthetic_captions_are_lognormal_with_the_mean_and_spread_stated(mean, spread, cap):
    lengths = TextLengths(800_000_000, mean=mean, spread=spread, cap=cap, seed=1)
    drawn = lengths[np.random.default_rng(0).integers(0, len(lengths), 400_000)]
    middle, normal = math.log(mean) - spread**2 / 2, NormalDist()
    assert drawn.min() >= 1 and drawn.max() <= cap
    if not spread:
        assert set(drawn.tolist()) == {mean}
        return
    edge = (math.log(cap) - middle) / spread
    capped = mean * normal.cdf(edge - spread) + cap * (1 - normal.cdf(edge))
    assert drawn.mean() == pytest.approx(capped, rel=0.006)
    for z in (-1.5, -0.5, 0.0, 1.0, 1.9):
        share = (drawn <= math.exp(middle + z * spread)).mean()
        # A whole number of tokens is some width in z.
        assert share == pytest.approx(normal.cdf(z), abs=0.01)


def test_neighbours_and_seeds_are_independent():
    lengths = TextLengths(10**6, mean=150, spread=0.5, cap=415, seed=1)
    other = TextLengths(10**6, mean=150, spread=0.5, cap=415, seed=2)
    drawn = np.log(lengths[:100_000])
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn, np.log(other[:100_000]))[0, 1]) < 0.02


@given(st.integers(0, 2**40), st.lists(st.integers(0, 799_999_999), min_size=1, max_size=9))
def test_a_caption_is_the_same_asked_alone_together_again_or_by_slice(seed, samples):
    make = {"mean": 150, "spread": 0.5, "cap": 415, "seed": seed}
    lengths, again = TextLengths(800_000_000, **make), TextLengths(800_000_000, **make)
    together = again[np.array(samples)]
    assert together.tolist() == [int(lengths[i]) for i in samples]
    first = samples[0]
    assert lengths[first::1_000_003].tolist() == lengths[np.arange(first, 800_000_000, 1_000_003)].tolist()


@given(st.integers(1, 10**9), st.lists(st.just(0.0) | st.floats(1e-6, 5), min_size=3, max_size=3).filter(any))
def test_sizes_are_all_the_samples_in_the_shares_stated(num_samples, shares):
    data = SyntheticConfig(num_samples=num_samples, base_shares=tuple(shares))
    source = synthetic_source(data, "512+768+1024", 0)
    assert source.sizes.sum() == num_samples and source.sizes.min() >= 0
    for place in range(3):
        held = source.sizes[source.labels == place]
        for size, aspect in zip(held, data.aspect_shares, strict=True):
            assert abs(size - num_samples * shares[place] / sum(shares) * aspect / sum(data.aspect_shares)) <= 1.001
    assert source.tokens.tolist() == [bucket.height * bucket.width // 256 for bucket in LENS_BUCKETS]


def test_presets_describe_themselves_and_hold_the_papers_numbers():
    names = [make.__name__ for make in PRESETS]
    assert set(names) == {"stage1", "stage2", "packed", "manifest", "mixes"}
    assert all(make.__doc__ and make.__doc__.endswith(".") for make in PRESETS)
    presets = {make.__name__: make() for make in PRESETS}
    # 24, 10 and 6 images are what the budget of image tokens gives, too.
    data, fixed = SyntheticConfig(num_samples=10**6), presets["stage2"].plan
    source = synthetic_source(data, "512+768+1024", 0)
    for config in (fixed, replace(fixed, images_per_slot=())):
        plan = make_plan(source, config, TINY, "bucket", 128)
        assert plan.images_per_slot.tolist() == [24] * 9 + [10] * 9 + [6] * 9
        slots = np.diff(plan.step(0).offsets)
        # Bases are in equally many slots, whose mean is 40 / 3 images; a packed slot has as many.
        assert [int((slots == images).sum()) for images in (24, 10, 6)] == pytest.approx([128 / 3] * 3, abs=2)
    assert make_plan(source, fixed, TINY, "packed", 128).schedule.units == 13 * 128
    stage1 = replace(presets["stage1"].data, num_samples=10**6)
    assert (
        len(make_plan(synthetic_source(stage1, "512", 0), presets["stage1"].plan, TINY, "bucket", 128).step(0).samples)
        == 3072
    )
    cap = presets["packed"].plan.max_tokens
    assert rows_of(
        data=data, plan=replace(presets["packed"].plan, steps=3), cluster=replace(CLUSTER, ranks=(128,))
    )["packed", 128]["most_slot_tokens"] <= cap  # fmt: skip
    assert presets["stage2"].run.steps * 128 * 40 // 3 == pytest.approx(0.683e9, rel=1e-3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report on several mixes and one on several rank counts, as the scripts write them."""
    root = tmp_path_factory.mktemp("reports")
    plan, cluster = replace(PLAN, images_per_slot=(), slot_tokens=4096, steps=2), replace(CLUSTER, ranks=(4, 8, 16))
    for name, data in (("one", DATA), ("two", replace(DATA, mixes=("256", "512+1024"), base_shares=()))):
        main(ReportConfig(data=data, plan=plan, cluster=cluster, model=TINY, run=LengthConfig(out=root / name)))
    return root


@pytest.mark.parametrize(("name", "num_rows"), [("one", 9), ("two", 18)])
def test_what_is_written_can_be_read(written, name, num_rows):
    found = json.loads((written / name / "plan_report.json").read_text(), parse_constant=pytest.fail)
    assert len(found["rows"]) == num_rows
    assert len({(row["mix"], row["mode"], row["ranks"]) for row in found["rows"]}) == num_rows
    assert found["config"]["plan"]["num_slots"] == 8 and found["provenance"]["versions"]["torch"]
    assert any("measured from the plan" in note for note in found["notes"])
    assert any("modelled" in note for note in found["notes"])
    from PIL import Image

    with Image.open(written / name / "plan_report.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 700
    assert sorted(path.name for path in (written / name).iterdir()) == ["plan_report.json", "plan_report.png"]


def test_the_table_without_a_terminal_is_plain_and_has_a_line_for_every_row(capsys):
    config = ReportConfig(data=DATA, plan=PLAN, cluster=CLUSTER, model=TINY)
    report = make_report(config)
    plan_report.print_report(report)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    for row in report["rows"]:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [f"{row['ranks']}"])
        assert len(line.split()) == 15
        printed = printed[printed.index(line) + len(line) :]
        assert [float(word) for word in line.split()[5:7]] == pytest.approx(
            [row["balance"], row["worst_balance"]], abs=1e-3
        )
        assert line.split()[10] == row["recompute"]


def make_manifest(folder, name="a.parquet", more=()):
    """Forty wide pictures of 512, twenty square ones of 1024, and one that is too small, with captions of 10 to 70."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    height, width = [360] * 40 + [1024] * 20 + [100, *more], [710] * 40 + [1024] * 20 + [100, *more]
    text = [10 + i for i in range(len(height))]
    pq.write_table(pa.table({"height": height, "width": width, "text_tokens": text}), folder / name)
    return folder / name


def test_a_manifest_is_read_into_buckets_and_an_index_kept_gives_the_same_report(tmp_path, capsys):
    path = make_manifest(tmp_path)
    plan = PlanConfig(num_slots=4, images_per_slot=(4, 3, 1), modes=("bucket",), steps=20)
    config = ReportConfig(plan=plan, cluster=replace(CLUSTER, ranks=(2, 4)), model=TINY, run=LengthConfig(images=120))
    reports = [
        make_report(replace(config, data=data))
        for data in (
            ManifestConfig(path=(path,)),
            ManifestConfig(path=(path,), index=tmp_path / "index"),
            ManifestConfig(path=(path,), index=tmp_path / "index"),
            ManifestConfig(path=(tmp_path / "index",)),
        )
    ]
    rows = [[{**row, "mix": ""} for row in report["rows"]] for report in reports]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert "60 samples, left out 1 smaller than every bucket" in reports[0]["notes"][0]
    assert "index from" in reports[2]["notes"][0]
    row = rows[0][0]
    # Two epochs of forty and twenty: slots of four 352x704 or one 1024x1024 picture, ten to twenty; 60 images in 30 slots.
    assert row["epochs"] == pytest.approx({"512": 2.0, "1024": 2.0}, rel=0.1)
    assert row["images_per_step"] == pytest.approx(4 * 60 / 30, rel=0.05)
    assert row["most_slot_tokens"] == 64 * 64 + 69
    assert row["image_tokens_per_step"] / row["images_per_step"] == pytest.approx(
        (40 * 22 * 44 + 20 * 4096) / 60, rel=0.1
    )


def test_an_index_of_other_files_is_refused(tmp_path):
    a, b, index = make_manifest(tmp_path), make_manifest(tmp_path, "b.parquet"), tmp_path / "index"
    plan = PlanConfig(num_slots=4, images_per_slot=(4, 3, 1), modes=("bucket",), steps=2)
    config = ReportConfig(plan=plan, cluster=replace(CLUSTER, ranks=(4,)), model=TINY)

    def report(*path, index=index):
        return make_report(replace(config, data=ManifestConfig(path=path, index=index)))

    rows = report(a)["rows"]
    assert report(a)["rows"] == rows
    with pytest.raises(
        ValueError, match="index was built from a.parquet of 61 rows where data.path has b.parquet of 61"
    ):
        report(b)
    with pytest.raises(ValueError, match="from no more files where data.path has b.parquet"):
        report(a, b)
    for path in ((index, b), (b, index)):
        with pytest.raises(ValueError, match="data.path: expected the index .* alone"):
            report(*path, index=None)
    with pytest.raises(ValueError, match="data.path: expected the index .* alone"):
        report(index, index=tmp_path / "other")
    assert report(index)["rows"][0]["days"] == report(index, index=None)["rows"][0]["days"] == rows[0]["days"]
    # A folder stands for its files, in order of name.
    report(a, b, index=tmp_path / "both")
    report(tmp_path, index=tmp_path / "both")
    with pytest.raises(ValueError, match="from a.parquet of 61 rows where data.path has b.parquet"):
        report(b, a, index=tmp_path / "both")
    with pytest.raises(ValueError, match="from b.parquet of 61 rows where data.path has no more files"):
        report(a, index=tmp_path / "both")
    make_manifest(tmp_path, more=[600])
    with pytest.raises(ValueError, match="from a.parquet of 61 rows where data.path has a.parquet of 62 rows"):
        report(a)


def test_buckets_of_an_index_far_from_every_base_are_refused(tmp_path):
    path, index = make_manifest(tmp_path), tmp_path / "index"
    config = ReportConfig(plan=replace(PLAN, images_per_slot=()), cluster=replace(CLUSTER, ranks=(8,)), model=TINY)
    assert make_report(replace(config, data=ManifestConfig(path=(path,), index=index)))["rows"]
    for mix, ok in (("256+1024", False), ("512+768", False), ("512+768+1440", False), ("448+832+960", True)):
        data = ManifestConfig(path=(index,), mix=mix)
        if ok:
            assert make_report(replace(config, data=data))["rows"]
            continue
        with pytest.raises(ValueError, match="data.mix: expected a base near each bucket of the index in area, got"):
            make_report(replace(config, data=data))
    for side, bases, near in ((512, [420], True), (512, [416], False), (512, [624], True), (512, [628], False)):
        # 1.5 is 1.2247 squared.
        if near:
            assert plan_report.base_of(Bucket(side, side), bases) == 0
        else:
            with pytest.raises(ValueError, match=f"got {side}x{side}"):
                plan_report.base_of(Bucket(side, side), bases)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("manifest", "data.path: expected Parquet files"),
        ("manifest --data.path nowhere.parquet", "nowhere.parquet: no such file or folder"),
        ("manifest --data.path FOLDER --data.mix 512+x", "expected different base resolutions"),
        ("manifest --data.path FOLDER/broken.parquet", "no complete Parquet file"),
        ("packed --plan.max-tokens 3000", "128 slots of 3000 tokens may not hold even one image"),
        ("packed --plan.max-tokens 20000 --plan.mean-images 13", "may not fit into 128 slots of 20000 tokens; "),
        ("stage2 --cluster.ranks 48", "divisors of plan.num_slots = 128, or more ranks than slots, got 48"),
        ("stage2 --cluster.ranks 4", "multiples of cluster.shard_over = 8, got 4"),
        ("stage2 --plan.weights 1 2", "plan.weights: expected one for each base"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words, message, tmp_path):
    (tmp_path / "broken.parquet").write_text("none")
    with pytest.raises(SystemExit) as refusal:
        cli([*words.replace("FOLDER", str(tmp_path)).split(), "--run.out", str(tmp_path / "out")])
    text = str(refusal.value)
    assert text.startswith("plan_report: ") and message in text and "\n" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "stage2 --cluster.mfu 0",
        "stage2 --plan.steps 0",
        "stage2 --data.aspect-shares 1 2",
        "stage2 --run.steps 0",
        "stage2 --plan.images-per-slot 24 10 0",
        "stage2 --plan.mean-images 0",
        "stage2 --plan.max-tokens 0",
        "stage2 --plan.weights 1 inf 1",
        "stage2 --plan.weights 1 -1 1",
        "stage2 --cluster.ranks 8 128 128",
        "stage2 --cluster.ranks 0",
        "stage2 --cluster.shard-over 0",
        "stage2 --cluster.peak-tflops inf",
        "stage2 --cluster.reserve-gb nan",
        "stage2 --cluster.text-gflops inf",
        "stage2 --data.text-mean inf",
        "stage2 --data.text-mean nan",
        "stage2 --data.text-spread 1e200",
        "stage2 --data.mixes 512 512",
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_read(words, capsys, monkeypatch):
    monkeypatch.setattr(plan_report, "main", pytest.fail)
    with pytest.raises(SystemExit):
        cli(words.split())
    # The parser breaks lines in its box.
    name = words.split()[1].removeprefix("--").replace("-", "_").split(".")
    assert name[0] in (said := capsys.readouterr().err) and name[1] in said and "Traceback" not in said


def test_the_help_of_every_preset_is_short_enough(capsys):
    for make in PRESETS:
        with pytest.raises(SystemExit) as leaving:
            cli([make.__name__, "--help"])
        assert leaving.value.code == 0
        flags = set(re.findall(r"--[a-z]+\.[a-z-]+", capsys.readouterr().out)) - {"--cluster.no-encoders-online"}
        assert 30 < len(flags) <= 40


def test_examples_run():
    for module in (plan_report, plan_report_rows):
        found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert found.attempted and not found.failed
