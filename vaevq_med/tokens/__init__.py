"""A tokenizer's output as data."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "LayerDataset": "layers",
        "TokenDataset": "store",
        "TokenStore": "store",
        "decode_volume": "volumes",
        "encode_volume": "volumes",
        "load_token_store": "store",
    },
)
