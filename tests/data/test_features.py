"""Laws of stored features: the values of a dtype, the same from every source, and the same end after any kill."""

import hashlib
import json
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lensmini.data import BatchPlan
from lensmini.data.collate import Sample, collate_samples
from lensmini.data.features import FeatureStore, OnlineFeatures, round_sample, write_features
from lensmini.data.fp8 import dequantise_features, quantise_features, relative_error
from lensmini.data.rolling import RollingFeatures
from tests.strategies import seeds

SHAPES = ((2, 4, 6), (2, 5, 5), (2, 6, 4))


def sample(number, scale=1.0):
    generator = torch.Generator().manual_seed(number)
    text = torch.randn(1 + number % 7, 3, 8, generator=generator) * torch.tensor([1.0, 30.0, 900.0])[:, None]
    return Sample(number, scale * torch.randn(SHAPES[number % 3], generator=generator), text)


def encode(numbers):
    return [sample(int(number)) for number in numbers]


def groups(num):
    return [range(shape, num, 3) for shape in range(3)]


def equal(one, other):
    return one.number == other.number and one.latents.equal(other.latents) and one.text_tokens.equal(other.text_tokens)


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 5), st.randoms(use_true_random=False))
def test_what_is_read_is_what_the_dtype_keeps(tmp_path_factory, precision, dtype, num, num_per_shard, batch_size, draw):
    out = tmp_path_factory.mktemp("features")
    options = {"num_per_shard": num_per_shard, "batch_size": batch_size}
    written = write_features(groups(num), encode, out, precision=precision, **options)
    assert written == sum(-(-len(group) // num_per_shard) for group in groups(num))
    store = FeatureStore(out)
    order = draw.sample(range(num), num)
    for found, number in zip(store.read(order), order, strict=True):
        original = sample(number)
        assert found.latents.equal(original.latents.to(dtype).float())
        assert found.text_tokens.equal(original.text_tokens.to(dtype).float())
    assert len(store) == num and store.verify() == [] and store.relative_errors == []


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 16), seeds(), st.sampled_from(["token", "layer"]))
def test_eight_bits_are_within_the_formats_rounding(tokens, layers, width, seed, scaling):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, layers, width, generator=generator) * 10.0 ** torch.arange(layers)[:, None]
    codes, scales = quantise_features(features, scaling=scaling)
    restored = dequantise_features(codes, scales)
    largest = features.abs().amax(2, keepdim=True)
    largest = largest.amax(0, keepdim=True) if scaling == "layer" else largest
    # Three bits of mantissa: half a step is 1/16 of a value; below 2^-6 of 448 steps are 2^-9 of the scale.
    bound = torch.maximum(features.abs() / 16, largest / 448 * 2**-10) * (1 + 1e-5)
    assert bool(((restored - features).abs() <= bound).all())
    assert scales.shape == ((tokens if scaling == "token" else 1), layers)
    top = features.abs() == largest
    assert torch.allclose(restored[top], features[top], rtol=1e-6)
    errors = relative_error(features, restored)
    by_hand = [((restored[:, j] - features[:, j]).norm() / features[:, j].norm()).item() for j in range(layers)]
    assert errors.tolist() == pytest.approx(by_hand, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("outlier", "layer_error"), [(1e3, (0.02, 0.03)), (1e6, (0.9, 1.1))])
def test_a_scale_for_each_token_does_not_mind_other_tokens(outlier, layer_error):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 2, 256, generator=generator)
    features[0] *= outlier  # the first token of a language model
    errors = {}
    for scaling in ("token", "layer"):
        restored = dequantise_features(*quantise_features(features, scaling=scaling))
        errors[scaling] = relative_error(features[1:], restored[1:]).max().item()
    assert 0.02 < errors["token"] < 0.03
    # Four bits of exponent carry a factor of a thousand; beyond it a scale for the layer loses the small ones.
    assert layer_error[0] < errors["layer"] < layer_error[1]


def test_zeros_stay_and_what_is_not_finite_is_refused():
    codes, scales = quantise_features(torch.zeros(2, 1, 4))
    assert not dequantise_features(codes, scales).any() and scales.eq(1).all()
    assert quantise_features(torch.zeros(0, 2, 4))[1].shape == (0, 2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quantise_features(torch.full((1, 1, 2), bad))
    with pytest.raises(ValueError, match="scaling"):
        quantise_features(torch.zeros(1, 1, 1), scaling="tensor")
    with pytest.raises(ValueError, match="scales"):
        dequantise_features(codes, torch.ones(3, 1))


def test_the_error_of_eight_bits_is_measured_and_written_down(tmp_path):
    write_features(groups(12), encode, tmp_path, precision="fp8", num_per_shard=2)
    store = FeatureStore(tmp_path)
    errors = store.relative_errors
    assert len(errors) == 6 and all(0.005 < error < 0.06 for row in errors for error in row)
    first = [sample(0), sample(3)]
    text = torch.cat([s.text_tokens for s in first])
    found = torch.cat([s.text_tokens for s in store.read([0, 3])])
    assert errors[0] == pytest.approx(relative_error(text, found).tolist(), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), seeds(), st.sampled_from(["bf16", "fp32", "fp8"]), st.booleans())
def test_every_source_gives_the_plans_batches(tmp_path_factory, slots, steps, seed, precision, ahead):
    folder = tmp_path_factory.mktemp("sources")
    plan = BatchPlan([10, 9, 11], [24, 25, 24], num_slots=slots, images_per_slot=3, seed=seed)
    # Numbers go bucket by bucket.
    shape_of = [0] * 10 + [1] * 9 + [2] * 11
    by_number = lambda numbers: [Sample(n, *sample(3 * n + shape_of[n])[1:]) for n in map(int, numbers)]  # noqa: E731
    numbers_of = lambda step: plan.assign(step, step + 1)[0].flatten().tolist()  # noqa: E731
    write_features([range(10), range(10, 19), range(19, 30)], by_number, folder / "store", precision=precision)
    store, online = FeatureStore(folder / "store"), OnlineFeatures(by_number, precision=precision)
    options = {"steps": steps, "precision": precision, "batch_size": 4, "ahead": ahead}
    rolling = RollingFeatures(numbers_of, by_number, folder / "rolling", **options)
    for step in range(7):
        numbers = numbers_of(step)
        rolling.prepare(step)
        batches = [collate_samples(source.read(numbers)) for source in (store, online, rolling)]
        for batch in batches[1:]:
            assert batch.samples.equal(batches[0].samples) and batch.image_tokens.equal(batches[0].image_tokens)
            assert batch.text_tokens.equal(batches[0].text_tokens)
        assert len(rolling.windows()) <= 3
    rolling.close()


def test_windows_are_encoded_once_and_thrown_away(tmp_path):
    asked = []

    def counted(numbers):
        asked.extend(numbers)
        return encode(numbers)

    def numbers_of(step):
        return [step, step + 1, 100]

    rolling = RollingFeatures(numbers_of, counted, tmp_path, steps=4)
    for step in range(12):
        rolling.prepare(step)
        assert [s.number for s in rolling.read(numbers_of(step))] == numbers_of(step)
        assert rolling.windows() == [step // 4]
    assert sorted(asked) == sorted([*range(5), *range(4, 9), *range(8, 13), 100, 100, 100])
    again = RollingFeatures(numbers_of, lambda numbers: pytest.fail("encoded again"), tmp_path, steps=4)
    again.prepare(11)
    assert equal(again.read([100])[0], round_sample(sample(100), "bf16"))
    with pytest.raises(ValueError, match=r"numbers: .*\[3\]"):
        again.read([3])
    other = RollingFeatures(lambda step: [step], encode, tmp_path, steps=4)
    other.prepare(11)
    assert [s.number for s in other.read([8, 11])] == [8, 11] and other._current.numbers == [8, 9, 10, 11]


def test_an_error_ahead_comes_up_in_the_trainer(tmp_path):
    def failing(numbers):
        if max(numbers) >= 6:
            raise RuntimeError("the encoder is gone")
        return encode(numbers)

    rolling = RollingFeatures(lambda step: [step], failing, tmp_path, steps=3, ahead=True)
    rolling.prepare(0)
    rolling.prepare(3)
    with pytest.raises(RuntimeError, match="encoder is gone"):
        rolling.prepare(6)


def test_a_half_written_window_is_made_again(tmp_path):
    rolling = RollingFeatures(lambda step: [step, 50], encode, tmp_path, steps=2)
    rolling.prepare(0)
    (tmp_path / "window-00000000" / "features.json").unlink()
    rolling = RollingFeatures(lambda step: [step, 50], encode, tmp_path, steps=2)
    rolling.prepare(1)
    assert [s.number for s in rolling.read([50, 0])] == [50, 0]
    with pytest.raises(ValueError, match="steps"):
        RollingFeatures(lambda step: [], encode, tmp_path, steps=0)
    with pytest.raises(ValueError, match="prepare"):
        RollingFeatures(lambda step: [], encode, tmp_path).read([0])


def test_done_again_nothing_is_encoded_and_only_what_is_missing_is(tmp_path):
    write_features(groups(20), encode, tmp_path, num_per_shard=4)
    before = digest(tmp_path)
    assert write_features(groups(20), lambda numbers: pytest.fail("encoded again"), tmp_path, num_per_shard=4) == 0
    (tmp_path / "features-00001-000000.safetensors").unlink()
    asked = []

    def counted(numbers):
        asked.extend(numbers)
        return encode(numbers)

    assert write_features(groups(20), counted, tmp_path, num_per_shard=4) == 1
    assert asked == [1, 4, 7, 10] and digest(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"precision": "fp32"}, {"made_by": {"encoder": "b"}}, {"num_per_shard": 5}, {"num": 21}]
)
def test_a_folder_of_other_features_is_refused(change, tmp_path):
    write_features(groups(20), encode, tmp_path, made_by={"encoder": "a"}, num_per_shard=4)
    num, change = change.get("num", 20), {name: value for name, value in change.items() if name != "num"}
    with pytest.raises(ValueError, match="out: .* other samples, models or precision"):
        write_features(groups(num), encode, tmp_path, **{"made_by": {"encoder": "a"}, "num_per_shard": 4, **change})
    assert FeatureStore(tmp_path, made_by={"encoder": "a"}).read([3])
    with pytest.raises(ValueError, match="made_by: expected encoder 'b'"):
        FeatureStore(tmp_path, made_by={"encoder": "b"})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda n: Sample(n + 1, *sample(n)[1:]), "encode: expected samples"),
        (lambda n: Sample(n, sample(n + 1).latents, sample(n).text_tokens) if n == 3 else sample(n), "equal shapes"),
        (
            lambda n: Sample(n, sample(n).latents * float("nan"), sample(n).text_tokens) if n == 3 else sample(n),
            "sample 3",
        ),
        (lambda n: Sample(n, sample(n).latents, sample(n).text_tokens[0]), "text of sample 0"),
    ],
)
def test_what_encode_may_not_give(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_features([[0, 3, 6]], lambda numbers: [bad(number) for number in numbers], tmp_path)
    with pytest.raises(ValueError, match="expected finished features"):
        FeatureStore(tmp_path)
    with pytest.raises(ValueError, match="groups: expected every number once"):
        write_features([[0], [0]], encode, tmp_path / "twice")


def test_numbers_that_are_not_there_and_damage_are_named(tmp_path):
    write_features(groups(9), encode, tmp_path)
    store = FeatureStore(tmp_path)
    with pytest.raises(ValueError, match=r"numbers: .*\[9, -1\] \(2\)"):
        store.read([3, 9, -1])
    path = tmp_path / "features-00002-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert FeatureStore(tmp_path).verify() == [path.name]
    path.write_bytes(data[:-40])
    with pytest.raises(ValueError, match=rf"shard .*{path.name} is damaged"):
        FeatureStore(tmp_path).read([2])
    path.write_bytes(pickle.dumps({"latents": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        FeatureStore(tmp_path).read([2])
    assert FeatureStore(tmp_path).read([0, 1])


def test_slices_read_little_and_workers_may_share_a_store(tmp_path):
    big = lambda numbers: [Sample(n, torch.full((4, 128, 128), float(n)), torch.zeros(1, 1, 1)) for n in numbers]  # noqa: E731
    write_features([range(200)], big, tmp_path, precision="fp32")
    store = pickle.loads(pickle.dumps(FeatureStore(tmp_path)))
    before = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    assert store.read([150])[0].latents.eq(150).all()
    assert int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0]) - before < 2**20
    with safe_open(tmp_path / "features-00000-000000.safetensors", framework="pt") as file:
        assert file.get_slice("latents").get_shape() == [200, 4, 128, 128]
    loader = torch.utils.data.DataLoader([[7], [9]], batch_size=None, num_workers=1, collate_fn=store.read)
    assert [[sample.number for sample in batch] for batch in loader] == [[7], [9]]


PROGRAM = """
import sys, time
from tests.data.test_features import encode, groups
from lensmini.data.features import write_features
def slow(numbers):
    time.sleep(0.01)
    return encode(numbers)
write_features(groups(120), slow, sys.argv[1], num_per_shard=3, precision="fp8")
"""


@pytest.mark.slow
def test_killed_at_any_point_it_ends_with_the_bytes_of_an_uninterrupted_run(tmp_path):
    def start(name):
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / name)], cwd=Path(__file__).parents[2])

    assert start("whole").wait() == 0
    draw, kills = random.Random(0), 0
    for _ in range(4):
        process, until = start("torn"), len(list((tmp_path / "torn").glob("*"))) + draw.randint(1, 12)
        while process.poll() is None and len(list((tmp_path / "torn").glob("*"))) < until:
            time.sleep(0.0005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3 and start("torn").wait() == 0
    assert digest(tmp_path / "torn") == digest(tmp_path / "whole")
    assert json.loads((tmp_path / "torn" / "features.json").read_text())["precision"] == "fp8"
