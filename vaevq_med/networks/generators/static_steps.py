"""Tokens drawn by steps over static memory, which a GPU replays as CUDA graphs.

A step takes a token to the next one: network, guidance, filters, draw and the known tokens of an inpainting. It reads
the place from the device and leaves everything there, so that the host does nothing for a token but launch a graph. The
graphs of a call differ by the codebook, whose head and table a step uses, and by how many places attention reads, which
grows by ``bucket`` at a time.

Random numbers are drawn outside of the graphs, into memory that they read, for several places at once. So a graph holds
no state of a generator, and serves any number of generators.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vaevq_med.networks.generators.captured import CudaGraphs, Graphs, Replayed
from vaevq_med.networks.generators.drawing import RandomSource, TokenRule, fill_waits, soonest
from vaevq_med.networks.generators.stepwise import StepwiseGenerator
from vaevq_med.networks.generators.token_generator import Kept

# Random numbers of a sample drawn at once: 4 MiB. By K alone, as a sample must not depend on the batch that it is in.
_WAITS_AT_ONCE = 2**20

# cuDNN's attention would be planned anew for every bucket, and the flash kernel takes no bias.
_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class StaticSteps:
    """The steps of one network, batch size and way to draw, over memory of their own.

    Args:
        network: in evaluation mode, in the type that it runs in.
        rule: how to draw.
        batch: B, samples; with guidance the network runs twice as many rows.
        inpaint: whether some tokens are known.
        bucket: attention reads a multiple of so many places, as far as there are.
        places_at_once: places whose random numbers are drawn together; as many as 4 MiB a sample hold when absent.
        graphs: how a step is captured; None runs all of them eagerly.

    Attributes:
        replayed: what does the steps.
        tokens: int64 ``[B, h w G]``, those of the last run.
    """

    def __init__(
        self,
        network: StepwiseGenerator,
        rule: TokenRule,
        *,
        batch: int,
        inpaint: bool = False,
        bucket: int = 128,
        places_at_once: int | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        device, length = network.token_embedding.weight.device, network.sequence_length
        self.network = network
        self.rule = rule
        self.bucket = bucket
        self.places_at_once = places_at_once or min(length, max(1, _WAITS_AT_ONCE // network.num_embeddings))
        self.replayed = Replayed(graphs)
        self._copies = 2 if rule.guided else 1
        self._cache = network.new_static_cache(self._copies * batch)
        self._inputs = torch.zeros(self._copies * batch, dtype=torch.int64, device=device)
        self._waits = torch.ones(batch, self.places_at_once, network.num_embeddings, device=device)
        self.tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self._kept: Kept | None = None
        if inpaint:
            self._kept = torch.zeros_like(self.tokens, dtype=torch.bool), torch.zeros_like(self.tokens)

    def run(
        self,
        classes: Tensor,
        kept: Kept | None = None,
        generator: RandomSource = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Tokens ``[B, h w G]``; the arguments are on the device, and as ``generate_indices`` makes them of its own.

        Args:
            classes: ``[B]``, with guidance ``[2 B]``.
            kept: known tokens, where there are some.
            generator: of the draws.
            progress: called with the tokens launched and all tokens after each.
        """
        self._cache.restart()
        self._inputs.copy_(classes)
        if self._kept is not None:
            assert kept is not None
            for own, given in zip(self._kept, kept, strict=True):
                own.copy_(given)
        for place in range(self.network.sequence_length):
            if place % self.places_at_once == 0:
                fill_waits(self._waits, generator)
            self._launch(place)
            if progress is not None:
                progress(place + 1, self.network.sequence_length)
        return self.tokens.clone()

    def _launch(self, place: int) -> None:
        codebook = place % self.network.num_codebooks
        end = min((place // self.bucket + 1) * self.bucket, self._cache.capacity)
        if place == 0:  # It takes labels, and there is one of it: not worth a graph.
            self.step(codebook, end, first=True)
        else:
            self.replayed((codebook, end), functools.partial(self.step, codebook, end))

    def step(self, codebook: int, end: int, first: bool = False) -> None:
        """From the inputs to the next ones, at the place that the cache holds, which goes on by one.

        Args:
            codebook: of the token that is drawn.
            end: places that attention reads.
            first: whether the inputs are labels.
        """
        place = self._cache.place
        with sdpa_kernel(_ATTENTION):
            logits = self.network.static_step(self._inputs, self._cache, codebook=codebook, end=end, first=first)
        waits = self._waits.index_select(1, place % self.places_at_once).squeeze(1)  # [B, K]
        drawn = soonest(self.rule.filtered(logits), waits).unsqueeze(1)  # [B, 1]
        if self._kept is not None:
            mask, values = (kept.index_select(1, place) for kept in self._kept)
            drawn = torch.where(mask, values, drawn)
        self.tokens.index_copy_(1, place, drawn)
        self._inputs.copy_(drawn.squeeze(1).repeat(self._copies))
        place.add_(1)


class StepStore:
    """The static steps of the last call of ``generate_indices``, for the next call to go on with.

    They are made anew where the network, its weights or a setting changed. One set of steps is held at a time: its
    keys and values, its graphs, and the weights in another type where one is asked for.

    Args:
        bucket: see :class:`StaticSteps`.
        places_at_once: see there.
        graphs: captures the steps; by default CUDA graphs on a GPU, and on a CPU nothing.
        eager: run every step eagerly, without graphs.

    Attributes:
        last: the steps of the last call.
    """

    def __init__(
        self,
        *,
        bucket: int = 128,
        places_at_once: int | None = None,
        graphs: Graphs | None = None,
        eager: bool = False,
    ) -> None:
        self.bucket = bucket
        self.places_at_once = places_at_once
        self.last: StaticSteps | None = None
        self._graphs = graphs
        self._eager = eager
        self._made_for: tuple[StepwiseGenerator, Hashable] | None = None

    def steps(
        self, network: StepwiseGenerator, rule: TokenRule, *, batch: int, dtype: torch.dtype | None, inpaint: bool
    ) -> StaticSteps:
        """Steps of a network in evaluation mode; the arguments are those of :class:`StaticSteps`.

        Args:
            network: as it is; where the type is another, a copy of it runs.
            rule: how to draw.
            batch: samples.
            dtype: of weights, keys and values; the network's own when absent.
            inpaint: whether some tokens are known.
        """
        # A graph reads the weights where they were: it must not outlive a move of theirs, nor a copy their change.
        weights = tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in network.parameters())
        setting = (rule, batch, dtype, inpaint, weights)
        if self.last is not None and self._made_for is not None:
            known, described = self._made_for
            if known is network and described == setting:
                return self.last
        # The old steps free their memory before the new ones take theirs.
        self.last = self._made_for = None
        weight = network.token_embedding.weight
        graphs = self._graphs
        if graphs is None and weight.device.type == "cuda" and not self._eager:
            graphs = CudaGraphs(weight.device)
        run = network
        if dtype is not None and dtype != weight.dtype:
            run = copy.deepcopy(network).to(dtype)
        self.last = StaticSteps(
            run,
            rule,
            batch=batch,
            inpaint=inpaint,
            bucket=self.bucket,
            places_at_once=self.places_at_once,
            graphs=graphs,
        )
        self._made_for = network, setting
        return self.last
