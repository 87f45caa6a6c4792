"""Many ranks in one process hold and send what the formula says, and the model of a step is its closed form."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import virtual_cluster as cluster
from experiments.virtual_cluster import ClusterRun, model_steps, rehearse, traffic
from lensmini.cost import parameter_count, train_flops
from lensmini.data import Bucket
from lensmini.nn import LensConfig
from lensmini.parallel import make_mesh
from lensmini.parallel.rehearsal import count_collectives, expected_collectives, rehearsal_job

SMALL = LensConfig(
    num_layers=5, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), enc_hidden_dim=8
)


@pytest.mark.parametrize(("ranks", "shard"), [(128, 8), (128, 128), (128, 1), (6, 3)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_shards_and_collectives_are_those_of_the_formula(ranks: int, shard: int, blocks: int) -> None:
    config = ClusterRun(model=SMALL, ranks=ranks, shard=shard, blocks=blocks)
    found = rehearse(config, shard)
    assert found["counts"] == expected_collectives(blocks, ranks, shard)
    whole = parameter_count(replace(SMALL, num_layers=blocks))
    assert whole / shard <= found["elements_held"] < whole / shard * 1.3 + 200 * 64


@pytest.mark.slow
def test_the_papers_blocks_are_built_sharded_and_stepped_on_128_ranks() -> None:
    found = rehearse(ClusterRun(blocks=1), 8)
    assert found["counts"] == {"all-gather": 4, "reduce-scatter": 2, "all-reduce": 2}


def test_traffic_is_that_of_rings() -> None:
    config = ClusterRun(model=SMALL)
    count = parameter_count(SMALL)
    inside, across = traffic(config, 8), traffic(config, 128)
    assert inside["node_gb"] == pytest.approx(8 * count * 7 / 8 / 1e9)
    assert inside["network_gb"] == pytest.approx(8 * count / 8 * 15 / 16 / 1e9)
    assert across["node_gb"] == pytest.approx(8 * count * 127 / 128 * 7 / 8 / 1e9)
    assert across["network_gb"] == pytest.approx(8 * count * 127 / 128 / 8 / 1e9)


def test_steps_of_one_bucket_are_balanced_and_have_a_closed_form() -> None:
    config = replace(
        cluster.stage1(), model=SMALL, steps=3, ranks=8, launch_ms=0.0, network_gb_per_s=1e9, node_gb_per_s=1e9
    )
    found = model_steps(config)
    one = 24 * train_flops(SMALL, 1024, config.text_tokens)
    assert found["balance"] == 1 and found["images_per_step"] == 192
    assert found["seconds_per_step"] == pytest.approx(one * 4 / 3 / (312e12 * 0.45))
    assert found["model_mfu"] == pytest.approx(0.45 * 3 / 4)


def test_packed_slots_are_better_balanced_than_the_papers() -> None:
    mixed = [model_steps(replace(preset(), steps=20)) for preset in (cluster.stage2, cluster.packed)]
    assert mixed[0]["balance"] < 0.95 < 0.98 < mixed[1]["balance"]
    assert mixed[0]["images_per_rank"] == [6, 24]


def test_a_job_is_pretended_once_and_ends(tmp_path: Path) -> None:
    with rehearsal_job(4, rank=3) as group:
        assert (group.rank, group.world_size) == (3, 4)
        assert tuple(make_mesh(4, shard=2, device="cpu").shape) == (2, 2)
        with pytest.raises(ValueError, match="expected a process without a job"), rehearsal_job(2):
            pass
    assert not torch.distributed.is_initialized() and count_collectives(lambda: 1) == {}


def test_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ClusterRun(
        model=SMALL, blocks=1, steps=2, ranks=16, out=tmp_path, buckets=(Bucket(512, 512), Bucket(1024, 1024))
    )
    cluster.main(replace(config, images_per_rank=(4, 2)))
    text = capsys.readouterr().out
    assert "16 ranks" in text and "ASSUMED" in text and "balance" in text
    stored = json.loads((tmp_path / "virtual_cluster.json").read_text())
    assert np.isfinite(stored["steps"]["seconds_per_step"]) and (tmp_path / "virtual_cluster.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "message"), [({"shard": 3}, "shard: expected a divisor"), ({"steps": 0}, "steps: expected")]
)
def test_settings_out_of_range_are_errors(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterRun(**change)
