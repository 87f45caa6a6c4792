import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments import estimate_rl, reinforce
from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.generate import read_config
from experiments.reinforce_config import PRESETS, RolloutConfig, lens, mini
from experiments.reinforce_rewards import CachedJudge, Judging, load_tasks
from experiments.reinforce_rollout import encode_prompt, my_chunks, roll_out, seed_of, step_samples, window_of
from experiments.reinforce_state import Policies, find_base
from experiments.reinforce_update import Moments, accumulate_chunk, chosen_times, surrogate_losses, velocity_losses
from experiments.runs import latest_checkpoint, read_jsonl
from lensmini.packed import Layout
from lensmini.parallel import Group, run_processes
from lensmini.paths import interpolate
from lensmini.rewards.judges import JudgeUnavailableError, ScriptedJudge, VerdictCache
from tests.experiments.tiny_reinforce import PLACES, prepare, tiny_config, train, verdict

ONE = Group(0, 1)
JUDGE = ScriptedJudge(verdict)
OBJECTIVES = [{"name": "nft"}, {"name": "nft", "weight": "none"}, {"name": "awm"}] + [
    {"name": "grpo", "kernel": kernel, "window": 2, "updates": 1} for kernel in ("ddim", "flow", "dance", "cps")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reinforce")
    prepare(folder)
    return folder


def run(config, judge=JUDGE) -> tuple[dict, list[dict]]:
    """Weights at the end by file, and the rows of the metrics."""
    reinforce.train(ONE, config, judge)
    return result(config.run.out)


def result(out: Path) -> tuple[dict, list[dict]]:
    path, _ = latest_checkpoint(out)
    tensors = {
        f"{name}/{key}": tensor
        for name in ("model", "ema", "old", "optimizer")
        for key, tensor in load_file(path / f"{name}.safetensors").items()
    }
    return tensors, read_jsonl(out / "metrics.jsonl")


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


def opened(root, **changes):
    """Policies, encoders, tasks and one chunk of pictures, before anything was trained."""
    changes["rollout"] = {"num_steps": 4, "chunk": 6, **changes.get("rollout", {})}
    config = tiny_config(root, "opened", **changes)
    base = find_base(config.base)
    sizes, world = reinforce.open_world(config, base)
    policies, tasks = Policies(config, ONE, sizes, base), load_tasks(config.prompts)
    samples = step_samples(config.rollout, len(tasks), 0, config.run.seed)
    texts = [encode_prompt(world, tasks[sample.prompt].text) for sample in samples]
    place = {"downsample": world.autoencoder.downsample, "step": 0, "device": policies.device}

    def sample(chosen):
        return roll_out(policies.model, [samples[i] for i in chosen], [texts[i] for i in chosen], config, **place)

    return config, policies, sample


def gradient(policies) -> torch.Tensor:
    policies.state.collect(ONE, [0.0])
    return policies.state.flat[: -policies.state.NUM_EXTRA].clone()


def test_a_finished_run_is_a_checkpoint_like_any_other_with_the_encoders_of_its_base(root):
    config = tiny_config(root, "loaded", run={"steps": 1})
    reinforce.main(config)
    found = find_checkpoint(config.run.out)
    model, world = load_checkpoint(found, quiet=True)
    base_model, base_world = load_checkpoint(find_checkpoint(config.base), quiet=True)
    written, started = load_file(found / "ema.safetensors"), base_model.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, started[name]) for name, tensor in written.items())
    assert world.key == base_world.key and all(world.reused.values())


@pytest.mark.parametrize("prompts", [1, 5, 7, 20])
def test_every_prompt_comes_once_before_any_comes_again_and_shapes_are_dealt_evenly(prompts):
    rollout = RolloutConfig(groups=4, group_size=5, canvases=((8, 8), (4, 16), (16, 4)))
    steps = [step_samples(rollout, prompts, step, 9) for step in range(15)]
    everything = [sample for step in steps for sample in step]
    assert [sample.number for sample in everything] == list(range(300))
    groups = {sample.group: sample.prompt for sample in everything}
    order = [groups[group] for group in range(60)]
    for epoch in range(60 // prompts):
        assert sorted(order[epoch * prompts : (epoch + 1) * prompts]) == list(range(prompts))
    counts = [sum(sample.canvas == canvas for sample in everything) for canvas in rollout.canvases]
    assert counts == [100, 100, 100]
    for group in range(60):
        members = [sample for sample in everything if sample.group == group]
        assert len(members) == 5 and len({sample.prompt for sample in members}) == 1
        assert len({sample.canvas for sample in members}) == 3


def test_shapes_of_a_group_in_equal_parts():
    rollout = RolloutConfig(
        groups=5, group_size=6, canvases=((8, 8), (4, 16), (16, 4), (6, 10), (10, 6)), shapes_per_group=2
    )
    samples = step_samples(rollout, 9, 1, 0)
    for group in range(5, 10):
        shapes = [sample.canvas for sample in samples if sample.group == group]
        assert len(set(shapes)) == 2 and all(shapes.count(shape) == 3 for shape in shapes)
    assert {sum(s.canvas == canvas for s in samples) for canvas in rollout.canvases} == {6}


def test_pictures_of_a_group_share_their_training_noise_if_so_asked(root):
    for shared in (False, True):
        config, policies, sample = opened(
            root, objective={"name": "nft", "shared_noise": shared}, rollout={"canvases": ((32, 32),)}
        )
        rollout, known = sample(range(6)), torch.ones(6, dtype=torch.bool)
        # Equal pictures: with equal noise their losses are equal, for equal advantages.
        rollout.latents.copy_(rollout.latents[:64].repeat(6, 1))
        losses = velocity_losses(policies, rollout, torch.full((6,), 1), torch.ones(6), known, config, Moments())
        groups = [[losses[i].item() for i, s in enumerate(rollout.samples) if s.group == g] for g in (0, 1)]
        for values in groups:
            assert len(values) == 3 and (max(values) - min(values) < 1e-4) == shared
        times = {(s.group, tuple(chosen_times(config, s, u)[0] for u in (0, 1))) for s in rollout.samples}
        assert not shared or len(times) == 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_have_whole_chunks_that_do_not_depend_on_their_number(world):
    samples = step_samples(RolloutConfig(groups=3, group_size=4, canvases=((8, 8),)), 9, 2, 0)
    parts = [my_chunks(samples, 5, Group(rank, world)) for rank in range(world)]
    assert [chunk for part in parts for chunk in part] == my_chunks(samples, 5, ONE)
    assert [sample for part in parts for chunk in part for sample in chunk] == samples


def test_updates_see_different_times_as_long_as_there_are_some():
    config = replace(
        mini(), rollout=replace(mini().rollout, num_steps=4), objective=replace(mini().objective, places=None)
    )
    for sample in step_samples(config.rollout, 9, 3, 0):
        times = [chosen_times(config, sample, update) for update in range(4)]
        assert sorted(t for row in times for t in row) == [0, 1, 2, 3]
    everything = replace(config, objective=replace(config.objective, times=0))
    assert chosen_times(everything, sample, 1) == [0, 1, 2, 3]
    some = replace(config, objective=replace(config.objective, places=(1, 3)))
    assert sorted(chosen_times(some, sample, update)[0] for update in range(2)) == [1, 2]


def test_stochastic_steps_stay_among_those_that_are_trained_on_and_have_noise():
    config = replace(mini(), rollout=replace(mini().rollout, num_steps=8))
    some = replace(config, objective=replace(mini().objective, name="grpo", dwell=2, places=(4, 8)))
    assert [window_of(some, step) for step in range(0, 6, 2)] == [range(4, 6), range(5, 7), range(4, 6)]
    everywhere = replace(config, objective=replace(some.objective, places=None, window=4))
    assert window_of(everywhere, 0) == range(4) and window_of(everywhere, 6) == range(3, 7)


def test_a_picture_depends_on_its_number_and_not_on_what_is_sampled_beside_it(root):
    for objective in ({"name": "nft"}, {"name": "grpo", "window": 2, "updates": 1}):
        _, _, sample = opened(root, objective=objective)
        whole, alone = sample(range(6)), sample([3])
        first = whole.layout.image_offsets[3]
        part = whole.latents[first : whole.layout.image_offsets[4]]
        torch.testing.assert_close(part, alone.latents, rtol=1e-4, atol=1e-5)
        assert whole.latents.isfinite().all() and whole.latents.std() > 0.1
        same = [i for i, one in enumerate(whole.samples) if one[1:] == whole.samples[1][1:]]
        pieces = whole.latents.split(whole.layout.image_lengths)
        assert len(same) > 1 and not torch.equal(pieces[same[0]], pieces[same[1]]), "members of a group differ"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_masked_pictures_count_as_if_they_were_not_there(root, objective):
    config, policies, sample = opened(root, objective=objective)
    advantage = torch.tensor([0.7, -1.2, 0.4, -0.3, 1.1, 0.2])
    known = torch.tensor([True, False, True, True, False, True])
    whole = sample(range(6))
    with torch.no_grad():  # a policy that is not the one that sampled, and garbage where nothing is known
        for parameter in policies.model.parameters():
            parameter.add_(1e-3 * torch.ones_like(parameter))
    broken = torch.where(known, advantage, torch.nan)
    first, last = whole.layout.image_offsets[1], whole.layout.image_offsets[2]
    if objective["name"] != "grpo":
        whole.latents[first:last] = 7.0
    accumulate_chunk(policies, whole, broken, known, config, update=1 if not whole.steps else 0, share=0.25) if (
        not whole.steps
    ) else _accumulate_surrogate(policies, whole, broken, known, config)
    masked = gradient(policies)
    kept = known.nonzero()[:, 0].tolist()
    with torch.no_grad():
        for parameter in policies.model.parameters():
            parameter.sub_(1e-3 * torch.ones_like(parameter))
    subset = sample(kept)
    with torch.no_grad():
        for parameter in policies.model.parameters():
            parameter.add_(1e-3 * torch.ones_like(parameter))
    all_known = torch.ones(4, dtype=torch.bool)
    if whole.steps:
        _accumulate_surrogate(policies, subset, advantage[kept], all_known, config)
    else:
        accumulate_chunk(policies, subset, advantage[kept], all_known, config, update=1, share=0.25)
    alone = gradient(policies)
    assert masked.isfinite().all() and alone.abs().max() > 1e-4
    torch.testing.assert_close(masked, alone, rtol=2e-3, atol=2e-4 * float(alone.abs().max()))


def _accumulate_surrogate(policies, rollout, advantage, known, config):
    safe = torch.where(known, advantage, 0.0)
    for step in rollout.steps:
        losses = surrogate_losses(policies, rollout, step, safe, known, config, Moments(), first=False)
        (losses.sum() * 0.25).backward()
        policies.state.accumulate()


def test_the_first_ratio_after_a_rollout_is_exactly_one_or_the_run_stops(root):
    config, policies, sample = opened(root, objective={"name": "grpo", "window": 2, "updates": 1})
    rollout, advantage, known = sample(range(6)), torch.linspace(-1, 1, 6), torch.ones(6, dtype=torch.bool)
    moments = accumulate_chunk(policies, rollout, advantage, known, config, update=0, share=1 / 6)
    assert moments.first_ratio == 0.0
    with torch.no_grad():
        policies.model.proj_out.bias.add_(1e-3)
    with pytest.raises(RuntimeError, match="must be exactly 0"):
        accumulate_chunk(policies, rollout, advantage, known, config, update=0, share=1 / 6)


def test_nft_of_a_chunk_is_the_written_out_loss_of_each_picture(root):
    objective = {"name": "nft", "weight": "none", "kl": 0.3, "advantage_clip": 2.0, "beta": 0.5}
    config, policies, sample = opened(root, objective=objective)
    rollout, advantage = sample(range(6)), torch.tensor([0.5, -1.0, 3.0, 0.0, -5.0, 1.0])
    shift = torch.Generator().manual_seed(2)
    for tensors in (policies.old, policies.reference):
        tensors["proj_out.bias"] += 0.1 * torch.randn(tensors["proj_out.bias"].shape, generator=shift)
    places = torch.tensor([0, 1, 2, 3, 1, 2])
    known = torch.ones(6, dtype=torch.bool)
    losses = velocity_losses(policies, rollout, places, advantage, known, config, Moments())
    offsets = rollout.layout.image_offsets.tolist()
    texts = rollout.layout.text_offsets.tolist()
    for i, place in enumerate(places.tolist()):
        clean, t = rollout.latents[offsets[i] : offsets[i + 1]], rollout.times[i, place]
        layout = Layout.build(rollout.layout.grids[i : i + 1], text_lengths=[texts[i + 1] - texts[i]])
        seed = seed_of(config.run.seed, "training", rollout.samples[i].number, place)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        noisy = (1 - t) * clean + t * noise
        torch.testing.assert_close(noisy, interpolate(clean, noise, t[None], layout=layout))
        velocities = []
        for which in ("trained", "old", "reference"):
            with torch.no_grad(), policies.acting(which) as model:
                text = rollout.text_tokens[texts[i] : texts[i + 1]]
                velocities.append(model.forward_packed(noisy, t[None], text, layout).double())
        new, old, reference = velocities
        target = (noise - clean).double()
        r = 0.5 + max(-2.0, min(2.0, float(advantage[i]))) / 4.0
        plus, minus = 0.5 * old + 0.5 * new, 1.5 * old - 0.5 * new
        expected = 2.0 / 0.5 * (r * (plus - target).square().mean() + (1 - r) * (minus - target).square().mean())
        expected = expected + 0.3 * (new - reference).square().mean()
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_another_policy_acts_for_a_while_and_the_sampling_one_follows_the_trained_one(root):
    _, policies, _ = opened(root)
    before = {name: p.detach().clone() for name, p in policies.model.named_parameters()}
    with torch.no_grad():
        policies.model.proj_out.bias.add_(1.0)

    def act():
        with policies.acting("reference") as model:
            assert torch.equal(model.proj_out.bias, before["proj_out.bias"])
            raise KeyError

    with pytest.raises(KeyError):
        act()
    assert torch.equal(policies.model.proj_out.bias, before["proj_out.bias"] + 1.0)
    policies.follow(400)  # decay 0.4 of the published ramp
    torch.testing.assert_close(policies.old["proj_out.bias"], before["proj_out.bias"] + 0.6)
    assert torch.equal(policies.reference["proj_out.bias"], before["proj_out.bias"])


def test_judging_beside_the_sampler_changes_nothing(root):
    runs = [run(tiny_config(root, f"overlap-{overlap}", reward={"overlap": overlap})) for overlap in (True, False)]
    assert_same(*runs)
    assert len(runs[0][1]) == 4 and {row["coverage"]["causes"].get("timeout", 0) for row in runs[0][1]} != {0}


def test_verdicts_come_back_in_the_order_of_the_pictures_however_slow_each_is(root):
    import time

    tasks = load_tasks(tiny_config(root).prompts)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8) for _ in range(8)]

    def slow(request):
        time.sleep(0.002 * (int(request.image_hash[0], 16) % 4))
        return verdict(request)

    answers = []
    for overlap in (True, False):
        with Judging(ScriptedJudge(slow), overlap=overlap) as judging:
            for first in (0, 3, 5):
                chosen = range(first, {0: 3, 3: 5, 5: 8}[first])
                judging.submit([pictures[i] for i in chosen], [tasks[i % len(tasks)].rubric for i in chosen])
            answers.append(judging.results())
            assert judging.results() == []
    assert answers[0] == answers[1] and len(answers[0]) == 8


@pytest.mark.parametrize("objective", OBJECTIVES[:1] + OBJECTIVES[2:4], ids=str)
def test_every_objective_runs_resumes_and_repeats_itself(root, objective):
    name = "-".join(map(str, objective.values()))
    whole = run(tiny_config(root, f"whole-{name}", objective=objective, rollout={"num_steps": 4}))
    config = tiny_config(root, f"parts-{name}", objective=objective, rollout={"num_steps": 4})

    class Stop(Exception):
        pass

    def failing(request):
        if len(list(config.run.out.glob("step-*"))) >= 1 and not (config.run.out / "again").exists():
            raise Stop
        return verdict(request)

    with pytest.raises(Stop):
        reinforce.train(ONE, config, ScriptedJudge(failing))
    (config.run.out / "again").touch()
    assert_same(whole, run(config, ScriptedJudge(failing)))


@pytest.mark.parametrize("policy", ["drop_sample", "renormalise", "impute_group_mean", "drop_group"])
def test_missing_verdicts_by_every_rule_but_raise_let_training_go_on(root, policy):
    _, rows = run(tiny_config(root, f"missing-{policy}", reward={"missing": policy, "min_coverage": 0.5}))
    assert len(rows) == 4 and all(torch.tensor(row["loss"]).isfinite() for row in rows)
    missing = [row["reward"]["missing"] for row in rows]
    assert sum(missing) > 0 or policy in ("renormalise", "impute_group_mean")
    assert sum(missing) == 0 or policy != "renormalise"


def test_missing_verdicts_stop_the_run_where_the_rule_says_so(root):
    with pytest.raises(ValueError, match="expected every verdict"):
        run(tiny_config(root, "missing-raise", reward={"missing": "raise"}))


def test_nothing_moves_when_no_verdict_comes(root):
    config = tiny_config(root, "nothing", reward={"missing": "drop_sample"}, optim={"weight_decay": 0.0})
    tensors, rows = run(config, ScriptedJudge(lambda request: "connection"))
    base = load_file(find_base(config.base) / "ema.safetensors")
    for name, tensor in base.items():
        assert torch.equal(tensor, tensors[f"model/{name}"]), name
    assert all(row["loss"] == 0 and row["reward"]["mean"] is None for row in rows)
    assert all(row["coverage"]["causes"] == {"connection": row["coverage"]["due"]} for row in rows)


class Gone:
    """A judge that is gone from the COUNT-th call on."""

    judge_id = "gone"

    def __init__(self, count: int, *, back: bool = False) -> None:
        self.left, self.back = count, back

    def score(self, requests):
        self.left -= 1
        if self.left == 0 or (self.left < 0 and not self.back):
            raise JudgeUnavailableError("60 of the last 100 questions failed")
        return JUDGE.score(requests)


def test_a_judge_that_is_gone_stops_the_run_with_everything_saved(root):
    whole = run(tiny_config(root, "stays"))
    config = tiny_config(root, "goes", run={"checkpoint_every": 0})
    with pytest.raises(JudgeUnavailableError, match="step 3: 60 of the last"):
        reinforce.train(ONE, config, Gone(5))
    assert latest_checkpoint(config.run.out)[1] == 2 * config.objective.updates
    assert_same(whole, run(config))
    assert read_jsonl(config.run.out / "events.jsonl")[0]["action"] == "stop"


def test_a_judge_that_is_gone_for_a_while_costs_a_step_if_so_asked(root):
    config = tiny_config(root, "skips", reward={"unavailable": "skip"})
    _, rows = run(config, Gone(3, back=True))
    assert [row["step"] for row in rows] == [1, 3, 4]
    assert json.loads((config.run.out / "summary.json").read_text())["skipped_steps"] == 1


def start(root: Path, out: str, strike: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.experiments.tiny_reinforce", str(root), out, *([strike] if strike else [])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("strike", [f"{place}:{count}" for place in PLACES for count in (3, 6)])
def test_a_kill_anywhere_changes_nothing_and_no_question_is_asked_twice(root, strike):
    if not (root / "calm").exists():
        done = start(root, "calm")
        assert done.returncode == 0, done.stderr[-3000:]
    name = "killed-" + strike.replace(":", "-")
    struck = start(root, name, strike)
    again = start(root, name)
    assert struck.returncode in (-9, 0) and again.returncode == 0, again.stderr[-3000:]
    if not strike.startswith(("save", "follow", "verdicts")):
        assert struck.returncode == -9
    assert_same(result(root / "calm"), result(root / name))
    asked = (root / f"asked-{name}.txt").read_text().splitlines()
    assert len(asked) == len(set(asked)) and set(asked) == set((root / "asked-calm.txt").read_text().splitlines())


@pytest.mark.slow
def test_two_processes_compute_what_one_does(root):
    alone = tiny_config(root, "one")
    run_processes(train, 1, root, alone)
    pair = tiny_config(root, "two", run={"processes": 2})
    run_processes(train, 2, root, pair)
    (first, rows), (second, others) = result(alone.run.out), result(pair.run.out)
    assert rows[0]["reward"] == others[0]["reward"] and rows[0]["coverage"] == others[0]["coverage"]
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_was_judged_is_not_judged_again_and_what_failed_is(tmp_path, root):
    tasks, asked = load_tasks(tiny_config(root).prompts), []

    def answer(request):
        asked.append(request.criterion.id)
        return verdict(request)

    judge = CachedJudge(ScriptedJudge(answer), VerdictCache(tmp_path / "v.sqlite"))
    pictures = [torch.full((3, 8, 8), level, dtype=torch.uint8) for level in range(8)]
    with Judging(judge, overlap=True) as judging:
        results = []
        for _ in range(2):
            judging.submit(pictures, [tasks[0].rubric] * len(pictures))
            results.append([v for row in judging.results() for v in row])
    failed = [v.criterion_id for v in results[0] if v.state == "missing"]
    assert failed and asked == [v.criterion_id for v in results[0]] + failed
    assert [v.score for v in results[0]] == [v.score for v in results[1]]


def test_presets_parse_and_the_papers_run_is_the_papers():
    for make in PRESETS:
        assert read_config(PRESETS, "reinforce", [make.__name__, "--run.seed", "7"]).run.seed == 7
    config = lens()
    assert len(config.rollout.canvases) == 9 and config.adapter.rank == 64 and config.run.steps == 180
    costs = estimate_rl.rl_costs(estimate_rl.lens_rl())
    assert (costs["pictures"], costs["questions"]) == (1152, 12_672)
    assert (costs["run_pictures"], costs["run_calls"]) == (207_360, 2_280_960)
    assert costs["trained"] == 160_432_128


def test_the_dry_run_of_the_papers_stage_needs_nothing(capsys):
    reinforce.main(replace(lens(), dry_run=True))
    text = capsys.readouterr().out
    assert "2,280,960" in text and "160,432,128" in text and "GPU-hours" in text


def test_parts_of_the_prompt_set(root):
    whole = load_tasks(mini().prompts)
    half = load_tasks(replace(mini().prompts, share=0.5))
    less = load_tasks(replace(mini().prompts, without=("relation",)))
    assert len(whole) == 240 and len(half) == 120 and {t.text for t in half} < {t.text for t in whole}
    counts = {kind: sum(task.category == kind for task in half) for kind in {task.category for task in whole}}
    assert set(counts.values()) == {20}
    assert {t.text for t in less} == {t.text for t in whole if t.category != "relation"}


def test_an_adapter_begins_as_the_base_resumes_and_leaves_the_base_alone(root):
    pytest.importorskip("peft")
    changes = {"adapter": {"rank": 4, "alpha": 8.0}}
    config, policies, sample = opened(root, adapter=changes["adapter"])
    plain = opened(root)[2](range(6)).latents
    assert torch.equal(sample(range(6)).latents, plain)
    with policies.acting("reference"):
        assert torch.equal(sample(range(6)).latents, plain)
    whole = tiny_config(root, "adapter-whole", **changes)
    reinforce.train(ONE, whole, JUDGE)
    parts = tiny_config(root, "adapter-parts", **changes)
    with pytest.raises(JudgeUnavailableError):
        reinforce.train(ONE, parts, Gone(5))
    reinforce.train(ONE, parts, JUDGE)
    files = [latest_checkpoint(one.run.out)[0] for one in (whole, parts)]
    for name in ("model", "ema", "old", "optimizer", "adapter"):
        one, other = (load_file(path / f"{name}.safetensors") for path in files)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert any("lora_B" in key and tensor.any() for key, tensor in load_file(files[0] / "model.safetensors").items())
    assert read_jsonl(whole.run.out / "metrics.jsonl") == read_jsonl(parts.run.out / "metrics.jsonl")
    assert config.adapter.rank == 4


def test_weights_that_are_not_trained_stay_as_they_are(root):
    objective = {"name": "nft", "trained": ("txt_norm", "attn.norm_")}
    tensors, _ = run(tiny_config(root, "some-weights", objective=objective, optim={"weight_decay": 0.0}))
    base = load_file(find_base(tiny_config(root).base) / "ema.safetensors")
    moved = {name for name, tensor in base.items() if not torch.equal(tensor, tensors[f"model/{name}"])}
    assert moved and all("txt_norm" in name or "attn.norm_" in name for name in moved)
