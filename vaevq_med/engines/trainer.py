"""Adversarial training of a tokenizer on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.errors import VaevqMedError
from vaevq_med.losses import KLLoss, TokenizerObjective
from vaevq_med.networks.tokenizer import TrainingForward, VisualTokenizer
from vaevq_med.outputs import LossOutput, TokenizerOutput

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


class TrainingError(VaevqMedError):
    """Training cannot go on; the message names the loss term and the iteration."""


def reraise(engine: Engine, error: BaseException) -> None:
    """A handler that passes an exception on."""
    raise error


def _plain(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


class TokenizerTrainer(SupervisedTrainer):
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
        if precision not in PRECISIONS:
            raise VaevqMedError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
        if accumulation_steps < 1:
            raise VaevqMedError(f"accumulation_steps: found {accumulation_steps}, expected 1 or more")
        if max_epochs < 1:
            raise VaevqMedError(f"max_epochs: found {max_epochs}, expected 1 or more")
        if objective.adversarial is not None and (discriminator is None or d_optimizer is None):
            raise VaevqMedError("objective.adversarial is set: found no discriminator or no d_optimizer, expected both")
        super().__init__(
            device=torch.device(device),
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            epoch_length=epoch_length,
            network=network,
            optimizer=optimizer,
            loss_function=objective.generator,
            train_handlers=None,
            decollate=False,
            **kwargs,
        )
        # MONAI's class keeps 1: an iteration is one optimizer step here, whatever the number of chunks.
        self.num_chunks = accumulation_steps
        for term in objective.terms.values():
            if isinstance(term, KLLoss):
                term.calls_per_step = accumulation_steps
        self.training_network = training_network or TrainingForward(network)
        self.objective = objective
        self.discriminator = discriminator
        self.d_optimizer = d_optimizer
        self.schedulers = list(schedulers)
        self.ema = ema
        self.autocast_dtype = PRECISIONS[precision]
        self.max_grad_norm = max_grad_norm
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
        self.state.terms = {}
        self.state.images_seen = 0
        self._register_handlers(train_handlers or [])
        # Last of all: ignite swallows an exception once any handler listens for it.
        self.add_event_handler(Events.EXCEPTION_RAISED, reraise)

    def run(self) -> None:  # type: ignore[override]
        """Train to ``max_epochs``; a run that already has ends at once."""
        if self.state.iteration >= self.state.max_epochs * self.state.epoch_length:
            self.logger.warning(
                "This run is finished (%d of %d epochs). Raise --max_epochs, choose another --output_dir, or pass "
                "--resume False to start anew.",
                self.state.iteration // self.state.epoch_length,
                self.state.max_epochs,
            )
            return
        super().run()

    @property
    def is_adversarial(self) -> bool:
        """Whether this iteration trains the discriminator."""
        adversarial = self.objective.adversarial
        return adversarial is not None and self.state.iteration - 1 >= adversarial.start_step

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.state.device.type, dtype=self.autocast_dtype)

    def _no_sync(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def _check_finite(self, terms: dict[str, float]) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"iteration {self.state.iteration}: found {', '.join(f'{n} = {terms[n]}' for n in bad)}, expected "
                "finite numbers; the weights of the last checkpoint are untouched. Try a lower learning rate, "
                "max_grad_norm, fp32, or a smaller weight for that term."
            )

    def _step(
        self, module: nn.Module, optimizer: Optimizer, terms: dict[str, Tensor], norm_name: str
    ) -> dict[str, float]:
        """Clip, check every term, step; one synchronization with the device."""
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        terms[norm_name] = nn.utils.clip_grad_norm_(module.parameters(), limit)
        values = torch.stack([value.detach().float().reshape(()) for value in terms.values()]).tolist()
        floats = dict(zip(terms, values, strict=True))
        self._check_finite(floats)
        optimizer.step()
        return floats

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
        rates = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.d_optimizer is not None:
            rates["discriminator_learning_rate"] = self.d_optimizer.param_groups[0]["lr"]
        with warnings.catch_warnings():
            # The discriminator's rate follows the schedule before its first step, too.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers:
                scheduler.step()
        engine.state.images_seen = engine.state.iteration * batch_size
        engine.state.terms = {
            **terms,
            **rates,
            "images_per_second": batch_size / (time.perf_counter() - started),
        }
        return {
            Keys.IMAGE: images,
            Keys.PRED: torch.cat([output.reconstruction for output in outputs]),
            Keys.LOSS: terms["loss"],
        }
