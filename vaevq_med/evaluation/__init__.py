"""Images judged: records, pictures, references."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "EvaluationHandler": "handler",
        "EvaluationTracker": "tracking",
        "LabelWriter": "labels",
        "PredictionWriter": "predictions",
        "SegmentationHandler": "segmentation",
        "ValidationSummary": "summary",
        "evaluation_split": "data",
        "label_map": "data",
        "validation_split": "data",
    },
)
