"""Trainer, evaluator and their handlers on MONAI's engines."""

from vaevq_med.engines.base_trainer import BaseTrainer, TrainingError, precision_name
from vaevq_med.engines.checkpoint import CheckpointError, TrainingCheckpoint, read_checkpoint
from vaevq_med.engines.config import ConfigError, check_config, current_config, initialize, run, shared
from vaevq_med.engines.distributed import (
    default_device,
    is_main,
    named_device,
    rank,
    stop_process_group,
    synchronized,
    world_size,
)
from vaevq_med.engines.ema import exponential_moving_average
from vaevq_med.engines.evaluation import (
    EvaluationHandler,
    EvaluationTracker,
    ValidationSummary,
    evaluation_split,
    label_map,
    validation_split,
)
from vaevq_med.engines.evaluator import TokenizerEvaluator
from vaevq_med.engines.generator_evaluator import GeneratorEvaluator
from vaevq_med.engines.generator_trainer import GeneratorTrainer
from vaevq_med.engines.generators import (
    check_fit,
    checked_learning_rate,
    decay_groups,
    evenly_spaced,
    prepared_generator,
    tokens_tags,
    tokens_validation_split,
)
from vaevq_med.engines.predictions import PredictionWriter
from vaevq_med.engines.progress import ProgressReporter
from vaevq_med.engines.samples import SampleWriter
from vaevq_med.engines.sampling import ImageSampler, SamplePlan, SamplingSettings
from vaevq_med.engines.schedules import cosine_with_warmup
from vaevq_med.engines.stored import StoredGenerator, StoredTokenizer
from vaevq_med.engines.summary import RunSummary
from vaevq_med.engines.tracking import MLflowTracker
from vaevq_med.engines.trainer import TokenizerTrainer

__all__ = [
    "BaseTrainer",
    "CheckpointError",
    "ConfigError",
    "EvaluationHandler",
    "EvaluationTracker",
    "GeneratorEvaluator",
    "GeneratorTrainer",
    "ImageSampler",
    "MLflowTracker",
    "PredictionWriter",
    "ProgressReporter",
    "RunSummary",
    "SamplePlan",
    "SampleWriter",
    "SamplingSettings",
    "StoredGenerator",
    "StoredTokenizer",
    "TokenizerEvaluator",
    "TokenizerTrainer",
    "TrainingCheckpoint",
    "TrainingError",
    "ValidationSummary",
    "check_config",
    "check_fit",
    "checked_learning_rate",
    "cosine_with_warmup",
    "current_config",
    "decay_groups",
    "default_device",
    "evaluation_split",
    "evenly_spaced",
    "exponential_moving_average",
    "initialize",
    "is_main",
    "label_map",
    "named_device",
    "precision_name",
    "prepared_generator",
    "rank",
    "read_checkpoint",
    "run",
    "shared",
    "stop_process_group",
    "synchronized",
    "tokens_tags",
    "tokens_validation_split",
    "validation_split",
    "world_size",
]
