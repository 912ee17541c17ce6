"""Images judged: records, pictures, references."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "EvaluationHandler": "handler",
        "EvaluationTracker": "handler",
        "PredictionWriter": "predictions",
        "ValidationSummary": "handler",
        "evaluation_split": "handler",
        "label_map": "handler",
        "validation_split": "handler",
    },
)
