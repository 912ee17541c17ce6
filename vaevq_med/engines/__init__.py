"""Trainer, evaluator and their handlers on MONAI's engines."""

from vaevq_med.engines.checkpoint import CheckpointError, TrainingCheckpoint, read_checkpoint
from vaevq_med.engines.config import ConfigError, check_config, current_config, initialize, run, shared
from vaevq_med.engines.distributed import (
    default_device,
    is_main,
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
from vaevq_med.engines.predictions import PredictionWriter
from vaevq_med.engines.progress import ProgressReporter
from vaevq_med.engines.schedules import cosine_with_warmup
from vaevq_med.engines.stored import StoredTokenizer
from vaevq_med.engines.summary import RunSummary
from vaevq_med.engines.tracking import MLflowTracker
from vaevq_med.engines.trainer import TokenizerTrainer, TrainingError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EvaluationHandler",
    "EvaluationTracker",
    "MLflowTracker",
    "PredictionWriter",
    "ProgressReporter",
    "RunSummary",
    "StoredTokenizer",
    "TokenizerEvaluator",
    "TokenizerTrainer",
    "TrainingCheckpoint",
    "TrainingError",
    "ValidationSummary",
    "check_config",
    "cosine_with_warmup",
    "current_config",
    "default_device",
    "evaluation_split",
    "exponential_moving_average",
    "initialize",
    "is_main",
    "label_map",
    "rank",
    "read_checkpoint",
    "run",
    "shared",
    "stop_process_group",
    "synchronized",
    "validation_split",
    "world_size",
]
