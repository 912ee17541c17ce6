"""The search and the quantizers beside their peers, and sampling beside its bound."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import nearest_codeword
import quantizers
import sampling
import torch
from _measure import copied_bytes_per_second
from _setting import Setting

QUANTIZERS = ("vqgan", "vqgan_ema", "simvq", "fsq", "lfq")


def _say_each(setting: Setting, title: str, rows: Iterable[dict[str, Any]]) -> None:
    """A line a row, without the rounds."""
    for row in rows:
        figures = {key: value for key, value in row.items() if key not in ("name", "seconds", "method")}
        setting.record.say(f"{title}, {row['name']}", **figures)


def search(setting: Setting) -> None:
    """Time and memory of the search for the latents of a batch, beside the forms of others."""
    sizes = {"images": 2, "tokens": 64, "num_embeddings": 256} if setting.small else {"images": 32}
    arguments = argparse.Namespace(
        **{"tokens": 1024, "embedding_dim": 64, "num_embeddings": 16384, "repeats": 3, **sizes}, device=setting.device
    )
    _say_each(setting, "search: codewords", nearest_codeword.measure(arguments))


def quantize(setting: Setting) -> None:
    """Forward and backward of some quantizers, and of the same ones of other packages."""
    settings = argparse.Namespace(
        images=2 if setting.small else 32,
        tokens=8 if setting.small else 32,
        embedding_dim=64,
        num_embeddings=256 if setting.small else 16384,
        repeats=1 if setting.small else 3,
        only=list(QUANTIZERS),
        device=str(setting.device),
    )
    _say_each(setting, "search: quantizer", quantizers.measure_each(settings))


def sample_llamagen(setting: Setting, batch: int) -> None:
    """Tokens a second of LlamaGen-B with the cache against the bound that reading weights and cache sets."""
    small = setting.small
    arguments = argparse.Namespace(
        preset="S" if small else "B",
        width=64 if small else None,
        depth=2 if small else None,
        num_heads=2 if small else None,
        tokens=16 if small else 1024,
        batch=batch,
        num_embeddings=256 if small else 16384,
        dtype="bfloat16" if setting.on_gpu else "float32",
        device=str(setting.device),
    )
    torch.manual_seed(0)
    samplers = sampling.Samplers(arguments)
    network = samplers.network
    with torch.no_grad():
        cache = network.new_cache(batch)
        inputs = network.check_labels(None, batch)
        for _ in range(4):
            inputs = sampling.draw_indices(network.step(inputs, cache).float(), samplers.generator)
    setting.reset_peak()

    def once() -> float:
        setting.synchronize()
        started = time.perf_counter()
        samplers.cached()
        setting.synchronize()
        return time.perf_counter() - started

    seconds = once()
    if seconds < 5:  # the first time may have prepared something that the second finds done
        seconds = once()
    if setting.copy_rate is None:
        setting.copy_rate = copied_bytes_per_second(setting.device, 16 if small else 1024, 5)
    bound = arguments.tokens * sampling.bytes_per_token(network, batch) / setting.copy_rate
    setting.record.say(
        f"sampling: LlamaGen-B, batch {batch}",
        tokens_a_second=batch * arguments.tokens / seconds,
        seconds_an_image=seconds / batch,
        share_of_memory_bound=bound / seconds,
        peak_gib=setting.peak_gib(),
        dtype=arguments.dtype,
    )


def sample_ldm(setting: Setting, batch: int) -> None:
    """Steps of LDM-4's network a second, and the share of the measured rate of bf16 products."""
    from torch.utils.flop_counter import FlopCounterMode

    from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet

    small = setting.small
    sizes: dict[str, Any] = {"in_channels": 64}
    if small:
        sizes |= {"num_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "cross_attention_dim": 32}
    torch.manual_seed(0)
    network = LatentDiffusionUNet(**sizes).to(setting.device).eval()
    side = 8 if small else 32
    noise = torch.randn(batch, 64, side, side, device=setting.device)
    times = torch.full((batch,), 500, device=setting.device)
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    setting.reset_peak()
    with torch.no_grad(), torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.on_gpu):
        with FlopCounterMode(display=False) as counter:
            network(noise, times)
        seconds = setting.seconds_of(lambda: network(noise, times))
    steps = 250
    setting.record.say(
        f"sampling: LDM-4, batch {batch}",
        network_steps_a_second=1 / seconds,
        seconds_an_image_of_250_steps=steps * seconds / batch,
        share_of_bf16_rate=counter.get_total_flops() / seconds / setting.rate if setting.rate else None,
        peak_gib=setting.peak_gib(),
        dtype=str(dtype).removeprefix("torch."),
    )


SEARCH_PARTS = [
    SimpleNamespace(name="search: codewords", run=search, at_most=30, needs=5),
    SimpleNamespace(name="search: quantizers", run=quantize, at_most=40, needs=8),
]


def sampling_parts(setting: Setting) -> list[SimpleNamespace]:
    """LlamaGen-B and LDM-4, one image and a batch."""
    many = 4 if setting.small else 32
    parts = []
    for title, call in (("LlamaGen-B", sample_llamagen), ("LDM-4", sample_ldm)):
        for batch in (1, many):
            parts.append(
                SimpleNamespace(
                    name=f"sampling: {title}, batch {batch}",
                    run=lambda s, call=call, batch=batch: call(s, batch),
                    at_most=30,
                    needs=8,
                )
            )
    return parts
