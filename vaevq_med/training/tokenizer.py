"""Adversarial training of a tokenizer on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.objective import TokenizerObjective
from vaevq_med.networks.outputs import LossOutput, QuantizerOutput, TokenizerOutput
from vaevq_med.networks.tokenizer import TrainingForward, VisualTokenizer
from vaevq_med.training.base import BaseTrainer, DiscardError
from vaevq_med.training.distributed import require_ddp, unwrapped
from vaevq_med.training.micro_batches import AUTO
from vaevq_med.training.optim import check_trained_parts


class TokenizerTrainer(BaseTrainer):
    """Alternate a generator and a discriminator step on each batch.

    ``engine.state.output`` holds the batch (``image``), its quantized reconstruction (``pred``), and the
    generator's total (``loss``); ``engine.state.terms`` holds every unweighted term, gradient norms and
    learning rates of the iteration.

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
        precision: see :class:`BaseTrainer`.
        micro_batch_size: see :class:`BaseTrainer`. Averaged codebooks, the posterior's noise and a KL budget are those
            of the whole batch; the discriminator's batch norms, the adaptive weight, entropies over a batch and the
            calibrated likelihood are those of each part, as are the draws of nested masks, stages and slots, and of a
            gate the budget and the bottom level's losses, means over the codes that the part has.
        max_grad_norm: clip the generator's and the discriminator's gradient norms to this; None does not clip.
        log_interval: see :class:`BaseTrainer`.
        activation_checkpointing: levels of encoder and decoder, 0 for the finest, whose residual blocks are computed
            again in the backward pass: less memory, for large images, and more arithmetic.
        channels_last: use the channels-last memory format.
        compile: compile encoder, decoder and discriminator with ``torch.compile``.
        train_handlers: ignite handlers.
        inferer: MONAI inferer that calls ``training_network``.
        **kwargs: passed on to ``SupervisedTrainer``.

    Raises:
        VaevqMedError: an adversarial objective without a discriminator, several processes without DDP, or trained
            parts outside the network.
        TrainingError: while running, a loss term or gradient norm is not finite; no parameter has been changed
            by that iteration (a codebook of moving averages has: it moves before the step).
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
        micro_batch_size: int | str | None = AUTO,
        max_grad_norm: float | None = None,
        log_interval: int = 50,
        activation_checkpointing: Sequence[int] = (),
        channels_last: bool = False,
        compile: bool = False,
        train_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if objective.adversarial is not None and (discriminator is None or d_optimizer is None):
            raise VaevqMedError("objective.adversarial is set: found no discriminator or no d_optimizer, expected both")
        objective.check_adaptive(network, compiled=compile)
        objective.check_paths(network)
        training_network = training_network or TrainingForward(network)
        require_ddp(training_network, "training_network", "multi_gpu")
        if objective.adversarial is not None and discriminator is not None:
            require_ddp(discriminator, "discriminator", "multi_gpu")
        check_trained_parts(network, optimizer, objective, "objective")
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
            micro_batch_size=micro_batch_size,
            max_grad_norm=max_grad_norm,
            log_interval=log_interval,
            **kwargs,
        )
        self.training_network = training_network
        self.objective = objective
        self.discriminator = discriminator
        self.d_optimizer = d_optimizer
        if channels_last and network.takes_volumes:
            raise VaevqMedError("channels_last is true with a tokenizer of volumes; expected false")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for half in (network.encoder, network.decoder):
            half.recompute_levels(activation_checkpointing)
        if channels_last:
            for module in (network, discriminator):
                if module is not None:
                    module.to(memory_format=torch.channels_last)
        if compile:
            network.encoder.compile_layers()
            network.decoder.compile_layers()
            if discriminator is not None:
                unwrapped(discriminator).compile()
        self._attach(train_handlers)

    def control_state(self) -> dict[str, Tensor]:
        """That of the objective."""
        return self.objective.control_state()

    def load_control_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`control_state` gave."""
        self.objective.load_control_state(state)

    def summary(self) -> dict[str, Any]:
        """Bits of the indices, where there are some."""
        network: VisualTokenizer = self.network  # type: ignore[assignment]
        return network.bits()

    @property
    def is_adversarial(self) -> bool:
        """Whether this iteration trains the discriminator."""
        adversarial = self.objective.adversarial
        return adversarial is not None and self.state.iteration - 1 >= adversarial.start_step

    def _accumulate(self, total: dict[str, Tensor], loss: LossOutput, share: float, name: str) -> None:
        for key, value in {name: loss.total.detach(), **loss.terms}.items():
            total[key] = total.get(key, torch.zeros((), device=value.device)) + share * value.detach()

    def _probe(self, images: Tensor) -> Any:
        """The graph of images with the GAN on, without the updates that follow a batch."""
        network: VisualTokenizer = self.network  # type: ignore[assignment]
        adversarial = self.objective.adversarial
        with contextlib.suppress(DiscardError), network.quantizer.one_update(), self.objective.one_update():
            with self._autocast():
                output = TrainingForward(network)(images)
                loss = self.objective.generator(
                    images,
                    output,
                    discriminator=None if self.discriminator is None else unwrapped(self.discriminator),
                    step=0 if adversarial is None else adversarial.start_step,
                    last_layer=network.last_layer,
                    latent_layer=network.latent_layer,
                )
            raise DiscardError
        return loss

    def _generator_step(
        self, images: Tensor, noise: Tensor | None
    ) -> tuple[list[TokenizerOutput], dict[str, Tensor | float]]:
        network: VisualTokenizer = self.network  # type: ignore[assignment]
        batch_size = images.shape[0]
        discriminator = unwrapped(self.discriminator) if self.is_adversarial and self.discriminator else None
        if discriminator is not None:
            discriminator.requires_grad_(False)

        def gradients() -> tuple[list[TokenizerOutput], dict[str, Tensor]]:
            self.optimizer.zero_grad(set_to_none=True)
            outputs: list[TokenizerOutput] = []
            terms: dict[str, Tensor] = {}
            parts = self._parts(images)
            noises = [None] * len(parts) if noise is None else self._parts(noise)
            with network.quantizer.one_update(), self.objective.one_update():
                for number, (part, of_part) in enumerate(zip(parts, noises, strict=True), start=1):
                    share = part.shape[0] / batch_size
                    with self._no_sync(self.training_network, last=number == len(parts)):
                        with self._autocast():
                            output = self.inferer(part, self.training_network, of_part)
                            loss = self.objective.generator(
                                part,
                                output,
                                discriminator=discriminator,
                                step=self.state.iteration - 1,
                                last_layer=network.last_layer,
                                latent_layer=network.latent_layer,
                            )
                        (loss.total * share).backward()
                    self._accumulate(terms, loss, share, "loss")
                    outputs.append(_images_of(output))
                    del output, loss
            return outputs, terms

        outputs, terms = self._repeat(gradients, batch_size)
        stepped = self._step(network, self.optimizer, terms, "gradient_norm")
        if self.ema is not None:
            self.ema.update_parameters(network)
        return outputs, stepped

    def _discriminator_step(self, images: Tensor, outputs: Sequence[TokenizerOutput]) -> dict[str, Tensor | float]:
        assert self.discriminator is not None
        assert self.d_optimizer is not None
        discriminator, optimizer, batch_size = self.discriminator, self.d_optimizer, images.shape[0]
        discriminator.requires_grad_(True)

        def gradients() -> dict[str, Tensor]:
            optimizer.zero_grad(set_to_none=True)
            terms: dict[str, Tensor] = {}
            # The parts of the generator's step, whose reconstructions these are.
            parts = images.split([len(output.reconstruction) for output in outputs])
            for number, (part, output) in enumerate(zip(parts, outputs, strict=True), start=1):
                share = part.shape[0] / batch_size
                with self._no_sync(discriminator, last=number == len(parts)):
                    with self._autocast():
                        loss = self.objective.discriminator(
                            part, output, discriminator=discriminator, step=self.state.iteration - 1
                        )
                    (loss.total * share).backward()
                self._accumulate(terms, loss, share, "discriminator_loss")
            return terms

        return self._step(discriminator, optimizer, gradients(), "discriminator_gradient_norm")

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        network: VisualTokenizer = self.network  # type: ignore[assignment]
        images = batchdata[Keys.IMAGE].to(engine.state.device, non_blocking=True, memory_format=self.memory_format)
        images = images.as_tensor() if hasattr(images, "as_tensor") else images
        batch_size = images.shape[0]
        self.network.train()
        self.objective.train()
        self._plan(lambda count: self._probe(images[:count]), batch_size)
        outputs, terms = self._generator_step(images, network.draw_noise(images))
        if self.is_adversarial:
            terms |= self._discriminator_step(images, outputs)
        self._end_iteration(engine, terms, batch_size, started)
        return {
            Keys.IMAGE: images,
            Keys.PRED: torch.cat([output.reconstruction for output in outputs]),
            Keys.LOSS: torch.as_tensor(terms["loss"]),
        }


def _images_of(output: TokenizerOutput) -> TokenizerOutput:
    """The reconstructions, without the graph and what hangs on it."""
    continuous = output.reconstruction_continuous
    return TokenizerOutput(
        reconstruction=output.reconstruction.detach(),
        reconstruction_continuous=None if continuous is None else continuous.detach(),
        latent=output.latent.detach(),
        posterior=None,
        quantizer=QuantizerOutput(
            quantized=output.quantizer.quantized.detach(),
            codes=output.quantizer.codes.detach(),
            indices=output.quantizer.indices,
        ),
    )
