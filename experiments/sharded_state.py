"""The state of a training run over many ranks: what :class:`experiments.training.TrainingState` is, sharded or replicated."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.muon import Muon
from experiments.runs import config_dict, provenance
from experiments.training import HIDDEN_MATRICES, OptimConfig, SettingsError, learning_rate_factor, read_run
from lensmini.averaging import lerp_parameters_
from lensmini.checkpoints import load_transformer, save_transformer
from lensmini.nn import LensConfig, LensTransformer
from lensmini.nn.initialise import initial_value
from lensmini.parallel import (
    Checkpointer,
    Group,
    clip_gradients,
    fill_parameters,
    last_microbatch,
    load_tensors,
    make_mesh,
    parameter_copies,
    read_whole,
    replicate_model,
    shard_model,
    stored_shapes,
)
from lensmini.parallel.recompute import Recompute, recompute_blocks

__all__ = ["ShardedState", "Sharding", "consolidate"]

Sharding = Literal["replicate", "hybrid", "full"]


class ShardedState:
    """Float32 weights, average and moments, each rank with its part; arithmetic in ``optim.dtype``.

    Args:
        model_config: of the transformer.
        optim: optimiser settings.
        seed: of the initial weights, which are the same on any mesh.
        group: the job; ``torch.distributed`` must run, with one rank too.
        sharding: "replicate" (DDP), "hybrid" (FSDP2 in groups of ``shard_size``) or "full" (FSDP2).
        shard_size: ranks that share a copy; 0 is the ranks of a node.
        recompute: of :func:`lensmini.parallel.recompute_blocks`.
        compile: compile the blocks.
        prefetch: blocks gathered ahead.
        device: of this rank.
        background: write checkpoints while training goes on.

    Raises:
        ValueError: if a copy of everything does not fit the device ("replicate"), or it is asked to compute in bfloat16.
    """

    def __init__(
        self,
        model_config: LensConfig,
        optim: OptimConfig,
        *,
        seed: int,
        group: Group,
        sharding: Sharding,
        shard_size: int = 0,
        recompute: Recompute = "none",
        compile: bool = False,
        prefetch: int = 1,
        device: torch.device | None = None,
        background: bool = True,
    ) -> None:
        self.optim, self.group, self.background = optim, group, background
        self.device = device or torch.device("cpu")
        with torch.device("meta"):
            self.model = LensTransformer(model_config)
        self.module: nn.Module = self.model
        self.compute: Any = self.model
        blocks = self.model.transformer_blocks
        if sharding == "replicate":
            if optim.dtype != "float32":
                raise ValueError(
                    f'sharding: expected "hybrid" (shard_size 1 keeps a copy on every rank) for {optim.dtype}, got "replicate"'
                )
            recompute_blocks(blocks, recompute)
            if compile:
                self.model.compile_blocks(fullgraph=recompute == "none")
        else:
            size = group.world_size if sharding == "full" else shard_size or None
            mesh = make_mesh(group.world_size, shard=size, device=self.device.type)
            dtype = getattr(torch, optim.dtype)
            shard_model(
                self.model,
                blocks,
                mesh,
                dtype=None if dtype == torch.float32 else dtype,
                recompute=recompute,
                compile=compile,
                prefetch=prefetch,
                methods=("forward_packed",),
            )
        fill_parameters(
            self.model,
            lambda name, shape: initial_value(name, shape, seed=seed, gate=optim.init_gate),
            device=self.device,
        )
        if sharding == "replicate":
            memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
            copies = replicate_model(
                self.model,
                method="forward_packed",
                unused=self.model.unused_parameters(),
                memory_bytes=memory,
            )
            self.module, self.compute = copies, SimpleNamespace(forward_packed=copies, config=model_config)
        self.ema = parameter_copies(self.model)
        parameters = dict(self.model.named_parameters())
        hidden = {n: p for n, p in parameters.items() if optim.muon_lr and n.endswith(HIDDEN_MATRICES)}
        rest = [p for n, p in parameters.items() if n not in hidden]
        options: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {"foreach": True}
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, optim.lr, optim.betas, optim.eps, optim.weight_decay, **options)
        ]
        if hidden:
            self.optimizers.append(Muon(hidden, lr=optim.muon_lr, splits={"qkv.weight": 3}))
        self.step = 0
        self._saver: Checkpointer | None = None

    def begin(self, *, last: bool) -> None:
        """Before each micro-batch of a step: whether it is this rank's last."""
        last_microbatch(self.module, last)

    def accumulate(self) -> None:
        """Gradients add up by themselves."""

    def collect(self, group: Group, numbers: list[float]) -> list[float]:
        """Numbers summed over all processes; gradients have been."""
        return group.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of a step."""
        return clip_gradients(self.model.parameters(), float("inf")).item()

    @torch.no_grad()
    def update(self, num_steps: int) -> dict[str, float]:
        """One optimiser step; returns the gradient's norm and the learning rate."""
        norm = clip_gradients(self.model.parameters(), self.optim.grad_clip)
        factor = learning_rate_factor(self.step, num_steps, self.optim)
        for optimizer, rate in zip(self.optimizers, (self.optim.lr, self.optim.muon_lr), strict=False):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        decay = min(self.optim.ema_decay, (1 + self.step) / (10 + self.step))
        lerp_parameters_(self.ema, dict(self.model.named_parameters()), 1 - decay)
        self.skip()
        return {"grad_norm": norm.item(), "lr": self.optim.lr * factor}

    def skip(self) -> None:
        """Go to the next step without applying this one's gradient."""
        self.model.zero_grad()
        self.step += 1

    def save(
        self, out: Path, config: Any, *, keep: int, plan: str | None = None, notes: Mapping[str, Any] | None = None
    ) -> Path:
        """Begin to write ``out/step-N``; every rank calls it. :meth:`finish` waits."""
        saver = self._checkpointer(out, keep)
        run = {"plan": plan, "config": config_dict(config), "provenance": provenance(), **(notes or {})}
        text = json.dumps(self.model.config.to_dict(), indent=2) + "\n"
        saver.save(self.step, self._tensors(self._moments()), run, config=text)
        return out / f"step-{self.step:06d}"

    def finish(self) -> None:
        """Wait for the last checkpoint."""
        if self._saver is not None:
            self._saver.wait()

    def resume(self, out: Path) -> bool:
        """Continue from the newest checkpoint of ``out``, if there is one, whatever number of ranks wrote it."""
        self.finish()
        found = self._checkpointer(out, 2).latest()
        if found is None:
            return False
        path, self.step = found
        if (path / "model.safetensors").exists():
            raise SettingsError(
                f'{path} is a checkpoint of engine.sharding "none": go on with that, or use --init-from'
            )
        self.model.zero_grad()
        load_tensors(path, self._tensors(self._stored_moments(path)))
        return True

    def load(self, path: Path, *, which: str, optimizer: bool) -> None:
        """Take weights from a checkpoint of either kind, or a released folder; moments only from one of this kind."""
        if (path / f"{which}.safetensors").exists():
            weights = load_file(path / f"{which}.safetensors")
            fill_parameters(self.model, lambda name, shape: weights[name])
        elif (path / "run.json").exists():
            load_tensors(path, {f"{which}.{name}": p for name, p in self.model.named_parameters()})
            if optimizer:
                load_tensors(path, self._stored_moments(path))
        else:
            released = dict(load_transformer(path, dtype=torch.float32).named_parameters())
            fill_parameters(self.model, lambda name, shape: released[name])
        if optimizer and not (path / "run.json").exists():
            raise SettingsError(f"{path}: expected moments of the optimisers, it holds none; start with fresh ones")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.ema[name].copy_(parameter)

    def _checkpointer(self, out: Path, keep: int) -> Checkpointer:
        if self._saver is None or self._saver.folder != Path(out):
            self._saver = Checkpointer(out, self.group, keep=keep, background=self.background)
        self._saver.keep = keep
        return self._saver

    def _tensors(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return weights | {f"ema.{name}": tensor for name, tensor in self.ema.items()} | dict(moments)

    def _moments(self) -> dict[str, Tensor]:
        names: dict[Any, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"optim.{names[parameter]}.{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()  # pyright: ignore
        }

    def _stored_moments(self, path: Path) -> dict[str, Tensor]:
        """Room for the moments that a checkpoint holds, in the optimisers."""
        names: dict[Any, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        stored = stored_shapes(path)
        for optimizer in self.optimizers:
            keys = ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq", "step")
            for parameter in optimizer.param_groups[0]["params"]:
                held = [key for key in ("momentum", "exp_avg") if f"optim.{names[parameter]}.{key}" in stored]
                if held and held[0] != keys[0]:
                    raise SettingsError(
                        f"{path}: expected moments {list(keys)} of {names[parameter]}, got {held[0]}: they are another "
                        "optimiser's; start with fresh ones (--reset-optimizer)"
                    )
                if held:
                    device = parameter.device if self.device.type == "cuda" else "cpu"
                    optimizer.state[parameter] = {
                        key: torch.zeros((), dtype=torch.float32, device=device)
                        if key == "step"
                        else torch.zeros_like(parameter).detach()
                        for key in keys
                    }
        return self._moments()


def consolidate(path: Path, out: Path, which: str = "ema") -> None:
    """Write the whole weights of a sharded checkpoint in the released layout, in one process.

    Args:
        path: ``step-N`` directory of a sharded run.
        out: folder for ``config.json`` and safetensors, as ``load_transformer`` and diffusers read them.
        which: "ema" or "model".
    """
    read_run(path)
    model_config = LensConfig.from_dict(json.loads((path / "config.json").read_text()))
    with torch.device("meta"):
        model = LensTransformer(model_config)
    model.load_state_dict(read_whole(path, f"{which}."), strict=True, assign=True)
    save_transformer(model, out)
