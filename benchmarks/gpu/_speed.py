"""How fast training and evaluation are, beside the authors' way of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from _job import evaluation_of, evaluator_of
from _setting import Setting
from ignite.engine import Events
from torch import Tensor

from vaevq_med.losses.adversarial import adaptive_weight
from vaevq_med.networks import blocks
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.precision import full_precision

AT_ONCE = 8
"""Images that go through the network at once where rows are compared."""


def _at_once(setting: Setting, count: int) -> int:
    return max(1, count * setting.batch_size // 32)


def rows(setting: Setting) -> dict[str, dict[str, Any]]:
    """Settings by the name of their row, those that take long last."""
    eight = {"micro_batch_size": _at_once(setting, AT_ONCE)}
    if not setting.on_gpu:  # whose bf16 convolutions can be a hundred times slower
        return {"default": {}, "fp32, a quarter at once": eight}
    found: dict[str, dict[str, Any]] = {"default": {}}
    for count in (8, 16, 32, 4):
        found[f"bf16, {count} at once"] = {"precision": "bf16", "micro_batch_size": count}
    found["fp32 (TF32), 8 at once"] = {"precision": "fp32", **eight}
    lean = {"precision": "bf16", **eight}
    found["bf16, 8 at once, two levels recomputed"] = {**lean, "activation_checkpointing": [0, 1]}
    found["bf16, 8 at once, channels_last"] = {**lean, "channels_last": True}
    found["bf16, 8 at once, channels_last, compiled"] = {**lean, "channels_last": True, "compile": True}
    return found


def count_flops(setting: Setting) -> None:
    """Floating-point operations of a training step an image, counted in one step, GAN on."""
    from torch.utils.flop_counter import FlopCounterMode

    parser = setting.parser(1, micro_batch_size=1, **({} if setting.on_gpu else {"precision": "fp32"}))
    trainer = parser.get_parsed_content("train#trainer")
    images = setting.images[:2]
    trainer.data_loader = [{"image": images}]
    with FlopCounterMode(display=False) as counter:
        trainer.run()
    setting.kept["flops"] = counter.get_total_flops() / len(images)
    setting.record.say("training: arithmetic", tera_flop_an_image=setting.kept["flops"] / 1e12)


def _share(setting: Setting, images_a_second: float) -> float | None:
    flops = setting.kept.get("flops")
    return None if not flops or not setting.rate else flops * images_a_second / setting.rate


def train(setting: Setting, name: str, overrides: dict[str, Any]) -> None:
    """Images a second and peak memory of one row, GAN on, after steps that warm up."""
    warm, timed = (1, 1) if setting.small else (2, 4)
    trainer = setting.parser(warm + timed, **overrides).get_parsed_content("train#trainer")
    moments: dict[int, float] = {}

    def mark(engine: Any) -> None:
        number = engine.state.iteration
        if number in (warm, warm + timed):
            setting.synchronize()
            moments[number] = time.perf_counter()
        if number == warm:
            # cuDNN's search for algorithms takes large workspaces in the first steps alone.
            moments[0] = setting.peak_gib() or 0.0
            setting.reset_peak()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, mark)
    setting.reset_peak()
    started = time.perf_counter()
    trainer.run()
    rate = setting.batch_size * timed / (moments[warm + timed] - moments[warm])
    setting.record.say(
        f"training: {name}",
        images_a_second=rate,
        share_of_bf16_rate=_share(setting, rate),
        peak_gib=setting.peak_gib(),
        peak_gib_of_first_steps=moments[0] or None,
        at_once=trainer.micro_batch_size,
        first_steps_seconds=moments[warm] - started,
        loss=float(trainer.state.terms["loss"]),
    )


@contextlib.contextmanager
def _as_torch_comes() -> Iterator[None]:
    """GroupNorm, swish and convolution keep what autograd keeps; products of matrices are fp32, convolutions TF32."""
    lean = blocks._is_lean
    blocks._is_lean = lambda x: False
    try:
        with full_precision("cuda"):
            yield
    finally:
        blocks._is_lean = lean


def authors_way(setting: Setting) -> None:
    """The authors' way over the same modules: fp32, the decoder twice, the target's features with either path."""
    count = _at_once(setting, AT_ONCE)
    parser = setting.parser(1)
    with _as_torch_comes():
        content = parser.get_parsed_content
        network, discriminator = content("network").train(), content("discriminator").train()
        objective = content("objective").to(setting.device).train()
        optimizer, d_optimizer, ema = content("optimizer"), content("d_optimizer"), content("ema")
        images = setting.images[:count]

        def step() -> Tensor:
            posterior = network.encode(images)
            sample = posterior.sample()
            quantized = network.quantize(sample, posterior)
            paths = [network.decode(quantized.quantized), network.decode(sample)]
            output = TokenizerOutput(paths[0], paths[1], sample, posterior, quantized)
            weights, terms = objective.weights, dict(objective.terms)
            perceptual = terms.pop("perceptual")
            values = {name: term(images, output) for name, term in terms.items() if weights[name]}
            values["perceptual"] = sum(perceptual.distance(images, path).mean() for path in paths)
            total = sum(weights[name] * value for name, value in values.items())
            likelihood = sum(weights[name] * values[name] for name in ("reconstruction", "perceptual"))
            discriminator.requires_grad_(False)
            gan = objective.adversarial.generator(output, discriminator)
            strength = adaptive_weight(
                *(torch.autograd.grad(loss, network.last_layer, retain_graph=True)[0] for loss in (likelihood, gan))
            )
            total = total + objective.adversarial.weight * strength * gan
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            ema.update_parameters(network)
            discriminator.requires_grad_(True)
            d_optimizer.zero_grad(set_to_none=True)
            objective.adversarial.discriminator(images, output, discriminator)["loss"].backward()
            d_optimizer.step()
            return total.detach()

        for _ in range(1 if setting.small else 2):
            step()
        setting.synchronize()
        setting.reset_peak()
        timed = 1 if setting.small else 4
        started = time.perf_counter()
        for _ in range(timed):
            loss = step()
        setting.synchronize()
        rate = count * timed / (time.perf_counter() - started)
    setting.record.say(
        "training: the authors' way, fp32",
        images_a_second=rate,
        share_of_bf16_rate=_share(setting, rate),
        peak_gib=setting.peak_gib(),
        at_once=count,
        loss=float(loss),
    )


def evaluate(setting: Setting, precision: str, batch_size: int) -> None:
    """Images a second of the toolkit's evaluator with PSNR, SSIM, LPIPS-style distance and rFID."""
    if "evaluated" not in setting.kept:
        setting.kept["evaluated"] = setting.parser(1).get_parsed_content("network").eval()
    network = setting.kept["evaluated"]
    batch = setting.images.repeat(2, 1, 1, 1)[:batch_size]
    rounds = 2 if setting.small else 8

    def run(count: int) -> float:
        measured = evaluation_of(setting, network)
        evaluator = evaluator_of(setting, network, measured, [batch] * count, precision)
        setting.synchronize()
        started = time.perf_counter()
        evaluator.run()
        setting.synchronize()
        return time.perf_counter() - started

    run(1)
    setting.reset_peak()
    seconds = run(rounds)
    setting.record.say(
        f"evaluation: {precision}, batch {batch_size}",
        images_a_second=rounds * batch_size / seconds,
        peak_gib=setting.peak_gib(),
    )


def training_parts(setting: Setting) -> list[SimpleNamespace]:
    """Arithmetic, the default, the authors' way, then every other row; compilation last."""
    parts = [SimpleNamespace(name="training: arithmetic", run=count_flops, at_most=30, needs=5)]
    for name, overrides in rows(setting).items():
        compiled = "compiled" in name
        parts.append(
            SimpleNamespace(
                name=f"training: {name}",
                run=lambda s, name=name, overrides=overrides: train(s, name, overrides),
                at_most=160 if compiled else 60,
                needs=100 if compiled else 10,
            )
        )
    parts.insert(2, SimpleNamespace(name="training: the authors' way, fp32", run=authors_way, at_most=40, needs=10))
    return parts


def evaluation_parts(setting: Setting) -> list[SimpleNamespace]:
    """fp32 and bf16, two sizes of batch."""
    precisions = ("bf16", "fp32") if setting.on_gpu else ("fp32",)
    return [
        SimpleNamespace(
            name=f"evaluation: {precision}, batch {size}",
            run=lambda s, precision=precision, size=size: evaluate(s, precision, size),
            at_most=30,
            needs=5,
        )
        for precision in precisions
        for size in (setting.batch_size, 2 * setting.batch_size)
    ]
