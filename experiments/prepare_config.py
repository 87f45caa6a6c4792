"""What `experiments.prepare_data` makes of raw pictures: settings of filters, captions, shards and the run."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from experiments.runs import config_dict
from lensmini.data.buckets import Bucket, make_buckets
from lensmini.data.caption_prompts import Mode
from lensmini.data.filters import Thresholds

__all__ = ["CaptionConfig", "ModelsConfig", "PrepareConfig", "PrepareRun", "ShardConfig", "TextConfig"]

Missing = Literal["given", "missing", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsConfig:
    """Models of the filters, folders or Hub repositories; without one its filter is left out."""

    nsfw: Path | None = None
    """NSFW classifier; the paper's is Freepik/nsfw_image_detector."""
    aesthetic: Path | None = None
    """SigLIP model of the aesthetic score; the paper's is google/siglip-so400m-patch14-384."""
    aesthetic_head: Path | None = None
    """Safetensors of the score's layers (`lensmini.data.filters.convert_head`)."""
    watermark: Path | None = None
    """Watermark classifier; the paper's is not public."""
    embedder: Path | None = None
    """CLIP model of near-duplicates; the paper's is openai/clip-vit-large-patch14. Without it only equal pictures are
    duplicates."""
    device: str = "cpu"
    """Where they run."""
    batch_size: int = 32
    """Pictures of one forward pass."""
    local_files_only: bool = False
    """Never ask the network."""

    def __post_init__(self) -> None:
        if (self.aesthetic is None) != (self.aesthetic_head is None):
            raise ValueError(
                f"aesthetic, aesthetic_head: expected both or neither, got {self.aesthetic} and {self.aesthetic_head}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """Where captions are from."""

    which: Missing = "given"
    """"given" drops pictures without a caption, "missing" asks a model for those, "all" asks for every picture."""
    mode: Mode = "detailed"
    """"detailed", "brief" or "mixed" (half and half)."""
    use_given: bool = True
    """Tell the model the caption that was given, for names in it."""
    model: str = "gpt-4.1"
    """Name on the server."""
    url: str | None = None
    """Server, up to /v1; None for OpenAI's own."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key."""
    local: Path | None = None
    """A vision-language model of transformers on this machine, in place of a server."""
    concurrency: int = 16
    """Requests in flight."""
    max_cost: float | None = None
    """Never spend more; needs prices."""
    prices: tuple[float, float] | None = None
    """Of a million tokens of questions and of answers."""
    max_tokens_total: int | None = None
    """Never use more tokens, of questions and answers together."""
    deadline_s: float | None = None
    """Stop asking after so many seconds; the same command goes on."""
    max_tokens: int = 1024
    """Of one answer."""
    max_attempts: int = 3
    """Answers for one picture before it is given up."""
    timeout_s: float = 120.0
    """Of one request."""

    def __post_init__(self) -> None:
        if self.which not in get_args(Missing) or self.mode not in get_args(Mode):
            raise ValueError(
                f"which, mode: expected one of {get_args(Missing)} and one of {get_args(Mode)}, "
                f"got {self.which!r} and {self.mode!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """How samples are stored."""

    bases: tuple[int, ...] = (512, 768, 1024)
    """Squares whose areas the buckets have; a picture goes to the largest that needs no enlarging."""
    ratios: tuple[tuple[int, int], ...] = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1))
    """Width to height of the buckets: the paper's nine."""
    multiple: int = 32
    """Sides are multiples of this."""
    tolerance: float = 0.06
    """How far a bucket's area and aspect may be off."""
    shard_bytes: int = 2**30
    """Size of a tar at which the next one begins."""
    units_per_group: int = 512
    """Units of 256 files, or tars, that are written together; a group's last tars are smaller."""

    def buckets(self) -> tuple[Bucket, ...]:
        """All buckets, base by base."""
        options = {"ratios": self.ratios, "multiple": self.multiple, "tolerance": self.tolerance}
        return tuple(bucket for base in self.bases for bucket in make_buckets(base, **options))

    def base_of_bucket(self) -> list[int]:
        """For each bucket its base."""
        options = {"ratios": self.ratios, "multiple": self.multiple, "tolerance": self.tolerance}
        return [base for base in self.bases for _ in make_buckets(base, **options)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Pictures of text, drawn in place of read; PATH is a file with a text a line."""

    num: int = 0
    """Pictures; 0 reads pictures instead."""
    height: int = 512
    """Pixels."""
    width: int = 512
    """Pixels."""
    fonts: tuple[Path, ...] = ()
    """Font files; none for those of matplotlib."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareRun:
    """Where and with how many."""

    out: Path = Path("runs/prepare")
    """Everything is written here; the same command goes on where it was interrupted."""
    shard: str = "0/1"
    """This task of how many, "I/N": run all N anywhere, in any order, with the same OUT."""
    workers: int = 1
    """Processes of this task."""
    ray: bool = False
    """Hand the work to Ray instead: a cluster that RAY_ADDRESS names, or a local one."""
    wait_s: float = 0.0
    """How long to wait for the other tasks between stages; 0 ends with a message, and the same command goes on later."""

    def __post_init__(self) -> None:
        number, count = self.part
        if not 0 <= number < count or self.workers < 1:
            raise ValueError(
                f"shard, workers: expected I/N with I below N, and 1 or more, got {self.shard}, {self.workers}"
            )

    @property
    def part(self) -> tuple[int, int]:
        """The task's number and how many there are."""
        number, slash, count = self.shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise ValueError(f'shard: expected "I/N", got {self.shard!r}')
        return int(number), int(count)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """From raw pictures to shards."""

    path: Path = Path("pictures")
    """A folder, a tar or a folder of tars, or a list of files."""
    text: TextConfig = field(default_factory=TextConfig)
    """Pictures of text, in place of pictures that are there."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Which scores keep a picture."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """Models of the filters."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """Where captions are from."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    """How samples are stored."""
    run: PrepareRun = field(default_factory=PrepareRun)
    """Where and with how many."""
    seed: int = 0
    """Of mixed captions, and of drawn text."""

    def identity(self, fingerprint: str) -> str:
        """Hash of everything that decides the result: input and settings, not where, how fast or at what price."""
        apart = {"run", "path"}
        values = {f.name: config_dict(getattr(self, f.name)) for f in fields(self) if f.name not in apart}
        for name in ("device", "batch_size", "local_files_only"):
            values["models"].pop(name)
        for name in (
            "url",
            "key_env",
            "concurrency",
            "max_cost",
            "prices",
            "timeout_s",
            "max_tokens_total",
            "deadline_s",
        ):
            values["captions"].pop(name)
        return hashlib.sha256(json.dumps([fingerprint, values], sort_keys=True, default=str).encode()).hexdigest()
