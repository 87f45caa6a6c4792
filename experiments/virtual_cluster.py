"""128 ranks on one machine: what each would hold, send and compute in the paper's two stages, before any is rented.

    python -m experiments.virtual_cluster stage2                 27 buckets, 24 / 10 / 6 images a rank
    python -m experiments.virtual_cluster packed                 the same samples in packed slots of equal work
    python -m experiments.virtual_cluster stage1

Three parts. Rehearsed: the real blocks at reduced depth are built, sharded and stepped once by torch's fake process group, as
HSDP and as FSDP; shard sizes and collectives are counted and compared with the formula. Planned: the real order of samples,
slot by slot, gives each rank's FLOPs. Modelled, and only modelled: seconds of a step, the slowest rank's FLOPs at an assumed
utilisation plus a launch overhead, against bytes over bandwidths. Stragglers, contention and storage are not in it.
Takes about half a minute on two cores; writes ``virtual_cluster.json`` and ``.png`` into ``--out``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from experiments.runs import provenance, write_json
from lensmini.cost import parameter_count, train_flops
from lensmini.data import LENS_BUCKETS, BatchPlan, Bucket
from lensmini.nn import LensConfig, LensTransformer
from lensmini.packed import Layout
from lensmini.parallel import fill_parameters, make_mesh, shard_model
from lensmini.parallel.rehearsal import count_collectives, expected_collectives, local_elements, rehearsal_job

__all__ = ["ClusterRun", "main", "model_steps", "packed", "rehearse", "stage1", "stage2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRun:
    """One rehearsal."""

    model: LensConfig = field(default_factory=LensConfig)
    """The transformer."""
    buckets: tuple[Bucket, ...] = LENS_BUCKETS
    """Resolutions, all equally frequent in the data."""
    images_per_rank: tuple[int, ...] = (24, 10, 6)
    """Images of a slot: one number, or one for each base resolution."""
    packed: bool = False
    """Slots of mixed shapes and equal work, with the mean of ``images_per_rank`` images."""
    ranks: int = 128
    """GPUs."""
    shard: int = 8
    """Ranks that share a copy: a node."""
    gpus_per_node: int = 8
    """GPUs with fast links between them, and a network card each."""
    blocks: int = 2
    """Blocks that are really built for the rehearsal."""
    steps: int = 400
    """Steps of the plan that are looked at."""
    text_tokens: int = 150
    """Text tokens of a caption: assumed the same for all."""
    peak_tflops: float = 312.0
    """Of a GPU: A100, dense bfloat16."""
    utilisation: float = 0.45
    """Assumed share of the peak that computing reaches, recomputation counted as work."""
    recompute: bool = True
    """Whether blocks' forwards are repeated, as on 80 GB they must be."""
    launch_ms: float = 30.0
    """Assumed overhead of a step that no computing hides."""
    node_gb_per_s: float = 300.0
    """Assumed bandwidth of a GPU inside a node."""
    network_gb_per_s: float = 25.0
    """Assumed bandwidth of a GPU to other nodes."""
    out: Path = Path("runs/virtual_cluster")
    """Where table and figure go."""

    def __post_init__(self) -> None:
        for name in ("ranks", "shard", "blocks", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.ranks % self.shard:
            raise ValueError(f"shard: expected a divisor of ranks = {self.ranks}, got {self.shard}")
        for name in ("peak_tflops", "utilisation", "node_gb_per_s", "network_gb_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


def stage1() -> ClusterRun:
    """The paper's 512x512 stage: 24 images a rank."""
    return ClusterRun(buckets=(Bucket(512, 512),), images_per_rank=(24,))


def stage2() -> ClusterRun:
    """The paper's 27 buckets, one a rank and step, each base in as many slots."""
    return ClusterRun()


def packed() -> ClusterRun:
    """The same images as stage 2, mixed inside each rank so that all ranks take equally long."""
    return ClusterRun(packed=True)


def rehearse(config: ClusterRun, shard: int) -> dict[str, Any]:
    """Build, shard and step the model's first blocks on pretended ranks; sizes and collectives against the formula.

    Raises:
        RuntimeError: if a shard or a count is not what the formula says.
    """
    model_config = replace(config.model, num_layers=config.blocks)
    with rehearsal_job(config.ranks):
        with torch.device("meta"):
            model = LensTransformer(model_config)
        mesh = make_mesh(config.ranks, shard=shard, device="cpu")
        shard_model(model, model.transformer_blocks, mesh, dtype=torch.bfloat16, methods=("forward_packed",))
        fill_parameters(model, lambda name, shape: torch.zeros(shape))
        for name, (mine, whole) in local_elements(model).items():
            rows = dict(model.named_parameters())[name].shape[0]
            # The first rank has the largest part: rows are dealt in equal chunks, the last ones shorter or empty.
            if mine != -(-rows // shard) * (whole // rows):
                raise RuntimeError(
                    f"{name}: expected {-(-rows // shard)} of {rows} rows on the first rank, got {mine} elements"
                )
        layout = Layout.build([(4, 4), (2, 6)], text_lengths=[5, 3])
        text = torch.randn(8, model_config.num_text_layers, model_config.enc_hidden_dim)
        image, times = torch.randn(28, model_config.in_channels), torch.tensor([0.2, 0.7])

        def step() -> None:
            velocity = model.forward_packed(image, times, text, layout)
            assert isinstance(velocity, torch.Tensor)
            velocity.square().sum().backward()

        counts = count_collectives(step)
        torch.optim.AdamW(model.parameters(), foreach=True).step()
        held = sum(mine for mine, _ in local_elements(model).values())
    expected = expected_collectives(config.blocks, config.ranks, shard)
    if counts != expected:
        raise RuntimeError(f"collectives: expected {expected}, counted {counts}")
    return {"shard": shard, "blocks": config.blocks, "counts": counts, "elements_held": held}


def traffic(config: ClusterRun, shard: int) -> dict[str, float]:
    """GB that one GPU sends in a step, by ring collectives: bfloat16 weights twice, float32 gradients once."""
    count, copies = parameter_count(config.model), config.ranks // shard
    gathered = 2 * 2 * count * (shard - 1) / shard + 4 * count * (shard - 1) / shard
    summed = 2 * 4 * count / shard * (copies - 1) / copies
    # Rings that leave a node do so once in as many hops as it has GPUs, each ring by another card.
    leaving = 0.0 if shard <= config.gpus_per_node else 1 / config.gpus_per_node
    node, network = gathered * (1 - leaving), gathered * leaving + summed
    seconds = node / config.node_gb_per_s / 1e9 + network / config.network_gb_per_s / 1e9
    return {"node_gb": node / 1e9, "network_gb": network / 1e9, "seconds": seconds}


def make_plan(config: ClusterRun) -> BatchPlan:
    """The order of samples of a million per bucket."""
    base = [round((bucket.height * bucket.width) ** 0.5 / 256) for bucket in config.buckets]
    place = [sorted(set(base)).index(value) for value in base]
    several = len(config.images_per_rank) > 1
    options: dict[str, Any] = {"images_per_slot": config.images_per_rank[0]}
    if several:
        options = {
            "images_per_slot": [config.images_per_rank[index] for index in place],
            "sources": place,
            "weights": config.images_per_rank,
        }
    if config.packed:
        options["images_per_slot"] = round(float(np.mean(config.images_per_rank)))
    return BatchPlan(
        [1_000_000] * len(config.buckets),
        [bucket.tokens() for bucket in config.buckets],
        num_slots=config.ranks,
        seed=0,
        mode="packed" if config.packed else "bucket",
        text_tokens=config.text_tokens,
        model=config.model,
        **options,
    )


def model_steps(config: ClusterRun) -> dict[str, Any]:
    """Every rank's work over some steps, from the plan; seconds of each step, from the model."""
    plan = make_plan(config)
    tokens = np.array([bucket.tokens() for bucket in config.buckets])
    price = train_flops(config.model, tokens, np.full(len(tokens), config.text_tokens))
    work = np.zeros((config.steps, config.ranks))
    images = np.zeros((config.steps, config.ranks), np.int64)
    for index in range(config.steps):
        step = plan.step(index)
        for rank in range(config.ranks):
            buckets = step.slot(rank) // 1_000_000
            work[index, rank], images[index, rank] = price[buckets].sum(), len(buckets)
    factor = 4 / 3 if config.recompute else 1.0
    compute = work.max(1) * factor / (config.peak_tflops * 1e12 * config.utilisation)
    sending = traffic(config, config.shard)["seconds"]
    seconds = np.maximum(compute, sending) + config.launch_ms / 1e3
    model_flops = work.sum() / seconds.sum() / config.ranks / (config.peak_tflops * 1e12)
    return {
        "balance": float(work.mean() / work.max(1).mean()),
        "images_per_step": float(images.sum(1).mean()),
        "images_per_rank": [int(images.min()), int(images.max())],
        "tflop_per_rank": [float(work.min() / 1e12), float(work.mean() / 1e12), float(work.max() / 1e12)],
        "seconds_per_step": float(seconds.mean()),
        "images_per_second": float(images.sum() / seconds.sum()),
        "model_mfu": float(model_flops),
        "days_of_400k_steps": float(seconds.mean() * 400_000 / 86_400),
        "rank_seconds": (work[0] * factor / (config.peak_tflops * 1e12 * config.utilisation)).tolist(),
    }


def draw(config: ClusterRun, result: dict[str, Any], path: Path) -> None:
    """Seconds of every rank in the first step, and what sending takes beside computing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    seconds = result["steps"]["rank_seconds"]
    left.bar(range(len(seconds)), sorted(seconds), width=1.0, color="#4878a8")
    left.axhline(float(np.mean(seconds)), color="#b04030", linewidth=1, label="mean")
    left.set(xlabel="rank, sorted", ylabel="seconds of computing (model)", title=f"one step on {config.ranks} ranks")
    left.legend(frameon=False)
    names = [f"shard {row['shard']}" for row in result["layouts"]]
    for offset, key in ((-0.2, "node_gb"), (0.2, "network_gb")):
        values = [row["traffic"][key] for row in result["layouts"]]
        bars = right.bar([place + offset for place in range(len(names))], values, width=0.38)
        right.bar_label(bars, fmt="%.1f")
        bars.set_label("inside the node" if key == "node_gb" else "to other nodes")
    right.set_xticks(range(len(names)), names)
    right.set(ylabel="GB sent by a GPU per step", title="traffic of the whole model")
    right.margins(y=0.3)
    right.legend(frameon=False, loc="upper center", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: ClusterRun) -> dict[str, Any]:
    """Rehearse, plan, model; print and write."""
    layouts = []
    for shard in dict.fromkeys((config.shard, config.ranks)):
        layouts.append({**rehearse(config, shard), "traffic": traffic(config, shard)})
    result: dict[str, Any] = {"layouts": layouts, "steps": model_steps(config)}
    count, steps = parameter_count(config.model), result["steps"]
    print(
        f"{config.ranks} ranks, {count:,} parameters; {config.blocks} blocks of width {config.model.inner_dim} rehearsed"
    )
    print("layout      state a GPU   collectives of a step (whole model)     GB in node  across  seconds")
    for row in layouts:
        whole = expected_collectives(config.model.num_layers, config.ranks, row["shard"])
        told = ", ".join(f"{number} {kind}" for kind, number in whole.items())
        sent = row["traffic"]
        print(
            f"shard {row['shard']:4d} {20 * count / row['shard'] / 1e9:9.2f} GB   {told:54s}"
            f"{sent['node_gb']:7.1f} {sent['network_gb']:7.1f} {sent['seconds']:8.2f}"
        )
    least, most = steps["images_per_rank"]
    print(f"images      {steps['images_per_step']:,.0f} a step, {least} to {most} a rank")
    print(
        "TFLOP       {:.0f} to {:.0f} a rank and step, mean {:.0f}".format(
            *(steps["tflop_per_rank"][i] for i in (0, 2, 1))
        )
    )
    print(f"balance     {steps['balance']:.3f} (mean over slowest rank, {config.steps} steps of the real plan)")
    print(
        f"MODEL       {steps['seconds_per_step']:.2f} s a step, {steps['images_per_second']:,.0f} images/s, model MFU "
        f"{steps['model_mfu']:.1%}, 400K steps in {steps['days_of_400k_steps']:.1f} days"
    )
    print(
        f"ASSUMED     {config.utilisation:.0%} of {config.peak_tflops:g} TFLOP/s, {config.launch_ms:g} ms a step, "
        f"{config.node_gb_per_s:g} and {config.network_gb_per_s:g} GB/s, {config.text_tokens} text tokens,\n"
        "            features ready. No stragglers, contention or storage."
    )
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "virtual_cluster.json", {**result, "config": config, "provenance": provenance()})
    draw(config, result, config.out / "virtual_cluster.png")
    return result


PRESETS: tuple[Callable[[], ClusterRun], ...] = (stage1, stage2, packed)


if __name__ == "__main__":
    choices = {make.__name__: (make.__doc__ or "", make()) for make in PRESETS}
    main(tyro.extras.overridable_config_cli(choices, prog="python -m experiments.virtual_cluster"))
