"""Where the codewords start: at random, or at centers of the latents of a few batches (k-means)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.core.clusters import StreamingClusters
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import from_first_process, objects_of_each_process, rank
from vaevq_med.networks.ranges import check_choice
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.training import distributed
from vaevq_med.training.base import BaseTrainer
from vaevq_med.training.start import Start

logger = logging.getLogger(__name__)

INITS = ("random", "kmeans")
_KEY = "codebook_init"
_AT_ONCE = 8
"""Items that are encoded at once where the micro-batch is not settled yet."""


class CodebookStart:
    """Start the codebook from the data before the first step of a new run; a resumed one has its codebook.

    ``kmeans`` encodes the first training batches and asks the quantizer to put its codewords at cluster centers of the
    posterior means (:meth:`~vaevq_med.networks.quantizers.base.Quantizer.start_codebook`), by scikit-learn's
    ``MiniBatchKMeans``. With several processes the latents of all are clustered by the first, whose centers all get.

    Args:
        init: ``random``, as the quantizer itself starts, or ``kmeans``.
        num_batches: batches that are encoded, of each process.
        seed: of the clustering.
        checkpoint: the run's checkpoint handler, which keeps what was done.
        start: what the run started from, whose quantizer is neither loaded nor frozen where it starts here.

    Raises:
        VaevqMedError: an option is out of its range; when the run starts, there are fewer latents than codewords.
    """

    def __init__(
        self,
        *,
        init: str = "random",
        num_batches: int = 8,
        seed: int = 0,
        checkpoint: Any = None,
        start: Start | None = None,
    ) -> None:
        self.init = check_choice("codebook_init", init, INITS)
        if num_batches < 1:
            raise VaevqMedError(f"codebook_init_batches: found {num_batches}, expected 1 or more")
        self.num_batches = num_batches
        self.seed = seed
        self.checkpoint = checkpoint
        self.start = start
        self._latents = 0

    def attach(self, engine: BaseTrainer) -> None:
        """Register the event, once the network has its start.

        Raises:
            VaevqMedError: the quantizer was loaded, or is frozen.
        """
        if self.init != "random":
            if self.start is not None:
                self.start.check_codebook_init(self.init)
            engine.add_event_handler(Events.STARTED, self._started)

    def _started(self, engine: BaseTrainer) -> None:
        if engine.state.iteration > 0:
            return
        network: VisualTokenizer = engine.network  # type: ignore[assignment]
        name = type(network.quantizer).__name__
        latents = torch.cat([self._encoded(engine, network, images) for images in self._batches(engine)])
        device = engine.state.device
        done = network.quantizer.start_codebook(latents, lambda found, count: self._cluster(found, count, device))
        if self.checkpoint is not None:
            self.checkpoint.extra[_KEY] = {"init": self.init if done else "random", "latents": self._latents}
        if not distributed.is_main():
            return
        if done:
            told = "%s starts at the centers of %d latents of %d batches"
            logger.warning(told, name, self._latents, self.num_batches)
        else:
            logger.warning(
                "codebook_init kmeans: %s has no codewords that can be put anywhere; it starts as it is", name
            )

    def _batches(self, engine: BaseTrainer) -> Iterator[Tensor]:
        """The images of the first training batches, by a loader of their own, so that training still sees them."""
        loader: Any = engine.data_loader
        chosen = list(itertools.islice(iter(loader.batch_sampler), self.num_batches))
        own: Any = DataLoader(
            loader.dataset,
            batch_sampler=chosen,
            num_workers=loader.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )
        yield from (batch[Keys.IMAGE] for batch in own)

    @torch.no_grad()
    def _encoded(self, engine: BaseTrainer, network: VisualTokenizer, images: Tensor) -> Tensor:
        """Posterior means, or latents, ``[B, D, *grid]`` on the CPU."""
        network.eval()
        size = engine.micro_batch_size if isinstance(engine.micro_batch_size, int) else _AT_ONCE
        parts = torch.as_tensor(images).split(size)
        return torch.cat([network.encode_stage_2_inputs(part.to(engine.state.device)).float().cpu() for part in parts])

    def _cluster(self, latents: Tensor, count: int, device: torch.device) -> Tensor:
        """Centers ``[count, C]`` of rows ``[N, C]`` of all processes, the same on each; sent by a device."""
        every = np.concatenate(objects_of_each_process(latents.cpu().numpy()))
        if len(every) < count:
            raise VaevqMedError(
                f"codebook_init kmeans: found {len(every)} latents in {self.num_batches} batches, expected at least "
                f"{count}, one a codeword; raise codebook_init_batches, or lower num_embeddings"
            )
        self._latents = max(self._latents, len(every))
        centers = np.zeros((count, every.shape[1]), np.float32)
        if rank() == 0:
            clusters = StreamingClusters(count, self.seed % 2**32)
            # In any order: the first ones, which the centers are drawn from, would be those of a few images.
            clusters.add(every[np.random.default_rng(self.seed).permutation(len(every))])
            centers = clusters.centers()
        return from_first_process(torch.from_numpy(centers).to(device)).to(latents.device)
