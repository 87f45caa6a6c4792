"""A run that is killed anywhere, or asked to stop, ends as one that never was; presets describe themselves."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import pretrain
from experiments.engine import EngineConfig
from experiments.guards import GuardConfig
from experiments.pretrain import PRESETS
from experiments.runs import read_jsonl
from experiments.shard_data import ShardsConfig
from experiments.training import SettingsError, check_same_run
from lensmini.parallel import read_whole
from tests.experiments import tiny_run
from tests.test_parallel import alive, wait_until

ROOT = Path(__file__).parents[2]
STEPS = 20
PLACES = tiny_run.PLACES

# Processes that start from one which has imported everything: a launch takes a second instead of ten.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.experiments.tiny_run", "transformers.models.gpt_oss.modeling_gpt_oss"])


def launch(out: Path, strike: str | None = None) -> int | None:
    """Run the same command again; returns how it ended."""
    os.environ["OMP_NUM_THREADS"], before = "1", os.environ.get("OMP_NUM_THREADS")
    process = CONTEXT.Process(target=tiny_run.run, args=(out, strike), kwargs={"fork": True})
    process.start()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    process.join(180)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def contents(out: Path) -> dict[str, bytes]:
    """What a run is compared by: metrics, pictures and the last checkpoint's tensors."""
    last = out / f"step-{STEPS:06d}"
    files = [out / "metrics.jsonl", *out.glob("samples-*.png"), *last.glob("*.safetensors"), last / "config.json"]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the frozen parts."""
    path = tmp_path_factory.getbasetemp() / "tiny"
    tiny_run.prepare(path)
    return path


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A run that nobody disturbs."""
    assert launch(root / "whole") == 0
    return root / "whole"


def assert_same_run(out: Path, whole: Path) -> None:
    expected, found = contents(whole), contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_an_undisturbed_run_leaves_what_it_promises(whole: Path) -> None:
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 for row in rows)
    assert [row["step"] for row in rows if "validation" in row] == [4, 8, 12, 16, 20]
    assert [row["step"] for row in rows if "strict" in row] == [7, 14, 20]
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.json"} == {
        Path(name).name for name in contents(whole) if name.startswith("step-")
    }
    assert sorted(path.name for path in whole.glob("step-*")) == ["step-000018", "step-000020"]
    assert len(list(whole.glob("samples-*.png"))) == 3
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step"] == STEPS and summary["loss"] == rows[-1]["loss"]
    assert summary["config"] == json.loads((whole / "config.json").read_text())
    run = json.loads((whole / "step-000020" / "run.json").read_text())
    assert run["config"] == summary["config"] and run["provenance"]["versions"]["torch"]


def test_the_same_command_after_the_end_changes_nothing(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    assert launch(whole) == 0
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == times


def test_three_kills_leave_no_trace(root: Path, whole: Path) -> None:
    draw, out = random.Random(0), root / "three-kills"
    assert launch(out, f"parent:KILL:update:{draw.randint(4, 8)}") == -signal.SIGKILL
    assert launch(out, f"1:KILL:update:{draw.randint(2, 5)}") == 1
    # The second checkpoint from here, after one of its three files.
    assert launch(out, f"0:KILL:file:{3 + draw.randint(1, 3)}") == 1
    assert 0 < len(read_jsonl(out / "metrics.jsonl")) < STEPS
    assert list(out.glob(".step-*")), "a half-written checkpoint is there and does not count"
    assert launch(out) == 0
    assert_same_run(out, whole)
    assert not list(out.glob(".*"))
    # The last launch went on from a checkpoint rather than from the start, which would have ended alike.
    done = read_jsonl(out / "timing.jsonl")[-1]
    assert done["step"] == STEPS and 0 < done["steps"] < STEPS and (STEPS - done["steps"]) % 3 == 0


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(root: Path, whole: Path) -> None:
    out = root / "stopped"
    assert launch(out, "parent:TERM:update:5") == 0
    (checkpoint,) = [path for path in out.glob("step-*") if path.name != "step-000003"]
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= stopped <= 7
    assert read_jsonl(out / "metrics.jsonl")[-1]["step"] == stopped
    assert not (out / "summary.json").exists()
    assert launch(out) == 0
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["parent", "0"])
@pytest.mark.parametrize("where", PLACES)
def test_a_kill_at_any_place_leaves_no_trace(root: Path, whole: Path, who: str, where: str) -> None:
    out = root / f"kill-{who}-{where}"
    assert launch(out, f"{who}:KILL:{where}:2") == (-signal.SIGKILL if who == "parent" else 1)
    assert launch(out) == 0
    assert_same_run(out, whole)


@pytest.mark.slow
def test_ten_kills_of_the_real_command_leave_no_trace(root: Path, whole: Path) -> None:
    draw, out = random.Random(1), root / "ten-kills"
    command = [sys.executable, "-m", "tests.experiments.tiny_run", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ends = 0
    for _ in range(10):
        who, where = draw.choice(["parent", "0", "1"]), draw.choice(["update", "update", "file", "row"])
        strike = f"{who}:KILL:{'update' if who == '1' else where}:{draw.randint(1, 4)}"
        ends += subprocess.run([*command, strike], cwd=ROOT, env=environment, capture_output=True).returncode != 0
    assert ends >= 7, "hardly ever finished before it was killed"
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kills_from_outside_at_any_time_leave_no_trace_and_no_process(root: Path, whole: Path) -> None:
    draw, out = random.Random(2), root / "outside"
    command = [sys.executable, "-m", "tests.experiments.tiny_run", str(out)]
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = len(read_jsonl(out / "metrics.jsonl"))
        end = time.monotonic() + 120
        while process.poll() is None and len(read_jsonl(out / "metrics.jsonl")) == rows and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        workers = _children(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda: not any(alive(pid) for pid in workers), 10)  # noqa: B023
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(out, whole)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(root: Path) -> None:
    config = tiny_run.tiny_config(root / "nan", steps=6, processes=1)
    config = replace(config, optim=replace(config.optim, lr=1e30, muon_lr=0.0, warmup_steps=0))
    with pytest.raises(
        FloatingPointError,
        match=r"step [2-6]: (loss|gradient) (nan|inf); bad steps since step [2-6]: guard.policy is stop. Lower the",
    ):
        pretrain.main(config)
    assert all(math.isfinite(row["loss"]) for row in read_jsonl(root / "nan" / "metrics.jsonl"))


def test_other_settings_are_refused_in_a_sentence(root: Path, whole: Path) -> None:
    config = tiny_run.tiny_config(root / "whole")
    with pytest.raises(SettingsError, match=r"holds a run with other settings \(run\.seed 3 -> 4\)"):
        pretrain.main(replace(config, run=replace(config.run, seed=4)))


def _children(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    direct = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return [pid for pid in direct if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    pretrain.cli()


@pytest.mark.parametrize("preset", [preset.__name__ for preset in PRESETS])
def test_every_preset_describes_itself(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run_cli(monkeypatch, preset, "--dry-run")
    output = capsys.readouterr().out
    config = json.loads(output[: output.index("\n}") + 2])
    assert config["dry_run"] is True and config["run"]["out"] == f"runs/{preset}"
    assert "parameters" in output and "FLOPs per step" in output and "training state" in output
    assert ("4,104,225,152" in output) == preset.startswith(("stage", "finetune"))
    sizes = {"toy_1b": 1.2e9, "lab_8gpu": 0.6e9, "lab_8gpu_512": 0.6e9}
    if preset in sizes:
        count = int(output.split("parameters")[-1].split()[0].replace(",", ""))
        assert abs(count / sizes[preset] - 1) < 0.03
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_papers_stages_are_the_papers() -> None:
    first, second = pretrain.stage1(), pretrain.stage2()
    for stage in (first, second):
        assert isinstance(stage.data, ShardsConfig)
        assert (stage.optim.betas, stage.optim.grad_clip, stage.optim.muon_lr) == ((0.9, 0.999), 1.0, 0.0)
        assert (stage.run.steps, stage.optim.decay_fraction, stage.optim.dtype) == (400_000, 0.0, "bfloat16")
    assert isinstance(first.data, ShardsConfig) and isinstance(second.data, ShardsConfig)
    assert first.data.num_ranks * first.data.images_per_rank[0] == 3072
    assert len(first.data.buckets) == 1 and len(second.data.buckets) == 27
    assert (first.optim.lr, second.optim.lr) == (2e-4, 1e-4)
    assert second.init_from is not None and first.run.steps == int(second.init_from.name.removeprefix("step-"))


def test_the_papers_stages_say_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_cli(monkeypatch, "stage1")
    assert "expected shards of `python -m experiments.prepare_data` in shards" in str(stop.value.code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        ([], "mini"),
        (["mini", "--run.stepz", "3"], "run.stepz"),
        (["mini", "--run.steps", "many"], "many"),
        (["mini", "--run.steps", "0"], "steps: expected at least 1"),
        (["mini", "--optim.dtype", "float16"], "dtype: expected"),
        (["mini", "--data.batch-size", "25"], "batch_size: expected a multiple of num_slots"),
        (["mini", "--run.processes", "7"], "processes: expected a divisor of data.num_slots = 2, got 7"),
        (["mini", "--data.density", "thick"], "density: expected"),
        (["mini", "--model.num-layers", "0"], "num_layers: expected"),
        (["mini", "--init-weights", "mean"], "init_weights: expected"),
    ],
)
def test_a_wrong_argument_is_explained_without_a_traceback(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        run_cli(monkeypatch, *arguments)
    assert stop.value.code not in (0, None)
    output = capsys.readouterr()
    text = " ".join((output.out + output.err).replace("\u2502", " ").split())
    assert message in text and "Traceback" not in text


def test_the_command_line_works_from_a_shell() -> None:
    command = [sys.executable, "-m", "experiments.pretrain", "stage2", "--dry-run"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "parameters          4,104,225,152" in output


def test_processes_share_the_slots_evenly(tmp_path: Path) -> None:
    for processes in (1, 2):
        assert tiny_run.tiny_config(tmp_path, processes=processes).run.processes == processes
    with pytest.raises(ValueError, match="processes: expected a divisor of data.num_slots = 2, got 3"):
        tiny_run.tiny_config(tmp_path, processes=3)


@pytest.mark.parametrize("mode", ["packed", "bucket", "same_bucket"])
def test_a_run_on_another_number_of_processes_sees_the_same_samples(root: Path, mode: str) -> None:
    rows = {}
    for processes in (1, 2):
        config = tiny_run.tiny_config(root / f"{mode}-{processes}", steps=3, processes=processes)
        # In float32 and without a score: what differs is the order of sums alone.
        config = replace(
            config,
            data=replace(config.data, mode=mode, weighting="per_token"),
            optim=replace(config.optim, dtype="float32", muon_lr=0.0),
            eval=replace(config.eval, score_every=0),
        )
        pretrain.main(config)
        rows[processes] = read_jsonl(config.run.out / "metrics.jsonl")
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    plans = [
        json.loads((root / f"{mode}-{processes}" / "step-000003" / "run.json").read_text())["plan"]
        for processes in (1, 2)
    ]
    assert plans[0] == plans[1] and len(plans[0]) == 32 + 1 + 16


def test_samples_in_another_order_are_refused_in_a_sentence(root: Path, whole: Path) -> None:
    config = tiny_run.tiny_config(root / "whole")
    run = json.loads((whole / "step-000020" / "run.json").read_text())
    with pytest.raises(SettingsError, match=r"samples came in another order \([0-9a-f]{32}-[0-9a-f]{16}, now 0+\)"):
        check_same_run(whole, config, "0" * 32)
    check_same_run(whole, config, run["plan"])


def torchrun(out: Path, *strikes: str, restarts: int = 0, sharding: str = "full") -> "subprocess.CompletedProcess[str]":
    """The run of two ranks under torchrun, which the n-th start ends by the n-th strike."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "tests.experiments.tiny_run", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_SHARDING": sharding}
    return subprocess.run(
        [*command, ",".join(strikes)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def sharded_contents(out: Path) -> dict[str, object]:
    """What a sharded run is compared by."""
    last = out / f"step-{STEPS:06d}"
    tensors = {name: tensor.numpy().tobytes() for name, tensor in read_whole(last).items()}
    return {"metrics": (out / "metrics.jsonl").read_bytes(), **tensors}


@pytest.fixture(scope="module")
def whole_sharded(root: Path) -> Path:
    """A sharded run of two ranks that nobody disturbs."""
    config = tiny_run.tiny_config(root / "whole-sharded")
    pretrain.main(replace(config, engine=EngineConfig(sharding="full", recompute="selective")))
    return root / "whole-sharded"


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_after_a_rank_and_after_all_were_killed(root: Path, whole_sharded: Path) -> None:
    out = root / "restarted"
    result = torchrun(out, "1:KILL:update:5", "all:KILL:update:5", "0:KILL:update:4", restarts=3)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "SIGKILL" in result.stderr or "exitcode: -9" in result.stderr.lower() or "-9" in result.stderr
    assert sharded_contents(out) == sharded_contents(whole_sharded)
    done = read_jsonl(out / "timing.jsonl")[-1]
    assert done["step"] == STEPS and 0 < done["steps"] < STEPS, "it went on from a checkpoint"
    assert not list(out.glob(".step-*"))


def test_a_rank_that_is_left_alone_says_so_and_ends(root: Path) -> None:
    result = torchrun(root / "dead", "1:KILL:update:2")
    assert result.returncode != 0
    assert "lost another rank, which ended or hangs" in result.stderr and "--max-restarts=N" in result.stderr


@pytest.mark.slow
def test_ten_kills_of_ranks_leave_no_trace(root: Path, whole_sharded: Path) -> None:
    draw, out = random.Random(4), root / "ten-sharded"
    strikes = [
        f"{draw.choice(['0', '1', 'all'])}:KILL:{draw.choice(['update', 'update', 'save'])}:{draw.randint(1, 4)}"
        for _ in range(10)
    ]
    result = torchrun(out, *strikes, restarts=10)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sharded_contents(out) == sharded_contents(whole_sharded)


@pytest.mark.slow
def test_a_sharded_run_is_the_run(root: Path, whole_sharded: Path) -> None:
    """Other engines, other numbers of ranks: the same losses up to the order of sums."""
    rows = {}
    for name, processes, engine in (
        ("none", 2, EngineConfig()),
        ("replicate", 2, EngineConfig(sharding="replicate", recompute="full")),
        ("full", 1, EngineConfig(sharding="full", batches_ahead=2)),
        ("hybrid", 2, EngineConfig(sharding="hybrid", shard_size=1, background=False)),
    ):
        config = tiny_run.tiny_config(root / f"engine-{name}", steps=4, processes=processes)
        config = replace(
            config,
            engine=engine,
            optim=replace(config.optim, dtype="float32", muon_lr=0.0),
            eval=replace(config.eval, score_every=0),
        )
        pretrain.main(config)
        rows[name] = read_jsonl(config.run.out / "metrics.jsonl")
    for name in ("replicate", "full", "hybrid"):
        for one, other in zip(rows["none"], rows[name], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert other["loss_by_time"] == pytest.approx(one["loss_by_time"], rel=1e-3)
            assert other["loss_by_grid"].keys() == {"4x4", "4x6"}
        assert rows[name][-1]["validation"] == pytest.approx(rows["none"][-1]["validation"], rel=1e-3)
    timing = read_jsonl(root / "engine-full" / "timing.jsonl")[-1]
    assert timing["mfu"] is None and timing["tflops_per_rank"] > 0 and timing["rank_balance"] == 1
    assert timing["tokens_per_second"] > timing["images_per_second"] > 0 and timing["peak_memory_gb"] > 0.05
    assert 0 <= timing["data_wait_share"] < 1
    config = tiny_run.tiny_config(whole_sharded, processes=1)
    with pytest.raises(SettingsError, match="is a sharded checkpoint"):
        pretrain.main(config)


def guarded(root: Path, name: str, bad: dict[int, float], **guard: object) -> tuple[Path, list[dict[str, object]]]:
    """A run of 12 steps in which the losses of some steps (from 1) are multiplied, each the first time only."""
    config = tiny_run.tiny_config(root / name, steps=12, processes=1)
    config = replace(
        config,
        optim=replace(config.optim, dtype="float32", muon_lr=0.0),
        eval=replace(config.eval, score_every=0, validate_every=0),
        run=replace(config.run, sample_every=0),
        guard=GuardConfig(**guard),  # pyright: ignore
    )
    original, seen = pretrain.per_sample_loss, []

    def worse(state: object, batch: object, times: object) -> object:
        losses = original(state, batch, times)  # pyright: ignore
        seen.append(state.step + 1)  # pyright: ignore
        return losses * bad.get(state.step + 1, 1.0)  # pyright: ignore

    pretrain.per_sample_loss = worse  # pyright: ignore
    try:
        pretrain.main(config)
    finally:
        pretrain.per_sample_loss = original
    return config.run.out, read_jsonl(config.run.out / "metrics.jsonl")


def test_bad_steps_are_left_out_counted_and_their_samples_named(root: Path) -> None:
    out, rows = guarded(root, "skip", {5: float("nan"), 8: 1e6}, policy="skip", spike_factor=50.0, window=3, patience=2)
    bad = {row["step"]: row for row in rows if "skipped" in row}
    assert bad.keys() == {5, 8} and all(row["loss"] is None for row in bad.values())
    assert bad[5]["skipped"] == "loss nan" and str(bad[8]["skipped"]).startswith("spike: gradient norm")
    events = read_jsonl(out / "events.jsonl")
    assert [(event["step"], event["action"], len(event["samples"])) for event in events] == [
        (5, "skip", 8),
        (8, "skip", 8),
    ]
    assert all(loss == "nan" for _, loss in events[0]["samples"]) and all(loss > 0 for _, loss in events[1]["samples"])
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 2
    # Weights and moments did not notice: the rest is what a run without these two updates does.
    assert all(row["loss"] < 10 for row in rows if row["loss"] is not None)
    assert len(rows) == 12


def test_going_back_leaves_the_bad_steps_out_for_good(root: Path) -> None:
    out, rows = guarded(root, "restore", {8: float("inf"), 9: float("inf")}, policy="restore", patience=2, margin=1)
    assert json.loads((out / "left_out.json").read_text()) == [[6, 9]]
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == dict.fromkeys((7, 8, 9), "left out")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [event["action"] for event in read_jsonl(out / "events.jsonl")] == ["skip", "restore"]
    # The same as a run that was told beforehand.
    told = root / "told"
    told.mkdir()
    (told / "left_out.json").write_text("[[6, 9]]")
    _, expected = guarded(root, "told", {}, policy="restore", patience=2, margin=1)
    assert rows == expected


def test_a_run_that_cannot_go_on_stops_with_a_reason(root: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 4: loss nan; bad steps since step 3: 2 bad steps in a row"):
        guarded(root, "runaway", {3: float("nan"), 4: float("nan")}, policy="skip", patience=2)
