import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from lensmini.data.buckets import LENS_BUCKETS, Bucket
from lensmini.data.index import SampleIndex
from lensmini.data.plan import BatchPlan
from lensmini.data.shard_writer import ShardSample, merge_manifests, write_shards
from lensmini.data.shards import Damage, DamagedSample, RawMembers, ShardReader
from lensmini.data.tar_index import index_tars

parquet = pytest.importorskip("pyarrow.parquet")

BUCKETS = (Bucket(512, 512), Bucket(256, 512), Bucket(512, 256))
SHARD_BYTES = 16_000


def make_samples(num=40, seed=0, prefix="set.v1/"):
    """Samples of three buckets with contents of every length around a block of 512 bytes."""
    rng = np.random.default_rng(seed)
    for number in range(num):
        bucket = int(rng.integers(3))
        size = [(640, 600), (300, 580), (700, 333)][bucket]
        members = {"jpg": rng.bytes(int(rng.integers(0, 2000))), "txt": f"Caption {number}.".encode()}
        if number % 3 == 0:
            members["seg.png"] = rng.bytes(512)
        yield ShardSample(f"{prefix}{number}.jpg", bucket, *size, number, members, {"sample_id": 10 * number})


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(make_samples(), folder, BUCKETS, shard_bytes=SHARD_BYTES)
    return folder


def copied(written, folder):
    folder.mkdir(exist_ok=True)
    for name, data in contents(written).items():
        (folder / name).write_bytes(data)
    return folder


def never():
    raise AssertionError("no sample is needed")
    yield


# What is written


def test_every_sample_comes_back_from_its_row_and_from_its_place(written):
    reader, rows = ShardReader(written), parquet.read_table(written / "manifest.parquet").to_pylist()
    wanted = {sample.key: sample for sample in make_samples()}
    assert len(reader) == len(rows) == len(wanted) == len({row["key"] for row in rows})
    for number, row in enumerate(rows):
        sample = wanted[row["key"]]
        for found in (reader[number], reader.read(row["shard"], row["offset"])):
            assert (found.key, found.members) == (sample.key, sample.members)
        said = row["height"], row["width"], row["text_tokens"], row["sample_id"]
        assert said == (sample.height, sample.width, sample.text_tokens, sample.columns["sample_id"])
        assert f"bucket-{sample.bucket:02d}-" in row["shard_name"]
        stored = (written / row["shard_name"]).read_bytes()[row["offset"] :][: row["num_bytes"]]
        assert zlib.crc32(stored) == row["checksum"]
    reader.verify_manifest()


def test_a_bucket_keeps_the_order_of_its_samples_and_shards_that_of_their_names(written):
    reader = ShardReader(written)
    names = [shard.name for shard in reader.files.shards]
    assert names == sorted(path.name for path in written.glob("*.tar")) and len(names) > 6
    for bucket in range(3):
        shards = [number for number, shard in enumerate(reader.files.shards) if shard.bucket == bucket]
        keys = [sample.key for shard in shards for sample in reader.iterate(shard)]
        assert keys == [sample.key for sample in make_samples() if sample.bucket == bucket]


def test_a_shard_is_as_long_as_allowed_and_no_longer(written):
    reader = ShardReader(written)
    rows = parquet.read_table(written / "manifest.parquet").to_pylist()
    for number, shard in enumerate(reader.files.shards):
        data = (written / shard.name).read_bytes()
        assert len(data) == shard.num_bytes <= SHARD_BYTES and hashlib.sha256(data).hexdigest() == shard.sha256
        after = reader.files.shards[number + 1 :][:1]
        if after and after[0].bucket == shard.bucket:
            first = next(row for row in rows if row["shard"] == number + 1)
            assert shard.num_bytes + first["num_bytes"] > SHARD_BYTES


def test_one_sample_longer_than_a_shard_gets_a_shard_of_its_own(tmp_path):
    samples = [ShardSample(str(i), 0, 512, 512, 0, {"jpg": bytes(5000)}) for i in range(3)]
    assert [shard.num_samples for shard in write_shards(samples, tmp_path, BUCKETS, shard_bytes=10).shards] == [1, 1, 1]


def test_tarfile_reads_what_is_written(written):
    members = 0
    for path in written.glob("*.tar"):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                members += 1
    assert members == sum(len(sample.members) for sample in make_samples())


def test_webdataset_reads_what_is_written(written):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(written.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    reader = ShardReader(written)
    assert len(found) == len(reader)
    for theirs, ours in zip(found, (reader[row] for row in range(len(reader))), strict=True):
        assert {name: data for name, data in theirs.items() if not name.startswith("__")} == ours.members


@example(["a.b/c", "_x_", "..", "%2E", "/", "a\\b", "A", "a", "\0", "n" * 300])
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=150), unique=True, min_size=1, max_size=5))
def test_any_key_comes_back_from_a_name_that_webdataset_splits_rightly(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("keys")
    samples = [ShardSample(key, 0, 512, 512, 0, {"a.b": key.encode(), "txt": b""}) for key in keys]
    write_shards(samples, folder, BUCKETS)
    reader = ShardReader(folder)
    assert [reader[row] for row in range(len(keys))] == [RawMembers(s.key, dict(s.members)) for s in samples]
    with tarfile.open(folder / "bucket-00-000000.tar") as tar:
        names = tar.getnames()
    stems = [name.split(".", 1)[0] for name in names]
    assert all("/" not in name and name.isascii() and not name.startswith("_") for name in names)
    assert [name.split(".", 1)[1] for name in names] == ["a.b", "txt"] * len(keys)
    assert len(set(stems)) == len(keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": "1"}, "every key once, got '1' twice"),
        ({"key": ""}, "expected a key"),
        ({"key": "\ud800"}, "expected a key"),
        ({"bucket": 1}, "expected bucket 0 for 512 x 512 pixels, got 1"),
        ({"bucket": 3}, "expected bucket 0"),
        ({"bucket": -3}, "expected bucket 0"),
        ({"height": 0}, "expected sides from 1"),
        ({"width": 2**16}, "expected sides from 1"),
        ({"text_tokens": -1}, "text from 0 to 65535"),
        ({"text_tokens": 2**16}, "text from 0 to 65535"),
        ({"members": {}}, "at least one member"),
        ({"members": {"../x": b""}}, "expected suffixes"),
        ({"members": {"JPG": b""}}, "expected suffixes"),
        ({"columns": {"a": 1.0}}, "expected {'a': 'int'} as in|expected {'a': 'int'}, got {'a': 'float'}"),
        ({"columns": {}}, "got {}"),
    ],
)
def test_a_sample_that_does_not_fit_is_named_and_leaves_nothing_that_looks_complete(tmp_path, change, words):
    good = {"key": "2", "bucket": 0, "height": 512, "width": 512, "text_tokens": 0, "members": {"x": b""}}
    good["columns"] = {"a": 1}
    samples = [ShardSample(**{**good, "key": "1"}), ShardSample(**{**good, **change})]
    with pytest.raises(ValueError, match=words):
        write_shards(samples, tmp_path, BUCKETS)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("column", ["offset", "shard", "key"])
def test_columns_of_the_manifest_are_not_the_callers(tmp_path, column):
    with pytest.raises(ValueError, match="other names"):
        write_shards([ShardSample("a", 0, 512, 512, 0, {"x": b""}, {column: 1})], tmp_path, BUCKETS)


def test_no_sample_is_a_folder_of_none(tmp_path):
    write_shards([], tmp_path, BUCKETS)
    assert len(ShardReader(tmp_path)) == 0 and write_shards(never(), tmp_path, BUCKETS).num_samples == 0


# Doing it again


def test_the_same_samples_give_the_same_bytes(written, tmp_path):
    write_shards(make_samples(), tmp_path, BUCKETS, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path) == contents(written)


def test_what_is_finished_is_not_done_again(written, tmp_path):
    folder = copied(written, tmp_path)
    assert write_shards(never(), folder, BUCKETS).num_samples == 40
    with pytest.raises(ValueError, match="finished shards of other buckets"):
        write_shards(never(), folder, BUCKETS[:2])


@pytest.mark.parametrize("how", ["missing", "longer", "shorter", "flipped", "stray"])
def test_only_shards_that_differ_are_written_again(written, tmp_path, how):
    folder = copied(written, tmp_path)
    tar = folder / "bucket-01-000001.tar"
    data = tar.read_bytes()
    changed = {"longer": data + b"1", "shorter": data[:3000], "flipped": data[:3000] + b"?" + data[3001:]}
    if how == "missing":
        tar.unlink()
    elif how == "stray":
        (folder / "bucket-01-000099.tar").write_bytes(data)
        (folder / ".bucket-02-000099.tar.unfinished").write_bytes(data)
    else:
        tar.write_bytes(changed[how])
    (folder / "manifest.parquet").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar") if path != tar}
    write_shards(make_samples(), folder, BUCKETS, shard_bytes=SHARD_BYTES)
    assert contents(folder) == contents(written)
    kept = {name: time for name, time in before.items() if name != "bucket-01-000099.tar"}
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.test_shards import BUCKETS, SHARD_BYTES, make_samples
from lensmini.data.shard_writer import write_shards

rename = Path.rename
for at in range(0, int(sys.argv[2]), int(sys.argv[3])):
    if not os.fork():
        count = 0
        def killing(self, target):
            global count
            count += 1
            if count > at // 2:
                if at % 2:
                    rename(self, target)
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)
        Path.rename = killing
        write_shards(make_samples(), Path(sys.argv[1]) / str(at), BUCKETS, shard_bytes=SHARD_BYTES)
        os._exit(0)
    assert os.wait()[1] == signal.SIGKILL
"""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_changes_nothing_in_the_end(written, tmp_path, every):
    wanted = contents(written)
    # Every tar, the header and the manifest are renamed once; kills come before and after each.
    kills = 2 * len(wanted)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(kills), str(every)], check=True, timeout=120)
    for at in range(0, kills, every):
        folder = tmp_path / str(at)
        left = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
        assert left.items() <= wanted.items() and len(left) == (at + 1) // 2
        times = {name: (folder / name).stat().st_mtime_ns for name in left if name.endswith(".tar")}
        if "manifest.parquet" not in left:
            with pytest.raises(ValueError, match="folder: "):
                ShardReader(folder)
        write_shards(make_samples(), folder, BUCKETS, shard_bytes=SHARD_BYTES)
        assert contents(folder) == wanted
        assert {name: (folder / name).stat().st_mtime_ns for name in times} == times


# Many tasks


def write_parts(folder, order):
    for part in order:
        write_shards(
            make_samples(12, part, f"{part}/"), folder, BUCKETS, shard_bytes=SHARD_BYTES, name=f"part-{part:02d}"
        )


def test_the_order_in_which_tasks_end_does_not_matter(tmp_path):
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        write_parts(tmp_path / name, order)
        write_shards([], tmp_path / name, BUCKETS, name="part-99")
        merge_manifests(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    reader = ShardReader(tmp_path / "a")
    rows = parquet.read_table(tmp_path / "a" / "manifest.parquet").to_pylist()
    wanted = {sample.key: sample for part in range(3) for sample in make_samples(12, part, f"{part}/")}
    assert {row["key"] for row in rows} == set(wanted) and len(rows) == len(wanted)
    assert [shard.name for shard in reader.files.shards] == sorted(path.name for path in reader.folder.glob("*.tar"))
    for number, row in enumerate(rows):
        assert reader.files.shards[row["shard"]].name == row["shard_name"]
        assert reader.read(row["shard"], row["offset"]) == reader[number]
        assert reader[number] == (row["key"], wanted[row["key"]].members)


def test_merging_again_changes_nothing_and_with_a_further_part_adds_it(tmp_path):
    write_parts(tmp_path, [0, 1])
    merge_manifests(tmp_path)
    before = contents(tmp_path), (tmp_path / "manifest.parquet").stat().st_mtime_ns
    merge_manifests(tmp_path)
    assert (contents(tmp_path), (tmp_path / "manifest.parquet").stat().st_mtime_ns) == before
    write_parts(tmp_path, [2])
    assert merge_manifests(tmp_path).num_samples == 36


def test_parts_that_are_missing_or_share_a_key_are_named(tmp_path):
    with pytest.raises(ValueError, match="missing all"):
        merge_manifests(tmp_path)
    write_parts(tmp_path, [0])
    with pytest.raises(ValueError, match="missing \\['part-01'\\]"):
        merge_manifests(tmp_path, parts=["part-00", "part-01"])
    write_shards([ShardSample("0/3.jpg", 0, 512, 512, 0, {"x": b""}, {"sample_id": 1})], tmp_path, BUCKETS, name="z")
    with pytest.raises(ValueError, match="got '0/3.jpg' in part-00 and in z"):
        merge_manifests(tmp_path)
    path = tmp_path / "parts" / "z.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="has changed"):
        merge_manifests(tmp_path)
    for name in ("../x", "", "a/b", "."):
        if name:
            with pytest.raises(ValueError, match="name: expected"):
                write_shards([], tmp_path, BUCKETS, name=name)


# Damage


def spoil(folder, how, rows):
    """Damage shard 2 and return the rows that are lost, with the cause."""
    tar = folder / ShardReader(folder).files.shards[2].name
    data = bytearray(tar.read_bytes())
    here = [row for row in rows if row["shard"] == 2]
    middle = here[len(here) // 2]
    if how == "missing":
        tar.unlink()
        return here, "missing shard"
    if how == "folder":
        tar.unlink()
        tar.mkdir()
        return here, "unreadable shard"
    if how == "link":
        tar.rename(folder / "elsewhere")
        tar.symlink_to("elsewhere")
        return here, "unreadable shard"
    if how == "truncated":
        tar.write_bytes(data[: middle["offset"] + 700])
        return [row for row in here if row["offset"] >= middle["offset"]], "truncated shard"
    data[middle["offset"] + (20 if how == "header" else middle["num_bytes"] - 500)] ^= 1
    tar.write_bytes(data)
    return [middle], "wrong checksum"


@pytest.mark.parametrize("how", ["missing", "folder", "link", "truncated", "header", "content"])
def test_damage_costs_what_is_damaged_and_names_it(written, tmp_path, how):
    folder = copied(written, tmp_path)
    whole = ShardReader(written)
    rows = parquet.read_table(folder / "manifest.parquet").to_pylist()
    lost, cause = spoil(folder, how, rows)
    reader = ShardReader(folder)
    wanted = [
        Damage(row["shard_name"], row["key"], row["offset"], cause) if row in lost else whole[number]
        for number, row in enumerate(rows)
        if row["shard"] == 2
    ]
    assert len(wanted) > 3
    assert list(reader.iterate(2)) == wanted
    assert reader.verify(2) == [found for found in wanted if isinstance(found, Damage)]
    assert reader.verify(1) == []
    with pytest.raises(DamagedSample) as caught:
        reader.read(2, lost[0]["offset"])
    assert all(str(word) in str(caught.value) for word in (lost[0]["shard_name"], lost[0]["key"], cause))
    assert pickle.loads(pickle.dumps(caught.value)).damage == caught.value.damage


def test_a_change_behind_the_last_sample_is_seen(written, tmp_path):
    folder = copied(written, tmp_path)
    tar = folder / ShardReader(folder).files.shards[0].name
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert [damage.cause for damage in ShardReader(folder).verify(0)] == ["changed outside samples"]


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/../../b.tar", "", "a\\b", "./a.tar", "a//b", 7])
def test_a_header_cannot_point_out_of_the_folder(written, tmp_path, name):
    folder = copied(written, tmp_path)
    header = json.loads((folder / "shards.json").read_bytes())
    header["shards"][0]["name"] = name
    del header["sha256"]
    header["sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (folder / "shards.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="expected names of tars|inside their folder"):
        ShardReader(folder)


def test_a_folder_on_the_way_to_a_tar_is_no_link_either(tmp_path):
    (tmp_path / "real").mkdir()
    write_tar(tmp_path / "real" / "a.tar", [("0.png", picture(9, 8))])
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "sub").symlink_to(tmp_path / "real")
    write_tar(tmp_path / "tars" / "b.tar", [("0.png", picture(9, 8))])
    index_tars([tmp_path / "tars" / "sub" / "a.tar", tmp_path / "tars" / "b.tar"], tmp_path / "out", text_tokens=len)
    reader = ShardReader(tmp_path / "out", tars=tmp_path / "tars")
    assert reader[0].key == "b.tar/0"
    with pytest.raises(DamagedSample, match="unreadable"):
        reader[1]


def test_a_changed_header_and_a_changed_manifest_are_refused(written, tmp_path):
    folder = copied(written, tmp_path)
    text = (folder / "shards.json").read_text()
    (folder / "shards.json").write_text(text.replace('"num_samples": ', '"num_samples": 1', 1))
    with pytest.raises(ValueError, match="has changed"):
        ShardReader(folder)
    (folder / "shards.json").write_text(text)
    data = bytearray((folder / "manifest.parquet").read_bytes())
    data[40] ^= 1
    (folder / "manifest.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="manifest.parquet has changed"):
        ShardReader(folder).verify_manifest()


def test_places_without_a_sample_are_errors(written):
    reader = ShardReader(written)
    num = len(reader.files.shards)
    for shard, offset in ((0, 1), (0, 10**9), (0, -512), (num, 0), (-1, 0)):
        with pytest.raises(ValueError, match="expected"):
            reader.read(shard, offset)
    for row in (-1, len(reader)):
        with pytest.raises(IndexError):
            reader[row]


# Readers everywhere


def test_threads_share_a_reader_that_keeps_few_tars_open(written):
    whole, reader = ShardReader(written), ShardReader(written, max_open=1)
    rows = np.random.default_rng(0).integers(len(reader), size=2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.__getitem__, rows))
    assert found == [whole[row] for row in rows]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_workers_read_what_this_process_does(written, context):
    reader = ShardReader(written)
    here = [reader[row] for row in range(len(reader))]
    loader = DataLoader(reader, batch_size=None, num_workers=2, multiprocessing_context=context)  # pyright: ignore
    assert [tuple(sample) for sample in loader] == [tuple(sample) for sample in here]


def test_a_reader_pickles_as_its_folders(written):
    reader = ShardReader(written, max_open=3)
    reader[0]
    again = pickle.loads(pickle.dumps(reader))
    assert (again.max_open, again[5]) == (3, reader[5]) and len(pickle.dumps(reader)) < 1000


def test_a_plan_over_the_index_of_the_manifest_finds_its_samples(written, tmp_path):
    index = SampleIndex.build(written / "manifest.parquet", tmp_path / "index", BUCKETS)
    assert np.diff(index.bucket_starts).tolist() == [
        sum(sample.bucket == bucket for sample in make_samples()) for bucket in range(3)
    ]
    reader, wanted = ShardReader(written), {sample.columns["sample_id"]: sample for sample in make_samples()}
    plan = BatchPlan(np.diff(index.bucket_starts), [4, 2, 2], num_slots=1, images_per_slot=1, seed=0)
    seen = []
    for step in range(len(index)):
        position = plan.step(step).samples
        place = {name: int(values[0]) for name, values in index.lookup(position).items()}
        sample = wanted[place["sample_id"]]
        assert reader.read(place["shard"], place["offset"]) == (sample.key, sample.members)
        assert place["bucket"] == sample.bucket == reader.files.shards[place["shard"]].bucket
        seen.append(sample.key)
    assert len(set(seen)) == len(wanted)


def test_the_published_buckets_are_open_at_once(tmp_path):
    samples = [
        ShardSample(f"{bucket}-{i}", bucket, size.height, size.width, 0, {"x": bytes([bucket, i])})
        for i in range(3)
        for bucket, size in enumerate(LENS_BUCKETS)
    ]
    files = write_shards(samples, tmp_path, LENS_BUCKETS)
    assert [(shard.bucket, shard.num_samples) for shard in files.shards] == [(bucket, 3) for bucket in range(27)]


# Tars of others


def picture(height, width, orientation=1):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(file, "png", exif=exif)
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_tars_of_webdataset_are_read_where_they_lie(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    wanted = {}
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for number in range(5):
                data = picture(20 + number, 30, 6 if number == 4 else 1)
                writer.write({"__key__": f"d.1/{number:04d}", "png": data, "txt": "a cat" * number, "json": {"a": 1}})
                size = (30, 24) if number == 4 else (20 + number, 30)
                text = ("a cat" * number).encode()
                wanted[f"{shard}.tar/d.1/{number:04d}"] = (*size, 5 * number), {"png": data, "txt": text}
    files = index_tars(sorted(tmp_path.glob("*.tar")), tmp_path / "out", text_tokens=len)
    assert files.left_out == {} and files.num_samples == 10
    reader = ShardReader(tmp_path / "out", tars=tmp_path)
    rows = parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    for number, row in enumerate(rows):
        (height, width, length), members = wanted.pop(row["key"])
        assert (row["height"], row["width"], row["text_tokens"]) == (height, width, length)
        found = reader.read(row["shard"], row["offset"])
        assert found == reader[number] and found.key == row["key"]
        assert {name: found.members[name] for name in members} == members
        assert json.loads(found.members["json"]) == {"a": 1}
    assert wanted == {} and reader.verify(0) == reader.verify(1) == []


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_other_kinds_of_tar_are_read(tmp_path, format):
    stems = [f"{'d' * 90}/{'n' * 60}{number}" for number in range(3)]
    write_tar(tmp_path / "a.tar", [(f"{stem}.{s}", picture(9, 8)) for stem in stems for s in ("png",)], format)
    index_tars(tmp_path / "a.tar", tmp_path / "out", text_tokens=len)
    reader = ShardReader(tmp_path / "out", tars=tmp_path)
    assert [reader[row] for row in range(3)] == [(f"a.tar/{stem}", {"png": picture(9, 8)}) for stem in stems]


def test_what_cannot_be_used_is_counted_by_cause(tmp_path):
    fine = picture(9, 8)
    write_tar(
        tmp_path / "a.tar",
        [
            ("good.png", fine),
            ("none.txt", b"a cat"),
            ("two.png", fine),
            ("two.2.png", fine),
            ("bad.png", fine[:20]),
            ("good.png", fine),
            ("twice.png", fine),
            ("twice.png", fine),
            ("large.png", fine + bytes(9000)),
            ("last.png", fine),
        ],
    )
    files = index_tars(tmp_path / "a.tar", tmp_path / "out", text_tokens=len, max_bytes=8000)
    causes = ["no picture", "several pictures", "unreadable picture", "duplicate key", "member twice", "too large"]
    assert files.left_out == dict.fromkeys(sorted(causes), 1)
    reader = ShardReader(tmp_path / "out", tars=tmp_path)
    assert [reader[row].key for row in range(len(reader))] == ["a.tar/good", "a.tar/last"]


@pytest.mark.parametrize("cut", ["content", "header", "boundary", "nonsense"])
def test_a_damaged_tar_gives_what_came_before(tmp_path, cut):
    members = [(f"{number}.{s}", data) for number in range(3) for s, data in (("png", picture(9, 8)), ("txt", b"a"))]
    write_tar(tmp_path / "a.tar", members)
    data = (tmp_path / "a.tar").read_bytes()
    # Every member takes a header and a block: sample 1's caption begins at block 6.
    changed = {
        "content": data[: 6 * 512 + 512],
        "header": data[: 6 * 512 + 100],
        "boundary": data[: 6 * 512],
        "nonsense": data[: 6 * 512] + b"?" * 512 + data[7 * 512 :],
    }
    (tmp_path / "a.tar").write_bytes(changed[cut])
    files = index_tars(tmp_path / "a.tar", tmp_path / "out", text_tokens=len)
    assert files.left_out == {"cut by damage": 1, "damaged tar": 1}
    assert ShardReader(tmp_path / "out", tars=tmp_path)[0].key == "a.tar/0" and files.num_samples == 1


def test_compressed_and_repeated_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="not compressed"):
        index_tars(tmp_path / "a.tar", tmp_path / "out", text_tokens=len)
    with pytest.raises(ValueError, match="each tar once"):
        index_tars([tmp_path / "a.tar"] * 2, tmp_path / "out", text_tokens=len)


def test_without_checks_bytes_come_as_they_are_and_verifying_still_tells(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    quick, info = ShardReader(folder, check=False), ShardReader(folder).files.shards[0]
    before, tar = quick[0], folder / info.name
    assert pickle.loads(pickle.dumps(quick)).check is False and before == ShardReader(folder)[0]
    data = bytearray(tar.read_bytes())
    name = next(iter(before.members))
    place = data.index(before.members[name])
    data[place] ^= 1
    tar.write_bytes(data)
    assert quick[0].members[name] != before.members[name] and quick[0].key == before.key
    with pytest.raises(DamagedSample, match="wrong checksum"):
        ShardReader(folder)[0]
    assert [damage.key for damage in quick.verify(0)] == [before.key]
    data[124:136] = b"no octal now"
    tar.write_bytes(data)
    with pytest.raises(DamagedSample, match="wrong checksum"):
        quick[0]
