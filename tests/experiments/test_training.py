"""Muon, the schedule, the update of a step, checkpoints, and gradients that processes add up."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.bank import FeatureBank, save_bank
from experiments.muon import Muon, orthogonalise
from experiments.pretrain import per_sample_loss, sample_times
from experiments.training import (
    OptimConfig,
    SettingsError,
    TrainingState,
    check_same_run,
    learning_rate_factor,
    read_run,
)
from lensmini.data import loss_weights
from lensmini.data.collate import Weighting
from lensmini.nn import LensConfig
from lensmini.parallel import Group, run_processes

MODEL = LensConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=8,
    out_channels=2,
    enc_hidden_dim=6,
    selected_layer_index=(0, 1),
)
MUON = OptimConfig(lr=1e-2, muon_lr=2e-2, warmup_steps=2, decay_fraction=0.5, ema_decay=0.9, init_gate=0.1)
ADAM = OptimConfig(
    lr=1e-2, dtype="float32", ema_decay=0.25, weight_decay=0.1, eps=1e-6, betas=(0.8, 0.95), warmup_steps=2
)


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2, generator=generator)


def fill_gradient(state: TrainingState, seed: int, scale: float = 1.0) -> None:
    state.flat.normal_(generator=torch.Generator().manual_seed(seed)).mul_(scale)


def moments(state: TrainingState) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for optimizer in state.optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@given(seed=st.integers(0, 2**32), count=st.integers(1, 3), rows=st.integers(2, 24), columns=st.integers(2, 24))
def test_orthogonalised_matrices_have_singular_values_near_one(seed: int, count: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Conditioned: five iterations lift what is not too small a share of the norm.
    left, _ = torch.linalg.qr(torch.randn(count, rows, rows, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(count, columns, columns, generator=generator))
    rank = min(rows, columns)
    values = torch.rand(count, rank, generator=generator) * 0.8 + 0.2
    matrices = left[:, :, :rank] * values[:, None] @ right[:, :rank]
    result = orthogonalise(matrices).float()
    singular = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape
    assert bool((singular > 0.5).all()) and bool((singular < 1.4).all())
    # The closest orthogonal matrix has the same singular vectors.
    target = left[:, :, :rank] @ right[:, :rank]
    cosine = (result * target).sum((1, 2)) / (result.norm(dim=(1, 2)) * target.norm(dim=(1, 2)))
    assert bool((cosine > 0.93).all())


def test_orthogonalise_does_not_depend_on_scale_or_on_its_neighbours() -> None:
    matrices = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    together = orthogonalise(matrices)
    for index in range(3):
        assert (together[index] - orthogonalise(matrices[index : index + 1])[0]).abs().max() < 0.08
    assert (together - orthogonalise(1000 * matrices)).abs().max() < 0.08
    assert not orthogonalise(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_muon_moves_as_torchs_muon(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer = Muon({"w": ours}, lr=0.02)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original")
    for _ in range(4):
        before = ours.detach().clone(), theirs.detach().clone()
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        peer.step()
        moved, expected = ours.detach() - before[0], theirs.detach() - before[1]
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
        assert abs(moved.norm() / expected.norm() - 1) < 0.05


def test_muon_treats_stacked_matrices_as_separate_ones_and_leaves_others_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    whole, single = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)
    gradients = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)
    stacked = {"a.qkv.weight": nn.Parameter(whole.clone()), "b.weight": nn.Parameter(single.clone())}
    parts = [nn.Parameter(part.clone()) for part in whole.chunk(3)] + [nn.Parameter(single.clone())]
    peers = torch.optim.Muon(parts, lr=0.1, weight_decay=0.0, adjust_lr_fn="original")
    optimizer = Muon(stacked, lr=0.1, splits={"qkv.weight": 3})
    for scale in (1.0, -0.3):
        # One matrix of the stack has a much larger gradient, which would drown the others if they were one matrix.
        uneven = gradients[0] * torch.tensor([100.0, 1.0, 0.01]).repeat_interleave(4)[:, None] * scale
        stacked["a.qkv.weight"].grad, stacked["b.weight"].grad = uneven, gradients[1] * scale
        for part, gradient in zip(parts, [*uneven.chunk(3), gradients[1] * scale], strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        peers.step()
    expected = torch.cat([part.detach() for part in parts])
    moved = torch.cat([stacked["a.qkv.weight"].detach(), stacked["b.weight"].detach()])
    # bfloat16 and five iterations that magnify its rounding.
    assert (moved - expected).abs().max() < 0.1 * (expected - torch.cat([whole, single])).abs().max()


def test_muon_treats_a_stack_as_its_matrices() -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(3, 8, 5, generator=generator)
    stack, parts = nn.Parameter(start.clone()), {str(n): nn.Parameter(start[n].clone()) for n in range(3)}
    together, apart = Muon({"w": stack}, lr=0.1), Muon(parts, lr=0.1)
    for _ in range(2):
        gradient = torch.randn(3, 8, 5, generator=generator) * torch.tensor([100.0, 1.0, 0.01])[:, None, None]
        stack.grad = gradient.clone()
        for part, slice_ in zip(parts.values(), gradient, strict=True):
            part.grad = slice_.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([part.detach() for part in parts.values()]))
    assert (stack.detach() - start).abs().amin((1, 2)).max() > 0


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (10, 4)])
def test_muon_refuses_what_is_no_stack_of_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a\.qkv\.weight: expected a matrix of 3 equal parts"):
        Muon({"a.qkv.weight": nn.Parameter(torch.zeros(shape))}, splits={"qkv.weight": 3})


@given(steps=st.integers(1, 200), warmup=st.integers(0, 50), decay=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_the_rate_warms_up_stays_and_falls_linearly(steps: int, warmup: int, decay: float) -> None:
    config = OptimConfig(warmup_steps=warmup, decay_fraction=decay)
    factors = [learning_rate_factor(step, steps, config) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    for step, factor in enumerate(factors):
        rising = step + 1 < warmup
        falling = steps - step < decay * steps
        if not rising and not falling:
            assert factor == 1
        if rising and not falling:
            assert factor * warmup == pytest.approx(step + 1)
        if falling and not rising:
            assert factor * decay * steps == pytest.approx(steps - step)
    assert learning_rate_factor(0, 10**6, OptimConfig()) == learning_rate_factor(10**6 - 1, 10**6, OptimConfig()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"lr": 0.0}, "lr"),
        ({"muon_lr": -1.0}, "muon_lr"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_fraction": 1.5}, "decay_fraction"),
    ],
)
def test_settings_out_of_range_are_errors(change: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_an_update_is_clip_adamw_and_average(scale: float) -> None:
    state = TrainingState(MODEL, ADAM, seed=0)
    model, average = deepcopy(state.model), deepcopy(state.model)
    peer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(3):
        fill_gradient(state, step, scale)
        pieces = state.flat[: -state.NUM_EXTRA].clone().split([p.numel() for p in model.parameters()])
        for parameter, piece in zip(model.parameters(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        peer.param_groups[0]["lr"] = rate = (0.005, 0.01, 0.01)[step]
        peer.step()
        decay = min(0.25, (1 + step) / (10 + step))
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.data = decay * mean.data + (1 - decay) * parameter.data
        row = state.update(10)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5) and row["lr"] == rate
    assert state.step == 3
    for ours, theirs in ((state.model, model), (state.ema, average)):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_blocks_matrices_and_adamw_everything_else() -> None:
    state = TrainingState(MODEL, MUON, seed=0)
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    adam, muon = ({names[p] for p in optimizer.param_groups[0]["params"]} for optimizer in state.optimizers)
    assert not adam & muon and adam | muon == set(names.values())
    assert all(name.startswith("transformer_blocks.") and "mod" not in name for name in muon)
    # Of every block two projections in (both fused), two out and three matrices of each feed-forward net.
    assert len(muon) == MODEL.num_layers * (2 + 2 + 6)


def test_muon_moves_fused_projections_one_by_one_at_the_scheduled_rate() -> None:
    moved = {}
    for step in range(2):
        state = TrainingState(MODEL, MUON, seed=0)
        state.step = step
        fused = [index for index, (name, _) in enumerate(state.model.named_parameters()) if name.endswith("qkv.weight")]
        fill_gradient(state, 0, 1e-4)
        for index in fused:
            first, _, third = state.grads[index].chunk(3)
            first.mul_(100)
            third.mul_(0.01)
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        state.update(10)
        changes = [after.detach() - old for after, old in zip(state.model.parameters(), before, strict=True)]
        moved[step] = [part.norm().item() for index in fused for part in changes[index].chunk(3)]
        # An orthogonal matrix of this width, times the rate.
        expected = 2e-2 * (0.5, 1.0)[step] * MODEL.inner_dim**0.5
        assert moved[step] == pytest.approx([expected] * 3 * len(fused), rel=0.25)


@pytest.mark.parametrize("optim", [MUON, ADAM], ids=["muon-bfloat16", "adamw-float32"])
def test_resuming_restores_every_bit(optim: OptimConfig, tmp_path: Path) -> None:
    state = TrainingState(MODEL, optim, seed=0)
    for step in range(3):
        fill_gradient(state, step)
        state.update(6)
    path = state.save(tmp_path, {"name": "x"}, keep=2)
    assert path == tmp_path / "step-000003" and read_run(path)["step"] == 3
    assert read_run(path)["config"] == {"name": "x"}
    assert LensConfig.from_dict(json.loads((path / "config.json").read_text())) == MODEL
    other = TrainingState(MODEL, optim, seed=1)
    assert other.resume(tmp_path) and other.step == 3
    for name in ("model", "ema", "compute"):
        assert_same_bits({**getattr(state, name).state_dict()}, {**getattr(other, name).state_dict()})
    assert_same_bits(moments(state), moments(other))
    assert len(moments(state)) >= len(list(state.model.parameters()))
    for one in (state, other):
        fill_gradient(one, 7)
        one.update(6)
    for name in ("model", "ema", "compute"):
        assert_same_bits({**getattr(state, name).state_dict()}, {**getattr(other, name).state_dict()})
    assert_same_bits(moments(state), moments(other))


def test_the_newest_checkpoint_counts_and_older_ones_go(tmp_path: Path) -> None:
    state = TrainingState(MODEL, MUON, seed=0)
    assert not state.resume(tmp_path)
    for step in range(4):
        fill_gradient(state, step)
        state.update(6)
        state.save(tmp_path, None, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-000003", "step-000004"]
    other = TrainingState(MODEL, MUON, seed=0)
    assert other.resume(tmp_path) and other.step == 4


@pytest.mark.parametrize("which", ["model", "ema"])
@pytest.mark.parametrize("optimizer", [True, False])
def test_a_later_stage_starts_from_the_named_weights(which: str, optimizer: bool, tmp_path: Path) -> None:
    state = TrainingState(MODEL, MUON, seed=0)
    for step in range(2):
        fill_gradient(state, step)
        state.update(4)
    path = state.save(tmp_path, None, keep=1)
    wanted = load_file(path / f"{which}.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(state.model.parameters(), state.ema.parameters(), strict=True))
    later = TrainingState(MODEL, MUON, seed=5)
    later.load(path, which=which, optimizer=optimizer)
    assert later.step == 0
    assert_same_bits({**later.model.state_dict()}, wanted)
    assert_same_bits({**later.ema.state_dict()}, wanted)
    assert_same_bits({**later.compute.state_dict()}, {name: value.bfloat16() for name, value in wanted.items()})
    assert_same_bits(moments(later), moments(state) if optimizer else {})


@pytest.mark.parametrize(("saved", "wanted"), [(MUON, ADAM), (ADAM, MUON)], ids=["muon-to-adamw", "adamw-to-muon"])
def test_another_optimisers_moments_are_refused_by_name(
    saved: OptimConfig, wanted: OptimConfig, tmp_path: Path
) -> None:
    state = TrainingState(MODEL, saved, seed=0)
    fill_gradient(state, 0)
    state.update(4)
    path = state.save(tmp_path, None, keep=1)
    with pytest.raises(
        SettingsError, match=r"expected moments .* of transformer_blocks\.0\.\S+, got .*--reset-optimizer"
    ):
        TrainingState(MODEL, wanted, seed=0).load(path, which="model", optimizer=True)
    TrainingState(MODEL, wanted, seed=0).load(path, which="model", optimizer=False)


def test_a_run_goes_on_only_with_the_settings_that_decide_its_numbers(tmp_path: Path) -> None:
    config = {"run": {"out": "a", "processes": 1, "steps": 4}, "optim": {"lr": 1e-3}}
    check_same_run(tmp_path, config)  # nothing there yet
    state = TrainingState(MODEL, ADAM, seed=0)
    fill_gradient(state, 0)
    state.update(4)
    state.save(tmp_path, config, keep=1)
    check_same_run(tmp_path, {**config, "run": {"out": "b", "processes": 2, "steps": 4}})
    with pytest.raises(SettingsError, match=r"other settings \(optim\.lr 0\.001 -> 0\.002, run\.steps 4 -> 8\)"):
        check_same_run(tmp_path, {"run": {**config["run"], "steps": 8}, "optim": {"lr": 2e-3}})
    with pytest.raises(SettingsError, match="optim.eps None -> 1"):
        check_same_run(tmp_path, {**config, "optim": {"lr": 1e-3, "eps": 1}})


WEIGHTINGS: tuple[Weighting, ...] = ("per_image", "per_token")


def make_gradients(group: Group, folder: Path) -> None:
    """The gradients of two steps of which the processes get unequal numbers of images, for both weightings."""
    torch.set_num_threads(1)
    bank = FeatureBank.load(folder)
    plan = bank.plan(batch_size=12, num_slots=2, seed=0)
    state = TrainingState(MODEL, ADAM, seed=0)
    randomise(state.model, 3)
    found = {}
    for step in (plan.step(0), plan.step(1)):
        for weighting in WEIGHTINGS:
            # What an earlier step left there must not stay where a parameter gets no gradient.
            state.flat.fill_(7.0)
            images, loss = 0, 0.0
            for slot in range(group.rank, plan.num_slots, group.world_size):
                pictures, repeats = step.slot(slot).tolist(), step.repeats(slot).tolist()
                batch = bank.collate(pictures, repeats=repeats, seed=0, step=step.step, text_dropout=0.3)
                weights = loss_weights(batch.layout, plan.totals(step), weighting)
                part = (weights * per_sample_loss(state, batch, sample_times(batch, ADAM))).sum()
                part.backward()
                images, loss = images + len(pictures), loss + part.item()
            name = f"{step.step}.{weighting}"
            found[f"{name}.numbers"] = torch.tensor(state.collect(group, [loss, float(images), 1.0]))
            found[f"{name}.images"] = torch.tensor(group.gather(images))
            names = [name for name, _ in state.model.named_parameters()]
            found |= {f"{name}.{key}": grad.clone() for key, grad in zip(names, state.grads, strict=True)}
            assert all(parameter.grad is None for parameter in state.compute.parameters())
    muon = TrainingState(MODEL, MUON, seed=0, group=group)
    for step in range(2):
        fill_gradient(muon, step)
        muon.update(4)
    found |= {f"muon.{name}": value for name, value in muon.model.state_dict().items()}
    torch.save(found, folder / f"gradients-{group.world_size}-{group.rank}.pt")


def test_two_processes_have_the_gradient_and_the_update_of_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 2, 6, generator=generator) for length in (3, 5, 2)]
    # Few large pictures among small ones: equal work is unequal numbers of images.
    grids = [(1, 2), (2, 1), (1, 1), (6, 5)]
    pictures = [(index % 3, torch.randn(8, *grids[index % 4], generator=generator)) for index in range(40)]
    save_bank(tmp_path, texts, pictures, ["a", "b", "c"])
    make_gradients(Group(0, 1), tmp_path)
    run_processes(make_gradients, 2, tmp_path)
    whole, first, second = (torch.load(tmp_path / f"gradients-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert_same_bits(first, second)
    start = TrainingState(MODEL, MUON, seed=0).model.state_dict()
    for name in start:
        one, both = whole.pop(f"muon.{name}") - start[name], first.pop(f"muon.{name}") - start[name]
        assert (one - both).norm() <= 0.05 * one.norm(), name
    for name in (f"{step}.{weighting}" for step in (0, 1) for weighting in WEIGHTINGS):
        numbers = first.pop(f"{name}.numbers"), whole.pop(f"{name}.numbers")
        assert numbers[0].tolist()[1:] == [12, 2.0] and numbers[1].tolist()[1:] == [12, 1.0]
        assert numbers[0][0] == pytest.approx(numbers[1][0].item(), rel=1e-6)
        parts = first.pop(f"{name}.images").tolist()
        assert sum(parts) == whole.pop(f"{name}.images").item() == 12 and parts[0] != parts[1]
    assert whole.keys() == first.keys()
    moved = 0
    for name, gradient in whole.items():
        largest = gradient.abs().max()
        moved += bool(largest > 0)
        assert (first[name] - gradient).abs().max() <= 1e-6 * largest, name
    assert moved > 0.8 * len(whole), "the comparison is not one of zeros"
    one, other = (whole[f"0.{weighting}.img_in.weight"] for weighting in WEIGHTINGS)
    assert (one - other).abs().max() > 1e-2 * one.abs().max(), "the weightings differ"


def test_gradients_of_many_micro_batches_add_up_in_float32(tmp_path: Path) -> None:
    config = replace(ADAM, dtype="bfloat16")
    state = TrainingState(MODEL, config, seed=0)
    parameters = list(state.compute.parameters())
    for _ in range(257):
        # In bfloat16 a sum of ones stops at 256.
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        state.accumulate()
    assert all(parameter.grad is None for parameter in parameters)
    state.collect(Group(0, 1), [])
    assert all(grad.eq(257).all() for grad in state.grads)
    state.collect(Group(0, 1), [])
    assert all(grad.eq(0).all() for grad in state.grads), "the next step starts from zero"


def test_times_follow_the_logit_normal_law(tmp_path: Path) -> None:
    pictures = [(0, torch.zeros(8, 16, 16)), (0, torch.zeros(8, 64, 64))]
    save_bank(tmp_path, [torch.zeros(1, 2, 6)], pictures, ["a"])
    bank = FeatureBank.load(tmp_path)
    batch = bank.collate([0, 1], seed=0, step=0, text_dropout=0.0)
    tokens = torch.tensor(batch.layout.image_lengths, dtype=torch.float64)
    normal = batch.normal.double()
    mu = 1.0 + 0.3 * (tokens - 256) / (4096 - 256)
    paper = 1 / (1 + torch.exp(-(mu + normal)))
    torch.testing.assert_close(sample_times(batch, OptimConfig()).double(), paper, rtol=1e-6, atol=1e-6)
    fixed = 1 / (1 + torch.exp(-(0.5 + 2 * normal)))
    config = OptimConfig(time_mu=0.5, time_std=2.0)
    torch.testing.assert_close(sample_times(batch, config).double(), fixed, rtol=1e-6, atol=1e-6)
