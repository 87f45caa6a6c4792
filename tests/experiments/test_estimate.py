"""Laws of the estimate: parts sum to wholes, memory shrinks with sharding and recomputation, seconds follow from bytes."""

import doctest
import json
import math
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import estimate, estimate_rows, plan_report_rows
from experiments.estimate import PRESETS, cli, lab_model, main, make_report, paper_accounting, toy_1b_model, traffic
from experiments.estimate_rows import (
    CLUSTERS,
    SHARDINGS,
    EstimateConfig,
    RentConfig,
    StageConfig,
    TrainConfig,
    adapter_parameters,
    expected_slowest,
    image_flops,
    memory_report,
    micro_batches,
    parameter_parts,
    state_bytes,
)
from lensmini.cost import activation_bytes, operation_flops, parameter_count, train_flops
from lensmini.data import LENS_BUCKETS
from lensmini.nn import LensConfig, LensTransformer
from lensmini.packed import Layout

RECOMPUTE = ("none", "selective", "full")
TINY = LensConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=24,
    selected_layer_index=(0, 1),
)
OFFLINE = TrainConfig(encoders="precomputed")
LORA = replace(OFFLINE, lora_rank=4)


@st.composite
def models(draw):
    heads = draw(st.integers(1, 4))
    return replace(
        TINY,
        num_layers=draw(st.integers(1, 5)),
        num_attention_heads=heads,
        enc_hidden_dim=draw(st.integers(1, 40)),
        selected_layer_index=tuple(range(draw(st.integers(1, 4)))),
    )


@st.composite
def configs(draw):
    bases = draw(st.lists(st.sampled_from([256, 512, 768, 1024]), min_size=1, max_size=3, unique=True))
    images = draw(st.lists(st.integers(1, 30), min_size=len(bases), max_size=len(bases)))
    stage = StageConfig(
        bases=tuple(bases), images_per_gpu=tuple(images), aspects=draw(st.sampled_from(["square", "all"]))
    )
    rank, online = draw(st.sampled_from([0, 0, 3])), draw(st.sampled_from(["online", "precomputed"]))
    train = TrainConfig(
        lora_rank=rank, encoders=online, text_tokens=draw(st.integers(0, 400)), micro_steps=draw(st.integers(1, 4))
    )
    rent = RentConfig(gpu=draw(st.sampled_from(list(CLUSTERS))), gpus=draw(st.sampled_from([1, 2, 3, 8, 16, 128])))
    model = replace(draw(models()), num_layers=draw(st.integers(4, 9)))
    return EstimateConfig(stages=(stage,), model=model, train=train, cluster=rent)


def simple(*, train=OFFLINE, model=TINY, gpus=8, gpu="a100_80gb", **stage):
    rent = RentConfig(gpus=gpus, gpu=gpu)
    return EstimateConfig(stages=(StageConfig(**stage),), model=model, train=train, cluster=rent)


@given(models())
def test_parts_are_the_models_own_tensors_and_sum_to_its_count(model):
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in LensTransformer(model).named_parameters()}
    places = (("mod", "modulation"), ("qkv", "qkv"), ("to_out", "attention_out"), ("to_add_out", "attention_out"))
    places += (("mlp", "mlp"), ("norm_out", "output"), ("proj_out", "output"), ("txt_norm", "norms"))
    places += (("img_in", "image_in"), ("txt_in", "text_in"), ("time_text_embed", "time"), ("norm", "norms"))
    expected = dict.fromkeys(parameter_parts(model), 0)
    for name, size in sizes.items():
        expected[next(part for word, part in places if word in name)] += size
    assert parameter_parts(model) == expected
    assert sum(parameter_parts(model).values()) == parameter_count(model)


def test_what_a_token_meets_is_a_third_of_the_released_parameters():
    assert estimate_rows.parameters_per_token(LensConfig()) == 12 * 1536**2 * 48
    assert parameter_count(LensConfig()) / (12 * 1536**2 * 48) == pytest.approx(3.02, abs=0.005)
    (row,) = make_report(simple(model=LensConfig(), train=replace(OFFLINE, text_tokens=256), bases=(1024,)))[
        "flops"
    ].values()
    assert row["6 N D"] / 1e12 == pytest.approx(107, abs=0.5)
    assert row["6 N D / 3 forwards"] == pytest.approx(2.05, abs=0.02)


@given(configs())
def test_the_rows_of_an_image_sum_to_the_librarys_counts(config):
    report, l, rank = make_report(config), config.train.text_tokens, config.train.lora_rank
    for base, row in report["flops"].items():
        n = (int(base) // 16) ** 2
        operations = operation_flops(config.model, n, l)
        assert {name: row[name] for name in operations} == operations
        assert row["forward"] == sum(operations.values()) + row.get("adapters", 0)
        assert ("adapters" in row) == (rank > 0)
        assert row["training, recomputing all"] - row["training"] == pytest.approx(row["forward"])
        if not rank:
            assert row["training"] == 3 * row["forward"] == train_flops(config.model, n, l)
        else:
            assert row["forward"] < row["training"] < 3 * row["forward"]


def adapted_model(rank):
    """A frozen model and, beside each of its qkv, attention-output and MLP linears, an adapter of rank r."""
    model, adapters = LensTransformer(TINY).requires_grad_(False), nn.ModuleList()
    for name, module in model.transformer_blocks.named_modules():
        if isinstance(module, nn.Linear) and "mod" not in name:
            down, up = nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, module.out_features, bias=False)
            adapters.append(nn.Sequential(down, up))
            module.register_forward_hook(lambda _, inputs, out, adapter=adapters[-1]: out + adapter(inputs[0]))
    return model, adapters


def test_adapters_of_a_real_model_have_as_many_parameters():
    _, adapters = adapted_model(4)
    assert sum(p.numel() for p in adapters.parameters()) == adapter_parameters(TINY, 4)
    assert adapter_parameters(LensConfig(), 64) == 2 * 48 * 64 * (1536 * 4 + 1536 * 2 + 3 * (1536 + 4096))


def test_training_adapters_costs_what_torchs_counter_counts():
    grid, text = (8, 8), 9
    model, _ = adapted_model(4)
    layout = Layout.build([grid], text_lengths=[text])
    tokens, features = torch.randn(64, 16), torch.randn(text, 2, 24)
    # The counter does not know the CPU's fused attention; written out, its products count.
    with FlopCounterMode(display=False) as counter:
        model.forward_packed(tokens, torch.tensor([0.5]), features, layout, backend="math").sum().backward()
    config = simple(train=replace(LORA, text_tokens=text))
    qkv = operation_flops(TINY, 64, text)["qkv"] // TINY.num_layers
    down = 2 * 4 * TINY.inner_dim * (64 + text)
    # The first block's input needs no gradient; the estimate leaves that in.
    assert image_flops(config, 64) - qkv - down == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_training_state_is_twenty_bytes_a_parameter_over_the_gpus_that_share_it(sharding):
    config = simple(gpus=16)
    rows, shards = state_bytes(config, sharding), {"ddp": 1, "fsdp": 16, "hsdp": 8}[sharding]
    state = [value for name, value in rows.items() if name.endswith("float32")]
    assert sorted(value * shards / parameter_count(TINY) for value in state) == pytest.approx([4, 4, 4, 8])
    with torch.device("meta"):
        model = LensTransformer(TINY)
    block = sum(p.numel() for p in model.transformer_blocks[0].parameters())
    whole = parameter_count(TINY)
    expected = 2 * whole if sharding == "ddp" else 2 * (whole - TINY.num_layers * block + 2 * block)
    assert rows["blocks at work, bfloat16"] == expected
    without = state_bytes(replace(config, train=replace(OFFLINE, average=False)), sharding)
    assert sum(rows.values()) - sum(without.values()) == pytest.approx(4 * whole / shards)
    online = state_bytes(replace(config, train=TrainConfig()), sharding)
    assert sum(online.values()) - sum(rows.values()) == pytest.approx(42e9 / shards)


def test_frozen_weights_take_two_bytes_and_adapters_sixteen():
    config = simple(train=replace(LORA, average=False), gpus=1)
    rows, adapters = state_bytes(config, "ddp"), adapter_parameters(TINY, 4)
    reserve = CLUSTERS["a100_80gb"].reserve_gb * 1e9
    assert sum(rows.values()) == 2 * parameter_count(TINY) + (4 + 4 + 8) * adapters + 2 * adapters + reserve


@given(configs())
def test_memory_shrinks_with_sharding_and_with_recomputation(config):
    report = memory_report(config)
    held = [report["activations"][way] for way in RECOMPUTE]
    assert held == sorted(held, reverse=True)
    if config.cluster.gpus > 1:
        fixed = [report["shardings"][name]["fixed"] for name in ("ddp", "hsdp", "fsdp")]
        assert fixed == sorted(fixed, reverse=True)
    for kind in report["shardings"].values():
        assert kind["fixed"] == sum(kind["rows"].values())
        for way in RECOMPUTE:
            assert kind["total"][way] == kind["fixed"] + report["activations"][way]
            assert kind["fits"][way] == (kind["total"][way] <= report["gpu"])


@given(st.integers(1, 40), st.sampled_from(RECOMPUTE), st.sampled_from(SHARDINGS), st.integers(0, 300))
def test_the_most_images_fit_and_one_more_does_not(images, way, sharding, text):
    config = simple(
        model=replace(LensConfig(), num_layers=6),
        train=replace(OFFLINE, text_tokens=text),
        bases=(1024,),
        images_per_gpu=(images,),
    )
    kind = memory_report(config)["shardings"][sharding]
    most = kind["most"]["1024"][way]
    assert most["tokens"] == 4096 * most["images"]
    assert kind["fits"][way] == (images <= most["images"])
    each = activation_bytes(config.model, 4096, text, recompute=way)
    assert kind["fixed"] + most["images"] * each <= 80e9 < kind["fixed"] + (most["images"] + 1) * each


@given(configs())
def test_traffic_of_a_copy_in_every_node_is_what_the_plans_report_models(config):
    if config.cluster.gpus % 8 or config.train.lora_rank:
        config = replace(config, cluster=RentConfig(gpus=32), train=replace(config.train, lora_rank=0))
    rent, steps = config.cluster, config.train.micro_steps
    expected = plan_report_rows._communication(parameter_count(config.model), rent.gpus, steps, rent.cluster())
    assert estimate.send_seconds(config, "hsdp") == pytest.approx(expected)


@given(configs())
def test_collectives_send_the_bytes_of_a_ring(config):
    gpus, steps = config.cluster.gpus, config.train.micro_steps
    adapters = adapter_parameters(config.model, config.train.lora_rank)
    whole = parameter_count(config.model) + adapters
    trained = adapters or whole
    for name, expected in (("fsdp", steps * (2 * 2 * whole + 4 * trained)), ("ddp", 2 * 4 * trained)):
        rows = traffic(config, name)
        assert sum(map(sum, rows.values())) == pytest.approx(expected * (gpus - 1) / gpus)
        across = sum(row[1] for row in rows.values())
        # Each node takes in, through its cards together, what other nodes hold.
        nodes = max(1, gpus / 8)
        assert across * min(gpus, 8) == pytest.approx(expected * (nodes - 1) / nodes)
        assert min(map(min, rows.values())) >= 0


def test_a_slow_network_sets_the_pace_and_does_not_hide():
    slow = RentConfig(gpus=16, network_gb_per_s=1e-6)
    config = replace(simple(), cluster=slow)
    row = make_report(config)["stages"]["train"]
    assert row["seconds_per_step"] == estimate.send_seconds(config, "hsdp") > row["compute_seconds"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 2**20))
def test_the_expected_slowest_is_the_mean_over_all_draws(costs, draws, seed):
    shares = torch.rand(len(costs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    shares = (shares / shares.sum()).tolist()
    expected = sum(
        math.prod(shares[i] for i in places) * max(costs[i] for i in places)
        for places in product(range(len(costs)), repeat=draws)
    )
    assert expected_slowest(costs, shares, draws) == pytest.approx(expected)
    assert expected_slowest(costs, shares, 10**6) == pytest.approx(max(costs))


def test_seconds_days_and_hours_of_a_stage_by_hand():
    train = replace(OFFLINE, micro_steps=3, recompute="full")
    config = simple(train=train, gpus=2, gpu="h100", bases=(256,), images_per_gpu=(5,), images=60_000)
    config = replace(config, cluster=replace(config.cluster, mfu=0.3, node_gb_per_s=1e9))
    row = make_report(config)["stages"]["train"]
    seconds = 3 * 5 * 4 / 3 * train_flops(TINY, 256, 150) / (0.3 * 989e12)
    assert row["seconds_per_step"] == pytest.approx(seconds)
    assert row["images_per_step"] == 30 and row["steps"] == pytest.approx(2000)
    assert row["days"] == pytest.approx(2000 * seconds / 86_400)
    assert row["gpu_hours"] == pytest.approx(2 * 2000 * seconds / 3600)
    assert row["model_mfu"] == pytest.approx(0.3 * 3 / 4) and row["balance"] == pytest.approx(1)


@given(configs(), st.integers(1, 5))
def test_time_is_proportional_to_images_and_to_the_inverse_of_the_utilisation(config, factor):
    config = replace(config, cluster=replace(config.cluster, node_gb_per_s=1e12, network_gb_per_s=1e12))
    (stage,) = config.stages
    row = make_report(config)["stages"]["train"]
    longer = replace(config, stages=(replace(stage, images=factor * stage.images),))
    faster = replace(config, cluster=replace(config.cluster, mfu=0.45 / factor))
    assert make_report(longer)["stages"]["train"]["days"] == pytest.approx(factor * row["days"])
    assert make_report(faster)["stages"]["train"]["days"] == pytest.approx(factor * row["days"])
    assert 0 < row["balance"] <= 1 + 1e-12 and 0 <= row["encoder_share"] < 1


def test_encoders_cost_what_was_measured():
    config = simple(train=TrainConfig(), bases=(256, 512, 1024), images_per_gpu=(1, 1, 1), model=LensConfig())
    rows = make_report(config)["flops"]
    assert [rows[base]["autoencoder"] / 1e12 for base in ("256", "512", "1024")] == pytest.approx([0.27, 1.12, 4.89])
    assert rows["256"]["language model"] == pytest.approx(6.06e9 * (97 + 150))
    assert rows["1024"]["encoders / training"] == pytest.approx(0.126, abs=0.002)
    assert 0.48 < rows["256"]["encoders / training"] < 0.6


def test_encoding_once_is_priced_by_pictures_not_by_repeats():
    config = simple(train=replace(OFFLINE, distinct_images=1000), model=LensConfig(), bases=(512,))
    once = make_report(config)["encode_once"]
    flops = 1000 * (1.12e12 + 6.06e9 * 247)
    assert once["gpu_hours"] == pytest.approx(flops / (0.45 * 312e12) / 3600)
    assert once["disk_bytes"] == 1000 * 2 * (150 * 4 * 2880 + 1024 * 128)
    longer = replace(config, stages=(replace(config.stages[0], images=10**9),))
    assert make_report(longer)["encode_once"] == once


def test_the_papers_claims_follow_from_its_own_numbers():
    paper = paper_accounting()
    values = list(paper.values())
    assert values[:3] == pytest.approx([62.5, 6.75, 192 * 312 / (314 * 989)])
    assert round(100 * values[2], 1) == 19.3
    tokens = [bucket.tokens() for bucket in LENS_BUCKETS]
    flops = 400_000 * 128 * 24 * train_flops(LensConfig(), 1024, 150)
    images = [24] * 9 + [10] * 9 + [6] * 9
    per_draw = [train_flops(LensConfig(), n, 150) * count for count, n in zip(images, tokens, strict=True)]
    flops += 400_000 * 128 * sum(per_draw) / 27
    assert paper["FLOPs of the model, bases equally often"] == pytest.approx(flops, rel=1e-6)
    assert paper["implied MFU"] == pytest.approx(flops / (192_000 * 3600 * 312e12), rel=1e-6)
    assert round(paper["implied MFU"], 2) == 0.13
    assert paper["... counting what is recomputed"] == pytest.approx(4 / 3 * paper["implied MFU"])
    assert paper["implied MFU"] < paper["6 N D would claim"]


def test_the_papers_stages_take_400k_steps():
    stages = make_report(estimate.paper())["stages"]
    assert [row["steps"] for row in stages.values()] == pytest.approx([400_000, 400_000])
    assert stages["stage1"]["images_per_step"] == 3072 and stages["stage2"]["images_per_step"] == pytest.approx(
        5120 / 3
    )
    assert {batch.bucket for batch in micro_batches(estimate.stage2().stages[0])} == set(LENS_BUCKETS)


def test_chosen_models_have_the_stated_sizes():
    for model, target, tolerance in ((toy_1b_model(), 1.2e9, 0.03), (lab_model(), 0.6e9, 0.05)):
        with torch.device("meta"):
            size = sum(p.numel() for p in LensTransformer(model).parameters())
        assert size == pytest.approx(target, rel=tolerance)
        assert model.attention_head_dim == 64 and model.axes_dims_rope == (8, 28, 28)


def test_the_labs_run_takes_two_days_on_eight_gpus_and_fits():
    config = estimate.lab_8gpu()
    report = make_report(config)
    days = report["encode_once"]["days"] + sum(row["days"] for row in report["stages"].values())
    assert 1 < days <= 2 and config.cluster.mfu == 0.4 and config.cluster.gpus == 8
    assert report["memory"]["shardings"][config.train.sharding]["fits"][report["recompute"]]
    assert [stage.bases for stage in config.stages] == [(256,), (512,)]


def test_the_fine_tuning_fits_into_24_gb_only_with_recomputation():
    report = make_report(estimate.finetune_24gb())
    kind = report["memory"]["shardings"]["ddp"]
    assert kind["fits"] == {"none": False, "selective": True, "full": True} and report["recompute"] == "full"
    assert kind["rows"]["model, frozen, bfloat16"] / 1e9 == pytest.approx(8.2, abs=0.05)
    assert "frozen encoders, bfloat16" not in kind["rows"]


def test_the_least_recomputation_that_fits_is_chosen():
    config = simple(model=LensConfig(), train=replace(OFFLINE, sharding="fsdp"), gpus=128, bases=(1024,))
    for images, expected in ((4, "none"), (6, "selective"), (10, "full"), (100, "full")):
        stage = replace(config.stages[0], images_per_gpu=(images,))
        report = make_report(replace(config, stages=(stage,)))
        assert report["recompute"] == expected
        assert report["memory"]["shardings"]["fsdp"]["fits"]["full"] == (images < 100)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_prints_tables_for_100_columns_in_seconds(preset, capsys, tmp_path):
    start, config = time.process_time(), preset()
    main(replace(config, out=tmp_path / "out"))
    assert time.process_time() - start < 5
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "ASSUMED" in text and text.isascii()
    written = json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["estimate.json"]
    assert sum(written["parameters"].values()) == parameter_count(config.model)
    assert ("THE PAPER" in text) == (preset is estimate.paper)
    assert ("GB SENT" in text) == (config.cluster.gpus > 1)


def test_what_does_not_fit_is_said_and_nothing_is_written_unasked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli(["stage1", "--cluster.gpu", "rtx4090", "--train.sharding", "ddp", "--cluster.gpus", "1"])
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: StageConfig(bases=()), "stages.bases"),
        (lambda: StageConfig(bases=(500,)), "stages.bases"),
        (lambda: StageConfig(images_per_gpu=(1, 2)), "stages.images_per_gpu"),
        (lambda: StageConfig(images_per_gpu=(0,)), "stages.images_per_gpu"),
        (lambda: StageConfig(shares=(1.0, 2.0)), "stages.shares"),
        (lambda: StageConfig(shares=(0.0,)), "stages.shares"),
        (lambda: StageConfig(shares=(math.nan,)), "stages.shares"),
        (lambda: StageConfig(images=0), "stages.images"),
        (lambda: TrainConfig(micro_steps=0), "train.micro_steps"),
        (lambda: TrainConfig(lora_rank=-1), "train.lora_rank"),
        (lambda: TrainConfig(text_tokens=-1), "train.text_tokens"),
        (lambda: TrainConfig(distinct_images=5), "train.distinct_images"),
        (lambda: RentConfig(gpus=0), "cluster.gpus"),
        (lambda: RentConfig(gpus=12), "cluster.gpus"),
        (lambda: RentConfig(mfu=0.0), "cluster.mfu"),
        (lambda: RentConfig(mfu=1.5), "cluster.mfu"),
        (lambda: RentConfig(mfu=math.nan), "cluster.mfu"),
        (lambda: RentConfig(gpu="abacus"), "cluster.gpu"),  # pyright: ignore
        (lambda: RentConfig(node_gb_per_s=0.0), "cluster.node_gb_per_s"),
        (lambda: RentConfig(network_gb_per_s=math.inf), "cluster.network_gb_per_s"),
        (lambda: EstimateConfig(stages=()), "stages"),
        (lambda: make_report(EstimateConfig(stages=(StageConfig(), StageConfig()))), "stages.name"),
        (lambda: expected_slowest([1.0], [1.0], 0), "draws"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        make()


def test_settings_of_the_command_line_reach_the_numbers(capsys):
    cli(["stage2", "--stages.0.images-per-gpu", "8", "4", "2", "--cluster.gpus", "16", "--cluster.gpu", "h200"])
    text = capsys.readouterr().out
    assert "THE RUN on 16 h200" in text and "hsdp / 8" in text and "fsdp / 16" in text
    with pytest.raises(SystemExit):
        cli(["stage2", "--cluster.gpus", "12"])


def test_examples_run():
    for module in (estimate, estimate_rows):
        assert not doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed
