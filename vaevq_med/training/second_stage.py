"""What a generator's training needs of its token store: that the two fit, the scale of latents, who is validated on."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.picks import evenly_spaced
from vaevq_med.networks.generators.base import Generator
from vaevq_med.tokens.store import KEYS, TokenDataset, load_token_store
from vaevq_med.training import distributed

logger = logging.getLogger(__name__)


def tokens_validation_split(tokens_dir: str | Path) -> str:
    """``validation``, or, where the store has no such images, ``training``, with a warning.

    Args:
        tokens_dir: token store.

    Raises:
        DataError: there is no store.
    """
    store = load_token_store(tokens_dir)
    if "validation" in store.splits and store.items("validation"):
        return "validation"
    if distributed.is_main():
        logger.warning(
            "%s: no images of the validation split, so training images are validated on; encode a data set that has "
            "some, or pass --val_split test",
            tokens_dir,
        )
    return "training"


def tokens_tags(dataset: TokenDataset) -> dict[str, str]:
    """Hashes of the store, the images behind it and the tokenizer, as tags of an MLflow run."""
    content = dataset.store.content
    return {
        "data.name": str(content["data"]["name"]),
        "data.content_hash": str(content["data"]["content_hash"]),
        "tokens.content_hash": dataset.store.content_hash,
        "tokens.tokenizer": str(content["tokenizer"]["content_hash"]),
    }


def prepared_generator(network: Generator, dataset: TokenDataset, *, scale_items: int = 256) -> Generator:
    """The network, after a check that it fits the data and what it measures of it, such as the scale of latents.

    Args:
        network: to train.
        dataset: its training data.
        scale_items: items, evenly spaced over the data, that it measures.

    Raises:
        VaevqMedError: they do not fit, or the latents have no spread.
    """
    if not isinstance(network, Generator):
        raise VaevqMedError(f"network_def is a {type(network).__name__}; expected a generator, such as LlamaGen")
    network.check_fit(dataset.store.content, str(dataset.store.root))
    chosen = evenly_spaced(len(dataset), scale_items)
    network.prepare(lambda: torch.stack([dataset[number][KEYS[network.kind]] for number in chosen]))
    return network
