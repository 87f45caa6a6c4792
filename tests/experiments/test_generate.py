"""Laws of experiments.generate: which pictures are painted, which are left alone, and what is refused."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import generate as script
from experiments.generate import GenerateConfig, find_checkpoint, generate, load_checkpoint, read_config
from experiments.miniature.autoencoder import train_autoencoder
from experiments.miniature.world import prepare_miniature
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
    monkeypatch.setattr(script, "_CHUNK", 2)
    several = replace(config, num_images_per_prompt=2)
    generate(replace(several, out=several.out.with_name("whole")))
    original, calls = script.paint_prompts, []

    def paint_once(*arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(script, "paint_prompts", paint_once)
    with pytest.raises(KeyboardInterrupt):
        generate(several)
    assert len(files(several.out)) == 2
    monkeypatch.setattr(script, "paint_prompts", original)
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
