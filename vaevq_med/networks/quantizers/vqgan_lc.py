"""VQGAN-LC (arXiv 2406.11837): a frozen codebook of a feature network's centers, and a trained projector.

``codebook = C W^T + b``: the rows of C are cluster centers of a pretrained network's features over the training
images and stay as they are; a linear layer takes them to the latent space. Each step's gradient reaches every codeword
through W, as in SimVQ, whose C is noise. The authors cluster CLIP's features of ImageNet, 100 centers a class;
``vaevq-med feature-codebook`` does it for any data set and feature network. The authors take the centers as they are;
networks differ in how long their features are, and with EfficientNet-Lite0's, several times as long as the latents,
every latent fell to one codeword (``docs/deviations.md``). Here the table is centered and scaled first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.initial import weights_follow
from vaevq_med.networks.quantizers.base import CodebookQuantizer
from vaevq_med.networks.ranges import check_sizes
from vaevq_med.networks.weight_file import read_weight_file

_COMMAND = "vaevq-med feature-codebook DATASET {path} --num-embeddings {count}"


class VQGANLC(CodebookQuantizer):
    """A frozen table of features under a trainable linear layer.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        num_features: F, length of a feature: 320 for EfficientNet-Lite0.
        features: file of the table ``[K, F]``, see :func:`read_features`; it is read when a new run starts, and never
            where the weights come from a checkpoint. None draws the table from N(0, 1).
        normalize: subtract the mean of the table's rows, and scale them to a mean squared length of 1, that of SimVQ's
            basis: the codewords then start with that length too.
        assignment: ``"euclidean"`` or ``"posterior"``, see :class:`CodebookQuantizer`.

    Raises:
        VaevqMedError: the file is missing, unreadable, or of another size.

    Example:
        >>> quantizer = VQGANLC(num_embeddings=8, embedding_dim=4, num_features=6)
        >>> quantizer.codebook().shape, [name for name, _ in quantizer.named_parameters()]
        (torch.Size([8, 4]), ['projection.weight', 'projection.bias'])
    """

    initial_files: ClassVar[tuple[str, ...]] = ("features",)

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        num_features: int,
        features: str | Path | None = None,
        normalize: bool = True,
        assignment: str = "euclidean",
    ) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim, assignment=assignment)
        check_sizes(num_features=num_features)
        shape = (num_embeddings, num_features)
        given = None if weights_follow() else features
        table = torch.randn(shape) if given is None else read_features(given, num_embeddings=num_embeddings)
        if tuple(table.shape) != shape:
            make = _COMMAND.format(path=features, count=num_embeddings)
            raise VaevqMedError(
                f"{features}: found {table.shape[0]} features of length {table.shape[1]}, expected num_embeddings = "
                f"{num_embeddings} of num_features = {num_features}; make them with: {make}"
            )
        if normalize:
            table = table - table.mean(dim=0)
            table = table / table.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
        self.register_buffer("features", table)
        self.projection = nn.Linear(num_features, embedding_dim)
        nn.init.normal_(self.projection.weight, std=embedding_dim**-0.5)

    features: Tensor

    def codebook(self) -> Tensor:
        """The projected table of this step, ``[K, D]``, in fp32."""
        with torch.autocast(self.features.device.type, enabled=False):
            return self.projection(self.features)


def read_features(path: str | Path, *, num_embeddings: int | None = None) -> Tensor:
    """A table of features from a file, float32 ``[K, F]``; nothing in the file can run.

    Args:
        path: an ``.npz`` with the array ``features``, as ``vaevq-med feature-codebook`` writes it, or a ``.pt`` or
            ``.pth`` of a tensor, alone or as the only matrix of a dictionary.
        num_embeddings: K of the command that a message about a missing file names.

    Raises:
        VaevqMedError: there is no such file, or no finite table in it.
    """
    path = Path(path)
    if not path.is_file():
        make = _COMMAND.format(path=path, count=num_embeddings or "K")
        raise VaevqMedError(f"{path}: found no feature codebook, expected one made by: {make}")
    if path.suffix not in (".npz", ".pt", ".pth"):
        raise VaevqMedError(f"{path}: found the suffix {path.suffix!r}, expected .npz, .pt or .pth")
    try:
        found = _read_npz(path) if path.suffix == ".npz" else read_weight_file(path, "a feature codebook")
    except VaevqMedError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VaevqMedError(f"{path}: found an unreadable file ({reason}), expected a feature codebook") from error
    tables = list(found.values()) if isinstance(found, Mapping) else [found]
    tables = [table for table in tables if isinstance(table, Tensor) and table.ndim == 2]
    if len(tables) != 1:
        raise VaevqMedError(f"{path}: found {len(tables)} matrices, expected one, the features [K, F]")
    table = tables[0].detach().float().contiguous()
    if not bool(table.isfinite().all()):
        raise VaevqMedError(f"{path}: found features that are NaN or infinite, expected finite numbers")
    return table


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files if name == "features"}
