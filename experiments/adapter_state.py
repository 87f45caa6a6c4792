"""The state of a fine-tuning run: frozen released weights in low precision, and low-rank updates (LoRA) that are trained."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.runs import atomic_directory, keep_last, latest_checkpoint, provenance, write_json
from experiments.training import OptimConfig, SettingsError, learning_rate_factor
from lensmini.averaging import lerp_parameters_
from lensmini.checkpoints import LoRA, LoRALayer, load_transformer, save_lora
from lensmini.data.permute import derive_key
from lensmini.parallel import Group, clip_gradients, recompute_blocks
from lensmini.parallel.recompute import Recompute

__all__ = ["AdapterConfig", "AdapterState"]

TARGETS = ("img_qkv", "txt_qkv", "to_out.0", "to_add_out", "w1", "w2", "w3")
"""Linears that an adapter updates: all of the blocks' per-token work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank updates ``alpha / rank * B A`` (arXiv 2106.09685) of the blocks' linears."""

    rank: int = 0
    """Rank; 0 trains all weights instead."""
    alpha: float = 128.0
    """Scale times rank."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 < self.alpha < float("inf"):
            raise ValueError(f"rank, alpha: expected at least 0 and a positive number, got {self.rank}, {self.alpha}")


class AdapterState:
    """What :class:`experiments.training.TrainingState` is, for an adapter; needs the extra ``lensmini[lora]``.

    Args:
        base: released weights: a folder, a file or a Hub repository.
        adapter: rank and scale.
        optim: optimiser settings; Muon is not used.
        seed: of the updates' inner halves; the outer ones begin at zero, so that the model begins as released.
        group: processes that each have everything.
        device: where to train.
        recompute: of :func:`lensmini.parallel.recompute_blocks`.
    """

    def __init__(
        self,
        base: Path,
        adapter: AdapterConfig,
        optim: OptimConfig,
        *,
        seed: int,
        group: Group,
        device: torch.device,
        recompute: Recompute = "none",
    ) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("training an adapter needs peft: install lensmini[lora]") from error
        self.adapter, self.optim, self.group, self.device = adapter, optim, group, device
        model = load_transformer(base, dtype=getattr(torch, optim.dtype), device=device).requires_grad_(False)
        dead = {name.rpartition(".")[0] for name in model.unused_parameters()}
        paths = [name for name, _ in model.named_modules() if name.endswith(TARGETS) and name not in dead]
        settings = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=paths)  # pyright: ignore
        inject_adapter_in_model(settings, model)
        self.compute: Any = model
        self.halves = {name: p for name, p in model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for number, (name, half) in enumerate(sorted(self.halves.items())):
                half.data = half.data.float().zero_()
                if "lora_A" in name:
                    generator = torch.Generator().manual_seed(int(derive_key(seed, number)) % 2**63)
                    bound = 1 / math.sqrt(half.shape[1])
                    half.copy_(torch.empty(half.shape).uniform_(-bound, bound, generator=generator))
        recompute_blocks(model.transformer_blocks, recompute)
        self.ema = {name: half.detach().clone() for name, half in self.halves.items()}
        self.optimizer = torch.optim.AdamW(
            self.halves.values(), optim.lr, optim.betas, optim.eps, optim.weight_decay, foreach=True
        )
        self.step = 0

    def begin(self, *, last: bool) -> None:
        """Nothing to do before a micro-batch."""

    def accumulate(self) -> None:
        """Gradients add up by themselves, in float32."""

    def finish(self) -> None:
        """Nothing is written in the background."""

    def collect(self, group: Group, numbers: list[float]) -> list[float]:
        """Numbers and gradients summed over all processes."""
        halves = list(self.halves.values())
        for half in halves:
            half.grad = torch.zeros_like(half) if half.grad is None else half.grad
        if group.world_size > 1:
            flat = group.sum_(torch.cat([half.grad.reshape(-1) for half in halves]))  # pyright: ignore
            for half, part in zip(halves, flat.split([half.numel() for half in halves]), strict=True):
                half.grad = part.view_as(half)
        return group.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of a step."""
        return clip_gradients(self.halves.values(), float("inf")).item()

    @torch.no_grad()
    def update(self, num_steps: int) -> dict[str, float]:
        """One optimiser step; returns the gradient's norm and the learning rate."""
        norm = clip_gradients(self.halves.values(), self.optim.grad_clip)
        rate = self.optim.lr * learning_rate_factor(self.step, num_steps, self.optim)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        decay = min(self.optim.ema_decay, (1 + self.step) / (10 + self.step))
        lerp_parameters_(self.ema, dict(self.halves), 1 - decay)
        self.skip()
        return {"grad_norm": norm.item(), "lr": rate}

    def skip(self) -> None:
        """Go to the next step without applying this one's gradient."""
        self.optimizer.zero_grad()
        self.step += 1

    def lora(self, which: str = "ema") -> LoRA:
        """The adapter, as :func:`lensmini.checkpoints.merge_lora` takes it."""
        halves: Mapping[str, Tensor] = self.ema if which == "ema" else self.halves
        layers = {}
        for name, down in halves.items():
            if "lora_A" in name:
                path = name.partition(".lora_A")[0]
                up = halves[name.replace("lora_A", "lora_B")]
                layers[path] = LoRALayer(down.detach().cpu(), up.detach().cpu(), self.adapter.alpha)
        return LoRA(layers)

    def save(
        self,
        out: Path,
        config: Any,
        *,
        keep: int,
        plan: str | None = None,
        notes: Mapping[str, Any] | None = None,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Path:
        """Write ``out/step-N`` with ``adapter.safetensors``, the averaged adapter for ``generate --lora``."""
        path = out / f"step-{self.step:06d}"
        if self.group.rank:
            return path
        names: dict[Any, str] = {half: name for name, half in self.halves.items()}
        moments = {
            f"{names[half]}.{key}": value
            for half, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        with atomic_directory(path) as new:
            save_lora(self.lora(), new / "adapter.safetensors")
            save_file(
                {name: half.detach().contiguous() for name, half in self.halves.items()}, new / "model.safetensors"
            )
            save_file(self.ema, new / "ema.safetensors")
            save_file(moments, new / "optimizer.safetensors")
            for name, tensors in (others or {}).items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / f"{name}.safetensors")
            write_json(new / "config.json", self.compute.config.to_dict())
            run = {"step": self.step, "plan": plan, "config": config, "provenance": provenance(), **(notes or {})}
            write_json(new / "run.json", run)
        keep_last(out, keep)
        return path

    @torch.no_grad()
    def resume(self, out: Path) -> bool:
        """Continue from the newest checkpoint of ``out``, if there is one."""
        found = latest_checkpoint(out)
        if found is None:
            return False
        path, self.step = found
        if not (path / "adapter.safetensors").exists():
            raise SettingsError(
                f"{path}: expected a checkpoint of an adapter, got {json.dumps(sorted(p.name for p in path.iterdir()))}"
            )
        stored = {name: load_file(path / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
        self.optimizer.zero_grad()
        for name, half in self.halves.items():
            half.copy_(stored["model"][name])
            self.ema[name].copy_(stored["ema"][name])
            moments = stored["optimizer"]
            state = {
                key: moments[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step") if f"{name}.{key}" in moments
            }
            if state:
                self.optimizer.state[half] = {
                    key: value.to(self.device) if key != "step" else value for key, value in state.items()
                }
        return True

    def load(self, path: Path, *, which: str, optimizer: bool) -> None:
        """Never: the base is loaded from the start."""
        raise SettingsError(f"{path}: an adapter starts from init_from's weights alone")
