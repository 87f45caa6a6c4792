"""The trained miniature of the repository: whole, small, able to paint with nothing else there, made again byte for byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import read_image

import experiments
from experiments.checkpoints import BUNDLE, EXAMPLE, find_checkpoint, load_checkpoint
from experiments.generate import generate
from experiments.generate_config import GenerateConfig
from experiments.miniature import bundle as bundle_module
from experiments.miniature.bundle import BundleConfig, main
from experiments.quickstart_score import ScoreConfig
from experiments.scoring import paint_prompts
from lensmini.data import MINIATURE_CANVASES, build_scene_prompts, score_images
from lensmini.nn import LensTransformer


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory without runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_is_the_one_that_was_bundled_and_none_can_run_code() -> None:
    said, found = json.loads((BUNDLE / "bundle.json").read_text()), files(BUNDLE)
    found.pop("bundle.json")
    assert said["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert said["bytes"] == sum(map(len, found.values())) < 15_000_000
    assert {Path(name).suffix for name in found} == {".json", ".safetensors", ".jinja"}


def test_it_paints_where_there_is_nothing_else_and_nothing_is_written_beside_it(elsewhere: Path) -> None:
    before = set(files(BUNDLE))
    (row,) = generate(GenerateConfig(texts=("a red circle left of a blue square",), out=elsewhere / "pictures"))
    assert (
        Path(row["checkpoint"]).is_relative_to(BUNDLE)
        and read_image(elsewhere / "pictures" / row["file"]).shape[0] == 3
    )
    assert set(files(BUNDLE)) == before


def test_the_command_paints_in_a_process_and_place_of_its_own_and_says_how_to_ask(elsewhere: Path) -> None:
    dense = "one shape on a black canvas . a big green plus at the bottom right ."
    command = [sys.executable, "-m", "experiments.generate", "mini", "a green cross", dense, "--out", "pictures"]
    environment = {**os.environ, "PYTHONPATH": str(Path(experiments.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    (told,) = [line for line in done.stderr.splitlines() if "bare request" in line]
    assert "('a green cross')" in told and told.endswith(EXAMPLE)
    # Green where the caption puts it, black everywhere else.
    picture = read_image(elsewhere / "pictures" / "00001.png").float()
    green = picture[1] - picture[[0, 2]].amax(0)
    assert green[16:, 16:].amax() > 80 and max(green[:16].amax(), green[:, :16].amax()) < 60
    assert sorted(path.name for path in elsewhere.iterdir()) == ["pictures"]


def test_a_run_of_ones_own_comes_first(elsewhere: Path) -> None:
    assert find_checkpoint(None).is_relative_to(BUNDLE)
    own = elsewhere / "runs" / "quickstart" / "step-000003"
    own.mkdir(parents=True)
    (own / "run.json").write_text("{}")
    assert find_checkpoint(None).resolve() == own.resolve()


def test_its_pictures_follow_captions_and_those_of_untrained_weights_do_not() -> None:
    model, world = load_checkpoint(find_checkpoint(BUNDLE / "quickstart"), quiet=True)
    prompts = build_scene_prompts(6, 8_000_009, wording="synonyms")
    texts = [prompt.text for prompt in prompts]
    untrained = LensTransformer(model.config).init_weights(0).eval()
    strict, loose = [], []
    for one in (model, untrained):
        with torch.no_grad():
            pictures = paint_prompts(one, world, texts, MINIATURE_CANVASES, ScoreConfig())
        score = score_images(pictures, prompts)
        strict.append(score.strict)
        loose.append(score.loose)
    # 0.43 and 0.98 on 384 prompts: three standard deviations below, on 36.
    assert strict[0] >= 0.18 and loose[0] >= 0.85
    assert strict[1] <= 0.03 and loose[1] <= 0.2


def test_a_bundle_of_the_bundle_is_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = main(BundleConfig(run=BUNDLE / "quickstart", out=tmp_path / "again"))
    assert files(tmp_path / "again") == files(BUNDLE) and said == json.loads((BUNDLE / "bundle.json").read_text())
    assert load_file(next((tmp_path / "again").rglob("ema.safetensors")))
    main(BundleConfig(run=tmp_path / "again" / "quickstart", out=tmp_path / "third"))
    next((tmp_path / "again").glob("autoencoder-*")).rename(tmp_path / "gone")
    assert files(tmp_path / "third") == files(BUNDLE)
    main(BundleConfig(run=tmp_path / "third" / "quickstart", out=tmp_path / "third"))  # onto itself
    assert files(tmp_path / "third") == files(BUNDLE)
    with pytest.raises(FileNotFoundError, match="expected autoencoder-"):
        main(BundleConfig(run=tmp_path / "again" / "quickstart", out=tmp_path / "no"))
    monkeypatch.setattr(bundle_module, "LIMIT", 1000)
    with pytest.raises(ValueError, match="at most 1,000 bytes"):
        main(BundleConfig(run=BUNDLE / "quickstart", out=tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_a_directory_that_is_no_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="out: expected no directory yet or an older bundle, got"):
        main(BundleConfig(run=BUNDLE / "quickstart", out=tmp_path / "home"))
    assert files(tmp_path / "home") == {"letter.txt": b"dear"}
