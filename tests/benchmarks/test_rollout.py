"""The rollout benchmark runs, small, and ends with its line."""

import json

import pytest

from benchmarks import rollout


@pytest.mark.slow
def test_it_runs_and_both_orders_give_the_same_verdicts(capsys):
    rollout.main(chunks=2, size=2, rounds=1)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "rollout" and line["goal"] == 1.5 and line["ratio"] > 0
    assert line["details"]["seconds"].keys() == {"overlapped", "sequential"}
    assert line["details"]["bound"] == pytest.approx(4 / 3, abs=1e-3)
