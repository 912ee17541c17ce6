"""A checkpoint read back: its file, its network, its bundle."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CheckpointError": "file",
        "StoredGenerator": "network",
        "StoredSegmenter": "segmenter",
        "StoredTokenizer": "network",
        "default_device": "device",
        "named_device": "device",
        "read_checkpoint": "file",
        "read_trained": "packed",
        "started_from": "starting",
        "take_weights": "starting",
    },
)
