"""The networks of a distillation run and what its checkpoints hold: student, fake score, frozen teacher, discriminator.

A checkpoint is three directories: ``student/step-N`` and ``fake/step-M`` of the two trained transformers, as their engine
writes them, and last ``step-N``, which makes them one: the head, its moments, ``run.json``, and of a run that is not
sharded the student's weights, so that ``experiments.generate`` paints with it. A kill between the three leaves the
last ``step-N`` in force, and what is newer is thrown away.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.adapter_state import AdapterState
from experiments.checkpoints import find_checkpoint, find_stages, load_checkpoint
from experiments.distill_config import DistillConfig
from experiments.engine import make_state
from experiments.miniature.world import Miniature
from experiments.runs import atomic_directory, config_dict, keep_last, latest_checkpoint, provenance, write_json
from experiments.shard_data import ShardsConfig, load_encoders
from experiments.sharded_state import ShardedState
from experiments.training import SettingsError, TrainingState, read_run
from lensmini.averaging import lerp_parameters_
from lensmini.checkpoints import load_transformer
from lensmini.nn import DiscriminatorHead, LensTransformer
from lensmini.parallel import Group, fill_parameters

__all__ = ["DistillState", "State", "Teacher", "resolved"]

State = TrainingState | ShardedState


class Teacher:
    """The frozen model with the adapter of reinforcement learning merged, and the encoders that belong to it.

    Args:
        config: of the run.
        device: of the model.
    """

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        self.path = _find(config.teacher)
        if (self.path / "run.json").exists():
            self.run: dict[str, Any] = read_run(self.path)
            model, self.world = load_checkpoint(self.path, config.teacher_weights, quiet=True)
        else:
            if not isinstance(config.data, ShardsConfig):
                raise SettingsError(f"teacher: expected a run of the miniature for scenes, got {self.path}")
            self.run = {}
            model = load_transformer(self.path, dtype=torch.float32)
            self.world: Miniature = load_encoders(config.data, model.config, device)
        model = model.float()
        if config.lora is not None:
            from lensmini.checkpoints.lora import load_lora, merge_lora

            merge_lora(model, load_lora(config.lora.expanduser()), scale=config.lora_scale, keep=False)
        blocks = [block for block in config.adversary.blocks if not 0 <= block < model.config.num_layers]
        if config.adversary.weight and blocks:
            raise SettingsError(f"adversary.blocks: expected blocks of {model.config.num_layers}, got {blocks}")
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        """In float32: what student and fake score start from."""
        self.model: LensTransformer = model.to(device, getattr(torch, config.optim.dtype)).requires_grad_(False).eval()


def _find(path: Path | None) -> Path:
    try:
        return find_checkpoint(path)
    except FileNotFoundError:
        if path is None:
            raise
        return path


def resolved(config: DistillConfig, teacher: Teacher) -> dict[str, Any]:
    """The run's settings as its checkpoints keep them: with the teacher's weights named, and its encoders' settings."""
    found = config_dict(config) | {"miniature": find_stages(teacher.path)[0] if teacher.run else None}
    return found | {"teacher": teacher.path.as_posix(), "lora": str(config.lora) if config.lora else None}


class DistillState:
    """Everything that a run trains.

    Args:
        config: of the run.
        teacher: whose weights student and fake score start from.
        group: the job.
    """

    def __init__(self, config: DistillConfig, teacher: Teacher, group: Group) -> None:
        self.config, self.teacher, self.group = config, teacher, group
        self.device, seed = config.engine.torch_device(), config.run.seed
        self.student = self._start(config.optim, seed)
        self.fake = None
        if config.critic.updates:
            follower = {
                "lr": config.critic.lr,
                "ema_decay": 0.0,
                "muon_lr": 0.0,
                "warmup_steps": 0,
                "decay_fraction": 0.0,
            }
            self.fake = self._start(type(config.optim)(**{**_fields(config.optim), **follower}), seed)
        self.head: DiscriminatorHead | None = None
        if config.adversary.weight and config.critic.updates:
            head = DiscriminatorHead(
                teacher.model.config.inner_dim, config.adversary.blocks, hidden_dim=config.adversary.hidden_dim
            )
            self.head = head.init_weights(seed).to(self.device)
            self.head_optimizer = torch.optim.AdamW(
                self.head.parameters(), config.adversary.lr, config.optim.betas, config.optim.eps, 0.0, foreach=True
            )

    def _start(self, optim: Any, seed: int) -> State:
        state = make_state(self.config.engine, self.teacher.model.config, optim, seed=seed, group=self.group)
        assert not isinstance(state, AdapterState)
        weights = self.teacher.weights
        fill_parameters(state.model, lambda name, shape: weights[name])
        if isinstance(state, ShardedState):
            with torch.no_grad():
                for name, parameter in state.model.named_parameters():
                    state.ema[name].copy_(parameter)
        else:
            state.ema.load_state_dict(weights)
            state.refresh()
        return state

    @property
    def step(self) -> int:
        """Updates of the student."""
        return self.student.step

    def update_student(self) -> dict[str, float]:
        """Apply the student's gradient, and let the fake score follow (IDA: ``fake += mu (student - fake)``)."""
        row = self.student.update(self.config.run.steps)
        if self.fake is not None and self.config.critic.ida:
            lerp_parameters_(self.fake.model, self.student.model, self.config.critic.ida)
            if isinstance(self.fake, TrainingState):
                self.fake.refresh()
        return row

    def update_critic(self) -> dict[str, float]:
        """Apply the gradients of the fake score and of the head."""
        assert self.fake is not None
        row = {"fake_grad_norm": self.fake.update(self.config.run.steps * self.config.critic.updates)["grad_norm"]}
        if self.head is not None:
            self.group.sum_(flat := torch.cat([p.grad.flatten() for p in self.head.parameters()]))  # pyright: ignore
            for parameter, piece in zip(
                self.head.parameters(), flat.split([p.numel() for p in self.head.parameters()]), strict=True
            ):
                parameter.grad = piece.view_as(parameter)
            self.head_optimizer.step()
            self.head.zero_grad()
            row["head_grad_norm"] = torch.linalg.vector_norm(flat).item()
        return row

    def save(self, *, plan: str, notes: dict[str, Any]) -> Path:
        """Write a checkpoint; every process calls it."""
        out, keep, config = self.config.run.out, self.config.run.keep_checkpoints, resolved(self.config, self.teacher)
        whole = self.student.save(out / "student", config, keep=keep, plan=plan)
        if self.fake is not None:
            self.fake.save(out / "fake", config, keep=keep, plan=plan)
            self.fake.finish()
        self.student.finish()
        path = out / f"step-{self.step:06d}"
        if self.group.rank == 0:
            student = self.config.student
            sampling = {"num_steps": student.num_steps, "guidance_scale": 1.0, "mu": student.mu, "walk": student.walk}
            with atomic_directory(path) as new:
                if self.head is not None:
                    save_file(_whole(self.head.state_dict()), new / "head.safetensors")
                    save_file(_whole(self._head_moments()), new / "head_optimizer.safetensors")
                for name in ("model.safetensors", "ema.safetensors", "config.json"):
                    if (whole / name).exists():
                        shutil.copyfile(whole / name, new / name)
                run = {"step": self.step, "plan": plan, "config": config, "sampling": sampling, **notes}
                write_json(new / "run.json", {**run, "provenance": provenance()})
            keep_last(out, keep)
        self.group.gather(None)
        return path

    def resume(self) -> dict[str, Any]:
        """Go on from the newest whole checkpoint; its ``run.json``, empty at a run's beginning."""
        out, found = self.config.run.out, latest_checkpoint(self.config.run.out)
        step = found[1] if found else 0
        if self.group.rank == 0:
            _drop_newer(out / "student", step)
            _drop_newer(out / "fake", step * self.config.critic.updates)
        self.group.gather(None)
        if found is None:
            return {}
        self.student.resume(out / "student")
        if self.fake is not None:
            self.fake.resume(out / "fake")
        if self.step != step:
            raise SettingsError(
                f"{found[0]}: expected student/step-{step:06d} beside it, the newest there is {self.step}"
            )
        if self.head is not None:
            self.head.load_state_dict(load_file(found[0] / "head.safetensors"))
            moments = load_file(found[0] / "head_optimizer.safetensors")
            for name, parameter in self.head.named_parameters():
                keys = [key for key in moments if key.rpartition(".")[0] == name]
                self.head_optimizer.state[parameter] = {key.rpartition(".")[2]: moments[key] for key in keys}
        return json.loads((found[0] / "run.json").read_text())

    def _head_moments(self) -> dict[str, Tensor]:
        assert self.head is not None
        return {
            f"{name}.{key}": value
            for name, parameter in self.head.named_parameters()
            for key, value in self.head_optimizer.state.get(parameter, {}).items()
        }


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _drop_newer(out: Path, step: int) -> None:
    """Remove what a killed run wrote after its last whole checkpoint."""
    while (found := latest_checkpoint(out)) is not None and found[1] > step:
        shutil.rmtree(found[0])
