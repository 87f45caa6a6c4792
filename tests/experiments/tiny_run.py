"""Pre-training of a second, and ways to end it at a chosen moment: ``python -m tests.experiments.tiny_run OUT [STRIKE]``.

A strike is ``WHO:SIGNAL:WHERE:COUNT``: at the COUNT-th time that the run gets to WHERE, WHO gets the signal. WHO is "parent",
the rank of a worker, or "all"; the places are those of :data:`PLACES`. Under ``torchrun`` STRIKE is a list, joined by commas,
of which each start of the job takes the next one, and ``TINY_SHARDING`` names the engine.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import pretrain, runs, sharded_state, training
from experiments.engine import EngineConfig
from experiments.folder_data import FolderConfig
from experiments.miniature.autoencoder import smallest_autoencoder, train_autoencoder
from experiments.miniature.language_model import smallest_language_model, train_language_model
from experiments.miniature.world import MiniatureConfig
from experiments.pretrain import EvalConfig, PretrainConfig
from experiments.pretrain_data import SceneConfig
from experiments.runs import RunConfig, cached_stage
from experiments.training import OptimConfig
from lensmini.nn import LensConfig
from lensmini.parallel import Group

MINIATURE = MiniatureConfig(
    language_model=smallest_language_model(), autoencoder=smallest_autoencoder(), layers=(0, 1), strict=False
)
MODEL = LensConfig(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=MINIATURE.language_model.hidden_size,
    selected_layer_index=(0, 1),
)
SCENES = SceneConfig(
    num_captions=30, pictures_per_caption=2, num_held_out=5, batch_size=8, canvases=((16, 16), (16, 24))
)
PLACES = ("update", "row", "file", "before-name", "after-name", "clean")
SHARDED_PLACES = ("update", "save")
"""Before a step's update; within a row of the metrics; after a file of a checkpoint; around the rename that makes it
appear; before older ones go."""


def tiny_config(
    out: Path, *, steps: int = 20, processes: int = 2, data: SceneConfig | FolderConfig = SCENES
) -> PretrainConfig:
    """A run of the smallest size that does everything."""
    return PretrainConfig(
        model=MODEL,
        data=data,
        optim=OptimConfig(lr=5e-3, muon_lr=1e-2, warmup_steps=2, decay_fraction=0.5, init_gate=0.1, ema_decay=0.9),
        run=RunConfig(
            out=out, steps=steps, seed=3, log_every=1, checkpoint_every=3, sample_every=8, processes=processes
        ),
        eval=EvalConfig(validate_every=4, score_every=7, num_prompts=6, num_steps=2),
        miniature=MINIATURE,
    )


def prepare(root: Path) -> None:
    """Make the language model and the autoencoder in this process."""
    for name, part, train in (
        ("language-model", MINIATURE.language_model, train_language_model),
        ("autoencoder", MINIATURE.autoencoder, train_autoencoder),
    ):
        cached_stage(root, name, part, partial(_train, train, part), quiet=True)


def _train(train: Any, part: Any, directory: Path) -> None:
    train(part, directory, strict=False, progress=partial(runs.progress, rank=1))


@dataclass(frozen=True)
class Strike:
    who: str
    number: int
    where: str
    count: int

    @classmethod
    def parse(cls, text: str) -> "Strike":
        who, number, where, count = text.split(":")
        assert where in PLACES + SHARDED_PLACES
        return cls(who, int(getattr(signal, f"SIG{number}")), where, int(count))

    def hit(self, processes: int) -> None:
        """Send the signal; a kill is waited for, so that nothing is done after it."""
        os.kill(os.getpid() if self.who != "parent" or processes == 1 else os.getppid(), self.number)
        time.sleep(30 if self.number == signal.SIGKILL else 0.5)


def struck_train(group: Group, config: PretrainConfig, strike: Strike) -> None:
    """Train until it strikes."""
    seen = 0

    def arrive() -> None:
        nonlocal seen
        seen += 1
        if seen == strike.count:
            strike.hit(group.world_size)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            arrive()
            return function(*arguments, **options)

        return wrapped

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            arrive()
            return result

        return wrapped

    def torn_row(path: Path, row: Any) -> None:
        nonlocal seen
        seen += path.name == "metrics.jsonl"
        if seen == strike.count and path.name == "metrics.jsonl":
            with path.open("a") as file:
                file.write('{"step": 1, "lo')
            strike.hit(group.world_size)
        runs.append_jsonl(path, row)

    # Only the first process writes; the others can be struck before an update.
    if strike.who in ("all", str(group.rank)) and config.engine.sharding != "none":
        name = {"update": "update", "save": "save"}[strike.where]
        # Within a background save the files are half written: it is struck once the save has begun.
        wrap = before if strike.where == "update" else after
        setattr(sharded_state.ShardedState, name, wrap(getattr(sharded_state.ShardedState, name)))
    elif strike.who in ("parent", str(group.rank)) and (strike.who != "parent" or group.rank == 0):
        if strike.where == "update":
            training.TrainingState.update = before(training.TrainingState.update)
        elif strike.where == "row":
            pretrain.append_jsonl = torn_row
        elif strike.where == "file":
            training.save_file = after(training.save_file)
        elif strike.where == "clean":
            training.keep_last = before(training.keep_last)
        else:
            take = runs._take_name
            runs._take_name = before(take) if strike.where == "before-name" else after(take)
    pretrain_train(group, config)


pretrain_train = pretrain.train


def run(out: Path, strike: str | None = None, *, processes: int = 2, fork: bool = False) -> None:
    """One launch of the run, as the script would do it.

    Args:
        out: directory of the run.
        strike: how it ends.
        processes: workers.
        fork: start workers from this process rather than afresh, which spares them the imports.
    """
    torch.set_num_threads(1)
    if fork:
        torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="fork")
    if strike is not None:
        pretrain.train = partial(_struck, strike=Strike.parse(strike))
    pretrain.main(tiny_config(out, processes=processes))


def _struck(group: Group, config: PretrainConfig, *, strike: Strike) -> None:
    struck_train(group, config, strike)


def run_again(out: Path, strikes: str) -> None:
    """One start of a job under torchrun."""
    torch.set_num_threads(1)
    wanted = strikes.split(",") if strikes else []
    number = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if number < len(wanted):
        pretrain.train = partial(_struck, strike=Strike.parse(wanted[number]))
    config = tiny_config(out)
    engine = EngineConfig(sharding=os.environ["TINY_SHARDING"], recompute="selective")  # pyright: ignore
    pretrain.main(replace(config, engine=engine))


if __name__ == "__main__":
    # Under its own name, so that workers find the functions where they were pickled.
    from tests.experiments import tiny_run

    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        tiny_run.run_again(Path(sys.argv[1]), *sys.argv[2:3])
    else:
        tiny_run.run(Path(sys.argv[1]), *sys.argv[2:3])
