"""Laws of experiments/runs.py: what a kill leaves, what a name means, and what stops a loop."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from experiments import runs
from experiments.runs import (
    RunConfig,
    StopRequest,
    append_jsonl,
    atomic_directory,
    cached_stage,
    config_dict,
    config_hash,
    keep_last,
    latest_checkpoint,
    progress,
    provenance,
    read_jsonl,
    truncate_jsonl,
    write_json,
)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Nested:
    run: RunConfig
    sizes: tuple[tuple[int, int], ...] = ((1, 2),)
    rate: float = 1e-3


def spawn(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def visible(directory):
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"log_every": 0}, {"seed": -1}, {"processes": 0}, {"keep_checkpoints": 0}]
)
def test_a_run_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RunConfig(**wrong)


def test_a_config_becomes_json_and_comes_back_equal():
    config = Nested(run=RunConfig(out=Path("runs/a")))
    told = json.loads(json.dumps(config_dict(config)))
    assert told["run"]["out"] == "runs/a" and told["sizes"] == [[1, 2]] and told["rate"] == 1e-3
    assert told == config_dict(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), lambda: 0])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match="config"):
        config_dict({"a": value})


def test_the_hash_is_sha256_of_the_sorted_json():
    # printf '{"a":[1,2],"b":null}' | sha256sum
    assert config_hash({"b": None, "a": (1, 2)}) == "f25109c41113"


def test_every_field_changes_the_hash():
    base = Nested(run=RunConfig())
    others = [replace(base, rate=2e-3), replace(base, sizes=((2, 1),)), replace(base, run=RunConfig(seed=1))]
    assert len({config_hash(config) for config in [base, *others]}) == 4


def test_the_hash_is_the_same_in_another_process():
    code = "from experiments.runs import *; print(config_hash({'a', 'b', 'c'}), config_hash(RunConfig()))"
    told = spawn(code).communicate()[0].split()
    assert told == [config_hash({"c", "b", "a"}), config_hash(RunConfig())]


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "step-1"
    for word in ("old", "new"):
        with atomic_directory(path) as directory:
            assert directory != path
            (directory / word).mkdir()
            (directory / word / "file").write_text(word)
    assert visible(path.parent) == ["step-1"] and visible(path) == ["new"]
    assert (path / "new" / "file").read_text() == "new"
    assert len(list(path.parent.iterdir())) == 1


def test_a_failed_body_leaves_the_old_directory(tmp_path):
    with atomic_directory(tmp_path / "a") as directory:
        (directory / "file").write_text("old")
    with pytest.raises(RuntimeError, match="half"), atomic_directory(tmp_path / "a") as directory:  # noqa: PT012
        (directory / "file").write_text("new")
        raise RuntimeError("half")
    assert (tmp_path / "a" / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replacement_works_without_the_system_call_too(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(runs, "_exchange", lambda one, other: False)
    for word in ("old", "new"):
        with atomic_directory(tmp_path / "a") as directory:
            (directory / "file").write_text(word)
    assert (tmp_path / "a" / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_dead_writer_between_two_renames_is_undone(tmp_path):
    dead = spawn("pass")
    dead.wait()
    for kind, word in (("old", "old"), ("new", "half")):
        (tmp_path / f".a.{kind}-{dead.pid}-0f").mkdir()
        (tmp_path / f".a.{kind}-{dead.pid}-0f" / "file").write_text(word)
    (tmp_path / f".b.new-{dead.pid}-0f").mkdir()
    with pytest.raises(KeyError), atomic_directory(tmp_path / "a"):
        raise KeyError
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f".b.new-{dead.pid}-0f", "a"]


def test_a_living_writer_is_left_alone(tmp_path):
    with atomic_directory(tmp_path / "a") as outer:
        with atomic_directory(tmp_path / "a") as inner:
            (inner / "file").write_text("inner")
        assert outer.is_dir()
        (outer / "file").write_text("outer")
    assert (tmp_path / "a" / "file").read_text() == "outer"


WRITER = """
import sys
from pathlib import Path
from experiments.runs import atomic_directory
for turn in range(10**9):
    with atomic_directory(Path(sys.argv[1]) / "a") as directory:
        for part in range(20):
            (directory / str(part)).write_text(f"{turn} " * 200)
    if turn == 0:
        print("begun", flush=True)
"""


@pytest.mark.parametrize("milliseconds", [0, 3, 11, 29, 47])
def test_a_kill_at_any_time_leaves_a_whole_directory(tmp_path, milliseconds):
    writer = spawn(WRITER, tmp_path)
    assert writer.stdout.readline() == "begun\n"
    time.sleep(milliseconds / 1000)
    writer.kill()
    writer.wait()
    contents = {entry.read_text() for entry in (tmp_path / "a").iterdir()}
    assert len(contents) == 1 and len(contents.pop().split()) == 200 and len(visible(tmp_path / "a")) == 20
    with atomic_directory(tmp_path / "a"):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_come_back_in_order_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    assert read_jsonl(path) == []
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    path.write_bytes(path.read_bytes()[:-5])
    assert read_jsonl(path) == rows[:2]
    append_jsonl(path, rows[2])
    assert read_jsonl(path) == rows


def test_a_torn_only_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1')
    assert read_jsonl(path) == []
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 2}]


def test_a_broken_row_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(path)


def test_a_resumed_run_writes_the_same_file_as_a_whole_one(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for step in range(1, 8):
        append_jsonl(whole, {"step": step, "loss": step**0.5})
    for step in range(1, 6):
        append_jsonl(cut, {"step": step, "loss": step**0.5})
    cut.write_bytes(cut.read_bytes() + b'{"step": 6, "lo')
    truncate_jsonl(cut, 3)
    assert [row["step"] for row in read_jsonl(cut)] == [1, 2, 3]
    for step in range(4, 8):
        append_jsonl(cut, {"step": step, "loss": step**0.5})
    assert cut.read_bytes() == whole.read_bytes()
    truncate_jsonl(tmp_path / "missing.jsonl", 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None and latest_checkpoint(tmp_path) is None
    for name in ("step-9", "step-10", "step-100", ".step-200.new-1-0f", "step-x", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-300").write_text("no directory")
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-100", 100)
    keep_last(tmp_path, 2)
    assert visible(tmp_path) == ["samples", "step-10", "step-100", "step-300", "step-x"]
    with pytest.raises(ValueError, match="k"):
        keep_last(tmp_path, 0)


def test_looking_for_a_checkpoint_changes_nothing(tmp_path):
    dead = spawn("pass")
    dead.wait()
    (tmp_path / f".step-5.new-{dead.pid}-0f").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop and not stop.requested
        signal.raise_signal(number)
        assert stop and stop.requested
    assert signal.getsignal(number) is before


def test_a_second_interrupt_kills():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop
        signal.raise_signal(signal.SIGINT)


def test_provenance_names_commit_and_versions():
    told = provenance()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told["commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    import torch

    assert (
        told["versions"]["torch"] == torch.__version__.split("+")[0] or told["versions"]["torch"] in torch.__version__
    )
    assert json.loads(json.dumps(told)) == told


def test_only_rank_0_draws_a_bar(capsys):
    for rank in (0, 1):
        with progress(10, 4, "steps", rank=rank) as bar:
            bar.update()
            assert rank or bar.n == 5
        shown = capsys.readouterr().err
        assert ("steps" in shown) == (rank == 0)


def test_a_json_file_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", RunConfig(seed=3))
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_stage_is_made_once_for_each_config(tmp_path, capsys):
    made = []

    def make(directory):
        made.append(directory)
        (directory / "file").write_text("made")

    first, reused = cached_stage(tmp_path, "letter", {"size": 1}, make)
    assert not reused and "making" in capsys.readouterr().out
    again, reused = cached_stage(tmp_path, "letter", {"size": 1}, make)
    assert reused and again == first and "reused" in capsys.readouterr().out
    other, reused = cached_stage(tmp_path, "letter", {"size": 2}, make)
    assert not reused and other != first and len(made) == 2
    assert first.name == f"letter-{config_hash({'size': 1})}" and (first / "file").read_text() == "made"
    told = json.loads((first / "stage.json").read_text())
    assert told["config"] == {"size": 1} and "commit" in told["provenance"]


def test_a_failed_stage_is_not_found_later(tmp_path):
    def fail(directory):
        (directory / "file").write_text("half")
        raise RuntimeError("gate")

    with pytest.raises(RuntimeError, match="gate"):
        cached_stage(tmp_path, "letter", 1, fail)
    assert visible(tmp_path) == []
    assert not cached_stage(tmp_path, "letter", 1, lambda directory: (directory / "file").write_text("whole"))[1]


STAGE = """
import sys, time
from pathlib import Path
from experiments.runs import append_jsonl, cached_stage
def make(directory):
    append_jsonl(Path(sys.argv[1]) / "made.jsonl", {"step": 1})
    time.sleep(float(sys.argv[2]))
print("started", flush=True)
print(cached_stage(Path(sys.argv[1]), "letter", 1, make)[1])
"""


def test_two_processes_do_not_make_a_stage_twice(tmp_path):
    both = [spawn(STAGE, tmp_path, 0.3) for _ in range(2)]
    told = sorted(process.communicate()[0].split()[-1] for process in both)
    assert told == ["False", "True"] and len(read_jsonl(tmp_path / "made.jsonl")) == 1


def test_a_killed_maker_does_not_block_the_next(tmp_path):
    killed = spawn(STAGE, tmp_path, 60)
    while not (tmp_path / "made.jsonl").exists():
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert spawn(STAGE, tmp_path, 0).communicate()[0].split()[-1] == "False"
    assert len(read_jsonl(tmp_path / "made.jsonl")) == 2
