"""Laws of experiments.generate: which pictures are painted, which are left alone, and what is refused."""

import io
import json
import shutil
import tracemalloc
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import checkpoints, painters, picture_store, pictures
from experiments import generate as script
from experiments.generate import GenerateConfig, find_checkpoint, generate, load_checkpoint, read_config
from experiments.miniature.autoencoder import train_autoencoder
from experiments.miniature.world import prepare_miniature
from experiments.picture_requests import Prompts
from experiments.picture_store import claim
from experiments.pictures import readable
from experiments.quickstart import smallest
from experiments.runs import cached_stage
from experiments.training import TrainingState
from lensmini.nn import LensTransformer, to_uint8
from lensmini.packed import Layout, unpack
from lensmini.sampling import initial_noise

PROMPTS = ("a red circle", "two blue squares at the top", "a green cross on white")


def make_autoencoder(config, root):
    """Train one part ahead, because a part that is missing alone is trained here and not in a fresh process."""
    part = config.miniature.autoencoder
    cached_stage(root, "autoencoder", part, lambda path: train_autoencoder(part, path, strict=False), quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose last weights predict no velocity and whose average predicts something that depends on the text."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = smallest()
    make_autoencoder(config, out.parent)
    prepare_miniature(config.miniature, out.parent, quiet=True)
    # In float32 a picture does not depend on which others are painted with it, but for rounding.
    config = replace(config, optim=replace(config.optim, dtype="float32"))
    state = TrainingState(config.model, config.optim, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in state.ema.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    state.step = 7
    state.save(out, config, keep=1)
    return out


@pytest.fixture
def config(run, tmp_path):
    return GenerateConfig(texts=PROMPTS, checkpoint=run, out=tmp_path / "pictures", num_steps=2, guidance_scale=2.0)


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def files(out):
    return {path.name: path.read_bytes() for path in out.glob("0*.png")}


def count_forwards(monkeypatch):
    """The number of samples of every forward call."""
    calls, original = [], LensTransformer.forward_packed

    def forward(self, tokens, t, *rest, **options):
        calls.append(len(t))
        return original(self, tokens, t, *rest, **options)

    monkeypatch.setattr(LensTransformer, "forward_packed", forward)
    return calls


def test_every_picture_has_a_file_of_its_size_and_a_row_that_says_how_it_was_made(config, run):
    rows = generate(replace(config, canvases=((16, 24), (32, 16)), num_images_per_prompt=2, seed=5))
    assert [(row["prompt"], row["height"], row["width"], row["seed"]) for row in rows] == [
        (prompt, *canvas, seed) for prompt in PROMPTS for canvas in ((16, 24), (32, 16)) for seed in (5, 6)
    ]
    assert [row["file"] for row in rows] == [f"{number:05d}.png" for number in range(12)]
    assert all(pixels(config.out / row["file"]).shape == (row["height"], row["width"], 3) for row in rows)
    written = [json.loads(line) for line in (config.out / "pictures.jsonl").read_text().splitlines()]
    assert {row["file"]: row["prompt"] for row in written} == {row["file"]: row["prompt"] for row in rows}
    assert {(row["num_steps"], row["guidance_scale"], row["checkpoint"]) for row in written} == {
        (2, 2.0, (run / "step-000007").as_posix())
    }
    assert (config.out / "grid.png").is_file()
    assert len({bytes(one) for one in files(config.out).values()}) == 12


def test_finished_pictures_are_not_painted_again(config, monkeypatch):
    first = generate(config)
    before = {path.name: path.stat().st_mtime_ns for path in config.out.glob("0*.png")}
    calls = count_forwards(monkeypatch)
    assert [row["file"] for row in generate(config)] == [row["file"] for row in first]
    assert calls == []
    assert {path.name: path.stat().st_mtime_ns for path in config.out.glob("0*.png")} == before
    # Anything that changes a picture makes it another one, and the old ones stay.
    others = (
        {"guidance_scale": 3.0},
        {"seed": 9},
        {"rescale": False},
        {"weights": "model"},
        {"num_steps": 3},
        {"width": 16},
    )
    for number, change in enumerate(others, 2):
        generate(replace(config, **change))
        assert len(files(config.out)) == 3 * number
    assert {name: (config.out / name).stat().st_mtime_ns for name in before} == before


def test_a_stopped_call_ends_with_the_files_of_one_that_was_not_stopped(config, monkeypatch):
    several = replace(config, num_images_per_prompt=2, chunk=2)
    generate(replace(several, out=several.out.with_name("whole")))
    original, calls = painters.paint_prompts, []

    def paint_once(*arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(painters, "paint_prompts", paint_once)
    with pytest.raises(KeyboardInterrupt):
        generate(several)
    assert len(files(several.out)) == 2
    monkeypatch.setattr(painters, "paint_prompts", original)
    generate(several)
    assert files(several.out) == files(several.out.with_name("whole"))


def test_a_lost_picture_comes_back_and_a_reused_name_is_not_taken_for_it(config):
    rows = generate(config)
    lost = config.out / rows[1]["file"]
    content = pixels(lost)
    lost.unlink()
    generate(replace(config, texts=("a pink disk",)))
    assert np.abs(pixels(lost) - content).max() > 16
    again = generate(config)
    assert np.abs(pixels(config.out / again[1]["file"]) - content).max() <= 1
    assert again[1]["file"] != rows[1]["file"] and again[0] == rows[0]


def test_guidance_one_costs_one_forward_a_step(config, monkeypatch):
    calls = count_forwards(monkeypatch)
    generate(replace(config, guidance_scale=1.0, num_steps=5))
    assert calls == [3] * 5
    calls.clear()
    generate(replace(config, guidance_scale=4.0, num_steps=5))
    assert calls == [6] * 5


def test_weights_names_the_file_that_is_loaded(config):
    [last] = generate(replace(config, texts=("a red circle",), weights="model", seed=3))
    model, world = load_checkpoint(find_checkpoint(config.checkpoint), "model", quiet=True)
    # Weights as they begin predict no velocity, so the picture is the decoded noise.
    layout = Layout.build([(8, 8)], text_lengths=[0])
    [noise] = unpack(initial_noise([3], model.config.in_channels, layout), layout)
    with torch.no_grad():
        expected = to_uint8(world.autoencoder.decode(noise[None]))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(config.out / last["file"]), expected)
    [average] = generate(replace(config, texts=("a red circle",), seed=3))
    assert not np.array_equal(pixels(config.out / average["file"]), expected)


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_the_others(config):
    rows = generate(replace(config, num_images_per_prompt=2, canvases=((32, 32), (24, 40))))
    [alone] = generate(replace(config, texts=PROMPTS[1:2], seed=1, out=config.out / "alone", height=24, width=40))
    among = next(r for r in rows if (r["prompt"], r["seed"], r["height"]) == (PROMPTS[1], 1, 24))
    picture = pixels(config.out / "alone" / alone["file"])
    assert np.abs(picture - pixels(config.out / among["file"])).max() <= 1
    for other in rows:
        if other["height"] == 24 and other is not among:
            assert np.abs(picture - pixels(config.out / other["file"])).max() > 16


def test_prompts_come_from_arguments_a_file_and_standard_input(config, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("a blue disk\n\n  two   red boxes \n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("a pink cross\n"))
    rows = generate(replace(config, texts=("a red circle", "-"), prompts=path))
    assert [row["prompt"] for row in rows] == ["a red circle", "a pink cross", "a blue disk", "two red boxes"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a cyan wedge\n"))
    assert [row["prompt"] for row in generate(replace(config, texts=(), prompts=Path("-")))] == ["a cyan wedge"]


def test_unknown_words_are_named(config, capsys):
    generate(replace(config, texts=("a red circle", "a Mauve hexagon , two cats")))
    told = capsys.readouterr().err
    assert "prompt 2" in told and "prompt 1" not in told
    assert all(word in told for word in ("'Mauve'", "'hexagon'", "'cats'", "triangle"))
    assert "'a'" not in told and "','" not in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ()}, "prompts: expected some"),
        ({"texts": (" ", "")}, "prompts: expected some"),
        ({"prompts": Path("missing.txt")}, "missing.txt"),
        ({"height": 30}, "multiples of 4, got 30 x 32"),
        ({"width": 0}, "multiples of 4, got 32 x 0"),
        ({"canvases": ((32, 32), (24, 42))}, "multiples of 4, got 24 x 42"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(config, change, message):
    with pytest.raises(ValueError, match=message):
        generate(replace(config, **change))
    assert not config.out.exists()


@pytest.mark.parametrize(
    "change", [{"num_images_per_prompt": 0}, {"num_steps": 0}, {"seed": -1}, {"guidance_scale": float("nan")}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GenerateConfig(**change)


def test_without_a_checkpoint_the_message_names_the_command_that_makes_one(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="python -m experiments.quickstart"):
        find_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "BUNDLE", tmp_path / "none")
    with pytest.raises(SystemExit, match="runs/quickstart or runs/mini.*python -m experiments.quickstart"):
        script.cli(["a red circle"])


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path, monkeypatch):
    for name in ("runs/mini/step-000009", "runs/other/step-000002", "runs/other/step-000010"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(Path("runs/other")) == Path("runs/other/step-000010")
    assert find_checkpoint(Path("runs/other/step-000002")) == Path("runs/other/step-000002")
    assert find_checkpoint(None) == Path("runs/mini/step-000009")


def test_the_command_line_takes_prompts_with_and_without_a_preset():
    prog = "generate"
    plain = read_config(script.PRESETS, prog, ["a red circle", "a box", "--seed", "3", "--no-rescale"])
    assert (plain.texts, plain.seed, plain.rescale, plain.canvases) == (("a red circle", "a box"), 3, False, ())
    named = read_config(script.PRESETS, prog, ["ratios", "--guidance-scale", "1", "a box"])
    assert (named.texts, named.guidance_scale, len(named.canvases)) == (("a box",), 1.0, 10)
    assert read_config(script.PRESETS, prog, ["-"]).texts == ("-",)
    canvases = read_config(script.PRESETS, prog, ["a box", "--canvases", "24", "40", "32", "32"]).canvases
    assert canvases == ((24, 40), (32, 32))


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def copied(run):
    """The same run at another place, beside the same frozen parts."""
    copy = run.with_name("copied")
    shutil.copytree(run, copy, dirs_exist_ok=True)
    return copy


def test_compared_checkpoints_get_the_same_noise_and_rows_of_their_own(config, run, copied, monkeypatch):
    grids = []
    monkeypatch.setattr(script, "save_grid", lambda shown, labels, path: grids.append((shown, labels)))
    both = replace(config, checkpoint=None, compare=(run, copied), num_images_per_prompt=2)
    rows = generate(both)
    first, second = rows[:6], rows[6:]
    assert {row["checkpoint"] for row in first} == {(run / "step-000007").as_posix()}
    assert {row["checkpoint"] for row in second} == {(copied / "step-000007").as_posix()}
    assert len({row["file"] for row in rows}) == 12
    for one, other in zip(first, second, strict=True):
        assert (one["prompt"], one["seed"]) == (other["prompt"], other["seed"])
        assert np.array_equal(pixels(config.out / one["file"]), pixels(config.out / other["file"]))
    [(shown, labels)] = grids
    assert [run.name in label.split(" | ")[0] for label in labels] == [True, False] * 6
    assert all(torch.equal(shown[i], shown[i + 1]) for i in range(0, 12, 2))
    assert not torch.equal(shown[0], shown[2])
    calls = count_forwards(monkeypatch)
    generate(both)
    generate(replace(config, num_images_per_prompt=2))
    assert calls == []


def test_a_comparison_with_other_weights_takes_over_what_was_painted_before(config, run, copied, monkeypatch):
    old = generate(config)
    (copied / "step-000007" / "ema.safetensors").write_bytes((run / "step-000007" / "model.safetensors").read_bytes())
    calls = count_forwards(monkeypatch)
    rows = generate(replace(config, checkpoint=None, compare=(run, copied), guidance_scale=2.0))
    assert rows[:3] == old and calls == [6] * 2
    assert not np.array_equal(pixels(config.out / rows[0]["file"]), pixels(config.out / rows[3]["file"]))


def test_a_line_of_json_has_its_own_size_seed_and_fields(config, tmp_path):
    path = write_jsonl(
        tmp_path / "prompts.jsonl",
        {"prompt": "a red circle", "height": 16, "width": 24, "seed": 7, "id": "x-1", "tags": {"kind": ["a", 1.5]}},
        {"prompt": "a  blue\ndisk "},
        {"prompt": "a red circle", "height": 16, "width": 24, "seed": 7, "id": "x-2"},
    )
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    rows = generate(replace(config, texts=(), prompts=path, num_images_per_prompt=2))
    expected = [("a red circle", 7, 16, 24), ("a red circle", 8, 16, 24)]
    plain = [("a  blue\ndisk ", 0, 32, 32), ("a  blue\ndisk ", 1, 32, 32)]
    assert [(r["prompt"], r["seed"], r["height"], r["width"]) for r in rows] == [*expected, *plain, *expected]
    assert [row.get("id") for row in rows] == ["x-1", "x-1", None, None, "x-2", "x-2"]
    assert rows[0]["tags"] == {"kind": ["a", 1.5]} and len({row["file"] for row in rows}) == 6
    assert pixels(config.out / rows[0]["file"]).shape == (16, 24, 3)
    # The seed is the noise's: the same as asked for on the command line.
    [again] = generate(replace(config, texts=("a red circle",), seed=8, height=16, width=24))
    assert np.abs(pixels(config.out / again["file"]) - pixels(config.out / rows[1]["file"])).max() <= 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[" * 100_000, "line 2: expected a JSON object"),
        ('"a box"', 'line 2: expected an object with a "prompt"'),
        ('{"text": "a box"}', 'line 2: expected an object with a "prompt"'),
        ('{"prompt": "a", "height": 16.5}', "line 2: height: expected a whole number"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed: expected a whole number"),
        ('{"prompt": "a", "seed": true}', "line 2: seed: expected a whole number"),
        ('{"prompt": "a", "negative_prompt": 3}', "line 2: negative_prompt: expected a string"),
        ('{"prompt": "a", "score": NaN}', "line 2: expected a JSON object with finite numbers"),
        ('{"prompt": "a", "score": 1e999}', "line 2: expected a JSON object with finite numbers"),
        ('{"prompt": "\\ud800"}', "line 2: expected a JSON object with finite numbers and whole characters"),
        ('{"prompt": "a", "file": "../../x.png"}', "line 2: expected no field .* got file"),
        ('{"prompt": "a", "width": 30}', r"multiples of 4, got 32 x 30 \(prompt 5\)"),
        ('{"prompt": "a", "negative_prompt": "b"}', "negative_prompt: expected none"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_written(config, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a red circle"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        generate(replace(config, prompts=path))
    assert not config.out.exists()


def test_shards_share_the_work_and_every_picture_is_painted_once(config, tmp_path, monkeypatch):
    texts = tuple(f"a red circle and {number} boxes" for number in range(12))
    config = replace(config, texts=(*texts, texts[0]), num_steps=1)
    whole = generate(replace(config, out=tmp_path / "whole"))
    parts = [generate(replace(config, shard=f"{number}/3")) for number in range(3)]
    names = [{row["file"] for row in part} for part in parts]
    assert sum(map(len, names)) == len(set().union(*names)) == 12
    assert all(len(part) > 0 for part in parts)
    of = {row["prompt"]: row["file"] for part in parts for row in part}
    for row in whole:
        painted = pixels(config.out / of[row["prompt"]])
        assert np.abs(painted - pixels(tmp_path / "whole" / row["file"])).max() <= 1
    calls = count_forwards(monkeypatch)
    assert [row["file"] for row in generate(config)] == [of[prompt] for prompt in config.texts]
    assert calls == []


def test_shards_at_work_at_the_same_time_do_not_take_each_others_names(config, monkeypatch):
    monkeypatch.setattr(script, "_WINDOW", 1)
    config = replace(config, texts=tuple(f"a red circle and {number} boxes" for number in range(8)), num_steps=1)
    streams = [script.stream(replace(config, shard=f"{number}/2")) for number in range(2)]
    rows = [row for pair in zip_longest(*streams) for row in pair if row is not None]
    assert len({row["file"] for row in rows}) == len(files(config.out)) == 8
    assert sorted(row["prompt"] for row in generate(config)) == sorted(row["prompt"] for row in rows)
    assert len(files(config.out)) == 8


def test_a_directory_is_shared_by_shards_of_one_count_only(config):
    for held, refused, allowed in (("0/1", ("0/1", "0/2"), ()), ("0/2", ("0/1", "0/2", "0/3"), ("1/2",))):
        with claim(config.out, replace(config, shard=held).part):
            for shard in refused:
                with pytest.raises(ValueError, match="another process is painting"):
                    generate(replace(config, shard=shard))
            for shard in allowed:
                generate(replace(config, shard=shard))


def test_prompts_are_streamed(config, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a white background\n" * 200_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in Prompts((), path)) == 200_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    # The first rows are there before the last prompt is painted.
    monkeypatch.setattr(script, "_WINDOW", 2)
    rows = script.stream(replace(config, texts=PROMPTS))
    assert [next(rows)["prompt"], next(rows)["prompt"]] == [*PROMPTS[:2]]
    assert len(files(config.out)) == 2
    assert [row["prompt"] for row in rows] == [PROMPTS[2]] and len(files(config.out)) == 3


@pytest.mark.parametrize("strike", range(1, 6))
def test_a_kill_between_a_picture_and_its_row_costs_no_more_than_a_chunk(config, monkeypatch, strike):
    several = replace(config, num_images_per_prompt=2, chunk=2)
    generate(replace(several, out=several.out.with_name("whole")))
    original, rows = picture_store.append_jsonl, []

    def append(path, row):
        rows.append(row)
        if len(rows) == strike:
            with path.open("a") as file:
                file.write('{"torn": ')
            raise KeyboardInterrupt
        original(path, row)

    monkeypatch.setattr(picture_store, "append_jsonl", append)
    with pytest.raises(KeyboardInterrupt):
        generate(several)
    monkeypatch.setattr(picture_store, "append_jsonl", original)
    calls = count_forwards(monkeypatch)
    generate(several)
    assert sum(calls[::2]) == 2 * (6 - (strike - 1))
    whole = several.out.with_name("whole")
    assert files(several.out).keys() == files(whole).keys()
    assert all(np.abs(pixels(several.out / name) - pixels(whole / name)).max() <= 1 for name in files(whole))
    written = [json.loads(line) for line in (several.out / "pictures.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in written) == sorted(files(whole))


LANGUAGES = (
    "ein roter Kreis \u00fcber Gr\u00fcn",
    "e\u0301tude de rouge",
    "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
    "\u7ea2\u8272\u7684\u5706\u5728\u84dd\u8272\u65b9\u5757\u4e0a\u9762",
    "\u062f\u0627\u0626\u0631\u0629 \u062d\u0645\u0631\u0627\u0621",
    "\u0932\u093e\u0932 \u0935\u0943\u0924\u094d\u0924",
    "\U0001f534 on \U0001f7e6 \u200d\u0007",
)


def test_prompts_in_any_script_stay_as_they_are(config, tmp_path, capsys):
    path = write_jsonl(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in LANGUAGES))
    rows = generate(replace(config, texts=(), prompts=path, num_steps=1))
    assert [row["prompt"] for row in rows] == [*LANGUAGES]
    lines = (config.out / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {*LANGUAGES}
    assert {row["file"] for row in rows} == {f"{number:05d}.png" for number in range(len(LANGUAGES))}
    text = tmp_path / "prompts.txt"
    text.write_bytes(b"\xef\xbb\xbf" + "\n".join(LANGUAGES[:5]).encode() + b"\r\n")
    assert [item["prompt"] for item in Prompts((), text)] == [*LANGUAGES[:5]]
    text.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="expected a text file, got .*UnicodeDecodeError"):
        generate(replace(config, texts=(), prompts=text))


def test_labels_spell_out_what_the_font_lacks():
    fonts = pictures._fonts(13)
    assert readable(LANGUAGES[0], fonts) == (LANGUAGES[0], fonts[1])
    assert readable(LANGUAGES[2], fonts) == (LANGUAGES[2], fonts[1])
    assert readable("plain words", fonts) == ("plain words", fonts[0])
    assert readable("a \u5bab\u0007b", fonts)[0] == r"a \u5bab\x07b"
    # A shaped vowel sign without its letter is drawn with a circle; it must not pass for a glyph.
    assert readable(LANGUAGES[5], fonts)[0].isascii()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_prompt": "blurry"}, "negative_prompt: expected '', since .* is a run"),
        ({"published_bf16": True}, "published_bf16: expected False, since .* is a run"),
        ({"lora": Path("missing.safetensors")}, "lora: expected a file or folder"),
        ({"checkpoint": Path("runs/no-such-run")}, "checkpoint: .* found no runs/no-such-run"),
    ],
)
def test_settings_that_do_not_suit_a_run_are_refused(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(replace(config, **change))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "2/2"}, "shard"),
        ({"shard": "x"}, "shard"),
        ({"chunk": 0}, "chunk"),
        ({"height": None}, "height, width"),
        ({"aspect_ratio": "1:1"}, "aspect_ratio"),
        ({"height": None, "width": None, "aspect_ratio": "5:4"}, "aspect_ratio"),
        ({"compare": (Path("a"), Path("b")), "checkpoint": Path("a")}, "compare"),
    ],
)
def test_contradictory_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**change)


def test_presets_of_the_released_variants(monkeypatch, tmp_path):
    named = {make.__name__: make() for make in script.PRESETS}
    steps = {name: (preset.num_steps, preset.guidance_scale) for name, preset in named.items()}
    assert (steps["lens"], steps["base"], steps["turbo"]) == ((20, 5.0), (50, 5.0), (4, 1.0))
    assert named["lens"].sizes == ((1024, 1024),)
    wide = read_config(script.PRESETS, "generate", ["turbo", "a fox", "--aspect-ratio", "16:9", "--base", "1440"])
    assert wide.sizes == ((1088, 1936),)
    assert read_config(script.PRESETS, "generate", ["a", "--compare", "x", "y"]).compare == (Path("x"), Path("y"))
    assert len(GenerateConfig.__dataclass_fields__) <= 40
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="expected a pipeline folder"):
        script.cli(["turbo", "a fox"])
