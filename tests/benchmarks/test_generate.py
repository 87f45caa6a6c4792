"""The sampling benchmarks: peer and ours paint the same, the GPU script rehearsed on a small model, the missing GPU."""

import json

import pytest
import torch

from benchmarks import generate_cpu, generate_gpu, profile_generate
from lensmini.cost import forward_flops
from lensmini.nn import LensConfig, LensTransformer
from tests.pipeline.test_call import SIZES

CONFIG = LensConfig(**{**SIZES, "num_layers": 2})


def test_every_contestant_paints_the_same():
    torch.manual_seed(0)
    calls = generate_cpu.case(LensTransformer(CONFIG).eval(), [(2, 3), (4, 2)], [3, 5], 2)
    expected = calls["padded loop"]()
    assert len(calls) == 6
    for name, call in calls.items():
        for a, b in zip(call(), expected, strict=True):
            assert (a - b).abs().max() / b.abs().max() < 1e-5, name


def test_the_flops_of_padding_by_hand():
    config = LensConfig()
    by_hand = (2 * forward_flops(config, 6, 5, text_tail=True) + 2 * forward_flops(config, 8, 5, text_tail=True)) / (
        forward_flops(config, 6, 3)
        + forward_flops(config, 6, 0)
        + forward_flops(config, 8, 5)
        + forward_flops(config, 8, 0)
    )
    assert generate_cpu.saved_flops(config, [(2, 3), (4, 2)], [3, 5]) == pytest.approx(by_hand)


def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["generate_gpu"])
    generate_gpu.main()
    said = capsys.readouterr().out.splitlines()
    assert "no CUDA device; nothing was measured" in said[0]
    line = json.loads(said[-1])
    assert line["holds"] is False and "nothing was measured" in line["details"]["left_out"]


def test_the_gpu_script_rehearsed_on_a_small_model(monkeypatch):
    cases = {"1024x1024, 20 steps": ((2, 3), 2, 5.0), "1024x1024, turbo": ((2, 2), 1, 1.0)}
    for name, value in {"CASES": cases, "SQUARE": (2, 2), "SMALL": (1, 2), "STEPS": 2, "TEXT": 3, "PADDED": 4}.items():
        monkeypatch.setattr(generate_gpu, name, value)
    monkeypatch.setattr(generate_gpu, "decoder", lambda *_: torch.sum)
    monkeypatch.setattr(LensTransformer, "compile_blocks", lambda self: self)
    rows = generate_gpu.measure(CONFIG, torch.float32, torch.device("cpu"), 1)
    for name in cases:
        assert {f"{name}, eager", f"{name}, compiled"} <= rows.keys() and rows[f"{name}, eager"]["over_floor"] > 0
    assert rows["1024x1024, 20 steps, eager"]["speed_up_over_plain_loop"] > 0
    assert "compute capability 8.9" in rows["fp8"]["left_out"]
    assert {name for name in rows if name.startswith("memory")} == {f"memory {n}GiB" for n in (4, 8, 12, 16, 24)}
    json.dumps(rows)


def test_the_profile_covers_the_run():
    parts = profile_generate.profile(CONFIG, (2, 3), 2, torch.float32, torch.device("cpu"), 1)
    assert parts.keys() == {"modulation", "text", "passes", "guidance and step"}
    assert all(part["seconds"] > 0 for part in parts.values())
