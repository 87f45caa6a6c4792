"""Shards of pictures train a model as they are: encoded when needed, ahead or beforehand, on any number of ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments import consolidate, pretrain
from experiments.adapter_state import AdapterConfig, AdapterState
from experiments.engine import EngineConfig
from experiments.prepare_data import prepare
from experiments.pretrain_config import EvalConfig, PretrainConfig
from experiments.runs import RunConfig, read_jsonl
from experiments.shard_data import ShardBank, ShardsConfig, load_encoders
from experiments.training import OptimConfig
from lensmini.checkpoints import load_lora, load_transformer, merge_lora
from lensmini.data import Bucket
from lensmini.nn import LensConfig
from lensmini.parallel import Group
from tests.experiments.test_generate_released import folder as released_folder  # noqa: F401
from tests.experiments.test_prepare_data import config as prepare_config
from tests.experiments.test_prepare_data import scenes

pytest.importorskip("pyarrow")
pytest.importorskip("diffusers")

MODEL = LensConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=16,
    selected_layer_index=(1, 3),
)
BUCKETS = (Bucket(48, 64), Bucket(64, 48), Bucket(56, 56))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, released_folder: Path) -> ShardsConfig:  # noqa: F811
    root = tmp_path_factory.mktemp("shards")
    prepare(prepare_config(scenes(root / "pictures", range(18)), root / "train"))
    prepare(prepare_config(scenes(root / "others", range(100, 106)), root / "held-out"))
    return ShardsConfig(
        path=root / "train" / "shards",
        held_out=root / "held-out" / "shards",
        buckets=BUCKETS,
        images_per_rank=(2,),
        num_ranks=2,
        mode="packed",
        text_encoder=str(released_folder),
        autoencoder=str(released_folder),
        encoder_dtype="float32",
    )


def run(data: ShardsConfig, out: Path, **changes: object) -> tuple[PretrainConfig, list[dict[str, object]]]:
    config = PretrainConfig(
        model=MODEL,
        data=data,
        optim=OptimConfig(lr=1e-3, dtype="float32", init_gate=0.1, ema_decay=0.5),
        run=RunConfig(out=out, steps=5, log_every=1, checkpoint_every=2, sample_every=4),
        eval=EvalConfig(validate_every=4, num_steps=2, mu=None),
        engine=EngineConfig(sharding="full", batches_ahead=2),
    )
    config = replace(config, **changes)
    pretrain.main(config)
    return config, read_jsonl(out / "metrics.jsonl")


@pytest.fixture(scope="module")
def online(data: ShardsConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("runs") / "online"
    return out, run(data, out)[1]


def test_a_run_over_shards_leaves_what_it_promises(online: tuple[Path, list[dict[str, object]]]) -> None:
    out, rows = online
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(isinstance(row["loss"], float) and row["loss"] > 0 for row in rows)
    assert {"validation", "validation_12x16", "validation_16x12"} <= rows[3].keys()
    assert (out / "samples-000004.png").exists() and json.loads((out / "summary.json").read_text())["sharded"]
    timing = read_jsonl(out / "timing.jsonl")
    for name in ("text_encoder_share", "autoencoder_share"):
        assert sum(row[name] for row in timing) > 0


@pytest.mark.parametrize("features", ["rolling", "precomputed"])
def test_when_samples_are_encoded_does_not_matter(
    features: str, data: ShardsConfig, online: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    _, rows = run(replace(data, features=features, rolling_steps=2), tmp_path / features)
    for one, other in zip(online[1], rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["loss_by_grid"] == pytest.approx(one["loss_by_grid"], rel=1e-5)


def test_two_ranks_see_what_one_sees_and_a_run_may_change_their_number(
    data: ShardsConfig, online: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    out = tmp_path / "two"
    engine = EngineConfig(sharding="hybrid", shard_size=2, recompute="full")
    base = RunConfig(out=out, steps=3, log_every=1, sample_every=4, processes=2)
    config, rows = run(data, out, run=base, engine=engine)
    with pytest.raises(Exception, match=r"other settings \(run\.steps 3 -> 5\)"):
        run(data, out, run=replace(base, steps=5, processes=1))
    for one, other in zip(online[1], rows, strict=False):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    # The weights in the released layout are the average that the run holds.
    consolidate.main(consolidate.ConsolidateConfig(path=out, out=tmp_path / "whole"))
    whole = load_transformer(tmp_path / "whole", dtype=torch.float32)
    assert whole.config == config.model and whole.proj_out.weight.abs().sum() > 0
    # A next stage starts from either form.
    losses = []
    for name, start in (("sharded", out / "step-000003"), ("released", tmp_path / "whole")):
        _, rows = run(data, tmp_path / name, init_from=start, run=RunConfig(out=tmp_path / name, steps=1, log_every=1))
        losses.append(rows[0]["loss"])
    assert losses[0] == losses[1] != online[1][0]["loss"]


def test_samples_are_those_of_the_shards(data: ShardsConfig, tmp_path: Path) -> None:
    device = torch.device("cpu")
    world = load_encoders(data, MODEL, device)
    bank = ShardBank(data.path, data, world, tmp_path, device)
    plan = bank.plan(seed=0, model=MODEL)
    assert plan.num_slots == 2 and len(bank.index) == 18
    grids = bank.by_grid()
    assert sorted(grids) == [(12, 16), (14, 14), (16, 12)] and sum(map(len, grids.values())) == 18
    for grid, members in grids.items():
        sample = bank.samples_of(members[:1])[0]
        assert tuple(sample.latents.shape) == (16, *grid) and sample.text_tokens.shape[1:] == (2, 16)
        features, mask = world.encoder(bank.captions(members[:1]))
        assert torch.equal(sample.text_tokens, torch.stack(features, 2)[0][mask[0]].bfloat16())
    with pytest.raises(ValueError, match="expected an index of 1 buckets, got one of others"):
        ShardBank(data.path, replace(data, buckets=BUCKETS[:1]), world, tmp_path, device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_per_rank": (1, 2)}, "images_per_rank: expected one number or 1, got 2"),
        ({"images_per_rank": ()}, "buckets, images_per_rank: expected at least one"),
        (
            {"buckets": (Bucket(512, 512), Bucket(1024, 1024)), "images_per_rank": (2, 1)},
            "one number, the mean, in packed",
        ),
        ({"rolling_steps": 0}, "precision, rolling_steps, max_length"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ShardsConfig(mode="packed"), **change)


@pytest.mark.slow
def test_an_adapter_trains_saves_goes_on_and_is_read_by_everyone(
    data: ShardsConfig,
    released_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    changes = {
        "adapter": AdapterConfig(rank=2, alpha=4.0),
        "init_from": released_folder,
        "engine": EngineConfig(recompute="full"),
        "optim": OptimConfig(lr=3e-3, dtype="float32", ema_decay=0.5),
    }

    def settings(name: str, steps: int, **more: object) -> RunConfig:
        return RunConfig(out=tmp_path / name, steps=steps, log_every=1, checkpoint_every=2, sample_every=0, **more)

    config, rows = run(data, tmp_path / "whole", run=settings("whole", 4), **changes)
    _, two = run(data, tmp_path / "two", run=settings("two", 4, processes=2), **changes)
    for one, other in zip(rows, two, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    # It stops at a checkpoint and goes on from it.
    out = tmp_path / "again"
    shutil.copytree(config.run.out, out)
    shutil.rmtree(out / "step-000004")
    (out / "summary.json").unlink()
    _, again = run(data, out, run=settings("again", 4), **changes)
    assert again == rows
    for name in ("model", "ema", "optimizer", "adapter"):
        one, other = (load_file(path / "step-000004" / f"{name}.safetensors") for path in (config.run.out, out))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    # Merged into the released weights it is the model that was trained.
    state = AdapterState(
        released_folder, changes["adapter"], changes["optim"], seed=0, group=Group(0, 1), device=torch.device("cpu")
    )
    batch = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.3, 0.8])
    base = load_transformer(released_folder, dtype=torch.float32)
    before = base(batch, times)
    torch.testing.assert_close(state.compute(batch, times), before)
    assert state.resume(config.run.out)
    with torch.no_grad():
        for name, half in state.halves.items():
            half.copy_(state.ema[name])
    merge_lora(base, load_lora(config.run.out / "step-000004" / "adapter.safetensors"))
    after = base(batch, times)
    torch.testing.assert_close(state.compute(batch, times), after, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected init_from with it"):
        replace(config, init_from=None)
