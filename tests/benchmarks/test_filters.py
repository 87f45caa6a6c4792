import json

from benchmarks import filters


def test_the_benchmark_runs_and_the_peer_has_the_same_scores(capsys):
    filters.main(5, rounds=1)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["name"], result["goal"], result["better"]) == ("filters", 3.0, "higher")
    assert result["holds"] == (result["ratio"] >= 3)
    assert set(result["details"]["pictures_per_second"]) == {"ours", "ours, 2 threads", "plain"}
