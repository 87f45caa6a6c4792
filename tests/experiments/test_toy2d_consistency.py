"""The two-dimensional study of consistency objectives: students start as the teacher, learn, and are measured rightly."""

import json
from pathlib import Path

import pytest
import torch

from experiments import toy2d_consistency as toy
from experiments.toy2d import Toy2d, train_base
from experiments.toy2d_world import fresh_net


def points(num: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(num, 2, generator=generator), torch.rand(num, generator=generator)
    return x, t, t * torch.rand(num, generator=generator), torch.arange(num) % 2


def test_a_second_time_changes_nothing_at_first_and_can_be_learnt() -> None:
    net = fresh_net(16, torch.Generator().manual_seed(0))
    x, t, r, prompt = points(8)
    span = toy.SpanNet(net)
    torch.testing.assert_close(span(x, t, r, prompt), net(x, t, prompt))
    span(x, t, r, prompt).sum().backward()
    assert span.span.weight.grad is not None and span.span.weight.grad.any()
    with torch.no_grad():
        span.span.weight.add_(1.0)
    assert not torch.allclose(span(x, t, r, prompt), net(x, t, prompt))
    torch.testing.assert_close(span(x, t, t, prompt), net(x, t, prompt), msg="a span of nothing is the velocity itself")


def test_a_students_step_is_its_map() -> None:
    net = fresh_net(16, torch.Generator().manual_seed(0))
    noise, _, _, prompt = points(8)
    one, zero = torch.ones(8), torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(toy.sample(net, prompt, noise, 1, generator), noise - net(noise, one, prompt))
        span = toy.SpanNet(net)
        span.span.weight.add_(0.3)
        half = noise - 0.5 * span(noise, one, one / 2, prompt)
        expected = half - 0.5 * span(half, one / 2, zero, prompt)
        torch.testing.assert_close(toy.sample(span, prompt, noise, 2, generator), expected)


@pytest.mark.slow
@pytest.mark.parametrize("arm", toy.ARMS)
def test_every_student_comes_nearer_to_the_teachers_map_in_one_step(tmp_path: Path, arm: toy.Arm) -> None:
    config = toy.ToyConsistency(out=tmp_path, width=64, steps=300, batch_size=256, warmup_steps=75, eval_points=500)
    teacher = train_base(Toy2d(seed=0, base_steps=1000, width=64))
    rows = toy.measure(teacher, {arm: toy.train_student(teacher, arm, config)}, config)
    assert rows[arm]["1"]["distance"] < rows["teacher"]["1"]["distance"]
    assert rows["teacher"]["64"]["distance"] < 1e-6


@pytest.mark.slow
def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    toy.main(toy.replace(toy.quick(), out=tmp_path, arms=("discrete_euler", "meanflow"), steps=2, eval_points=50))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["seeds"][0]) == {"teacher", "discrete_euler", "meanflow"}
    assert summary["seeds"][0]["discrete_euler"]["2"]["distance"] is None
    assert summary["seeds"][0]["meanflow"]["4"]["distance"] > 0
