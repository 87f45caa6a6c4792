"""A sharded or replicated model trains as one process does, however many ranks share it, and checkpoints fit any of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lensmini.nn import LensTransformer
from lensmini.packed import Layout
from lensmini.parallel import (
    Checkpointer,
    Group,
    clip_gradients,
    fill_parameters,
    load_tensors,
    make_mesh,
    map_matrices,
    read_whole,
    recompute_blocks,
    replicate_model,
    run_processes,
    shard_model,
    stored_shapes,
)
from tests import sharded_training as training

F32, F64 = torch.float32, torch.float64


@contextmanager
def lone_job() -> Iterator[Group]:
    """A job of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Group(0, 1)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process computes without any of this."""
    jobs = {"sgd32": ("sgd", F32), "adamw64": ("adamw", F64), "muon64": ("muon", F64)}
    return {name: training.train(Group(0, 1), "plain", *job) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, dict[str, Any]]:
    """Jobs of 2, 3 and 4 ranks; a float64 run is handed on from 2 to 1 to 3 to 4 of them."""

    def job(kind: str, optimizer: str, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        return {"kind": kind, "optimizer": optimizer, "dtype": dtype, **options}

    chain = [folder / f"chain-{ranks}" for ranks in (2, 1, 3)]
    two = {
        "sgd32-2": job("sharded", "sgd", F32),
        "sgd32-2-full": job("sharded", "sgd", F32, recompute="full", prefetch=2, compile={"backend": "eager"}),
        "sgd32-2-selective": job("sharded", "sgd", F32, recompute="selective", reshard=False, prefetch=0),
        "sgd32-2-ddp": job("replicated", "sgd", F32),
        "adamw64-2-hsdp": job("sharded", "adamw", F64, shard=1),
        "muon64-2": job("sharded", "muon", F64),
        "handed-on-2": job("sharded", "adamw", F64, steps=(0, 2), save=chain[0]),
    }
    run_processes(training.worker, 2, folder, two)
    with lone_job() as group:
        training.train(
            group, **job("sharded", "adamw", F64, steps=(2, 3), load=chain[0] / "step-000002", save=chain[1])
        )
    three = {
        "handed-on-3": job("sharded", "adamw", F64, steps=(3, 4), load=chain[1] / "step-000003", save=chain[2]),
        "adamw64-3": job("sharded", "adamw", F64),
        "muon64-3": job("sharded", "muon", F64),
    }
    run_processes(training.worker, 3, folder, three)
    four = {
        "adamw64-4-handed-on": job("sharded", "adamw", F64, shard=2, steps=(4, 5), load=chain[2] / "step-000004"),
        "sgd32-4": job("sharded", "sgd", F32, shard=2),
        "sgd32-4-all": job("sharded", "sgd", F32, shard=4),
    }
    run_processes(training.worker, 4, folder, four)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error relative to each tensor's own maximum."""
    assert found.keys() == expected.keys()
    return max(((found[n] - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for n, e in expected.items())


RUNS = (
    "sgd32-2",
    "sgd32-2-full",
    "sgd32-2-selective",
    "sgd32-2-ddp",
    "sgd32-4",
    "sgd32-4-all",
    "adamw64-2-hsdp",
    "adamw64-3",
    "muon64-2",
    "muon64-3",
)


@pytest.mark.parametrize("name", RUNS)
def test_gradients_and_trajectories_are_those_of_one_process(
    name: str, alone: dict[str, dict[str, Any]], together: dict[str, dict[str, Any]]
) -> None:
    expected, found = alone[name.split("-")[0]], together[name]
    # Muon's iteration is bfloat16: a last bit of a momentum may become 1e-3 of an update.
    tolerance = {"sgd32": 1e-6, "adamw64": 1e-9, "muon64": 5e-3}[name.split("-")[0]]
    assert worst(found["grads"], expected["grads"]) < (1e-6 if "32" in name else 1e-12)
    assert "transformer_blocks.1.txt_mlp.w1.weight" not in found["grads"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=max(tolerance, 1e-6))
    assert torch.stack(found["norms"]).tolist() == pytest.approx(torch.stack(expected["norms"]).tolist(), rel=5e-3)
    assert all(norm > 0.1 for norm in found["norms"][:2]), "clipping has work to do"
    for kind in ("weights", "ema"):
        assert worst(found[kind], expected[kind]) < tolerance
        moved = training.value_of("proj_out.weight", found[kind]["proj_out.weight"].shape)
        assert (found[kind]["proj_out.weight"] - moved).abs().max() > 1e-3


def test_a_run_handed_from_two_to_one_to_three_to_four_ranks_is_one_run(
    alone: dict[str, dict[str, Any]], together: dict[str, dict[str, Any]]
) -> None:
    expected, found = alone["adamw64"], together["adamw64-4-handed-on"]
    assert found["losses"] == pytest.approx(expected["losses"][4:], rel=1e-9)
    for kind in ("weights", "ema"):
        assert worst(found[kind], expected[kind]) < 1e-9


def test_a_checkpoint_of_many_is_read_as_a_whole_by_one(folder: Path, together: dict[str, dict[str, Any]]) -> None:
    path = folder / "chain-3" / "step-000004"
    expected = training.train(Group(0, 1), "plain", "adamw", F64, steps=(0, 4))
    assert worst(read_whole(path, "model."), expected["weights"]) < 1e-9
    assert worst(read_whole(path, "ema."), expected["ema"]) < 1e-9
    assert json.loads((path / "run.json").read_text()) == {"step": 4, "world_size": 3}
    assert len(list(path.glob("*.safetensors"))) == 3 and not list(path.glob("*.metadata"))
    assert stored_shapes(path)["optim.proj_out.weight.exp_avg"] == torch.Size([16, 32])
    with pytest.raises(FileNotFoundError, match="expected tensors student"):
        read_whole(path, "student.")
    with pytest.raises(ValueError, match=r"lacks \['model.nothing'\]"):
        load_tensors(path, {"model.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model.proj_out.bias: \[3\], stored \[16\]"):
        load_tensors(path, {"model.proj_out.bias": torch.zeros(3)})
    with pytest.raises(FileNotFoundError, match="found none"):
        stored_shapes(folder)


def small_model(dtype: torch.dtype = F32) -> LensTransformer:
    with torch.device("meta"):
        model = LensTransformer(training.CONFIG).to(dtype)
    fill_parameters(model, training.value_of)
    return model


class DtypeRecorder(TorchDispatchMode):
    """Dtypes that trigonometric functions and what is multiplied by tables see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0].removeprefix("aten::")
        dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()}
        self.seen.setdefault(name, set()).update(dtypes)
        return func(*args, **(kwargs or {}))


def test_times_and_rotations_stay_in_float32_under_bfloat16() -> None:
    plain = small_model().bfloat16()
    noisy, _, text, _, layout = training.batch_of(0, 2, F32)
    t = torch.tensor([0.12345, 0.5004, 0.98765])[: layout.image_offsets.shape[0] - 1]
    expected = plain.forward_packed(noisy, t, text, layout)
    tables = {}

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        tables.update(dict(enumerate(outputs)))

    with lone_job(), torch.no_grad():
        model = small_model()
        mesh = make_mesh(1, device="cpu")
        shard_model(model, model.transformer_blocks, mesh, dtype=torch.bfloat16, methods=("forward_packed",))
        model.rotary.register_forward_hook(keep)
        with DtypeRecorder() as recorder:
            found = model.forward_packed(noisy, t, text, layout)
        rounded = model.forward_packed(noisy, t.bfloat16().float(), text, layout)
    for name in ("cos", "sin"):
        assert recorder.seen[name] == {torch.float32}
    assert torch.bfloat16 in recorder.seen["addmm"] | recorder.seen.get("mm", set())
    assert all(part.dtype == torch.float32 for table in tables.values() for part in table if isinstance(part, Tensor))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, rounded), "a time that had been rounded on its way would give another velocity"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made by operations that somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)
        return result

    def held(self, model: torch.nn.Module) -> int:
        """Without views of parameters."""
        for parameter in model.parameters():
            self.made.pop(parameter.untyped_storage()._cdata, None)
        storages = [(ref, torch.UntypedStorage._new_with_weak_ptr(ref.cdata)) for ref in self.made.values()]
        return sum(storage.nbytes() for _, storage in storages if storage is not None)


def run_blocks(mode: Any, dtype: torch.dtype = F32) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients, and bytes that wait for the backward."""
    model = small_model(dtype)
    recompute_blocks(model.transformer_blocks, mode)
    clean, noise, text, t, layout = training.batch_of(0, 2, dtype)
    with LiveBytes() as bytes_:
        output = model.forward_packed(clean + noise, t, text, layout)
        held = bytes_.held(model)
    output.square().sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_recomputation_changes_no_bit(mode: str, dtype: torch.dtype) -> None:
    output, grads, _ = run_blocks("none", dtype)
    found, found_grads, _ = run_blocks(mode, dtype)
    assert torch.equal(found, output)
    assert found_grads.keys() == grads.keys()
    assert [name for name in grads if not torch.equal(found_grads[name], grads[name])] == []


def test_each_mode_holds_less_than_the_one_before() -> None:
    held = []
    for mode in ("none", "selective", "full"):
        model = LensTransformer(replace(training.CONFIG, num_layers=6)).init_weights(0, gate=0.1)
        recompute_blocks(model.transformer_blocks, mode)
        layout = Layout.build([(12, 12), (8, 8), (10, 6)], text_lengths=[9, 20, 0])
        with LiveBytes() as live:
            output = model.forward_packed(torch.randn(268, 16), torch.rand(3), torch.randn(29, 2, 8), layout)
            held.append(live.held(model))
        del output
    assert 0.4 < held[1] / held[0] < 0.7 and held[2] < 0.35 * held[1], held


def test_recomputation_refuses_what_it_cannot_do() -> None:
    block = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match='mode: expected "none", "selective" or "full", got "half"'.replace('"half"', "'half'")
    ):
        recompute_blocks([block], "half")  # pyright: ignore
    recompute_blocks([block], "none")
    recompute_blocks([block], "full")
    with pytest.raises(ValueError, match="got Linear twice"):
        recompute_blocks([block], "full")


def test_sharding_refuses_what_it_cannot_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with lone_job():
        mesh = make_mesh(1, device="cpu")
        for blocks in ([], [torch.nn.Linear(2, 2)], [model[0], model[0]], [model]):
            with pytest.raises(ValueError, match="blocks: expected different submodules of Sequential"):
                shard_model(model, blocks, mesh)
        with pytest.raises(ValueError, match=r"methods: expected methods of Sequential, got \['forward_packed'\]"):
            shard_model(model, [model[0]], mesh, methods=("forward_packed",))
        with pytest.raises(ValueError, match="prefetch: expected at least 0, got -1"):
            shard_model(model, [model[0]], mesh, prefetch=-1)
        with pytest.raises(ValueError, match="world_size: expected that of the running job, 1, got 2"):
            make_mesh(2, device="cpu")
        with pytest.raises(ValueError, match=r"weight: expected shape \[2, 2\], got \[1\]"):
            fill_parameters(model[0], lambda name, shape: torch.zeros(1))
        with pytest.raises(ValueError, match=r"unused: expected names of parameters, got \['2.bias'\]"):
            replicate_model(model, unused=["2.bias"])
        with pytest.raises(ValueError, match="method: expected a method of Sequential, got 'run'"):
            replicate_model(model, method="run")
    with pytest.raises(ValueError, match="the running job, none runs, got 2"):
        make_mesh(2, device="cpu")


def test_the_whole_model_does_not_fit_a_card_and_the_arithmetic_is_told() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(64_000, 64_000, bias=False)
    with pytest.raises(ValueError, match=r"at least 81.920 GB for 4,096,000,000 parameters .* got 80.000 GB: shard"):
        replicate_model(model, memory_bytes=80 * 10**9)


def test_clipping_is_the_formula_and_leaves_what_is_not_finite() -> None:
    weights = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    weights[0].grad, weights[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.full((2, 2), 2.0)
    assert clip_gradients(weights, float("inf")).item() == 5
    assert weights[0].grad.tolist() == [1, 2, 2]
    assert clip_gradients(weights, 2.5).item() == 5
    torch.testing.assert_close(weights[1].grad, torch.ones(2, 2))
    weights[0].grad[0] = float("nan")
    before = [weights[0].grad.clone(), weights[1].grad.clone()]
    assert clip_gradients(weights, 1e-3).isnan()
    torch.testing.assert_close([weights[0].grad, weights[1].grad], before, rtol=0, atol=0, equal_nan=True)
    assert clip_gradients([weights[2]], 1.0).item() == 0
    with pytest.raises(ValueError, match="max_norm: expected a positive number, got 0"):
        clip_gradients(weights, 0)


def test_matrices_must_be_alike() -> None:
    with pytest.raises(
        ValueError, match=r"matrices: expected torch.float32 matrices \[2, 2\], got torch.float32 \[1, 2\]"
    ):
        map_matrices(lambda stack: stack, [torch.zeros(2, 2), torch.zeros(1, 2)])
    assert map_matrices(lambda stack: stack, []) == []


def test_unused_parameters_are_exactly_those_without_gradient() -> None:
    model = small_model()
    clean, noise, text, t, layout = training.batch_of(0, 2, F32)
    model.forward_packed(clean + noise, t, text, layout).square().sum().backward()
    assert set(model.unused_parameters()) == {n for n, p in model.named_parameters() if p.grad is None}


def test_values_do_not_depend_on_where_parameters_live() -> None:
    plain = small_model()
    with lone_job():
        with torch.device("meta"):
            model = LensTransformer(training.CONFIG)
        shard_model(model, model.transformer_blocks, make_mesh(1, device="cpu"))
        fill_parameters(model, training.value_of)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), dict(plain.named_parameters())[name])


def test_checkpoints_are_whole_or_absent_and_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpointer(tmp_path, Group(0, 1), keep=2)
    assert saver.latest() is None
    for step in (1, 2, 3):
        saver.save(step, {"a": torch.full((2,), float(step))}, {"seed": 5}, config='{"b": 1}')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert json.loads((tmp_path / "step-000003" / "config.json").read_text()) == {"b": 1}
    saver.save(3, {"a": torch.full((2,), 33.0)}, {})
    assert read_whole(tmp_path / "step-000003")["a"].tolist() == [33, 33]

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lensmini.parallel.sharded_checkpoints._sync", fail)
    with pytest.raises(OSError, match="no space left"):
        saver.save(4, {"a": torch.zeros(2)}, {})
    monkeypatch.undo()
    assert saver.latest() == (tmp_path / "step-000003", 3)
    assert (tmp_path / ".step-000004.new").is_dir()
    saver.save(5, {"a": torch.zeros(2)}, {})
    assert not list(tmp_path.glob(".step-*"))
    # Ended between the two renames that replace a checkpoint of the same step.
    (tmp_path / "step-000005").rename(tmp_path / ".step-000005.old")
    assert Checkpointer(tmp_path, Group(0, 1)).latest() == (tmp_path / "step-000005", 5)
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Checkpointer(tmp_path, Group(0, 1), keep=0)


def failing_worker(group: Group, folder: Path) -> None:
    saver = Checkpointer(folder, group)
    saver.save(1, {"a": torch.ones(4)}, {})
    saver.wait()
    if group.rank == 0:
        # The background's rename cannot succeed: something else has the name, and cannot move away.
        saver._publish = lambda *_: (_ for _ in ()).throw(OSError("no space left"))  # pyright: ignore
    saver.save(2, {"a": torch.ones(4)}, {})
    try:
        saver.wait()
    except RuntimeError as error:
        (folder / f"told-{group.rank}").write_text(str(error))


def test_a_background_save_that_fails_is_told_on_every_rank(tmp_path: Path) -> None:
    run_processes(failing_worker, 2, tmp_path)
    for rank in (0, 1):
        assert "could not be written: OSError('no space left')" in (tmp_path / f"told-{rank}").read_text()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000001"]


def test_a_deep_copy_of_a_model_with_recomputation_computes_with_its_own_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    recompute_blocks(model, "full")
    twin = deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert twin(torch.ones(1, 2)).tolist() == [[0, 0]]
    assert model(torch.ones(1, 2)).abs().sum() > 0
