"""An optimizer's loop, its checkpoint, its MLflow run."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BaseTrainer": "base",
        "ConfigError": "config",
        "GeneratorEvaluator": "generator_evaluator",
        "GeneratorTrainer": "generator",
        "MLflowTracker": "tracking",
        "ProgressReporter": "progress",
        "RunSummary": "summary",
        "TokenizerEvaluator": "tokenizer_evaluator",
        "TokenizerTrainer": "tokenizer",
        "TrainingCheckpoint": "checkpoint",
        "TrainingError": "base",
        "check_config": "config",
        "checked_learning_rate": "optim",
        "cosine_with_warmup": "optim",
        "current_config": "current",
        "decay_groups": "optim",
        "evenly_spaced": "vaevq_med.core.picks",
        "exponential_moving_average": "ema",
        "initialize": "running",
        "is_main": "distributed",
        "precision_name": "precision",
        "prepared_generator": "second_stage",
        "rank": "distributed",
        "run": "running",
        "shared": "current",
        "stop_process_group": "distributed",
        "synchronized": "distributed",
        "tokens_tags": "second_stage",
        "tokens_validation_split": "second_stage",
        "world_size": "distributed",
    },
)
