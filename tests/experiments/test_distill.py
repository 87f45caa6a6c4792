"""A distillation does what its settings say, and one that is killed anywhere ends as one that never was."""

import json
import math
import multiprocessing
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import read_image

from experiments import distill
from experiments.checkpoints import load_checkpoint
from experiments.distill_config import (
    PRESETS,
    AdversaryConfig,
    CriticConfig,
    DistillConfig,
    MatchingConfig,
    ScoreSettings,
    StudentConfig,
    Walk,
    lens,
)
from experiments.distill_objectives import critic_losses, dmd_loss, simulate, warm_loss
from experiments.distill_score import Sampler, Suite, build_suite, paint_suite, paired_ratio
from experiments.distill_state import Teacher
from experiments.distill_update import Run
from experiments.engine import EngineConfig
from experiments.generate import generate
from experiments.generate_config import GenerateConfig
from experiments.guards import GuardConfig, RunawayError
from experiments.pretrain_data import encode_texts
from experiments.runs import RunConfig, read_jsonl
from experiments.training import SettingsError
from lensmini.checkpoints.lora import LoRA, save_lora
from lensmini.parallel import Group
from tests.experiments.tiny_distillation import PLACES, STEPS, launch, make_teacher, tiny_distillation

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.getbasetemp() / "distill")


@pytest.fixture(scope="module")
def root(teacher: Path) -> Path:
    return teacher.parent.parent


@pytest.fixture(scope="module")
def whole(root: Path, teacher: Path) -> Path:
    """A run that nobody disturbs."""
    launch(tiny_distillation(root / "whole", teacher))
    return root / "whole"


def opened(root: Path, teacher: Path, name: str, **changes: Any) -> Run:
    config = tiny_distillation(root / name, teacher, **changes)
    return distill.open_run(Group(0, 1), config)


def contents(out: Path) -> dict[str, bytes]:
    """What a run is compared by: metrics, and every tensor of the last checkpoint of every network."""
    last = [out / f"step-{STEPS:06d}", out / "student" / f"step-{STEPS:06d}", out / "fake" / f"step-{2 * STEPS:06d}"]
    files = [out / "metrics.jsonl", *(file for path in last for file in sorted(path.glob("*.safetensors")))]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def kill_and_go_on(config: DistillConfig, place: str, count: int) -> None:
    process = CONTEXT.Process(target=launch, args=(config, place, count))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    launch(config)


class TestRun:
    def test_it_leaves_what_it_promises(self, whole: Path) -> None:
        rows = read_jsonl(whole / "metrics.jsonl")
        assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
        assert {"loss", "fake", "discriminator", "r1", "dm", "ca", "generator", "grad_norm"} <= rows[0].keys()
        assert sorted(path.name for path in whole.glob("step-*")) == ["step-000004", "step-000006"]
        summary = json.loads((whole / "summary.json").read_text())
        assert summary["step"] == STEPS and summary["skipped"] == 0
        assert len(contents(whole)) == 11

    @pytest.mark.parametrize("place", [pytest.param(p, marks=[pytest.mark.slow] * (p == "name")) for p in PLACES])
    def test_a_kill_anywhere_leaves_no_trace(self, root: Path, teacher: Path, whole: Path, place: str) -> None:
        out = root / f"killed at {place}"
        kill_and_go_on(tiny_distillation(out, teacher), place, {"critic": 7, "student": 4}.get(place, 2))
        expected, found = contents(whole), contents(out)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []

    @pytest.mark.slow
    def test_two_processes_compute_what_one_does(self, root: Path, teacher: Path, whole: Path) -> None:
        config = tiny_distillation(root / "two", teacher)
        distill.main(replace(config, run=replace(config.run, processes=2)))
        for name in ("step-000006/model.safetensors", "step-000006/head.safetensors"):
            ours, theirs = load_file(root / "two" / name), load_file(whole / name)
            for key, tensor in theirs.items():
                torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_sharded_ranks_compute_what_one_process_does_and_go_on(self, root: Path, teacher: Path) -> None:
        student = StudentConfig(mu=0.5, stop="update", walk="renoise")
        launch(tiny_distillation(root / "alone", teacher, student=student))
        sharded = tiny_distillation(root / "sharded", teacher, student=student)
        engine, run = EngineConfig(sharding="full", recompute="full"), replace(sharded.run, processes=2)
        sharded = replace(sharded, engine=engine, run=run)
        expected = read_jsonl(root / "alone" / "metrics.jsonl")
        for _ in range(2):
            distill.main(sharded)
            found = read_jsonl(root / "sharded" / "metrics.jsonl")
            assert [row["step"] for row in found] == [*range(1, STEPS + 1)]
            for ours, theirs in zip(found, expected, strict=True):
                for name in ("loss", "fake", "discriminator", "dm", "ca"):
                    assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), (ours["step"], name)
            # Without its last checkpoint the run goes on from the one before.
            shutil.rmtree(root / "sharded" / f"step-{STEPS:06d}", ignore_errors=True)

    def test_other_settings_are_refused(self, teacher: Path, whole: Path) -> None:
        for change in ({"critic": CriticConfig(updates=3, lr=1e-3)}, {"matching": MatchingConfig(guidance=4.0)}):
            with pytest.raises(SettingsError, match="other settings"):
                launch(tiny_distillation(whole, teacher, **change))

    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets_describe_themselves(self, teacher: Path, preset, capsys: pytest.CaptureFixture[str]) -> None:
        config = preset()
        distill.main(replace(config, dry_run=True, **({} if preset is lens else {"teacher": teacher})))
        told = capsys.readouterr().out
        assert "student, fake score and teacher" in told and "FLOPs per step" in told

    def test_lens_is_the_papers(self) -> None:
        config = lens()
        assert (config.optim.lr, config.critic.lr, config.adversary.lr) == (5e-7, 5e-7, 1e-4)
        assert config.optim.betas == (0.0, 0.9) and config.critic.updates == 4 and config.critic.ida == 0.03
        assert (config.matching.weight, config.adversary.weight, config.matching.guidance) == (0.1, 0.001, 5.0)
        assert (config.adversary.gamma, config.adversary.alpha, config.student.num_steps) == (1.0, 0.1, 4)
        assert config.run.steps == 1000 and config.data.num_slots * 4 == 32

    @pytest.mark.parametrize(
        "wrong",
        [
            {"guard": GuardConfig(policy="restore")},
            {"run": RunConfig(keep_checkpoints=1)},
            {"run": RunConfig(processes=3)},
            {"warm_start": 10_000},
            {"engine": EngineConfig(sharding="full")},
        ],
    )
    def test_settings_that_do_not_go_together_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected"):
            tiny_distillation(Path("x"), Path("y"), **wrong)


class TestNetworks:
    def test_student_and_fake_score_start_as_the_teacher(self, root: Path, teacher: Path) -> None:
        run = opened(root, teacher, "start")
        assert run.state.fake is not None
        for name, tensor in load_file(teacher / "ema.safetensors").items():
            for model in (run.state.student.model, run.state.fake.model, run.state.teacher.model):
                assert torch.equal(model.state_dict()[name], tensor)

    def test_an_adapter_of_reinforcement_learning_is_merged_first(self, root: Path, teacher: Path) -> None:
        layer = "transformer_blocks.0.attn.to_out.0"
        down, up = torch.ones(2, 32), torch.full((32, 2), 0.01)
        save_lora(LoRA({layer: (down, up, 2.0)}), root / "adapter.safetensors")
        run = opened(root, teacher, "adapted", lora=root / "adapter.safetensors", lora_scale=0.5)
        before = load_file(teacher / "ema.safetensors")[f"{layer}.weight"]
        for model in (run.state.student.model, run.state.teacher.model):
            torch.testing.assert_close(model.state_dict()[f"{layer}.weight"], before + 0.5 * 0.02)

    def test_the_order_of_a_step_is_critic_student_then_alignment(self, root: Path, teacher: Path, monkeypatch) -> None:
        calls: list[str] = []
        for name in ("update_critic", "update_student"):
            function = getattr(distill.DistillState, name)
            monkeypatch.setattr(
                distill.DistillState, name, lambda self, f=function, n=name: (calls.append(n), f(self))[1]
            )
        config = tiny_distillation(root / "order", teacher)
        launch(replace(config, run=replace(config.run, steps=2)))
        assert calls == ["update_critic", "update_critic", "update_student"] * 2

    def test_alignment_moves_the_fake_score_by_mu_towards_the_new_student(self, root: Path, teacher: Path) -> None:
        run = opened(root, teacher, "ida", critic=CriticConfig(updates=1, lr=1e-3, ida=0.25))
        batch, draws = run.batch(0, 0)
        state = run.state
        dmd_loss(state, batch, draws, run.config).total.sum().backward()
        state.student.accumulate()
        state.student.collect(run.group, [])
        assert state.fake is not None
        before = {name: p.detach().clone() for name, p in state.fake.model.named_parameters()}
        state.update_student()
        for name, new in state.student.model.named_parameters():
            got = dict(state.fake.model.named_parameters())[name]
            torch.testing.assert_close(got, 0.75 * before[name] + 0.25 * new)
        assert any(not torch.equal(before[name], p) for name, p in state.fake.model.named_parameters())

    def test_nothing_of_the_teacher_is_ever_trained(self, teacher: Path, whole: Path) -> None:
        run = json.loads((whole / "step-000006" / "run.json").read_text())
        config = tiny_distillation(whole, teacher)
        assert run["config"]["teacher"] == teacher.as_posix()
        fresh = Teacher(config, torch.device("cpu"))
        assert not any(parameter.requires_grad for parameter in fresh.model.parameters())
        student = load_file(whole / "step-000006" / "model.safetensors")
        for name, tensor in load_file(teacher / "ema.safetensors").items():
            assert torch.equal(fresh.model.state_dict()[name], tensor)
            if name in ("proj_out.weight", "img_in.weight"):
                assert not torch.equal(student[name], tensor)


class TestLosses:
    def test_gradients_reach_the_network_that_is_trained_and_no_other(self, root: Path, teacher: Path) -> None:
        run = opened(root, teacher, "gradients")
        state, (batch, draws) = run.state, run.batch(0, 0)
        assert state.fake is not None and state.head is not None

        def touched(module: torch.nn.Module) -> bool:
            found = any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            for parameter in module.parameters():
                parameter.grad = None
            return found

        modules = [state.student.compute, state.fake.compute, state.teacher.model, state.head]
        critic_losses(state, batch, draws, run.config).total.sum().backward()
        assert [touched(module) for module in modules] == [False, True, False, True]
        dmd_loss(state, batch, draws, run.config).total.sum().backward()
        assert [touched(module) for module in modules] == [True, False, False, False]

    def test_the_student_is_asked_where_its_sampler_goes(self, root: Path, teacher: Path) -> None:
        run = opened(root, teacher, "walk")
        batch, draws = run.batch(0, 0)
        step = simulate(run.state, batch, draws._replace(stop=torch.tensor([0.99, 0.0])), run.config)
        # Three of four equal steps left is s = 1/4, shifted by mu = 0.5; the second sample stands at the beginning.
        last = math.exp(0.5) / (math.exp(0.5) + 4 - 1)
        assert step.t.tolist() == pytest.approx([last, 1.0])
        assert torch.equal(
            step.noisy.split(batch.layout.image_lengths)[1], batch.noise.split(batch.layout.image_lengths)[1]
        )

    @pytest.mark.parametrize("part", ["matching", "augmentation", "adversary"])
    def test_each_part_can_be_left_out(self, root: Path, teacher: Path, part: str) -> None:
        changes: dict[str, Any] = {"adversary": AdversaryConfig(weight=0.0)}
        if part != "adversary":
            changes = {"matching": MatchingConfig(guidance=3.0, **{part: False})}
        run, full = (opened(root, teacher, f"without {part} {i}", **c) for i, c in enumerate((changes, {})))
        batch, draws = run.batch(0, 0)
        losses, whole = dmd_loss(run.state, batch, draws, run.config), dmd_loss(full.state, batch, draws, full.config)
        left = {"matching": ("dm", 0.1), "augmentation": ("ca", 0.1), "adversary": ("generator", 0.1)}[part]
        torch.testing.assert_close(whole.total - losses.total, left[1] * whole.parts[left[0]], rtol=1e-3, atol=1e-5)

    def test_a_warm_start_has_learnt_all_where_the_teacher_walks_straight(self, root: Path, teacher: Path) -> None:
        # A velocity that knows no state and no time is its own mean over any step; guidance of equal halves changes nothing.
        run = opened(root, teacher, "straight", student=StudentConfig(mu=0.5, stop="sample"))
        batch, draws = run.batch(0, 0)
        constant = torch.linspace(-1, 1, batch.noise.shape[1])

        def forward_packed(x, t, text, layout):
            return constant.expand_as(x)

        straight = SimpleNamespace(forward_packed=forward_packed)
        state: Any = SimpleNamespace(student=SimpleNamespace(compute=straight), teacher=SimpleNamespace(model=straight))
        for shares in (draws.stop, torch.tensor([0.0, 0.99])):
            loss = warm_loss(state, batch, draws._replace(stop=shares), run.config).total
            torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-10)
        other = SimpleNamespace(forward_packed=lambda x, t, text, layout: constant.expand_as(x) + 0.5)
        state.student = SimpleNamespace(compute=other)
        loss = warm_loss(state, batch, draws, run.config).total
        torch.testing.assert_close(loss, torch.full_like(loss, 0.25))

    def test_random_numbers_belong_to_the_picture_and_the_update(self, root: Path, teacher: Path) -> None:
        run = opened(root, teacher, "numbers")
        batch, draws = run.batch(4, 1)
        again, same = run.batch(4, 1)
        assert batch.pictures == again.pictures and torch.equal(draws.matching, same.matching)
        for other in (run.batch(5, 1), run.batch(4, 0)):
            assert not torch.equal(other[1].levels, draws.levels)
        tensors = [draws.matching, draws.augmentation, draws.real, draws.perturbation, batch.noise, *draws.walk]
        assert all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])

    @pytest.mark.parametrize("policy", ["stop", "skip"])
    def test_divergence_is_caught_and_reported(self, root: Path, teacher: Path, policy, monkeypatch) -> None:
        out = root / f"diverged {policy}"
        config = tiny_distillation(out, teacher, guard=GuardConfig(policy=policy, patience=10))
        original = distill.STUDENT_LOSSES["dmd"]

        def broken(state, batch, draws, config):
            if state.step == 2:
                with torch.no_grad():
                    next(state.fake.compute.parameters()).fill_(torch.nan)
            losses = original(state, batch, draws, config)
            if state.step == 2:
                with torch.no_grad():
                    state.fake.compute.load_state_dict(state.teacher.weights)
            return losses

        monkeypatch.setitem(distill.STUDENT_LOSSES, "dmd", broken)
        if policy == "stop":
            with pytest.raises(RunawayError, match="step 3, broken: loss nan"):
                launch(config)
        else:
            launch(config)
            assert json.loads((out / "summary.json").read_text())["skipped"] == 1
        (event,) = read_jsonl(out / "events.jsonl")
        assert event["step"] == 3 and event["cause"] == "loss nan" and "dm" in event


class TestTurbo:
    def test_generate_paints_with_the_students_own_settings(self, root: Path, teacher: Path) -> None:
        config = tiny_distillation(root / "euler", teacher, student=StudentConfig(mu=0.5, num_steps=3))
        launch(replace(config, run=replace(config.run, steps=2)))
        options = {"texts": ("a red circle",), "checkpoint": root / "euler", "height": 16, "width": 16}
        (row,) = generate(GenerateConfig(**options, out=root / "pictures"))
        assert (row["num_steps"], row["guidance_scale"], row["mu"]) == (3, 1.0, 0.5)
        (row,) = generate(GenerateConfig(**{**options, "checkpoint": teacher}, out=root / "others"))
        assert (row["num_steps"], row["guidance_scale"], row["mu"]) == (12, 4.0, 1.8)

    def test_generate_walks_a_student_of_fresh_noise_as_it_was_trained(self, root: Path, whole: Path) -> None:
        options = {"texts": ("a red circle", "a blue square"), "checkpoint": whole, "height": 16, "width": 24}
        rows = generate(GenerateConfig(**options, out=root / "fresh", seed=5))
        model, world = load_checkpoint(whole / "step-000006", quiet=True)
        suite = Suite([], [(16, 24)] * 2, encode_texts([row["prompt"] for row in rows], world, quiet=True))
        seeds = [row["seed"] for row in rows]
        how = {"num_steps": rows[0]["num_steps"], "mu": rows[0]["mu"]}
        walked = {walk: paint_suite(model, world, suite, Sampler(walk=walk, **how), seeds) for walk in get_args(Walk)}
        painted = [read_image(str(root / "fresh" / row["file"])) for row in rows]
        for index, picture in enumerate(painted):
            assert (picture.int() - walked["renoise"][index].int()).abs().max() <= 1
            assert not torch.equal(picture, walked["euler"][index])
        with pytest.raises(ValueError, match="guidance_scale: expected 1 for the few-step"):
            generate(GenerateConfig(**options, guidance_scale=3.0, out=root / "no"))

    @pytest.mark.parametrize("walk", ["euler", "renoise"])
    def test_a_picture_depends_on_its_seed_alone(self, teacher: Path, whole: Path, walk) -> None:
        config = replace(tiny_distillation(whole, teacher), score=ScoreSettings(num_prompts=6))
        model, world = load_checkpoint(whole / "step-000006", quiet=True)
        suite = build_suite(config.score, config.data, world)  # pyright: ignore
        sampler = Sampler(num_steps=3, mu=0.5, walk=walk)
        one, other = (paint_suite(model, world, suite, sampler, range(6), chunk=chunk) for chunk in (6, 1))
        for a, b in zip(one, other, strict=True):
            assert (a.int() - b.int()).abs().max() <= 1

    def test_the_score_compares_student_and_teacher(self, root: Path, teacher: Path) -> None:
        score = ScoreSettings(num_prompts=12, teacher_steps=1, teacher_guidance=2.0, samples=2)
        config = tiny_distillation(root / "scored", teacher, score=score, student=StudentConfig(num_steps=1, mu=0.5))
        launch(replace(config, run=replace(config.run, steps=2)))
        summary = json.loads((root / "scored" / "summary.json").read_text())
        assert ("ratio" in summary) == (summary["teacher"]["strict"] > 0)
        assert len(summary["student"]["right"]) == len(summary["teacher"]["right"]) == 12
        assert (summary["student"]["calls"], summary["teacher"]["calls"]) == (1, 2)
        assert (root / "scored" / "samples.png").exists()


class TestRatio:
    def test_it_is_the_ratio_of_means_with_an_interval_around(self) -> None:
        ratio = paired_ratio(["1100" * 25, "1000" * 25], "1110" * 25)
        assert ratio.value == pytest.approx(0.375 / 0.75) and ratio.low < ratio.value < ratio.high

    def test_pairing_takes_the_prompts_difficulty_out(self) -> None:
        teacher = "01" * 200
        same = paired_ratio([teacher], teacher)
        shifted = paired_ratio([teacher[1:] + teacher[:1]], teacher)
        assert same == (1.0, 1.0, 1.0) and shifted.high - shifted.low > 0.2

    def test_its_width_is_that_of_the_delta_method(self) -> None:
        generator = torch.Generator().manual_seed(0)
        hard = torch.rand(2000, generator=generator)
        teacher, student = ((torch.rand(2000, generator=generator) < s * hard).double() for s in (0.9, 0.8))
        t, s = teacher.mean(), student.mean()
        spread = (student - s / t * teacher).std() / t / 2000**0.5
        got = paired_ratio(["".join(str(int(v)) for v in student)], "".join(str(int(v)) for v in teacher))
        assert got.high - got.low == pytest.approx(2 * 1.96 * spread.item(), rel=0.05)
