"""The documentation names what is there: files, modules, tests and pages; its Python runs; the site builds without warnings."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.site_hooks import show_outside_links

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
by_page = pytest.mark.parametrize("page", TEXTS, ids=[page.name for page in TEXTS])


def prose(page: Path) -> str:
    return page.read_text()


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}, target


@by_page
def test_commands_name_modules_that_exist(page: Path) -> None:
    for module in set(re.findall(r"python -m ((?:experiments|benchmarks|tests)[\w.]*\w)", prose(page))):
        assert importlib.util.find_spec(module) is not None, module


@by_page
def test_files_that_are_named_exist(page: Path) -> None:
    for name in set(re.findall(r"`((?:lensmini|experiments|benchmarks|tests|docs)/[\w/]+(?:\.\w+)?)`", prose(page))):
        assert (ROOT / name).exists(), name


def test_tests_that_are_named_exist() -> None:
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        known |= set(re.findall(r"def (test_\w+)\(", path.read_text()))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+?)`", prose(page)):
            found = known if not name.endswith("_") else {one for one in known if one.startswith(name)}
            assert name in known or (found - known == set() and found and name.endswith("_")), (page.name, name)


def test_every_page_is_in_the_site() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_the_25_questions_are_answered() -> None:
    numbers = re.findall(r"^\*\*(\d+)\. .+?\?\*\*", prose(DOCS / "faq.md"), flags=re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 26)]


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("[a](../b/c.md)", "a (`b/c.md`)"),
        ("[a](b.md) and [c](https://d.e/../f)", "[a](b.md) and [c](https://d.e/../f)"),
        ("![a](b.png)", "![a](b.png)"),
    ],
)
def test_only_links_out_of_the_docs_become_paths(markdown: str, expected: str) -> None:
    assert show_outside_links(markdown) == expected


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", prose(page), flags=re.MULTILINE | re.DOTALL)


WITH_CODE = [page for page in TEXTS if blocks(page) and page.name != "reasoner.md"]  # which asks a server: its own test


@pytest.mark.parametrize("page", WITH_CODE, ids=[page.name for page in WITH_CODE])
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for number, code in enumerate(blocks(page)):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_twice_the_same(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
        files = {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        built.append(files)
    assert built[0] == built[1] and Path("faq.html") in built[0]
