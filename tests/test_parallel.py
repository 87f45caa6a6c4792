"""Workers meet in sums, tell why they fail, save when they are asked to stop, and never outlive their parent."""

import atexit
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from experiments.runs import StopRequest
from lensmini.parallel import Group, LostRankError, run_processes
from lensmini.parallel.processes import agree_on_start

ROOT = Path(__file__).parents[1]


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for a dead parent's successor does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def worker_meets(group: Group, folder: Path) -> None:
    tensor = torch.tensor([1.5, 10.0]) * (group.rank + 1)
    assert group.sum_(tensor) is tensor
    gathered = group.gather({"rank": group.rank, "tensor": torch.full((group.rank + 1,), float(group.rank))})
    torch.save((tensor, gathered, os.getpid()), folder / f"{group.rank}.pt")


def worker_fails(group: Group) -> None:
    if group.rank == 0:
        # The failing worker is the slower one to leave, so that the other's lost connection is seen first.
        atexit.register(time.sleep, 1.5)
        atexit.register(dist.destroy_process_group)
        raise ValueError("the disk is full")
    group.sum_(torch.zeros(1))


def worker_until_stopped(group: Group, folder: Path, careful: bool) -> None:
    (folder / f"pid-{group.rank}").write_text(str(os.getpid()))
    if not careful:
        (folder / f"ready-{group.rank}").touch()
        time.sleep(60)
    with StopRequest() as stop:
        (folder / f"ready-{group.rank}").touch()
        while not group.sum_(torch.tensor([float(stop.requested)])):
            time.sleep(0.01)
        (folder / f"saved-{group.rank}").write_text("whole")


def start_parent(folder: Path, *, careful: bool = True) -> "subprocess.Popen[str]":
    """A process that runs two workers until a signal comes, once both of them are at work."""
    code = (
        "import sys; from pathlib import Path; from tests import test_parallel as t; "
        "t.run_processes(t.worker_until_stopped, 2, Path(sys.argv[1]), sys.argv[2] == 'True'); print('left in peace')"
    )
    command = [sys.executable, "-c", code, str(folder), str(careful)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: parent.poll() is not None or all((folder / f"ready-{rank}").exists() for rank in (0, 1)))
    assert parent.poll() is None, parent.communicate()[1]
    return parent


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid-{rank}").read_text()) for rank in (0, 1)]


def test_a_group_of_one_changes_nothing() -> None:
    group, tensor = Group(0, 1), torch.tensor([1.0, float("nan")])
    assert group.sum_(tensor) is tensor
    assert tensor[0] == 1 and tensor[1].isnan()
    value = object()
    assert group.gather(value) == [value]
    assert not dist.is_initialized()


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0)])
def test_a_rank_outside_the_group_is_an_error(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world_size"):
        Group(rank, world_size)


def test_no_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_processes: expected at least 1, got 0"):
        run_processes(worker_fails, 0)


def test_one_process_is_this_one(tmp_path: Path) -> None:
    run_processes(worker_meets, 1, tmp_path)
    tensor, gathered, pid = torch.load(tmp_path / "0.pt")
    assert pid == os.getpid()
    assert tensor.tolist() == [1.5, 10.0]
    assert len(gathered) == 1 and gathered[0]["rank"] == 0
    with pytest.raises(ZeroDivisionError):
        run_processes(lambda group: 1 // group.rank, 1)


def test_two_processes_add_up_and_tell_each_other(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_processes(worker_meets, 2, tmp_path)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert len({os.getpid(), seen[0][2], seen[1][2]}) == 3
    for tensor, gathered, _ in seen:
        assert tensor.tolist() == [4.5, 30.0]
        assert [value["rank"] for value in gathered] == [0, 1]
        assert [value["tensor"].tolist() for value in gathered] == [[0.0], [1.0, 1.0]]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_first_failure_is_told_and_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the disk is full") as error:
        run_processes(worker_fails, 2)
    assert "worker 0" in str(error.value) and "worker_fails" in str(error.value)
    assert time.monotonic() - start < 25
    assert all(not alive(child) for child in _children())


def _children() -> list[int]:
    """Children of this process that run this module's workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == os.getpid() and "spawn_main" in command:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    parent = start_parent(tmp_path)
    workers = pids(tmp_path)
    assert all(map(alive, workers))
    parent.kill()
    wait_until(lambda: not any(map(alive, workers)), 10)
    assert parent.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("saved-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_parent_lets_the_workers_save_and_leave(tmp_path: Path, number: signal.Signals) -> None:
    parent = start_parent(tmp_path)
    parent.send_signal(number)
    output, errors = parent.communicate(timeout=60)
    assert parent.returncode == 0 and output == "left in peace\n", errors
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["whole"] * 2
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
def test_workers_that_do_not_handle_the_signal_end_with_its_exit_code(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, careful=False)
    parent.terminate()
    output, errors = parent.communicate(timeout=60)
    assert parent.returncode == 128 + signal.SIGTERM and not output
    assert "Traceback" not in errors
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_with_an_error(tmp_path: Path) -> None:
    parent = start_parent(tmp_path)
    workers = pids(tmp_path)
    os.kill(workers[1], signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert "-9]" in errors, "the exit codes name the signal"
    assert not any(map(alive, workers))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_start_agrees_on_a_word_of_its_own_whatever_the_store_remembers(world_size: int) -> None:
    store, words = dist.HashStore(), []
    # The second start finds everything that the first one left, and the third what one that nobody finished left.
    for left_alone in (False, True, False):
        if left_alone:
            with pytest.raises(LostRankError, match=r"ranks \[0\] did not come in 0 s"):
                agree_on_start(store, world_size, world_size + 1, 0.05)
            continue
        with ThreadPoolExecutor(world_size) as pool:
            jobs = [pool.submit(agree_on_start, store, rank, world_size, 20.0) for rank in reversed(range(world_size))]
            found = {job.result() for job in jobs}
        assert len(found) == 1
        words += found
    assert len(set(words)) == 2
