"""Data: resolution buckets, the order of samples, image transforms, and the miniature world of scenes."""

from lensmini.data.assign import PlannedStep, StepTotals
from lensmini.data.balance import PlanReport
from lensmini.data.buckets import (
    LENS_1440_BUCKETS,
    LENS_BUCKETS,
    LENS_RATIOS,
    Bucket,
    assign_buckets,
    make_buckets,
)
from lensmini.data.collate import PackedBatch, Sample, collate_samples, loss_weights
from lensmini.data.index import SampleIndex
from lensmini.data.permute import permute, permute_windows
from lensmini.data.picture_bytes import PICTURE_CAUSES, BadPicture
from lensmini.data.pictures import PICTURE_NOTES, Picture, encode_picture, read_picture
from lensmini.data.plan import BatchPlan
from lensmini.data.sampler import BucketBatchSampler
from lensmini.data.scene_captions import SCENE_VOCABULARY, describe_scene
from lensmini.data.scene_prompts import (
    KINDS,
    KindScore,
    ScenePrompt,
    SuiteScore,
    build_scene_prompts,
    chance_score,
    score_images,
)
from lensmini.data.scene_reader import FoundObject, SceneReading, read_scene
from lensmini.data.scene_verifier import (
    AskBackground,
    AskCount,
    AskPlace,
    AskRelation,
    Pattern,
    Question,
    VerdictReport,
    answer_question,
    questions_about,
    verify_scene,
)
from lensmini.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    MINIATURE_CANVASES,
    SHAPES,
    SIZES,
    WITHHELD_PAIRS,
    Scene,
    SceneObject,
    render_scene,
    render_scenes,
    sample_scene,
)
from lensmini.data.shard_files import ShardFiles, ShardInfo
from lensmini.data.shard_writer import ShardSample, merge_manifests, write_shards
from lensmini.data.shards import DAMAGE_CAUSES, Damage, DamagedSample, RawMembers, ShardReader
from lensmini.data.sources import (
    CAPTION_PROBLEMS,
    SOURCE_CAUSES,
    Dropped,
    FolderSource,
    ListSource,
    RawSample,
    Source,
    TarSource,
    Unit,
    open_source,
)
from lensmini.data.tar_index import index_tars
from lensmini.data.transforms import crop_fraction, resize_and_crop

__all__ = [
    "BACKGROUNDS",
    "CAPTION_PROBLEMS",
    "COLOURS",
    "DAMAGE_CAUSES",
    "KINDS",
    "LENS_1440_BUCKETS",
    "LENS_BUCKETS",
    "LENS_RATIOS",
    "MINIATURE_CANVASES",
    "PICTURE_CAUSES",
    "PICTURE_NOTES",
    "SCENE_VOCABULARY",
    "SHAPES",
    "SIZES",
    "SOURCE_CAUSES",
    "WITHHELD_PAIRS",
    "AskBackground",
    "AskCount",
    "AskPlace",
    "AskRelation",
    "BadPicture",
    "BatchPlan",
    "Bucket",
    "BucketBatchSampler",
    "Damage",
    "DamagedSample",
    "Dropped",
    "FolderSource",
    "FoundObject",
    "KindScore",
    "ListSource",
    "PackedBatch",
    "Pattern",
    "Picture",
    "PlanReport",
    "PlannedStep",
    "Question",
    "RawMembers",
    "RawSample",
    "Sample",
    "SampleIndex",
    "Scene",
    "SceneObject",
    "ScenePrompt",
    "SceneReading",
    "ShardFiles",
    "ShardInfo",
    "ShardReader",
    "ShardSample",
    "Source",
    "StepTotals",
    "SuiteScore",
    "TarSource",
    "Unit",
    "VerdictReport",
    "answer_question",
    "assign_buckets",
    "build_scene_prompts",
    "chance_score",
    "collate_samples",
    "crop_fraction",
    "describe_scene",
    "encode_picture",
    "index_tars",
    "loss_weights",
    "make_buckets",
    "merge_manifests",
    "open_source",
    "permute",
    "permute_windows",
    "questions_about",
    "read_picture",
    "read_scene",
    "render_scene",
    "render_scenes",
    "resize_and_crop",
    "sample_scene",
    "score_images",
    "verify_scene",
    "write_shards",
]
