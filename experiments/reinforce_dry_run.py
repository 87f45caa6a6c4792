"""What an RL run would be, without running it: config, parameters, memory, FLOPs, pictures and questions."""

import json
from typing import Any

from experiments import estimate_rows as counts
from experiments.estimate_rl import RlEstimateConfig, rl_costs, rl_table
from experiments.reinforce_config import ReinforceConfig
from experiments.reinforce_state import find_base
from experiments.runs import config_dict
from lensmini.cost import activation_bytes
from lensmini.nn import LensConfig

__all__ = ["describe_run"]


def describe_run(config: ReinforceConfig) -> str:
    """The report of ``--dry-run``; the sizes of a base that is not there are the released ones."""
    scenes = config.prompts.source == "scenes"
    sizes = (find_base(config.base) if config.base.exists() else config.base) / "config.json"
    model = LensConfig.from_dict(json.loads(sizes.read_text())) if sizes.is_file() else LensConfig()
    text, side = (45, 4) if scenes else (150, 16)
    estimate = RlEstimateConfig(rl=config, model=model, text_tokens=text, downsample=side)
    costs, recompute = rl_costs(estimate), config.engine.recompute
    tokens = max(h * w for h, w in config.rollout.canvases) // side**2
    wide = 2 if config.optim.dtype == "bfloat16" else 4
    options: dict[str, Any] = {"dtype_bytes": wide, "recompute": recompute}
    held = config.rollout.chunk * float(activation_bytes(model, tokens, text, **options))
    # Weight, gradient, two moments, average, old policy and reference, in float32.
    state = 7 * 4 * costs["trained"]
    frozen = wide * costs["parameters"] if config.adapter.rank else 0.0
    encoders = 0.0 if scenes else 1e9 * counts.CLUSTERS["a100_80gb"].encoder_gb
    lines = [
        json.dumps(config_dict(config), indent=2),
        "",
        rl_table(estimate),
        f"memory of a process: {state / 1e9:.2f} GB for what is trained (7 x 4 bytes each), {frozen / 1e9:.2f} GB frozen, "
        f"{encoders / 1e9:.0f} GB encoders, {held / 1e9:.2f} GB activations of {config.rollout.chunk} pictures ({recompute} "
        f"recomputed)",
    ]
    return "\n".join(lines)
