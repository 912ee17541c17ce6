"""Where a training step's time goes, and where it waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _setting import Setting
from _speed import AT_ONCE
from ignite.engine import Events
from torch import Tensor
from torch.overrides import TorchFunctionMode

import vaevq_med
from vaevq_med.networks.posterior import DiagonalGaussian

_PACKAGE = str(Path(vaevq_med.__file__).parent)
_LATENT_TERMS = ("reconstruction", "kl", "rcs", "dcr", "codebook", "commitment")
"""Terms that need no further network."""


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


class _Clock:
    """Times the forward and the backward pass of a part, in milliseconds, the middle of three rounds."""

    def __init__(self, setting: Setting, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self.setting, self.autocast = setting, autocast
        self.rounds = 2 if setting.small else 4

    def _now(self) -> float:
        self.setting.synchronize()
        return time.perf_counter()

    def both(self, forward: Callable[[], Sequence[Tensor]]) -> tuple[float, float]:
        """Of a call whose outputs are differentiated."""
        ahead, back = [], []
        for number in range(self.rounds):
            started = self._now()
            with self.autocast():
                outputs = [output for output in forward() if output.requires_grad]
            middle = self._now()
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            if number:
                ahead.append(middle - started)
                back.append(self._now() - middle)
        return 1e3 * statistics.median(ahead), 1e3 * statistics.median(back)

    def once(self, call: Callable[[], object]) -> float:
        """Of a call that has no backward pass."""
        return 1e3 * self.setting.seconds_of(call, self.rounds - 1)


def by_part(setting: Setting) -> None:
    """Milliseconds of a step by part: images in parts of eight, what happens once a batch apart.

    Each part is timed by itself, on inputs that are cut from the graph, so that the sum may differ from a whole step.
    """
    count = max(1, AT_ONCE * setting.batch_size // 32)
    parts = setting.batch_size / count
    parser = setting.parser(1)
    trainer = parser.get_parsed_content("train#trainer")
    network, objective, discriminator = trainer.network.train(), trainer.objective.train(), trainer.discriminator
    images = setting.images[:count]
    clock = _Clock(setting, trainer._autocast)
    with torch.no_grad(), trainer._autocast():
        posterior = network.encode(images)
        sample = posterior.sample()
        quantized = network.quantize(sample, posterior)
    found: dict[str, tuple[float, float]] = {}

    def encoder() -> list[Tensor]:
        encoded = network.encode(images)
        return [encoded.mean, encoded.logvar]

    found["encoder"] = clock.both(encoder)
    sampled = _leaf(sample)
    found["quantizer, with the search"] = clock.both(lambda: [network.quantize(sampled, posterior).quantized])
    fed = _leaf(torch.cat([quantized.quantized, sample]))
    found["decoder, both paths"] = clock.both(lambda: [network.decode(fed)])

    with trainer._autocast():
        whole = network.reconstruct_full(images)
    continuous = whole.reconstruction_continuous
    mean, logvar = _leaf(whole.posterior.mean), _leaf(whole.posterior.logvar)
    leaves = dataclasses.replace(
        whole,
        reconstruction=_leaf(whole.reconstruction),
        reconstruction_continuous=None if continuous is None else _leaf(continuous),
        posterior=DiagonalGaussian(mean, logvar),
        quantizer=dataclasses.replace(
            whole.quantizer,
            codes=_leaf(whole.quantizer.codes),
            codebook=None if whole.quantizer.codebook is None else _leaf(whole.quantizer.codebook),
        ),
    )

    def value_of(term: torch.nn.Module) -> list[Tensor]:
        # A fresh posterior each time: what is derived from it belongs to the graph that a round has used up.
        return [term(images, dataclasses.replace(leaves, posterior=DiagonalGaussian(mean, logvar)))]

    for name, term in objective.terms.items():
        if name not in ("codebook", "commitment"):
            found[f"loss {name}"] = clock.both(functools.partial(value_of, term))
    discriminator.requires_grad_(False)
    found["discriminator, for the tokenizer"] = clock.both(
        lambda: [objective.adversarial.generator(leaves, discriminator)]
    )
    given = [torch.ones_like(whole.reconstruction)]
    at_last_layer = functools.partial(
        torch.autograd.grad, [whole.reconstruction], network.last_layer, given, retain_graph=True
    )
    found["adaptive weight"] = (2 * clock.once(at_last_layer), 0.0)
    torch.autograd.backward([whole.reconstruction], given)  # so that the optimizers have something to take up
    discriminator.requires_grad_(True)
    found["discriminator's own step"] = clock.both(
        lambda: [objective.discriminator(images, leaves, discriminator=discriminator, step=0).total]
    )
    del whole, given, at_last_layer
    once: dict[str, Callable[[], object]] = {
        "clipping": lambda: torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0),
        "optimizers": lambda: (trainer.optimizer.step(), trainer.d_optimizer.step()),
        "averages": lambda: trainer.ema.update_parameters(network),
    }
    per_batch = {name: clock.once(call) for name, call in once.items()}
    total = parts * sum(map(sum, found.values())) + sum(per_batch.values())
    for name, (ahead, back) in found.items():
        share = parts * (ahead + back) / total
        setting.record.say(f"step: {name}", forward_ms=ahead, backward_ms=back, images=count, share_of_step=share)
    for name, value in per_batch.items():
        setting.record.say(f"step: {name}", forward_ms=value, images=setting.batch_size, share_of_step=value / total)
    light = [sum(found[f"loss {name}"]) for name in _LATENT_TERMS if f"loss {name}" in found]
    latent = sum(found["quantizer, with the search"]) + sum(light)
    setting.record.say(
        "step: sum of the parts",
        milliseconds_a_batch=total,
        images_a_second=1e3 * setting.batch_size / total,
        share_of_search_and_losses=parts * latent / total,
        share_with_perceptual=parts * (latent + sum(found.get("loss perceptual", (0.0, 0.0)))) / total,
    )


def _our_line() -> str:
    """The innermost line of the package on the stack, as ``file:line``; of torch where there is none."""
    here = str(Path(__file__))
    frames = [frame for frame in traceback.extract_stack() if frame.filename != here]
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    frame = (ours or frames)[-1]
    name = Path(frame.filename)
    short = name.relative_to(_PACKAGE) if ours else Path(*name.parts[-2:])
    return f"{short.as_posix()}:{frame.lineno}"


class _Waits(TorchFunctionMode):
    """Counts the calls from Python that would wait for a GPU, on a machine without one.

    They are those that hand a number of a tensor to Python, copy to the CPU, or give a result whose size depends on the
    values. Counters that stay on the CPU, of the optimizer's steps and the average's updates, are not among them.
    """

    COUNTERS = ("optim/adam", "training/ema")

    NAMES = frozenset(
        "item tolist cpu numpy __bool__ __int__ __float__ __index__ nonzero masked_select unique equal".split()
    )

    def __init__(self, lines: Counter[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indexed = name in ("__getitem__", "__setitem__") and any(
            isinstance(key, Tensor) and key.dtype == torch.bool
            for key in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        callers = "".join(frame.filename for frame in traceback.extract_stack(limit=6))
        if (name in self.NAMES or indexed) and not any(counter in callers for counter in self.COUNTERS):
            self.lines[_our_line()] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _counted(setting: Setting, lines: Counter[str]) -> Iterator[None]:
    """Count by line what waits inside the block."""
    if not setting.on_gpu:
        with _Waits(lines):
            yield
        return

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchroniz" in str(message):
            lines[_our_line()] += 1

    before = torch.is_warn_always_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(before)


def synchronizations(setting: Setting) -> None:
    """How often a training step waits for the device, and where: the third of four, when all is set up.

    The fourth ends an epoch, and the losses are read. On a CPU they are read as late as on a GPU.
    """
    parser = setting.parser(4, **{"optimizer#fused": True, "d_optimizer#fused": True})
    trainer = parser.get_parsed_content("train#trainer")
    trainer.reads_late = lambda optimizer: True
    lines: Counter[str] = Counter()
    counting = contextlib.ExitStack()

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def start(engine: Any) -> None:
        setting.synchronize()
        counting.enter_context(_counted(setting, lines))

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def stop(engine: Any) -> None:
        counting.close()

    with counting:
        trainer.run()
    how = "set_sync_debug_mode" if setting.on_gpu else "calls from Python that would wait for a GPU"
    setting.record.say(
        "step: synchronizations",
        count=sum(lines.values()),
        at_once=trainer.micro_batch_size,
        counted_by=how,
        lines=[f"{line} ({count})" for line, count in lines.most_common(20)],
    )


PARTS = [
    SimpleNamespace(name="step: by part", run=by_part, at_most=60, needs=10),
    SimpleNamespace(name="step: synchronizations", run=synchronizations, at_most=30, needs=8),
]
