"""The three policies of a run in one model: the trained one, the one that samples, and the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.adapter_state import AdapterState
from experiments.checkpoints import find_checkpoint
from experiments.engine import make_state
from experiments.reinforce_config import ReinforceConfig
from experiments.runs import latest_checkpoint
from experiments.training import TrainingState
from lensmini.averaging import lerp_parameters_
from lensmini.nn import LensConfig, LensTransformer
from lensmini.objectives.policy import nft_decay
from lensmini.parallel import Group

__all__ = ["Policies", "Which"]

Which = Literal["trained", "old", "reference", "ema"]


class Policies:
    """Weights, or low-rank updates, of every policy; the model computes with one of them at a time.

    Args:
        config: of the run.
        group: processes that each have everything.
        model_config: sizes of the transformer, where all weights are trained.
        base: ``step-N`` directory, or a released folder for an adapter.
    """

    def __init__(self, config: ReinforceConfig, group: Group, model_config: LensConfig, base: Path) -> None:
        self.config, self.device = config, config.engine.torch_device()
        state: Any = make_state(
            config.engine,
            model_config,
            config.optim,
            seed=config.run.seed,
            group=group,
            adapter=config.adapter,
            base=base / f"{config.base_weights}.safetensors" if (base / "run.json").exists() else base,
        )
        self.state: TrainingState | AdapterState = state
        if isinstance(state, TrainingState):
            state.load(base, which=config.base_weights, optimizer=False)
            for name, parameter in state.compute.named_parameters():
                chosen = config.objective.trained
                parameter.requires_grad_(not chosen or any(part in name for part in chosen))
        self.model: LensTransformer = state.compute
        self._parameters: dict[str, nn.Parameter] = (
            state.halves if isinstance(state, AdapterState) else dict(state.compute.named_parameters())
        )
        # An adapter whose outer halves are zero is the base, bit for bit: it begins so.
        self.reference = {name: tensor.detach().clone() for name, tensor in self._masters().items()}
        self.old = {name: tensor.detach().clone() for name, tensor in self._masters().items()}

    @property
    def iteration(self) -> int:
        """Rollouts that are done."""
        return self.state.step // self.config.objective.updates

    @contextmanager
    def acting(self, which: Which) -> Iterator[LensTransformer]:
        """The model with another policy's weights; not to be used between a forward of the trained one and its backward."""
        if which == "trained":
            yield self.model
            return
        kept = {name: parameter.data for name, parameter in self._parameters.items()}
        tensors = self._ema() if which == "ema" else getattr(self, which)
        try:
            for name, parameter in self._parameters.items():
                parameter.data = tensors[name].to(parameter.dtype)
            yield self.model
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]

    def follow(self, iteration: int) -> None:
        """Let the sampling policy follow the trained one after a rollout's updates."""
        objective = self.config.objective
        decay = nft_decay(iteration, objective.old_decay) if objective.name == "nft" else 0.0
        lerp_parameters_(self.old, self._masters(), 1 - decay)

    def save(self, notes: dict[str, Any]) -> Path:
        """Write a checkpoint from which the run goes on bit for bit."""
        run = self.config.run
        others = {"old": self.old}
        return self.state.save(run.out, self.config, keep=run.keep_checkpoints, notes=notes, others=others)

    def resume(self) -> Path | None:
        """Go on from the newest checkpoint of the run, if there is one; returns it."""
        found = latest_checkpoint(self.config.run.out)
        if found is None:
            return None
        self.state.resume(self.config.run.out)
        stored = load_file(found[0] / "old.safetensors", device=str(self.device))
        lerp_parameters_(self.old, stored, 1.0)
        return found[0]

    def _masters(self) -> dict[str, Tensor]:
        """The trained policy in float32."""
        state = self.state
        return dict(state.halves) if isinstance(state, AdapterState) else dict(state.model.named_parameters())

    def _ema(self) -> dict[str, Tensor]:
        return self.state.ema if isinstance(self.state, AdapterState) else dict(self.state.ema.named_parameters())


def find_base(path: Path) -> Path:
    """The ``step-N`` directory of a run, or a released folder or repository as it is."""
    released = (path / "model_index.json").exists() or not path.exists()
    return path if released else find_checkpoint(path)
