"""Training of the context model: a small network over neighbors, learned in floats and rounded at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vaevq_med.codec.coders.context_model import ContextModel, from_floats, num_inputs
from vaevq_med.codec.coders.neighbors import PLACE_SCALE, Neighborhood
from vaevq_med.codec.options import IndexModelOptions
from vaevq_med.codec.stacks import Stack, encode_stacks
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import check_free
from vaevq_med.trained.network import StoredTokenizer


class ContextNetwork(nn.Module):
    """What becomes a :class:`ContextModel`: the same sums in floats.

    Args:
        codebook: ``[K, D]`` or ``[G, K, D / G]``, where the embeddings start; None for a random start.
        num_embeddings: K.
        num_codebooks: G.
        num_contrasts: known contrasts.
        options: sizes.
    """

    def __init__(
        self,
        *,
        codebook: Tensor | None,
        num_embeddings: int,
        num_codebooks: int,
        num_contrasts: int,
        options: IndexModelOptions,
    ) -> None:
        super().__init__()
        size, books, hidden, width = num_embeddings, num_codebooks, options.hidden, options.width
        inputs = num_inputs(books, width)
        self.embedding = nn.Parameter(_start(codebook, books, size, width))
        self.first = nn.Parameter(torch.randn(inputs, hidden) * math.sqrt(2 / inputs))
        self.first_bias = nn.Parameter(torch.zeros(num_contrasts + 1, books, hidden))
        self.second = nn.Parameter(torch.randn(hidden, hidden) * math.sqrt(2 / hidden))
        self.second_bias = nn.Parameter(torch.zeros(hidden))
        self.last = nn.Parameter(torch.zeros(books, hidden, size))
        self.last_bias = nn.Parameter(torch.zeros(books, size))
        self.dropout = options.dropout

    def forward(self, seen: Tensor, own: Tensor, further: Tensor, contrast: Tensor, codebook: int) -> Tensor:
        """Logits ``[n, K]``; arguments as for :meth:`ContextModel.hidden`, the contrast by number ``[n]``."""
        books = self.embedding.shape[0]
        absent = self.embedding.shape[1] - 1
        if books > 1:
            own = own.clone()
            own[:, codebook:] = absent
            seen = torch.cat([seen, own[:, None]], dim=1)
        parts = [F.embedding(seen[:, :, g], self.embedding[g]).flatten(1) for g in range(books)]
        x = torch.cat([*parts, further / PLACE_SCALE], dim=1) @ self.first
        x = F.relu(x + self.first_bias[:, codebook][contrast])
        x = F.dropout(x, self.dropout, self.training)
        x = F.relu(torch.addmm(self.second_bias, x, self.second))
        x = F.dropout(x, self.dropout, self.training)
        return torch.addmm(self.last_bias[codebook], x, self.last[codebook])


def _start(codebook: Tensor | None, books: int, size: int, width: int) -> Tensor:
    """Embeddings ``[G, K + 2, E]``: the codewords' principal components, where there are codewords."""
    start = 0.1 * torch.randn(books, size + 2, width)
    if codebook is None or codebook.shape[-2] != size or codebook.ndim > 3:
        return start
    tables = codebook.detach().float().cpu()
    tables = tables.expand(books, *tables.shape[-2:]) if tables.ndim == 2 else tables
    if len(tables) != books:
        return start
    for g, table in enumerate(tables):
        centered = table - table.mean(dim=0)
        _, _, axes = torch.linalg.svd(centered, full_matrices=False)
        turned = centered @ axes[:width].T
        start[g, :size, : turned.shape[1]] = 0.5 * turned / turned.std().clamp_min(1e-6)
    return start


@dataclass(frozen=True)
class _Positions:
    """All live positions of stacks, one after the other."""

    seen: NDArray[np.int32]
    own: NDArray[np.int32]
    further: NDArray[np.int16]
    contrast: NDArray[np.int8]

    @classmethod
    def of(cls, stacks: Sequence[Stack], contrasts: Sequence[str]) -> _Positions:
        parts = []
        for stack in stacks:
            hood = Neighborhood(stack.layout)
            symbols = stack.indices[stack.layout.live]
            hood.fill(symbols)
            seen, further = hood.around(slice(None))
            name = stack.layout.contrast
            number = contrasts.index(name) if name in contrasts else len(contrasts)
            own = symbols[hood.source]
            parts.append(
                (
                    seen.astype(np.int32),
                    own.astype(np.int32),
                    further.astype(np.int16),
                    np.full(len(own), number, np.int8),
                )
            )
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.from_numpy(self.seen[rows].astype(np.int64)),
            torch.from_numpy(self.own[rows].astype(np.int64)),
            torch.from_numpy(self.further[rows].astype(np.float32)),
            torch.from_numpy(self.contrast[rows].astype(np.int64)),
        )


def train_context_model(
    stacks: Sequence[Stack],
    *,
    tokenizer: str,
    codebook: Tensor | None,
    options: IndexModelOptions,
    on_step: Callable[[int, int, float], None] = lambda step, steps, bits: None,
) -> ContextModel:
    """A model of the indices of stacks.

    The same stacks, options and number of threads give the same model on the same machine. AdamW, its rate rising over
    the first twentieth of the steps and falling to 0 as a cosine.

    Args:
        stacks: of training patients.
        tokenizer: content hash of the tokenizer that made the indices.
        codebook: its codebook, where it has an explicit one.
        options: sizes and the length of training.
        on_step: called with the step, the number of steps and the batch's bits an index.

    Raises:
        VaevqMedError: an option is out of its range, or nothing is live in the stacks.
    """
    options.check()
    contrasts = tuple(sorted({stack.layout.contrast for stack in stacks} - {""}))
    data = _Positions.of(stacks, contrasts) if stacks else None
    if data is None or not len(data.own):
        raise VaevqMedError("context model: found no live position to learn from, expected some")
    rng = np.random.default_rng(options.seed)
    layout = stacks[0].layout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = ContextNetwork(
            codebook=codebook,
            num_embeddings=layout.num_embeddings,
            num_codebooks=layout.num_codebooks,
            num_contrasts=len(contrasts),
            options=options,
        )
        _fit(network, data, rng, options, on_step)
    weights = {name: value.detach().double().numpy() for name, value in network.named_parameters()}
    return from_floats(tokenizer, contrasts, weights)


def _fit(
    network: ContextNetwork,
    data: _Positions,
    rng: np.random.Generator,
    options: IndexModelOptions,
    on_step: Callable[[int, int, float], None],
) -> None:
    count = len(data.own)
    batch = min(options.batch_size, count)
    steps = max(1, round(options.epochs * count / batch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))),
    )
    order = rng.permutation(count)
    place = 0
    network.train()
    for step in range(steps):
        if place + batch > count:
            order, place = rng.permutation(count), 0
        seen, own, further, contrast = data.batch(np.sort(order[place : place + batch]))
        place += batch
        optimizer.zero_grad(set_to_none=True)
        losses = [
            F.cross_entropy(network(seen, own, further, contrast, codebook), own[:, codebook])
            for codebook in range(own.shape[1])
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, steps, float(loss.detach()) / math.log(2))


@dataclass(frozen=True)
class IndexModelReport:
    """What was written.

    Attributes:
        path: the model's file.
        stacks: contrasts of cases that it was trained on.
        positions: live positions of them.
        bits: an index, the mean over the last twentieth of the steps.
    """

    path: Path
    stacks: int
    positions: int
    bits: float


@dataclass(frozen=True, kw_only=True)
class IndexModel(IndexModelOptions):
    """``vaevq-med index-model``: encode the training patients of a data set, and train a context model on them.

    Attributes:
        dataset: folder of ``dataset.json``.
        output: file of the model, safetensors.
        checkpoint: of the tokenizer whose indices it predicts.
    """

    dataset: Path
    output: Path
    checkpoint: Path

    def run(
        self,
        *,
        on_stack: Callable[[int], None] = lambda done: None,
        on_step: Callable[[int, int, float], None] = lambda step, steps, bits: None,
    ) -> IndexModelReport:
        """Train and write the model.

        Args:
            on_stack: called with the number of stacks that are encoded.
            on_step: as for :func:`train_context_model`.

        Raises:
            VaevqMedError: the data set, the checkpoint or an option is not what was expected.
        """
        self.check()
        if self.output.suffix != ".safetensors":
            raise VaevqMedError(f"output {self.output}: found the suffix {self.output.suffix!r}, expected .safetensors")
        if not self.output.parent.is_dir():
            raise VaevqMedError(f"output {self.output}: found no folder {self.output.parent}, expected one")
        check_free(self.output, self.overwrite)
        stored = StoredTokenizer(self.checkpoint, weights=self.weights, readout=self.readout)
        stacks: list[Stack] = []
        for stack in encode_stacks(self.dataset, stored, "training"):
            stacks.append(stack)
            on_stack(len(stacks))
        seen: list[float] = []

        def step(number: int, steps: int, bits: float) -> None:
            seen.append(bits)
            on_step(number, steps, bits)

        model = train_context_model(
            stacks,
            tokenizer=stored.content_hash,
            codebook=stored.network().quantizer.codebook(),
            options=self,
            on_step=step,
        )
        model.save(self.output)
        last = seen[-max(1, len(seen) // 20) :]
        positions = sum(int(stack.layout.live.sum()) for stack in stacks)
        return IndexModelReport(self.output, len(stacks), positions, sum(last) / len(last))
