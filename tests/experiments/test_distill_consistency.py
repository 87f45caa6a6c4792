"""The consistency baselines of a distillation: each loss is its definition sample by sample, and a run of each goes through."""

import json
import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import distill
from experiments.ablations import distill_consistency as study
from experiments.checkpoints import load_checkpoint
from experiments.distill_config import PRESETS, CriticConfig, DistillConfig, StudentConfig
from experiments.distill_consistency import CONSISTENCY_LOSSES, guided
from experiments.distill_consistency_config import ConsistencyConfig
from experiments.distill_score import Interval
from experiments.distill_update import Run
from experiments.runs import read_jsonl
from lensmini.nn import LensTransformer
from lensmini.parallel import Group
from lensmini.sampling import time_grid
from tests.experiments.tiny_distillation import STEPS, launch, make_teacher, tiny_distillation

METHODS = [*CONSISTENCY_LOSSES]
MU = 0.5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.getbasetemp() / "distill_consistency")


def config_of(out: Path, teacher: Path, method: str, **changes: Any) -> DistillConfig:
    config = tiny_distillation(out, teacher, method=method, student=StudentConfig(mu=MU, walk="renoise"))
    config = replace(config, adversary=replace(config.adversary, weight=0.0))
    if method != "rcm":
        config = replace(config, critic=CriticConfig(updates=0))
    return replace(config, **{"consistency": ConsistencyConfig(warmup_steps=2), **changes})


def opened(tmp_path: Path, teacher: Path, method: str, **changes: Any) -> Run:
    """A run whose student has left the teacher a little."""
    run = distill.open_run(Group(0, 1), config_of(tmp_path / "out", teacher, method, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.state.student.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return run


def samples(batch):
    """Each sample of a batch by itself: a function from packed tokens to its latents, and its velocity under a model."""
    layout = batch.layout
    words = batch.text_tokens.split(layout.text_lengths)

    def velocity(model: LensTransformer, index: int, x, t, text: bool = True):
        alone = type(layout).build(
            [tuple(layout.grids[index].tolist())], text_lengths=[layout.text_lengths[index] if text else 0]
        )
        return model.forward_packed(x, t.reshape(1), words[index] if text else words[index][:0], alone)

    return velocity


def guided_by_hand(teacher, velocity, index, x, t, scale, rescale):
    cond, uncond = (velocity(teacher, index, x, t, text) for text in (True, False))
    mixed = uncond + scale * (cond - uncond)
    return mixed * cond.norm(dim=1, keepdim=True) / mixed.norm(dim=1, keepdim=True) if rescale else mixed


def place(batch, index, num):
    """A sample's share of the way from noise to clean, and the grid of ``num`` steps."""
    share = 0.5 * (1 + torch.erf(batch.normal[index] / 2**0.5))
    return share, time_grid(num, MU)


def end_of(t, grid, ends):
    return torch.tensor(0.0) if ends == "clean" else max(x for x in grid if x < t - 1e-6)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_guided_teacher_is_its_halves_one_by_one(tmp_path: Path, teacher: Path, rescale: bool) -> None:
    run = opened(tmp_path, teacher, "consistency")
    batch, model = run.batch(0, 0)[0], run.state.teacher.model
    velocity, x, t = samples(batch), batch.noise, torch.linspace(0.9, 0.2, batch.layout.batch_size)
    together = guided(model, batch, 3.0, rescale=rescale)(x, t).split(batch.layout.image_lengths)
    pieces = x.split(batch.layout.image_lengths)
    for index, found in enumerate(together):
        with torch.no_grad():
            alone = guided_by_hand(model, velocity, index, pieces[index], t[index], 3.0, rescale)
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)
    plain = guided(model, batch, 1.0, rescale=rescale)(x, t)
    with torch.no_grad():
        torch.testing.assert_close(plain, model.forward_packed(x, t, batch.text_tokens, batch.layout))


@pytest.mark.parametrize("ends", ["clean", "segment"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_discrete_distillation_is_its_definition_sample_by_sample(
    tmp_path: Path, teacher: Path, ends: Any, solver: Any
) -> None:
    wanted = ConsistencyConfig(ends=ends, solver=solver, substeps=2, guidance=3.0, metric="squared")
    run = opened(tmp_path, teacher, "consistency", consistency=wanted)
    batch, draws = run.batch(0, 0)
    found = CONSISTENCY_LOSSES["consistency"](run.state, batch, draws, run.config)
    velocity, student = samples(batch), run.state.student.compute
    parts = [tokens.split(batch.layout.image_lengths) for tokens in (batch.image_tokens, draws.real)]
    for index, (clean, noise) in enumerate(zip(*parts, strict=True)):
        share, grid = place(batch, index, 8)
        t, t_next = grid[int(share * 8)], grid[int(share * 8) + 1]
        end = end_of(t, time_grid(4, MU), ends)

        def field(x, t, index=index):
            return guided_by_hand(run.state.teacher.model, velocity, index, x, t, 3.0, True)

        with torch.no_grad():
            x = (1 - t) * clean + t * noise
            there = x + (t_next - t) * field(x, t)
            if solver == "heun":
                there = x + (t_next - t) * (field(x, t) + field(there, t_next)) / 2
            goal = there + (end - t_next) * velocity(student, index, there, t_next)
            mine = x + (end - t) * velocity(student, index, x, t)
        assert found.total[index].item() == pytest.approx((mine - goal).square().mean().item(), rel=2e-3)


@pytest.mark.parametrize("ends", ["clean", "segment"])
def test_meanflow_is_its_definition_sample_by_sample(tmp_path: Path, teacher: Path, ends: Any) -> None:
    wanted = ConsistencyConfig(ends=ends, guidance=3.0, warmup_steps=2, power=0.5)
    run = opened(tmp_path, teacher, "meanflow", consistency=wanted)
    run.state.student.step = 1  # half of the warm-up
    batch, draws = run.batch(0, 0)
    found = CONSISTENCY_LOSSES["meanflow"](run.state, batch, draws, run.config)
    velocity, student = samples(batch), run.state.student.compute.double()
    double = batch._replace(text_tokens=batch.text_tokens.double())
    exact = samples(double)
    parts = [tokens.split(batch.layout.image_lengths) for tokens in (batch.image_tokens, draws.real)]
    for index, (clean, noise) in enumerate(zip(*parts, strict=True)):
        share = place(batch, index, 1)[0].double()
        t = torch.sigmoid(MU + torch.logit(1 - share))
        end = end_of(t, time_grid(4, MU).double(), ends)
        with torch.no_grad():
            x = (1 - t) * clean.double() + t * noise.double()
            v = guided_by_hand(run.state.teacher.model, velocity, index, x.float(), t.float(), 3.0, True).double()
            h = 1e-6
            ahead, behind = (exact(student, index, x + s * h * v, t + s * h) for s in (1, -1))
            mine = exact(student, index, x, t)
            gap = (mine - v + 0.5 * (t - end) * (ahead - behind) / (2 * h)).square().mean().item()
        assert found.parts["meanflow"][index].item() == pytest.approx(gap, rel=0.02)
        assert found.total[index].item() == pytest.approx(gap / (gap + 1e-3) ** 0.5, rel=0.02)


def test_finite_differences_agree_with_forward_mode(tmp_path: Path, teacher: Path) -> None:
    losses = {}
    for derivative in ("forward", "central", "semi"):
        step = None if derivative == "forward" else 2**-14
        wanted = ConsistencyConfig(derivative=derivative, derivative_step=step, warmup_steps=0, regulariser=0.0)
        for method in ("meanflow", "rcm"):
            run = opened(tmp_path / derivative / method, teacher, method, consistency=wanted)
            batch, draws = run.batch(0, 0)
            losses[method, derivative] = CONSISTENCY_LOSSES[method](run.state, batch, draws, run.config)
    for method, part in (("meanflow", "slope"), ("rcm", "tangent")):
        exact = losses[method, "forward"].parts[part]
        for derivative in ("central", "semi"):
            torch.testing.assert_close(losses[method, derivative].parts[part], exact, rtol=0.2, atol=0.02)  # of float32


def test_the_teacher_itself_is_not_a_fixed_point_but_its_own_map_is_close(tmp_path: Path, teacher: Path) -> None:
    # As the time span goes to nothing, the mean velocity is the velocity: an unguided teacher's own loss vanishes.
    wanted = ConsistencyConfig(guidance=1.0, ends="segment", warmup_steps=10)
    run = distill.open_run(Group(0, 1), config_of(tmp_path / "out", teacher, "meanflow", consistency=wanted))
    batch, draws = run.batch(0, 0)
    found = CONSISTENCY_LOSSES["meanflow"](run.state, batch, draws, run.config)
    assert found.parts["meanflow"].max() < 1e-10, "before the warm-up the student learns the teacher's velocity"
    run.state.student.step = 10
    assert CONSISTENCY_LOSSES["meanflow"](run.state, batch, draws, run.config).parts["meanflow"].min() > 1e-6


def test_rcm_adds_distribution_matching(tmp_path: Path, teacher: Path) -> None:
    wanted = ConsistencyConfig(regulariser=0.0)
    alone = opened(tmp_path / "alone", teacher, "rcm", consistency=wanted)
    both = opened(tmp_path / "both", teacher, "rcm", consistency=replace(wanted, regulariser=2.0))
    batch, draws = alone.batch(0, 0)
    plain = CONSISTENCY_LOSSES["rcm"](alone.state, batch, draws, alone.config)
    summed = CONSISTENCY_LOSSES["rcm"](both.state, batch, draws, both.config)
    assert "dm" not in plain.parts and {"dm", "ca", "consistency", "tangent"} <= summed.parts.keys()
    extra = 2.0 * 0.1 * (summed.parts["dm"] + summed.parts["ca"])
    torch.testing.assert_close(summed.total, plain.total + extra)
    assert plain.total.max() <= 1, "a tangent that is bounded"


@pytest.mark.parametrize("method", [m if m != "rcm" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_run_of_each_trains(tmp_path: Path, teacher: Path, method: str) -> None:
    launch(run_config(tmp_path / "whole", teacher, method))
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)] and all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_ends_as_one_that_never_was(tmp_path: Path, teacher: Path, method: str) -> None:
    config = run_config(tmp_path / "whole", teacher, method)
    launch(config)
    killed = replace(config, run=replace(config.run, out=tmp_path / "killed"))
    process = multiprocessing.get_context("fork").Process(target=launch, args=(killed, "student", 4))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    launch(killed)
    ends = [
        load_checkpoint(tmp_path / name / f"step-{STEPS:06d}", "ema", quiet=True)[0] for name in ("whole", "killed")
    ]
    for name, tensor in ends[0].state_dict().items():
        assert torch.equal(tensor, ends[1].state_dict()[name]), name


def run_config(out: Path, teacher: Path, method: str) -> DistillConfig:
    segment = {"consistency": ConsistencyConfig(ends="segment", warmup_steps=2), "student": StudentConfig(mu=MU)}
    return config_of(out, teacher, method, **(segment if method == "meanflow" else {}))


@pytest.mark.slow
def test_the_study_trains_what_is_missing_and_compares_with_the_same_sampler_before(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {
        "consistency": lambda: config_of(tmp_path, teacher, "consistency"),
        "meanflow": lambda: run_config(tmp_path, teacher, "meanflow"),
    }
    monkeypatch.setattr(study, "ARMS", arms)
    # A teacher with random weights gets nothing right, and a ratio to nothing is refused.
    monkeypatch.setattr(study, "paired_ratio", lambda student, teacher: Interval(0.5, 0.4, 0.6))
    asked = study.ConsistencyStudy(out=tmp_path, teacher=teacher, arms=("meanflow",), seeds=(0, 1), num_prompts=1)
    study.main(asked)
    result = json.loads((tmp_path / "distill_consistency.json").read_text())
    assert set(result["arms"]) == {"meanflow"} and set(result["arms"]["meanflow"]["seeds"]) == {"0", "1"}
    assert result["arms"]["meanflow"]["steps"] == [STEPS, STEPS] and len(result["teacher"]) == 4
    first = (tmp_path / "meanflow-0" / "summary.json").stat().st_mtime_ns
    study.main(replace(asked, arms=("consistency", "meanflow"), seeds=(0,)))
    result = json.loads((tmp_path / "distill_consistency.json").read_text())
    assert set(result["arms"]) == set(arms) and (tmp_path / "meanflow-0" / "summary.json").stat().st_mtime_ns == first


def test_presets() -> None:
    found = {preset.__name__: preset() for preset in PRESETS}
    for method in METHODS:
        config = found[f"{method}_mini"]
        assert config.method == method and (config.critic.updates > 0) == (method == "rcm")
        assert (config.student.walk == "euler") == (config.consistency.ends == "segment")


@pytest.mark.parametrize(
    "changes",
    [
        {"ends": "noise"},
        {"solver": "dpm2"},
        {"normaliser": "l1"},
        {"derivative": "backward"},
        {"derivative": "central"},
        {"derivative_step": 0.1},
        {"substeps": 0},
        {"c": 0.0},
        {"tangent_c": 0.0},
        {"warmup_steps": -1},
        {"regulariser": -1.0},
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ConsistencyConfig(**changes)
