"""Laws of the sample index: it is the slow sort of the manifest, refuses what is wrong, and is never half there."""

import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.data.buckets import LENS_BUCKETS, Bucket
from lensmini.data.index import SampleIndex
from lensmini.data.manifest import CAUSES

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

BUCKETS = (Bucket(32, 32), Bucket(24, 40), Bucket(40, 24), Bucket(64, 64), Bucket(48, 80))
BASES = (0, 0, 0, 1, 1)
GOOD = {"height": [40, 70, 50], "width": [40, 70, 90], "text_tokens": [1, 2, 3]}


def write(path, columns, **options):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **options)
    return path


def slow_bucket(height, width):
    """The rule in words: nearest aspect of a base, narrower on a tie; the largest base that is covered; else -1."""
    for label in (1, 0):
        members = [bucket for bucket, base in zip(BUCKETS, BASES, strict=True) if base == label]
        best = min(members, key=lambda b: (round(abs(math.log(width / height * b.height / b.width)), 12), b.width))
        if height >= best.height and width >= best.width:
            return BUCKETS.index(best)
    return -1


def slow_cause(sample, top):
    for name, low, high in (("height", 1, top), ("width", 1, top), ("text_tokens", 0, 65535), ("source", 0, 0)):
        if sample[name] is None:
            return f"{name} null"
        if name != "source" and not low <= sample[name] <= high:
            return f"{name} out of range"
    return "" if slow_bucket(sample["height"], sample["width"]) >= 0 else "smaller than every bucket"


def slow_index(samples, top=65535):
    """The kept samples as dictionaries in order of position, and the rows left out by cause."""
    kept, left = [], {}
    for row, sample in enumerate(samples):
        if cause := slow_cause(sample, top):
            left.setdefault(cause, []).append(row)
        else:
            kept.append({**sample, "row": row, "bucket": slow_bucket(sample["height"], sample["width"])})
    return sorted(kept, key=lambda sample: sample["bucket"]), left


@st.composite
def manifests(draw, size, clean=False):
    side = st.sampled_from(
        [32, 40, 48, 64, 80, 96, 200] if clean else [None, -3, 0, 9, 24, 32, 40, 48, 64, 80, 200, 70000]
    )
    text = st.sampled_from([0, 1, 77, 65535] if clean else [None, -1, 0, 77, 65535, 65536])
    name = st.sampled_from(["web", "photo", "art"] if clean else [None, "web", "photo", "art"])
    sample = st.fixed_dictionaries({"height": side, "width": side, "text_tokens": text, "source": name})
    return draw(st.lists(sample, min_size=size, max_size=60))


def table_of(samples):
    kinds = {"height": pa.int32(), "width": pa.int64(), "text_tokens": pa.int32(), "source": pa.string()}
    columns = {name: pa.array([s[name] for s in samples], kind) for name, kind in kinds.items()}
    shard = pa.array([row // 7 for row in range(len(samples))], pa.uint16())
    return pa.table({**columns, "shard": shard, "offset": pa.array([2**40 + row for row in range(len(samples))])})


@given(manifests(1), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3))
@example([{"height": 40, "width": 40, "text_tokens": 3, "source": "web"}], 1, 1, 1)
def test_an_index_is_the_slow_stable_sort_of_the_good_rows(samples, group, chunk, num_files):
    kept, left = slow_index(samples)
    cuts = np.linspace(0, len(samples), num_files + 1).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(samples)
        files = [
            write(f"{folder}/{number}.parquet", table.slice(start, stop - start), row_group_size=group)
            for number, (start, stop) in enumerate(pairwise(cuts))
        ]

        def build():
            out = f"{folder}/index"
            return SampleIndex.build(files, out, BUCKETS, bases=BASES, small="drop", invalid="drop", chunk_rows=chunk)

        if not kept:
            with pytest.raises(ValueError, match="expected samples"):
                build()
            return
        index = build()
        index.verify()
        assert len(index) == len(kept)
        assert index.buckets == BUCKETS
        found = index.lookup(np.arange(len(index)))
        assert all(column.dtype == np.int64 for column in found.values())
        for name in ("row", "bucket", "height", "width", "text_tokens"):
            assert found[name].tolist() == [sample[name] for sample in kept]
        assert [index.sources[number] for number in found["source"]] == [sample["source"] for sample in kept]
        assert list(index.sources) == sorted({sample["source"] for sample in kept})
        assert found["shard"].tolist() == [sample["row"] // 7 for sample in kept]
        assert found["offset"].tolist() == [2**40 + sample["row"] for sample in kept]
        numbers = [sum(sample["bucket"] < bucket for sample in kept) for bucket in range(len(BUCKETS) + 1)]
        assert index.bucket_starts.tolist() == numbers and index.bucket_starts.dtype == np.int64
        assert index.left_out == {cause: len(rows) for cause, rows in left.items()}
        assert {cause: index.left_out_rows(cause).tolist() for cause in left} == left
        file, row = index.locate(found["row"])
        assert (cuts[file] + row).tolist() == found["row"].tolist() and (row < np.diff(cuts)[file]).all()


@given(manifests(1), manifests(1, clean=True), st.integers(1, 9), st.integers(1, 9))
def test_cutting_the_manifest_otherwise_changes_nothing(dirty, clean, group, chunk):
    samples = clean + dirty
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name), table_of(samples)
        write(folder / "one.parquet", table)
        (folder / "many").mkdir()
        write(folder / "many" / "b.parquet", table.slice(len(clean)), row_group_size=group, compression="none")
        write(folder / "many" / "a.parquet", table.slice(0, len(clean)), row_group_size=group, use_dictionary=False)
        rules = {"bases": BASES, "small": "drop", "invalid": "drop"}
        one = SampleIndex.build(folder / "one.parquet", folder / "1", BUCKETS, **rules)
        many = SampleIndex.build(folder / "many", folder / "2", BUCKETS, chunk_rows=chunk, **rules)
        assert one.fingerprint == many.fingerprint
        assert one.sources == many.sources
        for column in one.columns:
            assert (folder / "1" / f"{column}.npy").read_bytes() == (folder / "2" / f"{column}.npy").read_bytes()
        assert many.files == (("a.parquet", len(clean)), ("b.parquet", len(dirty)))


@pytest.mark.parametrize("change", ["value", "order", "bucket"])
def test_another_manifest_or_table_has_another_fingerprint(tmp_path, change):
    columns, buckets = {name: list(values) for name, values in GOOD.items()}, BUCKETS
    if change == "value":
        columns["text_tokens"][1] = 4
    elif change == "order":
        columns = {name: values[::-1] for name, values in columns.items()}
    else:
        buckets = (*BUCKETS[:-1], Bucket(48, 84))
    a = SampleIndex.build(write(tmp_path / "a.parquet", GOOD), tmp_path / "a", BUCKETS, bases=BASES)
    b = SampleIndex.build(write(tmp_path / "b.parquet", columns), tmp_path / "b", buckets, bases=BASES)
    assert a.fingerprint != b.fingerprint


def test_columns_are_mapped_read_only_and_narrow(tmp_path):
    index = SampleIndex.build(write(tmp_path / "a.parquet", GOOD), tmp_path / "index", BUCKETS, bases=BASES)
    for name, column in index.columns.items():
        assert isinstance(column, np.memmap) and column.filename == tmp_path / "index" / f"{name}.npy"
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    assert {name: column.dtype.itemsize for name, column in index.columns.items()} == {
        "row": 4,
        "height": 2,
        "width": 2,
        "text_tokens": 2,
    }
    assert index.mapped_bytes == 3 * 10
    assert sorted(os.listdir(tmp_path)) == ["a.parquet", "index"]


def test_an_index_travels_to_workers_as_its_folder(tmp_path):
    rows = 5000
    columns = {"height": [64] * rows, "width": [64] * rows, "text_tokens": list(range(rows))}
    index = SampleIndex.build(write(tmp_path / "a.parquet", columns), tmp_path / "index", BUCKETS, bases=BASES)
    sent = pickle.dumps(index)
    assert len(sent) < 500
    copy = pickle.loads(sent)
    assert isinstance(copy.columns["row"], np.memmap)
    assert copy.lookup([[4999, 3], [1, 0]])["text_tokens"].tolist() == [[4999, 3], [1, 0]]


def test_the_rule_for_small_images_is_assign_buckets_rule(tmp_path):
    small = write(tmp_path / "a.parquet", {"height": [600, 100], "width": [600, 300], "text_tokens": [1, 2]})
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0, row 1: 100 x 300 pixels are smaller than every"):
        SampleIndex.build(small, tmp_path / "index", LENS_BUCKETS)
    dropped = SampleIndex.build(small, tmp_path / "dropped", LENS_BUCKETS, small="drop")
    assert dropped.left_out == {"smaller than every bucket": 1}
    assert dropped.left_out_rows("smaller than every bucket").tolist() == [1]
    kept = SampleIndex.build(small, tmp_path / "kept", LENS_BUCKETS, small="upscale")
    assert [kept.buckets[bucket] for bucket in kept.lookup([0, 1])["bucket"]] == [Bucket(512, 512), Bucket(352, 704)]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("height", None, "height: expected 1 to 1000, got null"),
        ("width", 0, "width: expected 1 to 1000, got 0"),
        ("width", -7, "width: expected 1 to 1000, got -7"),
        ("height", 1001, "height: expected 1 to 1000, got 1001"),
        ("height", 2**62, "height: expected 1 to 1000, got 4611686018427387904"),
        ("text_tokens", -1, "text_tokens: expected 0 to 65535, got -1"),
        ("source", 65536, "source: expected 0 to 65535, got 65536"),
        ("shard", 2**32, "shard: expected 0 to 4294967295, got 4294967296"),
        ("offset", -1, "offset: expected 0 to 9223372036854775807, got -1"),
        ("sample_id", None, "sample_id: expected -9223372036854775808 to 9223372036854775807, got null"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_bad_row_is_refused_with_its_place_or_left_out(tmp_path, name, value, said, chunk):
    rows, bad = 20, 13
    columns = {"height": [64] * rows, "width": [64] * rows, "text_tokens": [5] * rows, "source": [3] * rows}
    columns |= {"shard": list(range(rows)), "offset": list(range(rows)), "sample_id": list(range(rows))}
    columns[name][bad] = value
    (tmp_path / "m").mkdir()
    table = pa.table({key: pa.array(values, pa.int64()) for key, values in columns.items()})
    write(tmp_path / "m" / "a.parquet", table.slice(0, 5))
    write(tmp_path / "m" / "b.parquet", table.slice(5), row_group_size=6)
    rules = {"bases": BASES, "max_side": 1000, "chunk_rows": chunk}
    with pytest.raises(ValueError, match=re.escape(f"b.parquet, row group 1, row 2: {said}")):
        SampleIndex.build(tmp_path / "m", tmp_path / "index", BUCKETS, **rules)
    assert os.listdir(tmp_path) == ["m"]
    index = SampleIndex.build(tmp_path / "m", tmp_path / "index", BUCKETS, invalid="drop", **rules)
    cause = f"{name} null" if value is None else f"{name} out of range"
    assert index.left_out == {cause: 1} and index.left_out_rows(cause).tolist() == [bad]
    assert index.lookup(range(19))["row"].tolist() == [row for row in range(rows) if row != bad]
    with pytest.raises(ValueError, match="cause"):
        index.left_out_rows("no such cause")


def test_every_cause_is_told_apart():
    assert len(set(CAUSES)) == len(CAUSES) == 16


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.uint32(), pa.int64(), pa.uint64()])
def test_any_integer_type_is_read(tmp_path, kind):
    columns = {name: pa.array(values, kind) for name, values in GOOD.items()}
    path = write(tmp_path / "a.parquet", {**columns, "sample_id": columns["width"], "caption": ["a", None, "b"]})
    index = SampleIndex.build(path, tmp_path / "index", BUCKETS, bases=BASES)
    assert index.lookup([0, 1, 2])["sample_id"].tolist() == [40, 70, 90]
    assert "caption" not in index.columns


def test_an_unsigned_number_too_large_for_int64_does_not_wrap(tmp_path):
    columns = {**GOOD, "sample_id": pa.array([1, 2**63, 3], pa.uint64())}
    with pytest.raises(ValueError, match="row 1: sample_id: expected .* got 9223372036854775808"):
        SampleIndex.build(write(tmp_path / "a.parquet", columns), tmp_path / "index", BUCKETS, bases=BASES)


def test_columns_may_have_other_names_and_sources_may_be_numbers(tmp_path):
    columns = {"h": GOOD["height"], "w": GOOD["width"], "n": GOOD["text_tokens"], "set": [700, 5, 700]}
    path = write(tmp_path / "a.parquet", columns)
    renamed = {"height": "h", "width": "w", "text_tokens": "n", "source": "set"}
    index = SampleIndex.build(path, tmp_path / "index", BUCKETS, bases=BASES, columns=renamed)
    found = index.lookup([0, 1, 2])
    assert found["width"].tolist() == [40, 70, 90] and found["text_tokens"].tolist() == [1, 2, 3]
    assert index.sources == (5, 700) and found["source"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"height": None}, r"expected a column 'height'"),
        ({"text_tokens": None}, r"expected a column 'text_tokens'"),
        ({"width": [1.0, 2.0, 3.0]}, "width: expected integers, got double"),
        ({"width": ["40", "70", "90"]}, "width: expected integers, got string"),
        ({"width": [True, True, False]}, "width: expected integers, got bool"),
        ({"source": [0.5, 1.0, 2.0]}, "source: expected integers, got double"),
        ({"shard": [1, 2, 3]}, "both columns shard and offset or neither"),
    ],
)
@pytest.mark.parametrize("invalid", ["error", "drop"])
def test_wrong_columns_are_always_refused(tmp_path, change, said, invalid):
    columns = {name: values for name, values in {**GOOD, **change}.items() if values is not None}
    good, bad = write(tmp_path / "a.parquet", GOOD), write(tmp_path / "b.parquet", columns)
    with pytest.raises(ValueError, match=rf"b\.parquet.*{said}"):
        SampleIndex.build([good, bad], tmp_path / "index", BUCKETS, bases=BASES, invalid=invalid)
    assert not (tmp_path / "index").exists()


def test_files_must_agree_on_optional_columns(tmp_path):
    a = write(tmp_path / "a.parquet", GOOD)
    b = write(tmp_path / "b.parquet", {**GOOD, "source": ["x", "y", "z"]})
    c = write(tmp_path / "c.parquet", {**GOOD, "source": [1, 2, 3]})
    for files in ([a, b], [b, a], [b, c]):
        with pytest.raises(ValueError, match="has the columns"):
            SampleIndex.build(files, tmp_path / "index", BUCKETS, bases=BASES)


def test_a_truncated_or_damaged_file_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(64, 900, 4000) for name in GOOD}
    path = write(
        tmp_path / "a.parquet",
        columns,
        row_group_size=1000,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    whole = path.read_bytes()
    build = {"buckets": BUCKETS, "bases": BASES, "invalid": "drop", "small": "drop"}
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.parquet is no complete Parquet file"):
            SampleIndex.build(path, tmp_path / "index", **build)
    group = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2)
    at = group.column(0).data_page_offset + group.column(0).total_compressed_size - 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"cannot read on at .*a\.parquet, row group [12], "):
        SampleIndex.build(path, tmp_path / "index", **build, chunk_rows=500)
    assert os.listdir(tmp_path) == ["a.parquet"]
    path.write_bytes(whole)
    assert len(SampleIndex.build(path, tmp_path / "index", **build)) > 0


KILLED = """
import os, sys
import lensmini.data.{module} as module
from lensmini.data.index import SampleIndex
from lensmini.data.buckets import Bucket
real, calls = getattr(module, {name!r}), [0]
def deadly(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {call}:
        os._exit(9)
    return real(*args, **kwargs)
setattr(module, {name!r}, deadly)
SampleIndex.build(sys.argv[1], sys.argv[2], [Bucket(32, 32)], chunk_rows=1)
"""


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [("index", "_assign", 3), ("spill", "_write_array", 3), ("index", "_sync", 1), ("index", "_sync", 2)],
)
def test_a_killed_build_leaves_nothing_that_opens_and_the_next_one_works(tmp_path, module, name, call):
    path = write(tmp_path / "a.parquet", GOOD)
    code = KILLED.format(module=module, name=name, call=call)
    killed = subprocess.run([sys.executable, "-c", code, path, tmp_path / "index"], timeout=120, check=False)
    assert killed.returncode == 9
    left = [entry for entry in tmp_path.iterdir() if entry != path]
    assert left and all(entry.name.startswith(".index-") for entry in left)
    for folder in (tmp_path / "index", *left):
        with pytest.raises(ValueError, match=r"index\.json"):
            SampleIndex(folder)
    assert len(SampleIndex.build(path, tmp_path / "index", [Bucket(32, 32)])) == 3


@pytest.mark.parametrize(("module", "name"), [("index", "_assign"), ("spill", "_write_array"), ("index", "_hash")])
def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, module, name):
    path = write(tmp_path / "a.parquet", GOOD)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lensmini.data.{module}.{name}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SampleIndex.build(path, tmp_path / "index", [Bucket(32, 32)])
    assert os.listdir(tmp_path) == ["a.parquet"]


@pytest.fixture
def built(tmp_path):
    path = write(tmp_path / "a.parquet", {**GOOD, "source": ["x", "y", "x"]})
    return SampleIndex.build(path, tmp_path / "index", BUCKETS, bases=BASES).folder


def test_opening_checks_the_files_against_the_header(built):
    for name in ("row", "height", "source", "left_out_row", "left_out_cause"):
        path = built / f"{name}.npy"
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole + b"\0", whole[:20], b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{name}\.npy"):
                SampleIndex(built)
        np.save(path, np.zeros(3, np.float32))
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            SampleIndex(built)
        np.save(path, np.array([{}, {}, {}]), allow_pickle=True)
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            SampleIndex(built)
        path.unlink()
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            SampleIndex(built)
        path.write_bytes(whole)
    SampleIndex(built).verify()


def test_a_changed_header_is_refused(built):
    path = built / "index.json"
    header = json.loads(path.read_text())
    for change in ({"bucket_starts": [0, 1, 2, 3, 3, 3]}, {"sources": ["y", "x"]}, {"files": []}, {"version": 2}):
        path.write_text(json.dumps({**header, **change}))
        with pytest.raises(ValueError, match=r"index\.json.*(changed|version)"):
            SampleIndex(built)
    for text in ("", "[]", "{}", path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            SampleIndex(built)


def test_verify_finds_a_changed_bit(built):
    path = built / "width.npy"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"width\.npy has changed"):
        SampleIndex(built).verify()


def test_an_index_does_not_need_the_manifest_and_may_move(built):
    moved = built.with_name("elsewhere")
    (built.parent / "a.parquet").unlink()
    shutil.move(built, moved)
    index = SampleIndex(moved)
    index.verify()
    assert index.lookup([])["row"].shape == (0,)
    assert index.lookup(2)["row"].shape == ()


@pytest.mark.parametrize("positions", [[-1], [3], [0.5], [[0], [7]], np.array([2**63], np.uint64)])
def test_positions_outside_are_refused(built, positions):
    index = SampleIndex(built)
    for method in (index.lookup, index.bucket_of):
        with pytest.raises(ValueError, match="positions: expected"):
            method(positions)


def test_bad_arguments_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", GOOD)
    for change, said in (
        ({"small": "keep"}, "small"),
        ({"invalid": "keep"}, "invalid"),
        ({"columns": {"hieght": "h"}}, "columns"),
        ({"max_side": 65536}, "max_side"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"bases": (0,)}, "bases"),
        ({"buckets": ()}, "buckets"),
        ({"manifest": tmp_path}, "smaller than every bucket"),
    ):
        arguments = {"manifest": path, "folder": tmp_path / "index", "buckets": LENS_BUCKETS, **change}
        with pytest.raises(ValueError, match=said):
            SampleIndex.build(**arguments)
    with pytest.raises(FileNotFoundError, match="manifest"):
        SampleIndex.build(tmp_path / "no.parquet", tmp_path / "index", BUCKETS)
    (tmp_path / "index").mkdir()
    with pytest.raises(FileExistsError, match="folder"):
        SampleIndex.build(path, tmp_path / "index", BUCKETS, bases=BASES)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", GOOD)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install lensmini\[data\]"):
        SampleIndex.build(path, tmp_path / "index", BUCKETS)
