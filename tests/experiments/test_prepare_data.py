"""Laws of experiments.prepare_data: everything is counted once, and the end is the same however it was reached."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.prepare_config import CaptionConfig, ModelsConfig, PrepareConfig, PrepareRun, ShardConfig, TextConfig
from experiments.prepare_data import Unfinished, cli, prepare
from experiments.prepare_units import read_rows
from lensmini.data import SampleIndex, describe_scene, encode_picture, read_picture, render_scene, sample_scene
from lensmini.data.filters import Thresholds
from lensmini.data.shards import ShardReader
from tests.chat_server import ChatServer, Fault
from tests.data.hostile import write_hostile_folder

pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[2]
SMALL = ShardConfig(bases=(32, 64), multiple=4, tolerance=0.13, shard_bytes=2**16)
LAX = Thresholds(min_area=300, min_clarity=None, min_entropy=None, min_luminance=None, max_luminance=None)
GOOD = "A red circle lies to the left of a blue square on a green ground."


def scenes(out, numbers, *, captions=True):
    """PNG, JPEG and WebP pictures of scenes, with captions beside them."""
    out.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        scene = sample_scene(generator=number)
        image = render_scene(scene, *((48, 64), (64, 48), (56, 56))[number % 3])
        kind = ("png", "jpeg", "webp")[number % 3]
        (out / f"{number:05d}.{kind}").write_bytes(encode_picture(image, kind))
        if captions:
            (out / f"{number:05d}.txt").write_text(describe_scene(scene, density="dense", generator=number))
    return out


def config(path, out, **changes):
    run = {name: changes.pop(name) for name in ("shard", "workers", "ray", "wait_s") if name in changes}
    fields = {"thresholds": LAX, "shards": SMALL, **changes}
    return PrepareConfig(path=path, run=PrepareRun(out=out, **run), **fields)


def digest(folder):
    """Hashes of all files below."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adds_up(summary):
    assert summary["read"] == summary["kept"] + sum(summary["dropped"].values())
    return summary


def test_every_sample_is_stored_as_it_was_with_its_caption(tmp_path):
    raw = scenes(tmp_path / "raw", range(40))
    summary = adds_up(prepare(config(raw, tmp_path / "out")))
    assert summary["kept"] == 40 and summary["dropped"] == {}
    reader = ShardReader(tmp_path / "out" / "shards")
    stored = {sample.key: sample.members for sample in (reader[row] for row in range(len(reader)))}
    for path in raw.glob("*[!t]"):
        if path.suffix == ".txt":
            continue
        members = stored[path.name]
        suffix = {"jpeg": "jpg"}.get(path.suffix[1:], path.suffix[1:])
        assert members[suffix] == path.read_bytes()
        assert members["txt"].decode() == path.with_suffix(".txt").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_the_manifest_feeds_the_index_and_webdataset(tmp_path):
    import pyarrow.parquet as parquet

    raw = scenes(tmp_path / "raw", range(30))
    prepare(config(raw, tmp_path / "out"))
    shards = tmp_path / "out" / "shards"
    table = parquet.read_table(shards / "manifest.parquet").to_pydict()
    assert {"clarity", "entropy", "luminance", "key", "height", "width"} <= table.keys()
    index = SampleIndex.build(shards / "manifest.parquet", tmp_path / "index", SMALL.buckets(), small="upscale")
    assert len(index) == 30
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 30 and all("txt" in sample for sample in samples)
    sizes = {tuple(Image.open(path).size) for path in raw.glob("*.png")}
    assert sizes <= set(zip(table["width"], table["height"], strict=True))


def test_each_filter_drops_what_it_is_for(tmp_path):
    raw = scenes(tmp_path / "raw", range(6))
    rng = np.random.default_rng(0)
    noise = lambda size: torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8))  # noqa: E731
    made = {
        "small": noise((10, 12)),
        "plain": torch.full((3, 64, 64), 90, dtype=torch.uint8),
        "black": (noise((64, 64)) // 64).to(torch.uint8),
        "white": 255 - noise((64, 64)) // 64,
        "noise": noise((64, 64)),
    }
    for name, image in made.items():
        (raw / f"{name}.png").write_bytes(encode_picture(image, "png"))
        (raw / f"{name}.txt").write_text(f"A {name} picture.")
    (raw / "again.png").write_bytes((raw / "noise.png").read_bytes())
    (raw / "again.txt").write_text("The same picture.")
    (raw / "silent.png").write_bytes(encode_picture(noise((50, 50)), "png"))
    (raw / "empty.png").write_bytes(encode_picture(noise((50, 50)), "png"))
    (raw / "empty.txt").write_text(" ")
    (raw / "broken.png").write_bytes(encode_picture(noise((50, 50)), "png")[:900])
    bounds = Thresholds(min_area=300, min_clarity=0.1, min_entropy=0.2)
    summary = adds_up(prepare(config(raw, tmp_path / "out", thresholds=bounds)))
    rows = read_rows(tmp_path / "out" / "parts" / "000000.jsonl")
    fates = {row["key"]: row["fate"] for row in rows}
    assert fates["small.png"] == "area" and fates["plain.png"] == "clarity"
    assert fates["black.png"] == "luminance" and fates["white.png"] == "luminance"
    assert fates["noise.png"] == "kept" and fates["broken.png"].startswith("picture: ")
    assert summary["dropped"]["duplicate"] == 1
    assert summary["dropped"]["caption: none"] == 1 and summary["dropped"]["caption: empty"] == 1
    assert summary["kept"] == 7


def test_hostile_folders_are_counted_file_by_file(tmp_path):
    expected = write_hostile_folder(tmp_path / "raw", seed=5, num=160)
    summary = adds_up(prepare(config(tmp_path / "raw", tmp_path / "out")))
    rows = {row["key"]: row for path in (tmp_path / "out" / "parts").glob("*.jsonl") for row in read_rows(path)}
    assert summary["read"] == len(rows)
    for name, fate in expected.fates.items():
        found = rows[name]["fate"]
        if fate == "kept":
            assert found == "kept", (name, found)
        elif fate != "either":
            assert found in (fate, f"picture: {fate}"), (name, found, fate)
    reader = ShardReader(tmp_path / "out" / "shards")
    for row in range(len(reader)):
        sample = reader[row]
        (data,) = [data for suffix, data in sample.members.items() if suffix not in ("txt", "json")]
        image = read_picture(data).image.permute(1, 2, 0).numpy().astype(int)
        if sample.key in expected.pixels:
            pixels, limit = expected.pixels[sample.key]
            assert np.abs(image - pixels).max() <= limit, sample.key


def test_tasks_and_processes_end_with_the_same_bytes(tmp_path):
    raw = scenes(tmp_path / "raw", range(300))
    prepare(config(raw, tmp_path / "one"))
    shards = replace(SMALL, units_per_group=1)
    prepare(config(raw, tmp_path / "groups", shards=shards))
    for number in (2, 0):
        with pytest.raises(Unfinished, match="belong to other tasks"):
            prepare(config(raw, tmp_path / "many", shards=shards, shard=f"{number}/3"))
    with pytest.raises(Unfinished, match="groups of shards"):
        prepare(config(raw, tmp_path / "many", shards=shards, shard="1/3"))
    prepare(config(raw, tmp_path / "many", shards=shards))
    assert digest(tmp_path / "many" / "shards") == digest(tmp_path / "groups" / "shards")
    one, many = (ShardReader(tmp_path / name / "shards") for name in ("one", "groups"))
    content = [
        {(s.key, tuple(sorted(s.members.items()))) for s in map(r.__getitem__, range(len(r)))} for r in (one, many)
    ]
    assert content[0] == content[1] and len(content[0]) == 300
    assert (tmp_path / "many" / "summary.json").read_text() == (tmp_path / "groups" / "summary.json").read_text()


def test_doing_it_again_changes_nothing_and_other_work_is_refused(tmp_path, monkeypatch):
    raw = scenes(tmp_path / "raw", range(12))
    prepare(config(raw, tmp_path / "out"))
    before = digest(tmp_path / "out")
    monkeypatch.setattr("experiments.prepare_units.read_picture", lambda data: pytest.fail("read again"))
    prepare(config(raw, tmp_path / "out"))
    assert digest(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"run\.out: .* other pictures or settings"):
        prepare(config(raw, tmp_path / "out", thresholds=replace(LAX, min_area=301)))
    scenes(raw, [99])
    with pytest.raises(ValueError, match=r"run\.out"):
        prepare(config(raw, tmp_path / "out"))


def test_missing_captions_are_asked_for_and_bad_answers_counted(tmp_path):
    raw = scenes(tmp_path / "raw", range(8))
    scenes(raw, range(8, 20), captions=False)
    answers = Counter()

    def say(body):
        answers["all"] += 1
        # The same picture always gets the same kind of answer.
        kind = int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16) % 4
        return "I'm sorry, I can't." if kind == 0 else "word " * 40 if kind == 1 else GOOD

    with ChatServer(say) as server:
        captions = CaptionConfig(which="missing", url=server.url, model="m", max_attempts=2)
        summary = adds_up(prepare(config(raw, tmp_path / "out", captions=captions)))
        asked = len(server.requests)
        prepare(config(raw, tmp_path / "out", captions=captions))
        assert len(server.requests) == asked
    dropped = summary["dropped"]
    assert set(dropped) <= {"caption: refusal", "caption: loop"} and sum(dropped.values()) > 0
    assert summary["kept"] == 20 - sum(dropped.values())
    assert asked == 12 + sum(dropped.values())
    texts = [
        sample.members["txt"].decode() for sample in map(ShardReader(tmp_path / "out" / "shards").__getitem__, range(8))
    ]
    assert any(text == GOOD for text in texts)


def test_a_server_that_fails_leaves_work_to_go_on_with(tmp_path, monkeypatch):
    import experiments.prepare_stages as stages

    raw = scenes(tmp_path / "raw", range(10), captions=False)
    make, down = stages.Endpoint, [True]
    monkeypatch.setattr(stages, "Endpoint", lambda *args, **options: make(*args, max_attempts=1, **options))

    def faults(body, number):
        return Fault(status=500) if down[0] and number % 2 else None

    with ChatServer(lambda body: GOOD, faults) as server:
        captions = CaptionConfig(which="all", url=server.url, model="m", timeout_s=5, concurrency=1)
        with pytest.raises(RuntimeError, match="x server error; the same command goes on"):
            prepare(config(raw, tmp_path / "out", captions=captions))
        down[0] = False
        summary = prepare(config(raw, tmp_path / "out", captions=captions))
    assert summary["kept"] == 10
    assert set(server.billed.values()) == {1} and len(server.billed) == 10


def test_models_judge_and_near_duplicates_go(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=12, **sizes))
    model.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "clip"
    )
    raw = scenes(tmp_path / "raw", range(9))
    image = read_picture((raw / "00000.png").read_bytes()).image
    (raw / "twin.png").write_bytes(encode_picture((image.int() + 1).clamp(0, 255).to(torch.uint8), "png"))
    (raw / "twin.txt").write_text("Nearly the same.")
    models = ModelsConfig(embedder=tmp_path / "clip", local_files_only=True, batch_size=4)
    strict = replace(LAX, max_duplicate_cosine=0.999999)
    summary = adds_up(prepare(config(raw, tmp_path / "out", models=models, thresholds=strict)))
    rows = read_rows(tmp_path / "out" / "duplicates.jsonl")
    assert {row["key"] for row in rows} & {"twin.png", "00000.png"} and summary["dropped"]["near-duplicate"] == len(
        rows
    )


def test_drawn_text_is_stored_with_its_boxes(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "texts.txt").write_text("Hello\n\nOpen until 9\n\u0427\u0430\u0439\n")
    drawn = TextConfig(num=7, height=64, width=80)
    summary = adds_up(prepare(config(tmp_path / "texts.txt", tmp_path / "out", text=drawn)))
    assert summary["kept"] == 7
    reader = ShardReader(tmp_path / "out" / "shards")
    for sample in map(reader.__getitem__, range(7)):
        lines = json.loads(sample.members["json"])["lines"]
        assert lines and all(f'"{line["text"]}"' in sample.members["txt"].decode() for line in lines)
        assert all(0 <= x <= 80 and 0 <= y <= 64 for line in lines for x, y in line["quad"])


def test_a_budget_ends_the_captions_and_a_larger_one_goes_on(tmp_path):
    raw = scenes(tmp_path / "raw", range(6), captions=False)
    with ChatServer(lambda body: GOOD) as server:
        captions = CaptionConfig(which="all", url=server.url, model="m", concurrency=1, max_tokens_total=11_500)
        with pytest.raises(RuntimeError, match="x budget; the same command goes on"):
            prepare(config(raw, tmp_path / "out", captions=captions))
        asked = len(server.requests)
        assert 0 < asked < 6
        richer = replace(captions, max_tokens_total=None)
        assert prepare(config(raw, tmp_path / "out", captions=richer))["kept"] == 6
        assert len(server.requests) == 6


def test_large_pictures_do_not_wait_for_each_other(tmp_path, monkeypatch):
    raw, seen = scenes(tmp_path / "raw", range(9)), []
    import experiments.prepare_units as units

    judge = units._judge
    monkeypatch.setattr(units, "_MOST_BYTES", 20_000)
    monkeypatch.setattr(units, "_judge", lambda c, waiting: seen.append(len(waiting)) or judge(c, waiting))
    assert prepare(config(raw, tmp_path / "out"))["kept"] == 9
    assert sum(seen) == 9 and max(seen) == 3


def test_the_report_shows_counts_and_no_raw_markup(tmp_path):
    raw = scenes(tmp_path / "raw", range(5))
    (raw / "00001.txt").write_text("A <script>alert(1)</script> & more.")
    (raw / "<b>.png").write_bytes(b"no picture")
    prepare(config(raw, tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "data:image/jpeg;base64," in page
    assert page.count("<figure>") >= 2 and "<svg" in page and ">read<" in page and ">kept<" in page


def test_the_command_line_reads_folders_tars_and_lists(tmp_path, capsys):
    raw = scenes(tmp_path / "raw", range(9))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(raw.iterdir()):
            tar.add(path, path.name)
    lines = [
        {"path": f"raw/{path.name}", "caption": path.with_suffix(".txt").read_text()} for path in raw.glob("*[gp]")
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = [
        "--shards.bases",
        "32",
        "--shards.multiple",
        "4",
        "--shards.tolerance",
        "0.13",
        "--thresholds.min-area",
        "300",
    ]
    small += ["--thresholds.min-clarity", "None", "--thresholds.min-entropy", "None"]
    for preset, path in (("folder", raw), ("tars", tmp_path / "a.tar"), ("list", tmp_path / "list.jsonl")):
        cli([preset, "--path", str(path), "--run.out", str(tmp_path / preset), *small])
        assert "9 of 9 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="prepare_data: path"):
        cli(["folder", "--path", str(tmp_path / "nothing"), "--run.out", str(tmp_path / "none"), *small])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrepareRun(shard="2/2"), "shard"),
        (lambda: PrepareRun(shard="one"), "shard"),
        (lambda: PrepareRun(workers=0), "workers"),
        (lambda: CaptionConfig(which="some"), "which"),
        (lambda: ModelsConfig(aesthetic=Path("a")), "aesthetic_head"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


PROGRAM = """
import sys
from pathlib import Path
from experiments.prepare_config import CaptionConfig
from experiments.prepare_data import prepare
from tests.experiments.test_prepare_data import config
raw, out, url, workers = sys.argv[1:5]
captions = CaptionConfig(which="missing", url=url, model="m", concurrency=4)
prepare(config(Path(raw), Path(out), captions=captions, workers=int(workers)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_point_it_ends_with_the_bytes_of_an_uninterrupted_run(tmp_path, workers):
    raw = scenes(tmp_path / "raw", range(420))
    scenes(raw, range(500, 620), captions=False)
    with ChatServer(lambda body: GOOD, lambda body, number: Fault(delay_s=0.01)) as server:

        def start(out):
            command = [sys.executable, "-c", PROGRAM, str(raw), str(out), server.url, str(workers)]
            return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)

        def done():
            return len(server.requests) + sum(1 for _ in (tmp_path / "torn").rglob("*"))

        assert start(tmp_path / "whole").wait() == 0
        billed = len(server.billed)
        assert set(server.billed.values()) == {1} and billed == 120
        server.billed.clear()
        server.requests.clear()
        draw, kills = random.Random(workers), 0
        for _ in range(5):
            process, until = start(tmp_path / "torn"), done() + draw.randint(1, 50)
            while process.poll() is None and done() < until:
                time.sleep(0.001)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            process.wait()
        assert kills >= 3
        assert start(tmp_path / "torn").wait() == 0
        assert digest(tmp_path / "torn" / "shards") == digest(tmp_path / "whole" / "shards")
        assert (tmp_path / "torn" / "summary.json").read_text() == (tmp_path / "whole" / "summary.json").read_text()
        # What was on its way at a kill is sent again under its own key; every other answer is paid for once.
        assert len(server.billed) == billed and sum(server.billed.values()) <= billed + 4 * kills


@pytest.mark.slow
def test_ray_does_the_same_and_outlives_a_worker(tmp_path):
    ray = pytest.importorskip("ray")
    raw = scenes(tmp_path / "raw", range(300))
    shards = replace(SMALL, units_per_group=1)
    prepare(config(raw, tmp_path / "here", shards=shards))
    ray.init(
        num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:
        import threading

        killed: list[int] = []
        over = threading.Event()

        def working():
            """Processes that Ray has named after the task they are at."""
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if path.read_bytes().startswith(b"ray::run_unit"):
                        yield int(path.parent.name)

        def kill():
            # The first worker that has begun a unit, however long the workers take to start.
            while not killed and not over.wait(0.005):
                for number in itertools.islice(working(), 1):
                    os.kill(number, signal.SIGKILL)
                    killed.append(number)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            prepare(config(raw, tmp_path / "ray", shards=shards, ray=True))
        finally:
            over.set()
            thread.join()
    finally:
        ray.shutdown()
    assert killed
    assert digest(tmp_path / "ray" / "shards") == digest(tmp_path / "here" / "shards")


def test_shards_are_a_source_again(tmp_path):
    raw = scenes(tmp_path / "raw", range(40))
    prepare(config(raw, tmp_path / "out"))
    prepare(config(tmp_path / "out" / "shards", tmp_path / "again"))
    content = []
    for name in ("out", "again"):
        reader = ShardReader(tmp_path / name / "shards")
        content.append(sorted(sample.members["txt"] for sample in map(reader.__getitem__, range(len(reader)))))
    assert content[0] == content[1] and len(content[0]) == 40


@pytest.fixture
def many(tmp_path):
    """2,000 scenes in every format, scikit-image's photographs, and what is wrong with real folders."""
    import skimage.data

    raw = tmp_path / "raw"
    expected = write_hostile_folder(raw / "hostile", seed=1, num=200)
    for folder in range(4):
        scenes(raw / f"scenes {folder}", range(500 * folder, 500 * folder + 500), captions=folder != 3)
    kinds = [
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
        ("JPEG", {"quality": 90}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
    ]
    for number, name in enumerate(
        ("astronaut", "chelsea", "coffee", "rocket", "retina", "camera", "colorwheel", "page")
    ):
        pixels = getattr(skimage.data, name)()
        image = Image.fromarray(pixels[..., :3] if pixels.ndim == 3 else pixels)
        for kind, options in kinds:
            image.convert("RGB" if kind == "JPEG" else image.mode).save(raw / f"{name}.{kind.lower()}", kind, **options)
            (raw / f"{name}.{kind.lower()}.txt").write_text(f"The photograph {name}, number {number}, as {kind}.")
    return raw, expected


@pytest.mark.slow
def test_two_thousand_pictures_become_shards_that_train(many, tmp_path):
    from experiments.folder_data import FolderConfig, check_folder

    raw, expected = many
    with ChatServer(lambda body: GOOD) as server:
        captions = CaptionConfig(which="missing", url=server.url, model="m")
        small = replace(SMALL, bases=(32, 64, 256))
        summary = adds_up(prepare(config(raw, tmp_path / "out", captions=captions, shards=small, workers=2)))
    rows = {row["key"]: row for path in (tmp_path / "out" / "parts").glob("*.jsonl") for row in read_rows(path)}
    assert summary["read"] == len(rows) > 2200
    for number in range(2000):
        (key,) = [
            key
            for key in (f"scenes {number // 500}/{number:05d}.{kind}" for kind in ("png", "jpeg", "webp"))
            if key in rows
        ]
        assert rows[key]["fate"] == "kept"
    for name, fate in expected.fates.items():
        if fate == "kept":
            assert rows[f"hostile/{name}"]["fate"] in ("kept", "area"), name
        elif fate != "either":
            assert rows[f"hostile/{name}"]["fate"] in (fate, f"picture: {fate}"), name
    # A photograph as BMP, TIFF, PNG and lossless WebP is the same picture four times, at least.
    assert summary["dropped"]["duplicate"] >= 8 * 3
    reader = ShardReader(tmp_path / "out" / "shards")
    assert len(reader) == summary["kept"] > 2000 and not any(reader.verify(n) for n in range(len(reader.files.shards)))
    check_folder(FolderConfig(path=tmp_path / "out" / "shards", min_samples=2000))
