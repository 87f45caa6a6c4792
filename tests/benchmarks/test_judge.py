"""The judge benchmark runs, small, and ends with its line."""

import json

import pytest

from benchmarks import judge


@pytest.mark.slow
def test_it_runs_and_counts_every_verdict(capsys):
    judge.main(num=33, rounds=2)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "judge" and line["goal"] == 8.0 and line["ratio"] > 1
    assert line["details"]["verdicts_per_second"].keys() == {"ours", "loop", "cached"}
