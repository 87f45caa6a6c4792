"""What a training run costs before a GPU is rented: FLOPs, memory, traffic, days and GPU-hours.

Reproduces the accounting of arXiv 2605.21573 (192K A100-hours, 19.3 % of Z-Image's) with its assumptions visible, from the
counts of ``lensmini.cost``. On a laptop, in seconds; the run itself may need anything from one GPU to a cluster.

    python -m experiments.estimate paper                                    both stages on 128 A100
    python -m experiments.estimate stage2 --cluster.gpu h200 --cluster.gpus 64
    python -m experiments.estimate lab_8gpu --cluster.mfu 0.35              a 0.6B model on 8 A100 in two days
    python -m experiments.estimate finetune_24gb                            LoRA of the released model on one RTX 4090
    python -m experiments.estimate lens_rl                                  the paper's RL: pictures, judge calls, GPU-hours

Bytes and FLOPs are counted; seconds follow from an ASSUMED share of the peak. ``--out DIR`` writes ``DIR/estimate.json``.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tyro

from experiments import estimate_rl
from experiments import estimate_rows as counts
from experiments.estimate_rl import RlEstimateConfig, lens_rl
from experiments.estimate_rows import EstimateConfig, RentConfig, Sharding, StageConfig, TrainConfig
from experiments.runs import provenance, write_json
from lensmini.cost import operation_flops, parameter_count, train_flops
from lensmini.data import Bucket
from lensmini.nn import LensConfig

PAPER_GPU_HOURS, PAPER_GPUS, PAPER_STEPS, PAPER_IMAGES = 192_000, 128, 400_000, (24, 10, 6)
Z_IMAGE_GPU_HOURS = 314_000
"""Stated by arXiv 2605.21573: A100 hours, A100s, steps of each stage, images a GPU at 512 (3072 / 128), 768 and 1024;
H800 hours of Z-Image, whose peak is an H100's."""


def toy_1b_model() -> LensConfig:
    """1.21B parameters, heads of 64: 36 blocks, width 960; the paper's Lens-Toy has 1.2B but no published shape."""
    return LensConfig(num_layers=36, num_attention_heads=15, attention_head_dim=64, axes_dims_rope=(8, 28, 28))


def lab_model() -> LensConfig:
    """0.61B parameters, heads of 64: 28 blocks of half the released width, 768."""
    return LensConfig(num_layers=28, num_attention_heads=12, attention_head_dim=64, axes_dims_rope=(8, 28, 28))


def stage1() -> EstimateConfig:
    """The paper's 512x512 stage: 400K steps of 3072 images on 128 A100."""
    low = StageConfig(name="stage1", images_per_gpu=PAPER_IMAGES[:1], images=PAPER_STEPS * PAPER_GPUS * PAPER_IMAGES[0])
    train = TrainConfig(recompute="full")  # "Gradient checkpointing"; sharding and where encoders ran are not stated.
    return EstimateConfig(stages=(low,), train=train, cluster=RentConfig(gpus=PAPER_GPUS))


def stage2() -> EstimateConfig:
    """The paper's 27 buckets: 400K steps of 24, 10 or 6 images a GPU; bases equally often is our assumption."""
    bases, images = (512, 768, 1024), round(PAPER_STEPS * PAPER_GPUS * sum(PAPER_IMAGES) / len(PAPER_IMAGES))
    high = StageConfig(name="stage2", bases=bases, images_per_gpu=PAPER_IMAGES, aspects="all", images=images)
    return replace(stage1(), stages=(high,))


def paper() -> EstimateConfig:
    """Both stages of the paper, and its accounting of 192K A100-hours."""
    return replace(stage1(), stages=stage1().stages + stage2().stages)


def toy_1b() -> EstimateConfig:
    """A 1.2B backbone for ablations: 120K steps of 2048 images at 256x256 on 32 A100 (ours; the paper states neither)."""
    stage = StageConfig(name="toy", bases=(256,), images_per_gpu=(64,), images=120_000 * 2048)
    return EstimateConfig(stages=(stage,), model=toy_1b_model(), cluster=RentConfig(gpus=32))


def lab_8gpu() -> EstimateConfig:
    """A 0.6B model in two days on 8 A100 at 40 %: 256x256, then 512x512, three million pictures encoded once."""
    low = StageConfig(name="256", bases=(256,), images_per_gpu=(64,), images=130_000_000)
    high = StageConfig(name="512", bases=(512,), images_per_gpu=(24,), images=36_000_000)
    train = TrainConfig(sharding="ddp", encoders="precomputed", distinct_images=3_000_000)
    return EstimateConfig(stages=(low, high), model=lab_model(), train=train, cluster=RentConfig(mfu=0.40))


def finetune_24gb() -> EstimateConfig:
    """LoRA of rank 64 on the frozen bfloat16 3.8B model at 512x512, features precomputed, one RTX 4090."""
    stage = StageConfig(name="finetune", images_per_gpu=(4,), images=80_000)
    frozen = TrainConfig(sharding="ddp", recompute="full", lora_rank=64, average=False)
    train = replace(frozen, encoders="precomputed", distinct_images=2_000)
    return EstimateConfig(stages=(stage,), train=train, cluster=RentConfig(gpu="rtx4090", gpus=1))


PRESETS: tuple[Callable[[], EstimateConfig], ...] = (stage1, stage2, paper, toy_1b, lab_8gpu, finetune_24gb)


def traffic(config: EstimateConfig, sharding: Sharding) -> dict[str, tuple[float, float]]:
    """Bytes that a GPU sends in a step, within its node and to other nodes, by collective.

    Sharded weights are gathered in bfloat16 for the forward and again for the backward, gradients scattered in float32,
    both in every micro-step; copies are averaged once a step. A collective of S bytes over N nodes of g GPUs sends
    S (g - 1) / g within a node and S (N - 1) / (N g) through each network card: all cards of a node work (NCCL's rings).
    """
    rent, parameters, micro_steps = config.cluster, parameter_count(config.model), config.train.micro_steps
    adapters = counts.adapter_parameters(config.model, config.train.lora_rank)
    trained, shards = adapters or parameters, rent.shards(sharding)

    def collective(size: float, gpus: int) -> tuple[float, float]:
        inside = min(gpus, rent.cluster().shard_over)
        return size * (inside - 1) / inside, size * (1 - inside / gpus) / inside

    gathered = 2 * micro_steps * (parameters + adapters)
    rows = {
        "all-gather, forward, bfloat16": collective(gathered, shards),
        "all-gather, backward, bfloat16": collective(gathered, shards),
        "reduce-scatter of gradients, float32": collective(4 * micro_steps * trained, shards),
        "all-reduce of gradients, float32": collective(2 * 4 * trained, rent.gpus) if shards == 1 else (0.0, 0.0),
    }
    if 1 < shards < rent.gpus:
        rows["all-reduce of gradients, float32"] = (0.0, 2 * 4 * trained / shards * (1 - shards / rent.gpus))
    return rows


def send_seconds(config: EstimateConfig, sharding: Sharding) -> float:
    """Seconds of sending in a step, within the node and then across: the plan report's model, without latency."""
    cluster, sent = config.cluster.cluster(), list(traffic(config, sharding).values())
    inside, across = (sum(row[place] for row in sent) for place in (0, 1))
    return inside / (1e9 * cluster.node_gb_per_s) + across / (1e9 * cluster.network_gb_per_s)


def stage_row(config: EstimateConfig, stage: StageConfig, recompute: str) -> dict[str, Any]:
    """Seconds of a step (all wait for the slowest GPU of every micro-step, and for what does not hide), and the days."""
    rent, batches, micro_steps = config.cluster, counts.micro_batches(stage), config.train.micro_steps
    online, peak = config.train.encoders == "online", 1e12 * rent.cluster().peak_tflops
    shares = [batch.share for batch in batches]

    def mean(values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    useful = [batch.images * counts.image_flops(config, batch.bucket.tokens()) for batch in batches]
    encoders = [batch.images * sum(counts.encoder_flops(config, batch.bucket)) * online for batch in batches]
    work = [batch.images * counts.image_flops(config, batch.bucket.tokens(), recompute) for batch in batches]
    work = [mine + other for mine, other in zip(work, encoders, strict=True)]
    compute = micro_steps * counts.expected_slowest(work, shares, rent.gpus) / (peak * rent.mfu)
    seconds = max(compute, send_seconds(config, config.train.sharding))
    images = rent.gpus * micro_steps * mean([batch.images for batch in batches])
    days = stage.images / images * seconds / 86_400
    return {
        "images": stage.images,
        "steps": stage.images / images,
        "images_per_step": images,
        "compute_seconds": compute,
        "seconds_per_step": seconds,
        "images_per_second": images / seconds,
        "balance": mean(work) * micro_steps / (compute * peak * rent.mfu),
        "model_mfu": micro_steps * mean(useful) / (peak * seconds),
        "encoder_share": mean(encoders) / mean(work),
        "training_flops": stage.images * per_image(stage, lambda bucket: counts.image_flops(config, bucket.tokens())),
        "days": days,
        "gpu_hours": 24 * days * rent.gpus,
    }


def per_image(stage: StageConfig, value: Callable[[Bucket], float]) -> float:
    """Mean over a stage's images of what depends on their bucket."""
    weights = [(batch.share * batch.images, value(batch.bucket)) for batch in counts.micro_batches(stage)]
    return sum(weight * x for weight, x in weights) / sum(weight for weight, _ in weights)


def encode_once(config: EstimateConfig) -> dict[str, float]:
    """Hours and disk of encoding the distinct pictures once for every stage, and their captions once."""
    train, rent, model = config.train, config.cluster, config.model
    flops, disk = counts.encoder_flops(config, Bucket(16, 16))[1], train.text_tokens * model.num_text_layers
    disk *= 2 * model.enc_hidden_dim
    for stage in config.stages:
        flops += per_image(stage, lambda bucket: counts.encoder_flops(config, bucket)[0])
        disk += per_image(stage, lambda bucket: 2 * bucket.tokens() * model.in_channels)
    hours = train.distinct_images * flops / (1e12 * rent.cluster().peak_tflops * rent.mfu) / 3600
    return {"gpu_hours": hours, "days": hours / 24 / rent.gpus, "disk_bytes": train.distinct_images * disk}


def paper_accounting() -> dict[str, float]:
    """The paper's claims from its own numbers, and the utilisation that they imply; nothing here depends on the flags."""
    config, training, again, encoders, six = paper(), 0.0, 0.0, 0.0, 0.0
    parameters, l = parameter_count(config.model), config.train.text_tokens
    for stage in config.stages:
        training += stage.images * per_image(stage, lambda bucket: counts.image_flops(config, bucket.tokens()))
        again += stage.images * per_image(stage, lambda bucket: counts.image_flops(config, bucket.tokens(), "full"))
        encoders += stage.images * per_image(stage, lambda bucket: sum(counts.encoder_flops(config, bucket)))
        six += stage.images * per_image(stage, lambda bucket: 6 * parameters * (bucket.tokens() + l))
    lens_peak, z_image_peak = (counts.CLUSTERS[gpu].peak_tflops for gpu in ("a100_80gb", "h100"))
    bought, hours_each = PAPER_GPU_HOURS * 3600 * 1e12 * lens_peak, PAPER_GPU_HOURS / PAPER_GPUS
    return {
        "days: hours / 24 / GPUs": hours_each / 24,
        "seconds per step, mean of both stages": hours_each * 3600 / (PAPER_STEPS * len(config.stages)),
        "of Z-Image's, GPU-hours x peak (312 / 989)": PAPER_GPU_HOURS * lens_peak / (Z_IMAGE_GPU_HOURS * z_image_peak),
        "FLOPs at peak": bought,
        "FLOPs of the model, bases equally often": training,
        "implied MFU": training / bought,
        "... counting what is recomputed": again / bought,
        "... and encoders, if they ran online": (again + encoders) / bought,
        "6 N D would claim": six / bought,
    }


def flops_report(config: EstimateConfig) -> dict[str, dict[str, float]]:
    """FLOPs of one square image of every base: forward by operation, training, encoders, and what 6ND would say."""
    found, l = {}, config.train.text_tokens
    for base in sorted({base for stage in config.stages for base in stage.bases}):
        n = (base // 16) ** 2
        operations = operation_flops(config.model, n, l)
        if config.train.lora_rank:
            operations["adapters"] = counts.adapter_flops(config.model, n, l, config.train.lora_rank)
        picture, text = counts.encoder_flops(config, Bucket(base, base))
        training, again = (counts.image_flops(config, n, recompute) for recompute in ("none", "full"))
        six = 6 * parameter_count(config.model) * (n + l)
        totals = {"forward": sum(operations.values()), "training": training, "training, recomputing all": again}
        totals |= {"autoencoder": picture, "language model": text, "encoders / training": (picture + text) / training}
        totals |= {"6 N D": six, "6 N D / 3 forwards": six / float(train_flops(config.model, n, l))}
        found[str(base)] = operations | totals
    return found


def make_report(config: EstimateConfig) -> dict[str, Any]:
    """Everything that is printed, as numbers: FLOPs and bytes, seconds, days."""
    memory = counts.memory_report(config)
    recompute, train = counts.chosen_recompute(config, memory), config.train
    stages = {stage.name: stage_row(config, stage, recompute) for stage in config.stages}
    if len(stages) < len(config.stages):
        raise ValueError(f"stages.name: expected different names, got {[stage.name for stage in config.stages]}")
    sizes, report = counts.parameter_parts(config.model), {"per_token": counts.parameters_per_token(config.model)}
    report |= {"parameters": sizes, "adapters": counts.adapter_parameters(config.model, train.lora_rank)}
    report |= {"flops": flops_report(config), "memory": memory, "recompute": recompute, "stages": stages}
    report |= {"traffic": {name: traffic(config, name) for name in counts.SHARDINGS}}
    report |= {"send_seconds": {name: send_seconds(config, name) for name in counts.SHARDINGS}}
    report |= {"encode_once": encode_once(config)} if train.encoders == "precomputed" else {}
    return report | ({"paper": paper_accounting()} if {"stage1", "stage2"} <= stages.keys() else {})


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left; a header of empty words is left out."""
    lines = [*([header] if any(header) else []), *rows]
    first, *others = (max(len(line[place]) for line in lines) for place in range(len(header)))
    texts = ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines]
    return "\n".join([title, *(f"  {text}".rstrip() for text in texts)])


def size_tables(config: EstimateConfig, report: dict[str, Any]) -> list[str]:
    """Parameters, and FLOPs of an image."""
    total, text = sum(report["parameters"].values()), config.train.text_tokens
    rows = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in report["parameters"].items()]
    rows += [["total", f"{total:,}", "100.0%"], ["met by one token", f"{report['per_token']:,}", ""]]
    rows += [["adapters", f"{report['adapters']:,}", ""]] if report["adapters"] else []
    modulation = report["parameters"]["modulation"] / total
    why = (
        f"\n  Never 6 N D: a token meets one stream of two, and modulation ({modulation:.0%} of N) works once a sample,"
        f"\n  so 6 N D counts {total / report['per_token']:.2f}x the linear work; attention it leaves out. Net: see below."
    )
    flops, forms = report["flops"], {"encoders / training": "{:.1%}", "6 N D / 3 forwards": "{:.2f}x"}
    cells = []
    for name in next(iter(flops.values())):
        values = [of[name] / (1 if name in forms else 1e12) for of in flops.values()]
        cells.append([name, *(forms.get(name, "{:.4f}").format(value) for value in values)])
    rule = "frozen, 2 to 3 forwards" if config.train.lora_rank else "3 forwards"
    head = f"TFLOP OF A SQUARE IMAGE, {text} text tokens (training: {rule}; recomputing: 1 more)"
    return [table("PARAMETERS", ["", "", ""], rows) + why, table(head, ["", *(f"{base}^2" for base in flops)], cells)]


def machine_tables(config: EstimateConfig, report: dict[str, Any]) -> list[str]:
    """Memory and traffic of a GPU, by sharding."""
    rent, memory = config.cluster, report["memory"]
    shown: list[Sharding] = [config.train.sharding] if rent.gpus == 1 else list(counts.SHARDINGS)
    kinds = [memory["shardings"][name] for name in shown]
    columns = ["", *(f"{name} / {rent.shards(name)}" for name in shown)]
    rows = [[row, *(_giga(kind["rows"][row]) for kind in kinds)] for row in kinds[0]["rows"]]
    rows.append(["before activations", *(_giga(kind["fixed"]) for kind in kinds)])
    for way, held in memory["activations"].items():
        totals = (f"{_giga(kind['total'][way])} {'fits' if kind['fits'][way] else '  NO'}" for kind in kinds)
        rows.append([f"recomputing {way}: + {_giga(held)}", *totals])
    for base in kinds[0]["most"]:
        for what, unit in (("images", 1), ("tokens", 1000)):
            most = (" / ".join(f"{fit[what] // unit}" for fit in kind["most"][base].values()) for kind in kinds)
            rows.append([f"most {what}{' (K)' if unit > 1 else ''} at {base}: none / some / all", *most])
    full = memory["fullest"]
    head = f"GB PER GPU of {_giga(memory['gpu'])}; activations of {full['images']} images of {full['width']}x{full['height']}"
    memory_table = table(f"{head} (sharding / GPUs of a copy)", columns, rows)
    if rent.gpus == 1:
        return [memory_table]
    sent, rows = [report["traffic"][name] for name in shown], []
    for place, where in enumerate(("in the node", "to other nodes")):
        for kind in sent[0]:
            values = [by[kind][place] for by in sent]
            rows += [[f"{kind}, {where}", *map(_giga, values)]] if any(values) else []
    seconds = [report["send_seconds"][name] for name in shown]
    rows.append(["seconds of sending", *(f"{value:.2f}" for value in seconds)])
    for name, row in report["stages"].items():
        compute = row["compute_seconds"]
        hides = (f"{value / compute:.0%} {'yes' if value <= compute else ' NO'}" for value in seconds)
        rows.append([f"share of {name}'s {compute:.2f} s of computing; hides?", *hides])
    rates = f"{rent.cluster().node_gb_per_s:g} GB/s in the node, {rent.cluster().network_gb_per_s:g} across"
    return [memory_table, table(f"GB SENT PER GPU AND STEP; {rates}", columns, rows)]


def run_tables(config: EstimateConfig, report: dict[str, Any]) -> list[str]:
    """Seconds, days and GPU-hours, and the paper's accounting."""
    rent, train, stages = config.cluster, config.train, report["stages"]
    once, rows = report.get("encode_once", {"days": 0.0, "gpu_hours": 0.0}), []
    for name in next(iter(stages.values())):
        total = once.get(name, 0) + sum(row[name] for row in stages.values())
        added = [_number(name, total) if name in ("images", "training_flops", *once) else ""]
        rows.append([name.replace("_", " "), *(_number(name, row[name]) for row in stages.values()), *added])
    how = f"{train.sharding}, recomputing {report['recompute']}, encoders {train.encoders}"
    text = table(f"THE RUN on {rent.gpus} {rent.gpu}, {how}", ["", *stages, "total"], rows)
    fits = report["memory"]["shardings"][train.sharding]["fits"][report["recompute"]]
    text += f"\n  {'It fits.' if fits else 'IT DOES NOT FIT.'} ASSUMED: {rent.mfu:.0%} of "
    text += f"{rent.cluster().peak_tflops:g} TFLOP/s over all work; model mfu leaves out\n  what is recomputed and encoders."
    if train.distinct_images:
        text += f" Encoding {train.distinct_images:,} pictures once: {once['gpu_hours']:,.2f} GPU-hours (in the\n"
        text += f"  total), {once['disk_bytes'] / 1e12:.3f} TB of bfloat16 features."
    if "paper" not in report:
        return [text]
    claims = report["paper"].items()
    rows = [[name, f"{x:.2e}" if x > 1e3 else f"{x:.2f}" if x > 1 else f"{x:.1%}"] for name, x in claims]
    head = f"THE PAPER: {PAPER_GPU_HOURS:,} A100-hours on {PAPER_GPUS}, {PAPER_STEPS:,} steps a stage"
    return [text, table(head, ["", ""], rows)]


def _number(name: str, x: float) -> str:
    if name in ("balance", "encoder_share", "model_mfu"):
        return f"{x:.1%}"
    return f"{x:.2e}" if name == "training_flops" else f"{x:,.2f}" if x < 1000 and x % 1 else f"{x:,.0f}"


def _giga(x: float) -> str:
    return f"{x / 1e9:.2f}"


def main(config: EstimateConfig) -> dict[str, Any]:
    """Count, print, and write if asked to."""
    report = make_report(config)
    tables = size_tables(config, report) + machine_tables(config, report) + run_tables(config, report)
    print("\n\n".join(tables))
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "estimate.json", {"config": config, **report, "provenance": provenance()})
    return report


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read a preset and its overrides from the command line; what a person can mend ends in one line."""
    presets: dict[str, Any] = {make.__name__: (make.__doc__ or "", make()) for make in (*PRESETS, lens_rl)}
    try:
        config = tyro.extras.overridable_config_cli(presets, args=arguments, prog="python -m experiments.estimate")
        if isinstance(config, RlEstimateConfig):
            estimate_rl.main(config)
        else:
            main(config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"estimate: {error}") from None


if __name__ == "__main__":
    cli(sys.argv[1:])
