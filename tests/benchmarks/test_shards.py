import json

import pytest

from benchmarks import shards
from lensmini.data.shard_writer import write_shards
from lensmini.data.shards import ShardReader

pytest.importorskip("pyarrow")


def test_all_contestants_hand_out_the_same_bytes_in_the_end(tmp_path):
    pytest.importorskip("webdataset")
    num = 90
    wanted = sum(len(data) for sample in shards.make_samples(num) for data in sample.members.values())
    write_shards(shards.make_samples(num), tmp_path / "shards", shards.BUCKETS, shard_bytes=2**20)
    (tmp_path / "files").mkdir()
    shards.write_files(num, tmp_path / "files")
    calls = shards.contestants(tmp_path, num, num, decode=False)
    # An endless stream through a buffer shows some twice before others.
    assert calls["webdataset"]() == pytest.approx(wanted, rel=0.2)
    whole = ShardReader(tmp_path / "shards")
    assert sum(len(data) for row in range(num) for data in whole[row].members.values()) == wanted


def test_the_plan_s_numbers_are_rows_of_the_right_buckets(tmp_path):
    num = 91
    write_shards(shards.make_samples(num), tmp_path, shards.BUCKETS)
    reader, order = ShardReader(tmp_path), shards.stretches(num)()
    assert [shard.num_samples for shard in reader.files.shards] == [31, 30, 30]
    first = [next(order) for _ in range(num)]
    assert max(first) < num and len(set(first)) > num // 2


def test_the_benchmark_runs(capsys):
    pytest.importorskip("webdataset")
    shards.main(60, rounds=1)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"name", "ratio", "goal", "better", "holds", "details"}
    assert (result["name"], result["goal"], result["better"]) == ("shards", 2.0, "higher")
    assert result["holds"] == (result["ratio"] >= 2)
    rates = result["details"]["samples_per_second"]
    assert set(rates) == {"members", "decoded"} and all(rate > 0 for cell in rates.values() for rate in cell.values())
