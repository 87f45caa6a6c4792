"""Laws of `features`: whenever samples are encoded, the run is the same; from a folder as from the shards made of it."""

from dataclasses import replace

import pytest
import torch

from experiments import pretrain
from experiments.folder_data import FolderConfig, folder_banks
from experiments.lazy_bank import LazyBank
from experiments.miniature.world import prepare_miniature
from experiments.prepare_data import prepare
from experiments.runs import read_jsonl
from tests.experiments import tiny_run
from tests.experiments.test_prepare_data import config as prepare_config
from tests.experiments.test_prepare_data import scenes

pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    return root, prepare_miniature(tiny_run.MINIATURE, root, quiet=True)


def data(path, **changes):
    return FolderConfig(path=path, side=16, batch_size=8, num_slots=2, **changes)


@pytest.mark.parametrize("kind", ["online", "rolling", "precomputed"])
def test_lazy_samples_are_those_of_a_bank(world, tmp_path, kind):
    root, parts = world
    raw = scenes(tmp_path / "raw", range(40))
    stored, _ = folder_banks(data(raw), parts, root / f"run {kind}", quiet=True)
    lazy, held_out = folder_banks(data(raw, features=kind, rolling_steps=2), parts, root / f"run {kind}", quiet=True)
    assert isinstance(lazy, LazyBank) and not isinstance(held_out, LazyBank)
    assert lazy.grids.equal(stored.grids) and lazy.text_lengths.equal(stored.text_lengths)
    plan = lazy.plan(batch_size=8, num_slots=2)
    assert plan.fingerprint() == stored.plan(batch_size=8, num_slots=2).fingerprint()
    for step in range(5):
        lazy.prepare(plan, step, 0, 1)
        for slot in range(2):
            numbers = plan.step(step).slot(slot).tolist()
            options = {"seed": 3, "step": step, "text_dropout": 0.2}
            one, other = stored.collate(numbers, **options), lazy.collate(numbers, **options)
            assert one.pictures == other.pictures and one.noise.equal(other.noise) and one.normal.equal(other.normal)
            assert (
                one.text_tokens.dtype == other.text_tokens.dtype
                and one.layout.text_lengths == other.layout.text_lengths
            )
            # The bank's were encoded in batches and its latents are float16: the last bits may differ.
            assert torch.allclose(one.image_tokens, other.image_tokens, rtol=1e-2, atol=1e-2)
            assert torch.allclose(one.text_tokens.float(), other.text_tokens.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "precision"), [(1, "fp8"), (2, "bf16")])
def test_runs_have_equal_losses_whenever_samples_are_encoded(tmp_path, processes, precision):
    raw = scenes(tmp_path / "raw", range(60))
    prepare(prepare_config(raw, tmp_path / "out"))
    losses = {}
    for kind in ("bank", "precomputed", "rolling", "online"):
        out = tmp_path / kind
        run = data(tmp_path / "out" / "shards", features=kind, rolling_steps=3, precision=precision)
        pretrain.main(tiny_run.tiny_config(out, steps=8, processes=processes, data=run))
        losses[kind] = torch.tensor([row["loss"] for row in read_jsonl(out / "metrics.jsonl") if "loss" in row])
    assert len(losses["online"]) > 0 and losses["rolling"].equal(losses["online"])
    assert losses["precomputed"].equal(losses["online"])
    assert torch.allclose(losses["bank"], losses["online"], rtol=1e-2 if precision == "fp8" else 1e-3)
    assert len(list(tmp_path.glob("folder-bank-*-features-*/features-*.safetensors"))) >= 2


@pytest.mark.parametrize("change", [{"features": "stored"}, {"rolling_steps": 0}, {"precision": "int8"}])
def test_settings_are_checked(change, tmp_path):
    with pytest.raises(ValueError, match="features, precision, rolling_steps"):
        replace(data(tmp_path), **change)
