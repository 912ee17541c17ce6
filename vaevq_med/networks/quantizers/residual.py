"""Residual vector quantization (SoundStream, arXiv 2107.03312, algorithm 1): each stage quantizes what is left.

``r_1 = z``, ``r_{i+1} = r_i - sg(q_i)`` with the codeword ``q_i`` nearest to ``r_i`` in stage i's codebook; the codes
are ``sum_i q_i``. G stages of K codewords take ``G log2 K`` bits a position; they are compared with one codebook at
equal bits, 2 stages of 128 with one of 16,384.

The losses are those of the stages, averaged over the stages that took part. The sum of the stages has one
straight-through gradient; one through each stage, as some code has it, adds up to G times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.processes import number_from_first_process
from vaevq_med.networks.quantizers.base import (
    Cluster,
    CodebookQuantizer,
    Quantizer,
    look_up,
    on_grid,
    rows,
    straight_through,
)
from vaevq_med.networks.quantizers.ema import VectorQuantizerEMA
from vaevq_med.networks.quantizers.nearest import nearest_codeword


class ResidualQuantizer(Quantizer):
    """Stages of quantizers with one codebook each, every stage on the residual of those before.

    It has no ``codebook()``: the codes are sums over the stages, which no one table holds.

    Args:
        stages: a quantizer a stage, free (:class:`VectorQuantizer`), of moving averages (:class:`VectorQuantizerEMA`)
            or any other with one explicit codebook, all of one type and size; or a single one, which all stages share.
            A shared codebook of moving averages is updated once a call, by the residuals of all stages together.
        num_codebooks: G, the number of stages; needed with a shared codebook, otherwise the length of ``stages``.
        dropout: in training, keep the first g stages only, with g drawn uniformly from 1 to G at each call, the same
            on every process. The stages after them are still searched, so that each position has G indices, but weigh 0
            in codes and losses and do not update. It makes decoding from the first g stages useful.

    Raises:
        VaevqMedError: the stages do not fit together.

    Example:
        >>> from vaevq_med.networks.quantizers import VectorQuantizer
        >>> quantizer = ResidualQuantizer(stages=[VectorQuantizer(num_embeddings=8, embedding_dim=4)], num_codebooks=3)
        >>> quantizer(torch.zeros(1, 4, 2, 2)).indices.shape, quantizer.bits_per_position
        (torch.Size([1, 2, 2, 3]), 9.0)
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("stages",)
    first_argument: ClassVar[str | None] = "num_stages"

    def __init__(
        self, *, stages: Sequence[CodebookQuantizer], num_codebooks: int | None = None, dropout: bool = False
    ) -> None:
        super().__init__()
        if not stages or any(not isinstance(stage, CodebookQuantizer) for stage in stages):
            found = ", ".join(type(stage).__name__ for stage in stages) or "none"
            raise VaevqMedError(f"the stages are {found}; expected quantizers with one explicit codebook each")
        num_codebooks = len(stages) if num_codebooks is None else num_codebooks
        if num_codebooks < 1 or len(stages) not in (1, num_codebooks):
            raise VaevqMedError(
                f"found {len(stages)} stages with num_codebooks {num_codebooks}; expected as many, or one to share"
            )
        kinds = {(type(s).__name__, s.num_embeddings, s.embedding_dim, s.assignment) for s in stages}
        if len(kinds) > 1:
            raise VaevqMedError(
                "the stages differ in (type, num_embeddings, embedding_dim, assignment); "
                f"found {', '.join(map(str, sorted(kinds)))}, expected the same in all"
            )
        _, self.num_embeddings, self.embedding_dim, self.assignment = kinds.pop()
        self.num_codebooks = num_codebooks
        self.dropout = dropout
        self.stages = nn.ModuleList(stages)

    def stage(self, number: int) -> CodebookQuantizer:
        """The quantizer of stage ``number``, counted from 0."""
        stage = self.stages[number if len(self.stages) > 1 else 0]
        assert isinstance(stage, CodebookQuantizer)
        return stage

    def codebook(self) -> None:
        """None: the codes are sums over the stages."""
        return

    def indices_to_codes(self, indices: Tensor, *, num_stages: int | None = None) -> Tensor:
        """Codes ``[B, D, *grid]`` of indices ``[B, *grid, G]``.

        Args:
            indices: int64, in [0, K).
            num_stages: decode from that many of the first stages, a coarser approximation; by default from all.

        Raises:
            VaevqMedError: the indices have another shape, one is not in [0, K), or ``num_stages`` is not in [1, G].
        """
        self.check_indices(indices)
        num_stages = self.num_codebooks if num_stages is None else num_stages
        if not 1 <= num_stages <= self.num_codebooks:
            raise VaevqMedError(f"num_stages is {num_stages}; expected 1 to {self.num_codebooks}")
        codes = look_up(indices[..., :1], self.stage(0).codebook())
        for number in range(1, num_stages):
            codes = codes + look_up(indices[..., number : number + 1], self.stage(number).codebook())
        return codes

    @torch.no_grad()
    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Start stage after stage, each on what the stages before have left; a shared codebook on the latents alone.

        The nearest codewords are Euclidean ones, whatever the assignment.
        """
        residual = latents.detach().float()
        for number in range(len(self.stages)):
            stage = self.stage(number)
            if not stage.start_codebook(residual, cluster):
                return False
            codebook = stage.codebook().detach().to(residual.device)
            found = nearest_codeword(rows(residual), codebook)
            residual = residual - look_up(on_grid(found, residual), codebook)
        return True

    def _num_kept(self, device: torch.device) -> int:
        """Stages that take part in this call."""
        if not (self.dropout and self.training):
            return self.num_codebooks
        return int(number_from_first_process(torch.randint(1, self.num_codebooks + 1, (1,)), device))

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]`` stage by stage, with one straight-through gradient."""
        self.check_latent(z)
        kept = self._num_kept(z.device)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            residual, outputs, residuals = z, [], []
            for number in range(self.num_codebooks):
                stage = self.stage(number)
                # Nothing is updated before the last stage has searched: a shared codebook is one codebook for all.
                search = stage.look_up if isinstance(stage, VectorQuantizerEMA) else stage
                output = search(residual, posterior)
                residuals.append(rows(residual.detach()))
                outputs.append(output)
                residual = residual - output.codes.detach()
            # A weight of 0 and not an omission: DDP waits for a gradient of every parameter.
            weights = [float(number < kept) for number in range(self.num_codebooks)]
            codes = outputs[0].codes
            for weight, output in zip(weights[1:], outputs[1:], strict=True):
                codes = codes + weight * output.codes
            losses = {
                name: torch.stack([w * output.losses[name] for w, output in zip(weights, outputs, strict=True)]).sum()
                / kept
                for name in outputs[0].losses
            }
        if self.training:
            self._update(residuals[:kept], [output.indices.flatten() for output in outputs[:kept]])
        return QuantizerOutput(
            quantized=straight_through(codes, z),
            codes=codes,
            indices=torch.cat([output.indices for output in outputs], dim=-1),
            losses=losses,
        )

    def _update(self, residuals: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
        """Update the codebooks of moving averages by the residuals ``[N, D]`` that each was given."""
        if len(self.stages) == 1:
            residuals, indices = [torch.cat(list(residuals))], [torch.cat(list(indices))]
        for number, (latents, assigned) in enumerate(zip(residuals, indices, strict=True)):
            stage = self.stage(number)
            if isinstance(stage, VectorQuantizerEMA):
                stage.follow(latents, assigned)
