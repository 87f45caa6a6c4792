"""The mutation check: every seeded mistake is noticed by the tests that are named beside it."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from tests.mutations import MUTATIONS, ROOT, UNTOUCHED, Mutation

by_name = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)


@pytest.fixture(scope="module")
def exit_codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Exit code and output of pytest for every mistake; one process for all of them, and one run for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / "mutations.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = folder / "mutations.json"
        if not found.exists():
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            environment.pop("PYTEST_XDIST_WORKER", None)
            command = [sys.executable, "-m", "tests.mutations"]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
            found.write_text(done.stdout.splitlines()[-1])
    return json.loads(found.read_text())


def test_there_are_enough_mistakes_and_every_one_is_different() -> None:
    assert len(MUTATIONS) >= 30
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS)


@by_name
def test_a_mistake_can_be_planted_in_exactly_one_place(mutation: Mutation) -> None:
    text = (ROOT / "lensmini" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    for test in mutation.tests:
        path, _, name = test.partition(" ")[0].partition("::")
        wanted, text = name.rpartition("::")[2], (ROOT / path).read_text()
        assert f"def {wanted}" in text or f"class {wanted}" in text, test


@pytest.mark.slow
def test_the_named_tests_pass_on_an_untouched_copy(exit_codes: dict[str, dict]) -> None:
    untouched = {name: result for name, result in exit_codes.items() if name.startswith(UNTOUCHED)}
    assert untouched and all(result["code"] == 0 for result in untouched.values()), untouched


@pytest.mark.slow
@by_name
def test_a_planted_mistake_is_noticed(mutation: Mutation, exit_codes: dict[str, dict]) -> None:
    result = exit_codes[mutation.name]
    # 0: every test passed; 2 to 5: pytest did not get as far as running them; above: the runner gave up.
    assert result["code"] == 1, result["log"]
    assert "error during collection" not in result["log"]
