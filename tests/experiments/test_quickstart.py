"""Laws of experiments.quickstart: what it leaves behind, what it does not do twice, and what its numbers mean."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import pretrain, pretrain_eval
from experiments import quickstart as script
from experiments.bank import FeatureBank
from experiments.generate import UNSEEN_CANVASES, find_checkpoint
from experiments.miniature.autoencoder import load_autoencoder_miniature
from experiments.quickstart import main, quickstart, smallest
from experiments.quickstart_score import ScoreConfig, build_suites, judge, losses_by_time, wilson_interval
from experiments.runs import read_jsonl
from experiments.usage import cpu_seconds, process_age, tree_memory
from lensmini.data import KINDS, MINIATURE_CANVASES, render_scene
from lensmini.nn import LensTransformer
from tests.experiments.test_generate import make_autoencoder

NUMBERS = [
    "verifier_strict",
    "verifier_strict_low",
    "verifier_strict_high",
    "verifier_loose",
    "verifier_atom",
    "chance_strict",
    "chance_loose",
    "shifted_strict",
    "shifted_loose",
    "autoencoder_strict",
    "unseen_strict",
    "unseen_loose",
    "withheld_strict",
    "withheld_chance_strict",
    "short_strict",
    "seconds",
    "cpu_seconds",
    "peak_memory_mb",
]
STAGES = ("language_model_and_autoencoder", "scene_bank", "pretrain", "score", "report")


def at(out, **changes):
    config = smallest()
    return replace(config, run=replace(config.run, out=out, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole quickstart of the smallest size: its directory and what ``main`` returned."""
    out = tmp_path_factory.mktemp("runs") / "small"
    make_autoencoder(smallest(), out.parent)
    return out, main(at(out))


class Page(HTMLParser):
    """Words, headings and pictures of a page, and whether every element is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.text, self.images, self.open, self.ids = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def test_it_leaves_pictures_a_summary_and_a_report(run):
    out, summary = run
    assert json.loads((out / "summary.json").read_text()) == summary
    assert all(isinstance(summary[name], float) and math.isfinite(summary[name]) for name in NUMBERS)
    assert summary["verifier_strict_low"] <= summary["verifier_strict"] <= summary["verifier_strict_high"]
    assert set(summary["by_kind"]) == set(KINDS) and summary["num_prompts"] == 12
    assert {one["num"] for one in summary["by_kind"].values()} == {2}
    assert tuple(summary["stage_seconds"]) == STAGES
    assert sum(summary["stage_seconds"].values()) <= summary["seconds"] + 0.01
    assert summary["checkpoint"] == (out / "step-000006").as_posix()
    assert summary["config"]["run"]["steps"] == summary["last_metrics"]["step"] == 6
    assert {"commit", "versions", "machine"} <= set(summary["provenance"])
    assert Image.open(out / "samples.png").width > 1000


def test_a_second_call_takes_every_stage_as_it_is_and_says_so(run, capsys):
    out, first = run
    assert first["reused"] == ["autoencoder"]
    kept = [path for path in out.parent.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".jsonl")]
    kept = [path for path in kept if path.name != "stages.jsonl"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}
    capsys.readouterr()
    second = main(at(out))
    said = capsys.readouterr().out
    assert second["reused"] == ["language-model", "autoencoder", "scene_bank", "pretrain", "score"]
    for name in ("language-model", "autoencoder", "scene-bank", "pretrain", "score"):
        assert f"{name}: reused from" in said
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}
    assert {name: second[name] for name in NUMBERS[:-3]} == {name: first[name] for name in NUMBERS[:-3]}
    # The time that the stages took is still known.
    assert second["stages_of_all_calls"]["pretrain"] == first["stages_of_all_calls"]["pretrain"]
    assert second["stages_of_all_calls"]["pretrain"]["seconds"] == pytest.approx(first["stage_seconds"]["pretrain"])


def test_the_report_shows_every_kind_and_sample_and_asks_nothing_of_a_server(run):
    out, _ = run
    text = (out / "report.html").read_text()
    assert not re.search(r"https?:|src\s*=\s*\"?//|@import|<script|<iframe", text)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)
    assert all(kind in page.text for kind in KINDS)
    assert len(page.images) == 10 and all(one["src"].startswith("data:image/png;base64,") for one in page.images)
    assert page.text.count("size never trained") == 5
    assert page.text.count("\u2713 right") + page.text.count("\u2717 wrong") == 10
    assert text.count("<svg") == 5
    assert f"--checkpoint {out}" in page.text


def test_the_commands_that_the_report_proposes_are_understood(run, monkeypatch, tmp_path):
    text = Page((run[0] / "report.html").read_text()).text
    commands = re.findall(r"python -m experiments\.(\w+) (.*?)(?=(?:Train|See|Paint|$))", text)
    assert Counter(name for name, _ in commands) == {"generate": 1, "quickstart": 2, "pretrain": 2}
    asked = []
    monkeypatch.setattr(script, "main", lambda config, **_: asked.append(config.run))
    for name, arguments in commands:
        if name == "quickstart":
            script.cli(arguments.split())
    assert [(one.out.name, one.steps, one.seed) for one in asked] == [
        ("longer", 12, 0),
        ("seed1", pretrain.mini().run.steps, 1),
    ]


def test_a_directory_with_other_settings_is_refused_by_name(run):
    out, _ = run
    before = (out / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(run.seed 0 -> 1\)"):
        main(at(out, seed=1))
    config = at(out)
    with pytest.raises(ValueError, match=r"optim.lr 0.005 -> 0.1"):
        main(replace(config, optim=replace(config.optim, lr=0.1)))
    assert (out / "summary.json").read_bytes() == before


def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(run, monkeypatch):
    whole, _ = run
    out = whole.parent / "stopped"
    original = pretrain_eval.validation_losses

    def stop(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(pretrain_eval, "validation_losses", stop)
    with pytest.raises(SystemExit, match="stopped at step 4 of 6"):
        main(at(out))
    assert not (out / "report.html").exists()
    monkeypatch.setattr(pretrain_eval, "validation_losses", original)
    main(at(out))
    for name in ("metrics.jsonl", "step-000006/ema.safetensors", "step-000006/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    rows = [row for row in read_jsonl(out / "stages.jsonl") if row["stage"] == "pretrain"]
    assert len(rows) == 2 and not any(row["reused"] for row in rows)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert main(replace(at(tmp_path / "runs" / "dry"), dry_run=True)) == {}
    assert "parameters" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_pretrain_mini_scored_on_at_least_384_dense_prompts():
    config = quickstart()
    assert script._without_score(config) == replace(
        pretrain.mini(), run=replace(pretrain.mini().run, out=Path("runs/quickstart"))
    )
    suites = build_suites(config.score, config.data.canvases)
    assert len(suites["trained"].prompts) >= 384
    assert (config.score.weights, config.score.guidance_scale, config.score.num_steps) == ("ema", 4.0, 12)
    assert not set(UNSEEN_CANVASES) & set(config.data.canvases)
    assert not set(UNSEEN_CANVASES) & set(config.miniature.autoencoder.canvases)


def test_every_kind_meets_every_canvas_and_suites_ask_what_they_say():
    suites = build_suites(ScoreConfig(), MINIATURE_CANVASES)
    for name in ("trained", "unseen", "withheld", "short"):
        met = Counter(zip((prompt.kind for prompt in suites[name].prompts), suites[name].canvases, strict=True))
        assert len(met) == len(KINDS) * 5 and max(met.values()) - min(met.values()) <= 1
    assert set(suites["trained"].canvases) == set(MINIATURE_CANVASES)
    assert set(suites["unseen"].canvases) == set(UNSEEN_CANVASES)
    assert set(suites["samples"].canvases) == {*MINIATURE_CANVASES, *UNSEEN_CANVASES}
    for dense, short, unseen in zip(*(suites[name].prompts for name in ("trained", "short", "unseen")), strict=False):
        assert dense.scene == short.scene == unseen.scene and dense.text == unseen.text
        assert len(short.text.split()) < len(dense.text.split())
    samples = {prompt.text for prompt in suites["samples"].prompts}
    assert not samples & {prompt.text for prompt in suites["trained"].prompts}


def test_perfect_pictures_score_one_and_shifted_ones_score_chance(run):
    out, _ = run
    autoencoder = load_autoencoder_miniature(next(out.parent.glob("autoencoder-*")))
    suite = build_suites(ScoreConfig(num_prompts=60), MINIATURE_CANVASES)["trained"]
    pictures = [render_scene(p.scene, *canvas) for p, canvas in zip(suite.prompts, suite.canvases, strict=True)]
    score = judge(suite, pictures, autoencoder)
    assert score["strict"] == score["loose"] == score["atom"] == score["low"] == score["high"] == 1.0
    assert score["chance_strict"] < 0.2 and score["shifted_strict"] < 0.2
    # An untrained autoencoder is no ceiling: what it is given is judged after it, not before.
    assert score["autoencoder_strict"] < 0.2
    # Half of the prompts of each kind right: the interval of a stratified mean is known in closed form.
    halves = [one if (index // len(KINDS)) % 2 else torch.zeros_like(one) for index, one in enumerate(pictures)]
    score = judge(suite, halves, autoencoder)
    assert score["strict"] == pytest.approx(0.5)
    assert score["high"] - score["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 60))
    assert score["by_kind"]["whole"]["strict"] == 0.5 and score["by_kind"]["whole"]["num"] == 10
    assert sum(one["num"] for one in score["by_canvas"].values()) == 60
    mean = sum(one["strict"] * one["num"] for one in score["by_canvas"].values()) / 60
    assert mean == pytest.approx(0.5)


@given(num=st.integers(1, 500), share=st.floats(0, 1))
def test_the_ends_of_a_wilson_interval_are_1_96_of_their_own_standard_errors_away(num, share):
    share = round(share * num) / num
    low, high = wilson_interval(share, num)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / num), abs=1e-9)


def test_a_model_that_predicts_nothing_has_the_loss_of_predicting_nothing_at_every_time(run):
    out, _ = run
    bank = FeatureBank.load(next(out.parent.glob("scene-bank-*")) / "held_out")
    rows = losses_by_time(LensTransformer(smallest().model).init_weights(0), bank)
    assert [row["time"] for row in rows] == pytest.approx([0.1 * number for number in range(1, 10)])
    assert all(row["loss"] == pytest.approx(row["zero_loss"], rel=1e-6) for row in rows)
    # Noise has variance 1 and is independent of the latents: of every other picture here.
    pieces = [bank.latents[bank.latent_starts[index] : bank.latent_starts[index + 1]] for index in range(0, 10, 2)]
    power = sum(piece.float().square().mean().item() for piece in pieces) / 5
    assert rows[0]["zero_loss"] == pytest.approx(1 + power, rel=0.1)


def test_the_trained_checkpoint_is_the_one_that_generate_finds(run):
    out, summary = run
    assert find_checkpoint(out).as_posix() == summary["checkpoint"]


def test_cpu_seconds_count_children_and_memory_counts_what_is_held():
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert cpu_seconds() - before > 0.45
    if sys.platform == "linux":
        assert 0 < process_age() < 24 * 3600
        least = tree_memory()
        held = torch.ones(32 * 2**20)
        assert tree_memory() - least > 100 * 2**20 and held.sum() > 0
        hold = "import sys; held = b'x' * 2**27; print(len(held), flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            assert tree_memory() - least > 220 * 2**20
            child.stdin.close()


@pytest.mark.slow
def test_two_processes_paint_what_one_paints(run):
    out, first = run
    config = at(out)
    again = main(replace(config, score=replace(config.score, processes=2)))
    assert "score" in again["reused"], "the number of processes decides nothing, so the score is kept"
    elsewhere = replace(config, score=replace(config.score, processes=2, seed=7))
    one = main(replace(elsewhere, score=replace(elsewhere.score, num_steps=2, processes=1)))
    for path in out.glob("score-*"):
        if json.loads((path / "stage.json").read_text())["config"]["score"]["num_steps"] == 2:
            path.rename(path.with_name(f"old-{path.name}"))
    two = main(replace(elsewhere, score=replace(elsewhere.score, num_steps=2)))
    assert two["by_kind"] == one["by_kind"]
    assert first["by_kind"].keys() == two["by_kind"].keys()


def is_running(process):
    """Whether the process is neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_the_command_and_its_children_and_the_same_command_finishes(tmp_path):
    out = tmp_path / "runs" / "small"
    command = [sys.executable, "-m", "experiments.quickstart", "smallest", "--run.out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if "making" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        rest = process.stdout.read()
    assert "the same command goes on" in rest and process.returncode == 1
    deadline = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, children))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "report.html" in done.stdout and (out / "report.html").is_file()
    assert os.path.getsize(out / "samples.png") > 0
