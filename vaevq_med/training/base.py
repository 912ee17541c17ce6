"""What the trainers share: an iteration is one optimizer step, in any number of micro-batches, checked beforehand."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import LossOutput
from vaevq_med.networks.processes import least_of_processes
from vaevq_med.training import distributed
from vaevq_med.training.events import RunEvents
from vaevq_med.training.micro_batches import AUTO, Snapshot, check_micro_batch_size, is_out_of_memory, planned
from vaevq_med.training.precision import autocast, autocast_dtype
from vaevq_med.training.terms import Terms

T = TypeVar("T")


class TrainingError(VaevqMedError):
    """Training cannot go on; the message names the loss term and the iteration."""


class DiscardError(Exception):
    """Ends a batch whose updates are not wanted."""


def pass_errors_on(engine: Engine) -> None:
    """Let what goes wrong in an engine's run reach its caller; ignite swallows it once any handler listens for it.

    To be called when all handlers are attached. Ignite's own lines about the error, which would stand above the one
    that the caller makes of it, are left out.
    """
    engine.add_event_handler(Events.EXCEPTION_RAISED, _reraise)
    engine.logger.addFilter(_is_no_repetition)


def _reraise(engine: Engine, error: BaseException) -> None:
    raise error


def _is_no_repetition(record: logging.LogRecord) -> bool:
    return "terminating due to exception" not in record.getMessage()


class BaseTrainer(SupervisedTrainer):
    """A trainer that handlers of this package can follow, checkpoint and resume.

    A subclass ends its constructor with :meth:`_attach`, and its ``_iteration`` with :meth:`_end_iteration`, which
    publishes ``engine.state.terms`` (numbers by name, which stay on the device until somebody looks),
    ``engine.state.batch_images`` and ``engine.state.images_seen``.

    Args:
        device: where to train.
        max_epochs: epochs to train.
        train_data_loader: yields dictionaries of batch-first tensors.
        epoch_length: iterations an epoch.
        network: what is trained, stored and averaged.
        optimizer: of its parameters.
        loss_function: what MONAI's class keeps as such.
        schedulers: learning-rate schedulers, each stepped once an iteration.
        ema: averaged copy of the network, updated after each step.
        precision: ``fp32``, ``bf16`` for autocast, or ``auto``, which is ``bf16`` on a GPU that has it.
        micro_batch_size: items of a batch that go through the network at once; the step sees their mean gradient.
            ``auto`` takes as many as the free memory holds, None the whole batch.
        max_grad_norm: clip gradient norms to this; None does not clip.
        log_interval: iterations between two looks at the terms on a GPU, each of which makes the host wait for it.
        **kwargs: passed on to ``SupervisedTrainer``.

    Attributes:
        discriminator: a second network that is trained against the first, or None.
        d_optimizer: its optimizer, or None.
    """

    discriminator: nn.Module | None = None
    d_optimizer: Optimizer | None = None

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        epoch_length: int,
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: Callable[..., Any],
        schedulers: Sequence[Any] = (),
        ema: AveragedModel | None = None,
        precision: str = "fp32",
        micro_batch_size: int | str | None = AUTO,
        max_grad_norm: float | None = None,
        log_interval: int = 50,
        **kwargs: Any,
    ) -> None:
        self.autocast_dtype = autocast_dtype(precision, device)
        sampler = getattr(train_data_loader, "batch_sampler", None)
        check_micro_batch_size(micro_batch_size, getattr(sampler, "batch_size", None))
        if max_epochs < 1:
            raise VaevqMedError(f"max_epochs: found {max_epochs}, expected 1 or more")
        if log_interval < 1:
            raise VaevqMedError(f"log_interval: found {log_interval}, expected 1 or more")
        super().__init__(
            device=torch.device(device),
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            epoch_length=epoch_length,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            train_handlers=None,
            decollate=False,
            **kwargs,
        )
        # MONAI's gradient accumulation stays off: an iteration is one optimizer step here, whatever the micro-batch.
        self.micro_batch_size = micro_batch_size
        self.schedulers = list(schedulers)
        self.ema = ema
        self.max_grad_norm = max_grad_norm
        self.log_interval = log_interval
        self.register_events(*RunEvents)
        self.state.terms = {}
        self.state.batch_images = 0
        self.state.images_seen = 0
        # Terms that have not been checked yet, with their iterations; what was trained since they last were.
        self._unread: list[tuple[int, Terms]] = []
        self._images, self._seconds = 0, 0.0
        # On the device, 1 from the first iteration on whose terms were not finite.
        self._stopped: Tensor | None = None

    def _attach(self, handlers: Sequence[Any] | None) -> None:
        """Attach the handlers, one of which may resume a run: nothing is constructed after this."""
        self._register_handlers(handlers or [])
        pass_errors_on(self)

    def run(self) -> None:  # type: ignore[override]
        """Train to ``max_epochs``; a run that already has ends at once."""
        if self.state.iteration >= self.state.max_epochs * self.state.epoch_length:
            self.logger.warning(
                "This run is finished (%d of %d epochs). Raise --max_epochs, choose another --output_dir, or pass "
                "--resume False to start anew.",
                self.state.iteration // self.state.epoch_length,
                self.state.max_epochs,
            )
            self.fire_event(RunEvents.ALREADY_FINISHED)
            return
        super().run()
        self.check_terms()

    def control_state(self) -> dict[str, Tensor]:
        """What steers the loss, for checkpoints; no network weights."""
        return {}

    def load_control_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`control_state` gave."""

    def summary(self) -> dict[str, Any]:
        """What a run's summary says of this kind of network."""
        return {}

    def _plan(self, probe: Callable[[int], Any], batch_size: int) -> None:
        """Choose the micro-batch, where that is asked for and has not been done.

        Args:
            probe: makes the graph of the first so many items of the batch, and moves no codebook and no factor.
            batch_size: items of the batch.
        """
        if self.micro_batch_size != AUTO:
            check_micro_batch_size(self.micro_batch_size, batch_size if self.state.iteration <= 1 else None)
            return
        device = self.state.device
        parameters = [*self.network.parameters()]
        if self.discriminator is not None:
            parameters += self.discriminator.parameters()
        before = Snapshot(device, self.discriminator)
        try:
            size = planned(probe, batch_size, parameters, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = 1  # not even two items fit
        finally:
            before.restore()
        # All processes cut alike: the one with the least memory decides.
        self.micro_batch_size = size = least_of_processes(size, device)
        if size < batch_size:
            self.logger.warning("%d of %d items of a batch go through the network at once", size, batch_size)

    def _parts(self, values: Tensor) -> Sequence[Tensor]:
        """A batch in micro-batches."""
        return values.split(int(self.micro_batch_size or len(values)))

    def _repeat(self, part: Callable[[], T], batch_size: int) -> T:
        """Run a part of a step; where memory runs out, halve the micro-batch and run it again from the same start.

        Raises:
            TrainingError: a single item is too much, or there are several processes, which have to cut alike.
        """
        while True:
            before = Snapshot(self.state.device, self.discriminator)
            size = min(int(self.micro_batch_size or batch_size), batch_size)
            try:
                return part()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1 or distributed.world_size() > 1:
                    raise TrainingError(
                        f"iteration {self.state.iteration}: found too little memory for a micro_batch_size of {size}, "
                        f"expected room for it; {'lower it' if size > 1 else 'choose a smaller network or image'}"
                    ) from None
            # Only now, the exception gone, are the tensors of its frames free.
            for optimizer in (self.optimizer, self.d_optimizer):
                if optimizer is not None:
                    optimizer.zero_grad(set_to_none=True)
            if self.state.device.type == "cuda":
                torch.cuda.empty_cache()
            before.restore()
            self.micro_batch_size = (size + 1) // 2
            self.logger.warning(
                "Iteration %d ran out of memory: from now on %d items of a batch go through at once, not %d",
                self.state.iteration,
                self.micro_batch_size,
                size,
            )

    def _minimize(
        self,
        loss: nn.Module,
        values: Sequence[Tensor],
        compute: Callable[..., LossOutput],
        one_update: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> dict[str, Any]:
        """One step of the network's optimizer and of its average, in any number of micro-batches.

        Args:
            loss: what holds the network, or its DDP wrapper.
            values: of the batch, batch first; each is cut into the same parts.
            compute: the loss of a part's values.
            one_update: in which all parts are one batch to what follows them, such as an averaged codebook.

        Returns:
            The mean of the loss and of each of its terms over the batch, and the gradient's norm.
        """
        batch_size = values[0].shape[0]

        def gradients() -> dict[str, Tensor]:
            self.optimizer.zero_grad(set_to_none=True)
            total: dict[str, Tensor] = {}
            parts = list(zip(*map(self._parts, values), strict=True))
            with one_update():
                for number, part in enumerate(parts, start=1):
                    share = part[0].shape[0] / batch_size
                    with self._no_sync(loss, last=number == len(parts)):
                        with self._autocast():
                            found = compute(*part)
                        (found.total * share).backward()
                    for name, value in {"loss": found.total.detach(), **found.terms}.items():
                        total[name] = total.get(name, torch.zeros((), device=value.device)) + share * value
            return total

        terms = self._step(self.network, self.optimizer, self._repeat(gradients, batch_size), "gradient_norm")
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        return terms

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.state.device, self.autocast_dtype)

    def _no_sync(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def _check_finite(self, terms: Mapping[str, float], iteration: int) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"iteration {iteration}: found {', '.join(f'{n} = {terms[n]}' for n in bad)}, expected "
                "finite numbers; the weights of the last checkpoint are untouched. Try a lower learning rate, "
                "max_grad_norm, fp32, or a smaller weight for that term."
            )

    def _step(
        self, module: nn.Module, optimizer: Optimizer, terms: dict[str, Tensor], norm_name: str
    ) -> dict[str, Tensor | float]:
        """Clip and step, unless a term is not finite.

        Where the terms are read late, the optimizer itself skips the step, and every one after it, until
        :meth:`check_terms` says so.
        """
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        terms[norm_name] = nn.utils.clip_grad_norm_(module.parameters(), limit)
        if not self.reads_late(optimizer):
            floats = dict(Terms(terms))
            self._check_finite(floats, self.state.iteration)
            optimizer.step()
            return dict(floats)
        finite = torch.stack([value.detach().float().reshape(()) for value in terms.values()]).isfinite().all()
        if self._stopped is None:
            self._stopped = torch.zeros((), device=self.state.device)
        self._stopped.clamp_(min=(~finite).float())
        optimizer.found_inf = self._stopped  # type: ignore[attr-defined]
        optimizer.step()
        return dict(terms)

    def reads_late(self, optimizer: Optimizer) -> bool:
        """Whether a step's terms stay on the device for a while: on a GPU, if the optimizer can skip a step by itself.

        Torch's fused optimizers can.
        """
        fused = all(group.get("fused") for group in optimizer.param_groups)
        return fused and self.state.device.type == "cuda"

    def check_terms(self) -> None:
        """Read the terms of the iterations since the last time, which waits for the device.

        Raises:
            TrainingError: one was not finite; no parameter has been changed from that iteration on.
        """
        waiting, self._unread = self._unread, []
        for iteration, terms in waiting:
            self._check_finite(terms, iteration)

    def _end_iteration(
        self, engine: Engine, terms: Mapping[str, Tensor | float], batch_size: int, started: float
    ) -> None:
        """Step the schedules and publish what the iteration gave; the rates are those that it was trained with."""
        state: Any = engine.state
        rates: dict[str, Tensor | float] = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        named = (group for group in self.optimizer.param_groups[1:] if "name" in group)
        rates |= {f"learning_rate_{group['name']}": group["lr"] for group in named}
        if self.d_optimizer is not None:
            rates["discriminator_learning_rate"] = self.d_optimizer.param_groups[0]["lr"]
        with warnings.catch_warnings():
            # The discriminator's rate follows the schedule before its first step, too.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers:
                scheduler.step()
        state.batch_images = batch_size
        state.images_seen = state.iteration * batch_size
        state.terms = Terms({**terms, **rates})
        self._unread.append((state.iteration, state.terms))
        late = self.reads_late(self.optimizer)
        read = not late or state.iteration % self.log_interval == 0 or state.iteration % state.epoch_length == 0
        if read:
            self.check_terms()
        self._images += batch_size
        self._seconds += time.perf_counter() - started
        if read:  # in between, the host runs ahead of the device, and its time says nothing
            state.terms = Terms({**state.terms, "images_per_second": self._images / self._seconds})
            self._images, self._seconds = 0, 0.0
