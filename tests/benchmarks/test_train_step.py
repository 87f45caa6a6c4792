"""The training-step benchmark: its counts are torch's, its floor is the model's products and no more, its output is whole."""

import importlib
import json
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step
from benchmarks import train_step_parts as parts
from lensmini.cost import forward_flops, operation_flops, train_flops
from lensmini.nn import LensConfig
from lensmini.packed import Layout

CONFIG = LensConfig(
    num_layers=3,
    num_attention_heads=3,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=24,
    selected_layer_index=(1, 3),
)
CPU, F32 = torch.device("cpu"), torch.float32
EVEN = Layout.build([(4, 6), (4, 6)], text_lengths=[5, 5])
RAGGED = Layout.build([(4, 6), (3, 3), (3, 3), (2, 8)], text_lengths=[5, 9, 9, 1])
LAYOUTS = pytest.mark.parametrize("layout", [EVEN, RAGGED], ids=["even", "ragged"])


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on several threads wait for each other for long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def total(function, layout, **options):
    samples = zip(layout.image_lengths, layout.text_lengths, strict=True)
    return sum(function(CONFIG, n, l, **options) for n, l in samples)


@pytest.mark.parametrize(("backend", "again"), [("padded", 1), ("math", 0)])
def test_train_flops_are_what_torch_counts_on_the_sdpa_path(backend, again):
    """Exactly, once two things are set right that ``train_flops`` leaves out or counts by rule.

    The fused backward repeats the scores (``again``), half of the forward's attention; nobody wants the gradient of the
    sinusoid. The counter knows SDPA, not custom operations: our CPU loop and CUDA's ``varlen_attn`` count
    as nothing, so that on a packed ragged batch it would miss the attention altogether.
    """
    model, batch = parts.make_ours(CONFIG, F32, CPU), parts.make_batch(CONFIG, EVEN, F32)
    image = batch.image_tokens.requires_grad_()
    step = lambda: model.forward_packed(image, batch.t, batch.text_tokens, EVEN, backend=backend).sum().backward()  # noqa: E731
    attention = sum(operation_flops(CONFIG, 24, 5)["attention"] for _ in range(2))
    sinusoid = 2 * (2 * 256 * CONFIG.inner_dim)
    assert counted(step) == train_step.batch_flops(CONFIG, EVEN) - sinusoid + again * attention // 2
    assert train_step.batch_flops(CONFIG, RAGGED) == total(train_flops, RAGGED)


@LAYOUTS
def test_the_floor_does_the_products_of_the_model_and_no_others(layout):
    assert counted(parts.floor_step(CONFIG, layout, F32, backward=False)) == total(forward_flops, layout)
    attention = sum(
        operation_flops(CONFIG, n, l)["attention"]
        for n, l in zip(layout.image_lengths, layout.text_lengths, strict=True)
    )
    # The fused backward repeats the scores.
    assert counted(parts.floor_step(CONFIG, layout, F32)) == total(train_flops, layout) + attention // 2


@LAYOUTS
def test_the_floor_takes_less_time_than_the_step(layout):
    model, batch = parts.make_ours(CONFIG, F32, CPU), parts.make_batch(CONFIG, layout, F32)
    seconds = {"step": [], "floor": []}
    calls = {"step": parts.our_step(model, batch), "floor": parts.floor_step(CONFIG, layout, F32)}
    for _ in range(12):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    # The best of a dozen: a tiny step is mostly Python, of which the floor has hardly any.
    assert min(seconds["floor"]) < min(seconds["step"])


def test_the_peer_does_as_many_products_but_for_the_text_tail_and_its_pooled_text():
    peer, batch = parts.make_peer(CONFIG, F32, CPU), parts.make_batch(CONFIG, EVEN, F32)
    d, found = CONFIG.inner_dim, []
    hook = peer.register_forward_hook(lambda *_: found.append(counter.get_total_flops()))
    with FlopCounterMode(display=False) as counter:
        parts.peer_step(peer, batch)()
    hook.remove()
    pooled = 2 * 2 * (parts.POOLED_DIM * d + d * d)
    assert found == [total(forward_flops, EVEN, text_tail=True) + pooled]
    with pytest.raises(
        ValueError, match=r"layout: expected samples of equal size for the dense peer, got \(29, 18, 18"
    ):
        parts.peer_step(peer, parts.make_batch(CONFIG, RAGGED, F32))


def test_the_cpu_and_gpu_batches_are_the_papers_sizes():
    grids, texts = train_step.mixture(3, 1)
    tokens = sum(height * width for height, width in grids) + sum(texts)
    assert 16_000 <= tokens <= 32_000 and all(150 <= text <= 256 for text in texts)
    assert {round((height * width) ** 0.5 / 16) for height, width in grids} == {2, 3, 4}
    assert train_step.uniform(64, 200, 4) == ("1024^2", ([(64, 64)] * 4, [200] * 4))


def test_held_bytes_are_the_storages_that_live_and_were_not_there_before():
    weight = torch.zeros(64, 32, requires_grad=True)

    def forward():
        view = weight.t()
        forgotten = torch.ones(1000) * 2
        return view, forgotten[:1].clone(), (weight * 3).view(-1)

    assert parts.held_bytes(forward, [weight]) == 4 * (1 + 64 * 32)


def test_activations_are_those_of_the_cost_model_and_fewer_with_recomputation():
    config = LensConfig(num_layers=6, num_attention_heads=2, enc_hidden_dim=64)
    model = parts.make_ours(config, F32, CPU)
    layout = Layout.build([(12, 12), (8, 10)], text_lengths=[30, 40])
    rows = parts.activations_per_token(model, parts.make_batch(config, layout, F32))
    measured = [rows[mode]["measured"] for mode in ("none", "selective", "full")]
    assert measured == sorted(measured, reverse=True) and measured[1] < 0.9 * measured[0] > 2 * measured[2]
    assert measured[0] == pytest.approx(rows["none"]["cost"], rel=0.1)
    assert not any("forward" in vars(block) for block in model.transformer_blocks)


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 40, 163, 500])
@pytest.mark.parametrize("guess", [0, 1, 30, 200])
def test_the_search_ends_within_two_per_cent_below_the_limit(limit, guess):
    tried = []

    def fits(count):
        tried.append(count)
        return count <= limit

    found = parts.largest_fit(fits, guess=guess, cap=163)
    assert found <= min(limit, 163) <= found + max(1, 0.02 * found) - (found < 50)
    assert len(tried) == len(set(tried)) < 30 and min(tried) >= 1 and max(tried) <= 163


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(Params)", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::mm", "matmul"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<Mainloop>>(Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, Mul>(int)", "at::native::vectorized_elementwise_kernel"),
        ("triton_poi_fused_add_mul_12", "triton_poi_fused_add_mul"),
        ("aten::sum", "aten::sum"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD "),
    ],
)
def test_kernels_are_grouped(name, group):
    assert parts.kernel_group(name) == group


def test_the_largest_gap_is_the_first_group_that_is_neither_matmul_nor_attention():
    kernels = [
        ("gemm_a", 5.0, 2),
        ("flash_fwd", 4.0, 1),
        ("triton_poi_1", 1.0, 3),
        ("triton_poi_2", 1.5, 3),
        ("x", 2.0, 1),
    ]
    found = parts.summarise_kernels(kernels, top=3)
    assert found["largest_gap"] == {"group": "triton_poi", "seconds": 2.5} and found["seconds"] == 13.5
    assert [row["name"] for row in found["top"]] == ["gemm_a", "flash_fwd", "x"]
    assert [*found["groups"].items()] == [("matmul", 5.0), ("attention", 4.0), ("triton_poi", 2.5)]
    assert parts.summarise_kernels(kernels[:2])["largest_gap"] is None


def test_a_profile_finds_the_products():
    weight = torch.randn(256, 256)
    found = train_step.profile_step(lambda: weight @ weight + 1, CPU)
    assert {row["name"]: row["calls"] for row in found["top"]}["aten::mm"] == 1
    assert found["groups"]["matmul"] > 0 and found["largest_gap"]["group"].startswith("aten::")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, peak):
    assert train_step.peak_flops(name) == peak


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def test_who_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    calls, reasons = parts.usable({"small": lambda: None, "large": full})
    assert [*calls] == ["small"] and reasons == {"large": "CUDA out of memory. Tried to allocate 2 GiB."}
    with pytest.raises(ZeroDivisionError):  # a mistake is no lack of memory
        parts.usable({"wrong": lambda: 1 // 0})
    monkeypatch.setattr(train_step, "our_step", lambda *_: full)
    setting = train_step.Setting(config=CONFIG, cases={}, device=CPU, dtype=F32, reduced=True)
    with pytest.raises(MemoryError, match="58 packed tokens do not fit on cpu: {'ours': 'CUDA out of memory"):
        train_step.time_cell(setting, None, None, parts.make_batch(CONFIG, EVEN, F32))


def test_a_step_that_never_fits_is_told_and_nothing_holds(monkeypatch, capsys):
    monkeypatch.setattr(parts, "our_step", lambda *_: full)
    monkeypatch.setattr(train_step, "our_step", lambda *_: full)
    monkeypatch.setattr(train_step, "make_peer", lambda *_: importlib.import_module("diffusers_that_is_not_there"))
    setting = train_step.Setting(
        config=CONFIG, cases={"even": ([(4, 6)] * 2, [5] * 2)}, device=CPU, dtype=F32, reduced=True, rounds=1
    )
    details = train_step.measure(setting)
    train_step.result_line(details)
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["holds"]
    assert details["cells"] == {} and [*details["left_out"]] == ["all", "even, eager", "even, compiled"]
    assert "pip install" in details["left_out"]["all"]["peer"]
    assert [row["measured"] for row in details["activation_bytes_per_token"].values()] == [None] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("tpu", 1), "device: expected auto, cuda or cpu, got 'tpu'"),
        (("cpu", 0), "rounds: expected at least 1, got 0"),
        (("cuda", 1), "device: expected a CUDA device for cuda, got a machine where torch sees none"),
    ],
)
def test_settings_refuse_what_they_cannot_do(options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train_step.setting_for(*options)


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_whole_result_line(monkeypatch, capsys, tmp_path):
    cases = {"even": ([(4, 6)] * 2, [5] * 2), "mixed": ([(4, 6), (3, 3)], [5, 9])}
    setting = train_step.Setting(
        config=CONFIG, cases=cases, device=CPU, dtype=F32, reduced=True, rounds=3, compile_options={"backend": "eager"}
    )
    monkeypatch.setattr(train_step, "setting_for", lambda device, rounds: setting)
    monkeypatch.setattr(sys, "argv", ["train_step", "--out", str(tmp_path / "line.json")])
    train_step.main()
    lines = capsys.readouterr().out.splitlines()
    result, details = json.loads(lines[-1]), json.loads(lines[-1])["details"]
    assert (tmp_path / "line.json").read_text() == lines[-1] + "\n"
    assert (result["name"], result["goal"], result["better"]) == ("train_step", 1.3, "lower")
    assert (details["device"], details["reduced"], details["dtype"]) == ("cpu", True, "float32")
    assert [*details["cells"]] == [f"{case}, {mode}" for mode in ("eager", "compiled") for case in cases]
    for name, cell in details["cells"].items():
        assert cell["over_floor"] == pytest.approx(cell["seconds"] / cell["floor_seconds"], rel=2e-3), name
        assert cell["mfu"] is None and cell["floor_seconds"] > 0, name
        assert (cell["peer_seconds"] is None) == (cell["over_peer"] is None) == name.startswith("mixed")
        assert cell["tflops"] * 1e12 * cell["seconds"] == pytest.approx(
            total(
                train_flops, EVEN if name.startswith("even") else Layout.build(*cases["mixed"][:1], text_lengths=[5, 9])
            ),
            rel=2e-3,
        )
    assert result["ratio"] == pytest.approx(max(cell["over_floor"] for cell in details["cells"].values()), abs=1e-3)
    assert result["holds"] == (result["ratio"] <= 1.3)
    assert [*details["activation_bytes_per_token"]] == ["none", "selective", "full"]
    attention = details["attention"]
    assert attention["lengths"] == [29, 18]
    assert {*attention["backends"], *attention["unavailable"]} >= {"loop", "padded", "varlen", "flex", "sdpa cudnn"}
    assert attention["backends"].keys() >= {"loop", "padded", "sdpa flash"}
    assert "CUDA kernels only" in attention["unavailable"]["varlen"]
    assert details["largest_batch"] is details["kernels"] is details["allocation_retries"] is None
    assert sum(line.startswith(("even ", "mixed ")) for line in lines) == 4
