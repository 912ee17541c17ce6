"""Adversarial training of a tokenizer on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.engines.base_trainer import BaseTrainer, _plain, require_ddp
from vaevq_med.errors import VaevqMedError
from vaevq_med.losses import KLLoss, TokenizerObjective
from vaevq_med.networks.tokenizer import TrainingForward, VisualTokenizer
from vaevq_med.outputs import LossOutput, TokenizerOutput


class TokenizerTrainer(BaseTrainer):
    """Alternate a generator and a discriminator step on each batch.

    ``engine.state.output`` holds the batch (``image``), its quantized reconstruction (``pred``), and the
    generator's total (``loss``); ``engine.state.terms`` holds every unweighted term, gradient norms and
    learning rates of the iteration as floats.

    Args:
        device: where to train.
        max_epochs: epochs to train.
        train_data_loader: yields dictionaries with ``image`` ``[B, C, H, W]`` in [-1, 1].
        epoch_length: iterations an epoch.
        network: the tokenizer.
        training_network: what the generator step calls, a ``TrainingForward`` of ``network`` or its DDP
            wrapper; by default made here.
        optimizer: the tokenizer's optimizer.
        objective: the weighted terms.
        discriminator: PatchGAN, or its DDP wrapper; needed if the objective is adversarial.
        d_optimizer: the discriminator's optimizer.
        schedulers: learning-rate schedulers, each stepped once an iteration.
        ema: averaged copy of the network, updated after each step.
        precision: ``fp32``, or ``bf16`` for autocast.
        accumulation_steps: chunks that each batch is split into; the step sees their mean gradient.
        max_grad_norm: clip the generator's and the discriminator's gradient norms to this; None does not clip.
        channels_last: use the channels-last memory format.
        compile: compile encoder, decoder and discriminator with ``torch.compile``.
        train_handlers: ignite handlers.
        inferer: MONAI inferer that calls ``training_network``.
        **kwargs: passed on to ``SupervisedTrainer``.

    Raises:
        VaevqMedError: an adversarial objective without a discriminator, or several processes without DDP.
        TrainingError: while running, a loss term or gradient norm is not finite; no parameter has been changed
            by that iteration (a codebook of moving averages has: it moves in the forward pass).
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        epoch_length: int,
        network: VisualTokenizer,
        optimizer: Optimizer,
        objective: TokenizerObjective,
        training_network: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        d_optimizer: Optimizer | None = None,
        schedulers: Sequence[Any] = (),
        ema: AveragedModel | None = None,
        precision: str = "fp32",
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
        train_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if objective.adversarial is not None and (discriminator is None or d_optimizer is None):
            raise VaevqMedError("objective.adversarial is set: found no discriminator or no d_optimizer, expected both")
        training_network = training_network or TrainingForward(network)
        require_ddp(training_network, "training_network", "multi_gpu")
        if objective.adversarial is not None and discriminator is not None:
            require_ddp(discriminator, "discriminator", "multi_gpu")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            epoch_length=epoch_length,
            network=network,
            optimizer=optimizer,
            loss_function=objective.generator,
            schedulers=schedulers,
            ema=ema,
            precision=precision,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            **kwargs,
        )
        for term in objective.terms.values():
            if isinstance(term, KLLoss):
                term.calls_per_step = accumulation_steps
        self.training_network = training_network
        self.objective = objective
        self.discriminator = discriminator
        self.d_optimizer = d_optimizer
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            for module in (network, discriminator):
                if module is not None:
                    module.to(memory_format=torch.channels_last)
        if compile:
            network.encoder.compile()
            network.decoder.compile()
            if discriminator is not None:
                _plain(discriminator).compile()
        self._attach(train_handlers)

    def control_state(self) -> dict[str, Tensor]:
        """That of the objective."""
        return self.objective.control_state()

    def load_control_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`control_state` gave."""
        self.objective.load_control_state(state)

    def summary(self) -> dict[str, Any]:
        """Bits of the indices."""
        network: VisualTokenizer = self.network  # type: ignore[assignment]
        bits = network.quantizer.bits_per_position
        return {"bits_per_position": bits, "bits_per_pixel": bits / network.encoder.downsampling_factor**2}

    @property
    def is_adversarial(self) -> bool:
        """Whether this iteration trains the discriminator."""
        adversarial = self.objective.adversarial
        return adversarial is not None and self.state.iteration - 1 >= adversarial.start_step

    def _accumulate(self, total: dict[str, Tensor], loss: LossOutput, share: float, name: str) -> None:
        for key, value in {name: loss.total.detach(), **loss.terms}.items():
            total[key] = total.get(key, torch.zeros((), device=value.device)) + share * value.detach()

    def _generator_step(
        self, chunks: Sequence[Tensor], batch_size: int
    ) -> tuple[list[TokenizerOutput], dict[str, float]]:
        network: VisualTokenizer = self.network  # type: ignore[assignment]
        discriminator = _plain(self.discriminator) if self.is_adversarial and self.discriminator else None
        if discriminator is not None:
            discriminator.requires_grad_(False)
        self.optimizer.zero_grad(set_to_none=True)
        outputs: list[TokenizerOutput] = []
        terms: dict[str, Tensor] = {}
        for number, chunk in enumerate(chunks, start=1):
            share = chunk.shape[0] / batch_size
            with self._no_sync(self.training_network, last=number == len(chunks)):
                with self._autocast():
                    output = self.inferer(chunk, self.training_network)
                    loss = self.objective.generator(
                        chunk,
                        output,
                        discriminator=discriminator,
                        step=self.state.iteration - 1,
                        last_layer=network.last_layer,
                    )
                (loss.total * share).backward()
            self._accumulate(terms, loss, share, "loss")
            continuous = output.reconstruction_continuous
            outputs.append(
                replace(
                    output,
                    reconstruction=output.reconstruction.detach(),
                    reconstruction_continuous=None if continuous is None else continuous.detach(),
                )
            )
        floats = self._step(network, self.optimizer, terms, "gradient_norm")
        if self.ema is not None:
            self.ema.update_parameters(network)
        return outputs, floats

    def _discriminator_step(
        self, chunks: Sequence[Tensor], outputs: Sequence[TokenizerOutput], batch_size: int
    ) -> dict[str, float]:
        assert self.discriminator is not None
        assert self.d_optimizer is not None
        self.discriminator.requires_grad_(True)
        self.d_optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for number, (chunk, output) in enumerate(zip(chunks, outputs, strict=True), start=1):
            share = chunk.shape[0] / batch_size
            with self._no_sync(self.discriminator, last=number == len(chunks)):
                with self._autocast():
                    loss = self.objective.discriminator(
                        chunk, output, discriminator=self.discriminator, step=self.state.iteration - 1
                    )
                (loss.total * share).backward()
            self._accumulate(terms, loss, share, "discriminator_loss")
        return self._step(self.discriminator, self.d_optimizer, terms, "discriminator_gradient_norm")

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        images = batchdata[Keys.IMAGE].to(engine.state.device, non_blocking=True, memory_format=self.memory_format)
        images = images.as_tensor() if hasattr(images, "as_tensor") else images
        batch_size = images.shape[0]
        chunks = images.chunk(min(self.num_chunks, batch_size))
        self.network.train()
        self.objective.train()
        outputs, terms = self._generator_step(chunks, batch_size)
        if self.is_adversarial:
            terms |= self._discriminator_step(chunks, outputs, batch_size)
        self._end_iteration(engine, terms, batch_size, started)
        return {
            Keys.IMAGE: images,
            Keys.PRED: torch.cat([output.reconstruction for output in outputs]),
            Keys.LOSS: terms["loss"],
        }
