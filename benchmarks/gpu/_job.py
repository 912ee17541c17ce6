"""The main job in small: train and resume, run out of memory, evaluate, encode tokens, train generators, sample."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _common import configure_generator, prepare, scratch_folder
from _record import NotNeededError
from _setting import Setting
from ignite.engine import Events
from torch import Tensor

from vaevq_med.evaluation.reconstruction import ReconstructionEvaluation
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.generators.autoregressive import generate_indices
from vaevq_med.networks.generators.ddim import generate_images
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.tokens.encode import describe_tokenizer, encode_views
from vaevq_med.tokens.store import FORMAT, index_type
from vaevq_med.tokens.writer import TokenWriter
from vaevq_med.training.checkpoint import TrainingCheckpoint
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator

_STEPS, _BROKEN_AT = 4, 2
_SMALL_GENERATORS: dict[str, dict[str, Any]] = {
    "autoregressive": {f"network_def#{name}": value for name, value in (("width", 64), ("depth", 2), ("num_heads", 2))},
    "diffusion": {
        "network_def#num_channels": 32,
        "network_def#channel_mult": [1, 2],
        "network_def#num_res_blocks": 1,
        "network_def#cross_attention_dim": 32,
    },
}


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """What the id ``deterministic`` asks of PyTorch."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before


def _start(setting: Setting) -> float:
    """Count time and memory from now on; what :func:`_figures` wants."""
    setting.reset_peak()
    return time.perf_counter()


def _figures(setting: Setting, started: float) -> dict[str, Any]:
    setting.synchronize()
    return {"seconds": time.perf_counter() - started, "peak_gib": setting.peak_gib()}


def train_and_resume(setting: Setting) -> None:
    """A run of four steps that leaves a checkpoint after two, and one that goes on from there."""
    losses: dict[str, list[float]] = {"job: train": [], "job: resume": []}
    path: Path | None = None
    for name, seen in losses.items():
        started = _start(setting)
        parser = setting.parser(_STEPS)
        with deterministic_algorithms():
            trainer = parser.get_parsed_content("train#trainer")
            loader = parser.get_parsed_content("train#dataloader")
            checkpoint = TrainingCheckpoint(directory=setting.scratch(parser), sampler=loader, resume=False)
            if path is not None:
                checkpoint.load(trainer, path)
                path.unlink()

            def follow(engine: Any, seen: list[float] = seen, checkpoint: TrainingCheckpoint = checkpoint) -> None:
                seen.append(float(engine.state.terms["loss"]))
                if engine.state.iteration == _BROKEN_AT:
                    checkpoint.save(engine)

            trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
            trainer.run()
        path = path or checkpoint.last
        line = {"losses": seen, "at_once": trainer.micro_batch_size, **_figures(setting, started)}
        if checkpoint.last.is_file():
            line["checkpoint_mib"] = checkpoint.last.stat().st_size / 2**20
        else:
            expected = losses["job: train"][_BROKEN_AT:]
            line["largest_relative_difference"] = max(abs(a - b) / abs(a) for a, b in zip(expected, seen, strict=True))
        setting.record.say(name, **line)
        setting.kept["tokenizer"] = parser.get_parsed_content("ema").module
        del trainer, checkpoint, parser


def out_of_memory(setting: Setting) -> None:
    """Take most of the memory away, ask for the whole batch at once, and see the step survive."""
    if not setting.on_gpu:
        raise NotNeededError("needs a GPU")
    started = time.perf_counter()
    total = torch.cuda.mem_get_info()[1]
    setting.reset_peak()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / total))
    try:
        trainer = setting.parser(2, micro_batch_size=setting.batch_size).get_parsed_content("train#trainer")
        trainer.run()
        setting.record.say(
            "job: out of memory",
            asked=setting.batch_size,
            went_on_with=trainer.micro_batch_size,
            within_gib=24,
            loss=float(trainer.state.terms["loss"]),
            **_figures(setting, started),
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _tokenizer(setting: Setting) -> VisualTokenizer:
    """That of the training, or, where that failed, a fresh one."""
    if "tokenizer" not in setting.kept:
        setting.kept["tokenizer"] = setting.parser(1).get_parsed_content("network")
    return setting.kept["tokenizer"].eval()


def evaluate(setting: Setting) -> None:
    """The toolkit's evaluator over two batches, with all metrics."""
    started = time.perf_counter()
    network = _tokenizer(setting)
    setting.reset_peak()
    measured = evaluation_of(setting, network)
    evaluator = evaluator_of(setting, network, measured, [*setting.images.split(setting.batch_size)], "auto")
    evaluator.run()
    overall = measured.compute().summary["overall"]
    figures = {name: float(overall[name]["value"]) for name in ("psnr", "ssim", "lpips", "rfid")}
    setting.record.say("job: evaluate", images=len(setting.images), **figures, **_figures(setting, started))


def evaluation_of(setting: Setting, network: VisualTokenizer) -> ReconstructionEvaluation:
    """PSNR, SSIM, LPIPS-style distance and rFID."""
    if "features" not in setting.kept:
        setting.kept["features"] = feature_network("efficientnet-lite0").to(setting.device)
    features = setting.kept["features"]
    return ReconstructionEvaluation(
        num_embeddings=network.num_embeddings, lpips=features, fid=features, device=setting.device
    )


def evaluator_of(
    setting: Setting,
    network: VisualTokenizer,
    measured: ReconstructionEvaluation,
    batches: list[Tensor],
    precision: str,
) -> TokenizerEvaluator:
    """The toolkit's evaluator, which feeds the metrics."""
    evaluator = TokenizerEvaluator(
        device=setting.device,
        val_data_loader=[{"image": images} for images in batches],
        network=network,
        precision=precision,
    )

    def update(engine: Any) -> None:
        output = engine.state.output
        measured.update(
            output["image"],
            output["pred"],
            output["indices"],
            metadata={"path": [str(i) for i in range(len(output["image"]))]},
            indices_sample=output.get("indices_sample"),
        )

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, update)
    return evaluator


def encode_tokens(setting: Setting) -> None:
    """Indices and latents of the images, in stores as ``vaevq-med encode-tokens`` writes them.

    The images are repeated to fill one batch of a generator.
    """
    network = _tokenizer(setting)
    setting.kept["stores"] = {}
    wanted = 8 if setting.small else 256
    for kind in ("indices", "latents"):
        started = _start(setting)
        values = encode_views(network, setting.images[:, None], kind, setting.batch_size)  # [N, 1, ...]
        seconds = _figures(setting, started)
        values = values[[i % len(values) for i in range(wanted)]]
        items = [{"id": f"{i}.png"} for i in range(wanted)]
        side = setting.size // network.encoder.downsampling_factor
        header = {
            "format": FORMAT,
            "kind": kind,
            "tokenizer": describe_tokenizer(network, "sha256:check"),
            "grid": [side, side],
            "dtype": index_type(network.num_embeddings) if kind == "indices" else "float16",
            "image_size": setting.size,
            "in_channels": 1,
            "label": {"kind": "none", "names": []},
            "data": {"name": "check", "content_hash": "", "split_hash": ""},
            "splits": {"training": {"shape": list(values.shape), "views": ["whole"]}},
        }
        root = scratch_folder()
        with TokenWriter(root, header, {"training": items}) as writer:
            writer.append("training", values)
            writer.finish()
        setting.kept["stores"][kind] = root
        setting.record.say(f"job: encode {kind}", images=len(setting.images), shape=list(values.shape[2:]), **seconds)


def _train_generator(setting: Setting, kind: str, store: str, title: str) -> None:
    root = setting.kept.get("stores", {}).get(store)
    if root is None:
        raise NotNeededError("there are no tokens")
    started = _start(setting)
    prepare(0)
    steps = 3
    batch_size = 8 if setting.small else 256
    parser = configure_generator(
        kind,
        root,
        {
            "device": setting.device,
            "batch_size": batch_size,
            **(_SMALL_GENERATORS[kind] if setting.small else {}),
        },
        steps=steps,
    )
    trainer = parser.get_parsed_content("train#trainer")
    losses: list[float] = []
    moments: list[float] = []

    def follow(engine: Any) -> None:
        losses.append(float(engine.state.terms["loss"]))
        setting.synchronize()
        moments.append(time.perf_counter())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
    trainer.run()
    setting.kept[kind] = parser.get_parsed_content("network").eval()
    setting.record.say(
        f"job: train {title}",
        losses=losses,
        items=batch_size,
        at_once=trainer.micro_batch_size,
        items_a_second=batch_size * (len(moments) - 1) / (moments[-1] - moments[0]),
        **_figures(setting, started),
    )


def train_llamagen(setting: Setting) -> None:
    """Three steps of the bundle's LlamaGen-B on the tokens."""
    _train_generator(setting, "autoregressive", "indices", "LlamaGen-B")


def train_ldm(setting: Setting) -> None:
    """Three steps of the bundle's LDM-4 on the latents."""
    _train_generator(setting, "diffusion", "latents", "LDM-4")


def _trained(setting: Setting, kind: str, title: str) -> Any:
    """The generator that an earlier part left."""
    if kind not in setting.kept:
        raise NotNeededError(f"there is no trained {title}")
    return setting.kept[kind]


def sample_llamagen(setting: Setting) -> None:
    """Two images, in bf16 on a GPU."""
    network = _trained(setting, "autoregressive", "LlamaGen")
    started = _start(setting)
    indices = generate_indices(
        network,
        num_samples=2,
        dtype=torch.bfloat16 if setting.on_gpu else None,
        generator=torch.Generator(setting.device).manual_seed(0),
    )
    with torch.no_grad():
        images = _tokenizer(setting).decode_indices(indices)
    _say_samples(setting, "job: sample LlamaGen-B", images, started, distinct_tokens=len(indices.unique()))


def sample_ldm(setting: Setting) -> None:
    """Two images by DDIM, the network in bf16 on a GPU."""
    network = _trained(setting, "diffusion", "LDM")
    started = _start(setting)
    tokenizer = _tokenizer(setting)
    side = setting.size // tokenizer.encoder.downsampling_factor
    steps = 4 if setting.small else 50
    images = generate_images(
        network,
        tokenizer,
        num_images=2,
        grid_size=(side, side),
        num_steps=steps,
        dtype=torch.bfloat16 if setting.on_gpu else None,
        generator=torch.Generator().manual_seed(0),
    )
    _say_samples(setting, "job: sample LDM-4", images, started, ddim_steps=steps)


def _say_samples(setting: Setting, name: str, images: Tensor, started: float, **figures: Any) -> None:
    finite = bool(images.isfinite().all())
    line = {"images": len(images), "size": images.shape[-1], "finite": finite, **figures, **_figures(setting, started)}
    setting.record.say(name, **line)
    if not finite:
        raise ValueError("a sample holds NaN or infinity")


PARTS: list[SimpleNamespace] = [
    SimpleNamespace(name=name, run=run, at_most=at_most, needs=needs)
    for name, run, at_most, needs in (
        ("job: train and resume", train_and_resume, 90, 20),
        ("job: evaluate", evaluate, 40, 5),
        ("job: encode tokens", encode_tokens, 30, 5),
        ("job: train LlamaGen-B", train_llamagen, 40, 8),
        ("job: train LDM-4", train_ldm, 40, 8),
        ("job: sample LlamaGen-B", sample_llamagen, 40, 8),
        ("job: sample LDM-4", sample_ldm, 40, 8),
        ("job: out of memory", out_of_memory, 40, 12),
    )
]
