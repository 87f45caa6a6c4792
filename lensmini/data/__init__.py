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
from lensmini.data.transforms import crop_fraction, resize_and_crop

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "LENS_1440_BUCKETS",
    "LENS_BUCKETS",
    "LENS_RATIOS",
    "MINIATURE_CANVASES",
    "SCENE_VOCABULARY",
    "SHAPES",
    "SIZES",
    "WITHHELD_PAIRS",
    "AskBackground",
    "AskCount",
    "AskPlace",
    "AskRelation",
    "BatchPlan",
    "Bucket",
    "BucketBatchSampler",
    "FoundObject",
    "KindScore",
    "PackedBatch",
    "Pattern",
    "PlanReport",
    "PlannedStep",
    "Question",
    "Sample",
    "SampleIndex",
    "Scene",
    "SceneObject",
    "ScenePrompt",
    "SceneReading",
    "StepTotals",
    "SuiteScore",
    "VerdictReport",
    "assign_buckets",
    "build_scene_prompts",
    "chance_score",
    "collate_samples",
    "crop_fraction",
    "describe_scene",
    "loss_weights",
    "make_buckets",
    "permute",
    "permute_windows",
    "questions_about",
    "read_scene",
    "render_scene",
    "render_scenes",
    "resize_and_crop",
    "sample_scene",
    "score_images",
    "verify_scene",
]
