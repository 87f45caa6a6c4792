"""A folder of anybody's pictures: what can be read is trained on as a person sees it, the rest is counted by cause."""

import json
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import folder_data, pretrain
from experiments.folder_data import FolderConfig, FolderError, folder_banks
from experiments.miniature.world import Miniature, prepare_miniature
from experiments.runs import read_jsonl
from lensmini.data import Bucket, FolderSource, open_source
from tests.experiments import tiny_run

SIDE = 16
CAUSES = {
    "truncated.png": "picture: truncated",
    "words.jpg": "picture: no picture",
    "nothing.png": "picture: empty file",
    "alone.png": "caption: none",
    "sub/also-alone.jpeg": "caption: none",
    "mute.png": "caption: empty",
    "latin.png": "caption: not UTF-8",
    "readme.md": "picture: no picture",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours of any size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def halves(top: int, bottom: int, mode: str = "L", size: int = 32) -> Image.Image:
    image = Image.new(mode, (size, size), top)
    image.paste(bottom, (0, size // 2, size, size))
    return image


def good(folder: Path) -> int:
    """Pictures of many formats that can be used; returns how many."""
    (folder / "sub").mkdir(parents=True)
    plain = picture(40, 40, 1)
    images = {
        "square.png": (plain, {}),
        "wide.jpg": (picture(90, 45, 2), {}),
        "tall.jpeg": (picture(20, 64, 3), {}),
        "tiny.png": (picture(3, 2, 4), {}),
        "SHOUT.PNG": (picture(33, 47, 5), {"format": "PNG"}),
        "sub/deep.png": (picture(50, 30, 6), {}),
        "print.jpg": (picture(40, 30, 7).convert("CMYK"), {}),
        "palette.png": (plain.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        "grey.png": (plain.convert("L"), {}),
        "ink.png": (plain.convert("1"), {}),
        "glass.png": (plain.convert("RGBA"), {}),
        "deep.png": (Image.fromarray(np.full((24, 24), 40000, dtype=np.uint16)), {}),
        "moving.png": (plain, {"save_all": True, "append_images": [picture(40, 40, 8)], "duration": 50}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
        (folder / name).with_suffix(".txt").write_text("a red circle .\n and a blue square .")
    return len(images)


def broken(folder: Path) -> None:
    """The files of CAUSES."""
    picture(64, 64).save(folder / "truncated.png")
    whole = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("not a picture")
    (folder / "nothing.png").touch()
    for name in ("alone.png", "sub/also-alone.jpeg", "mute.png", "latin.png"):
        picture(20, 20).save(folder / name)
    for name in ("truncated", "words", "nothing"):
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "mute.txt").write_text(" \n\t ")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "readme.md").write_text("neither picture nor caption")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / "tiny"
    tiny_run.prepare(path)
    return path


@pytest.fixture(scope="module")
def world(root: Path) -> Miniature:
    return prepare_miniature(tiny_run.MINIATURE, root, quiet=True)


def folder_config(path: Path, **options: object) -> FolderConfig:
    settings = {"path": path, "side": SIDE, "batch_size": 4, "held_out_share": 0.1, **options}
    return FolderConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_a_run_trains_on_the_good_ones_and_counts_the_others(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    num_good = good(folder)
    broken(folder)
    out = root / "folder-run"
    config = tiny_run.tiny_config(out, steps=2, processes=1, data=folder_config(folder))
    pretrain.main(replace(config, eval=replace(config.eval, validate_every=1)))
    report = json.loads((out / "folder.json").read_text())
    assert report["read"] == num_good + len(CAUSES)
    assert report["kept"] == num_good
    assert report["dropped"] == Counter(CAUSES.values())
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    assert dict(report["files"]) == CAUSES
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["validation"] > 0 for row in rows)
    assert {"summary.json", "step-000002", "samples-000002.png"} <= {path.name for path in out.iterdir()}
    # One picture in ten is held out.
    assert (out / "captions.txt").read_text().splitlines() == ["a red circle . and a blue square ."] * (num_good - 1)


def test_pictures_go_to_the_bucket_of_their_aspect(world: Miniature, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = [(40, 40), (60, 30), (30, 60), (41, 60), (100, 10)]
    for index, (width, height) in enumerate(sizes * 2):
        picture(width, height, index).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"caption {index}")
    banks = folder_banks(folder_config(folder), world, root / "x", quiet=True)
    buckets = [Bucket(*sides) for sides in ((24, 12), (20, 12), (16, 16), (12, 20), (12, 24))]
    expected: Counter[tuple[int, int]] = Counter()
    for width, height in sizes * 2:
        distances = [abs(np.log(width / height * bucket.height / bucket.width)) for bucket in buckets]
        bucket = buckets[int(np.argmin(distances))]
        expected[bucket.height // 4, bucket.width // 4] += 1
    found = Counter(tuple(grid) for bank in banks for grid in bank.grids.tolist())
    assert found == expected
    assert [bank.num_pictures for bank in banks] == [9, 1]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    for index in range(2):
        picture(8, 8, index).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a red circle", encoding=("utf-8", "utf-8-sig")[index])
    captions, pictures, dropped = folder_data._read(FolderSource(tmp_path), [Bucket(SIDE, SIDE)], quiet=True)
    assert captions == ["a red circle"] * 2 and not dropped
    assert all(image.dtype == torch.uint8 and image.shape == (3, SIDE, SIDE) for image in pictures)


def test_tars_lists_and_metadata_tables_give_what_the_folder_gives(tmp_path: Path) -> None:
    """The same pictures and captions four ways, as anybody keeps them."""
    beside, table = tmp_path / "beside", tmp_path / "table"
    beside.mkdir()
    table.mkdir()
    rows, listed = [], []
    for index in range(4):
        picture(30 + index, 20, index).save(beside / f"{index}.png")
        (beside / f"{index}.txt").write_text(f"caption {index}")
        picture(30 + index, 20, index).save(table / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"caption {index}"})
        listed.append({"path": f"beside/{index}.png", "caption": f"caption {index}"})
    (table / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in sorted(beside.iterdir()):
            tar.add(file, file.name)
    expected = None
    for path in (beside, table, tmp_path / "all.tar", tmp_path / "list.jsonl"):
        captions, pictures, dropped = folder_data._read(open_source(path), [Bucket(SIDE, SIDE)], quiet=True)
        assert captions == [f"caption {index}" for index in range(4)] and not dropped, path
        expected = expected or [image.tolist() for image in pictures]
        assert [image.tolist() for image in pictures] == expected, path


def test_a_second_run_reads_the_cache_until_a_file_changes(world: Miniature, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    good(folder)
    before = set(root.glob("folder-bank-*"))
    for _ in range(2):
        folder_banks(folder_config(folder), world, root / "x", quiet=True)
    once = set(root.glob("folder-bank-*"))
    assert len(once - before) == 1
    (folder / "square.txt").write_text("another caption , longer than before")
    folder_banks(folder_config(folder), world, root / "x", quiet=True)
    assert len(set(root.glob("folder-bank-*")) - once) == 1


def test_too_few_good_pictures_are_an_error_that_counts_causes(world: Miniature, root: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", root / "too-few"
    num_good = good(folder)
    broken(folder)
    with pytest.raises(FolderError, match="expected at least 15 captioned pictures") as error:
        folder_banks(folder_config(folder, min_samples=15), world, out, quiet=True)
    for cause, number in Counter(CAUSES.values()).items():
        assert f"{number} x {cause}" in str(error.value)
    assert f"got {num_good} " in str(error.value)
    report = json.loads((out / "folder.json").read_text())
    assert report["kept"] == num_good and len(report["files"]) == len(CAUSES)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "folder", *arguments])
    with pytest.raises(SystemExit) as stop:
        pretrain.cli()
    assert isinstance(stop.value.code, str), "a text ends the process with code 1 and no traceback"
    return stop.value.code


def test_the_command_line_says_at_once_what_is_wrong_with_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain, "prepare_miniature", lambda *_: pytest.fail("minutes of training before the error"))
    out = ["--run.out", str(tmp_path / "out")]
    message = run_cli(monkeypatch, "--data.path", str(tmp_path / "missing"), *out)
    missing = tmp_path / "missing"
    expected = "expected a folder of pictures with captions, a tar or a list of files"
    assert message == f"error: data.path: {expected}, got {missing}"
    (tmp_path / "empty").mkdir()
    message = run_cli(monkeypatch, "--data.path", str(tmp_path / "empty"), *out)
    assert "expected at least 8 captioned pictures" in message and "got 0 (no picture found)" in message
    for index in range(9):
        picture(9, 9).save(tmp_path / "empty" / f"{index}.png")
    message = run_cli(monkeypatch, "--data.path", str(tmp_path / "empty"), *out)
    assert "got 0 (9 x caption: none)" in message
    message = run_cli(monkeypatch, "--data.path", str(tmp_path / "empty" / "0.png"), *out)
    assert "got 0 (" in message, "a picture is no list of files"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"min_samples": 1}, {"held_out_share": 1.0}, {"held_out_share": -0.1}])
def test_settings_that_leave_nothing_to_train_on_are_errors(options: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_samples, held_out_share"):
        folder_config(tmp_path, **options)


def test_a_side_without_such_canvases_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no canvas"):
        folder_config(tmp_path, side=8)
