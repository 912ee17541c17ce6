"""Rows of the ablation and the presets under one budget, on packed slices: PSNR, SSIM, distances, utilization.

Each row is the bundle's ``train.json`` with that row's overlay, trained by the bundle's own trainer for the same number
of steps from the same seed on the same batches, and evaluated (averaged weights) on the held-out subject::

    python benchmarks/gpu/tokenizer_study.py --pack data/sample --data slices.npz   # once, on the machine with the data
    python benchmarks/gpu/tokenizer_study.py --data slices.npz --steps 2000         # on a GPU
    python benchmarks/gpu/tokenizer_study.py --data slices.npz --seconds 540 --parallel 4
    python benchmarks/gpu/tokenizer_study.py --data slices.npz --small              # on a CPU

A row is ``[NAME=]OVERLAY[+OVERLAY...][,ID=VALUE...]``; ``train`` is the default without an overlay. It is printed and
stored when it is done; an error of a row is its line. With ``--seconds`` the steps follow from a measured step, the
same number for all rows, and with ``--parallel`` so many rows train beside each other, each in a process of its own,
which small ones leave room for on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from _common import PackedSlices, configure, pack, prepare, write_json
from _measure import hardware
from _record import process_age

from vaevq_med.evaluation.reconstruction import ReconstructionEvaluation
from vaevq_med.evaluation.report import EvaluationReport
from vaevq_med.losses.kl import content_mask, kl_per_token
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator

ROWS = (
    "M0=ablation_m0",
    "SimVQ=simvq",
    "M1=ablation_m1",
    "M2=ablation_m2",
    "M3=ablation_m3",
    "full=ablation_full",
    "released=released",
    "information_matched=information_matched",
)
COLUMNS = (
    ("psnr", "PSNR dB", "{:.2f}"),
    ("psnr_brain", "brain", "{:.2f}"),
    ("psnr_continuous", "continuous", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS-style", "{:.4f}"),
    ("rfid", "rFID", "{:.2f}"),
    ("utilization", "util.", "{:.3f}"),
    ("perplexity", "perpl.", "{:.0f}"),
    ("utilization_sample", "util. sample", "{:.3f}"),
    ("perplexity_sample", "perpl. sample", "{:.0f}"),
    ("kl", "KL nats", "{:.1f}"),
    ("kl_content", "KL content", "{:.1f}"),
    ("seconds", "s", "{:.0f}"),
)
SMALL: dict[str, Any] = {
    **{f"network_def#{part}#num_channels": 16 for part in ("encoder", "decoder")},
    **{f"network_def#{part}#channel_mult": [1, 2, 4] for part in ("encoder", "decoder")},
    **{f"network_def#{part}#num_res_blocks": 1 for part in ("encoder", "decoder")},
    **{f"network_def#{part}#attention_resolutions": [] for part in ("encoder", "decoder")},
    **{f"network_def#{part}#z_channels": 64 for part in ("encoder", "decoder")},
    "num_embeddings": 1024,
    "embedding_dim": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.99,
    "discriminator_def#num_channels": 16,
    "discriminator_def#num_layers": 2,
}


def parse_row(text: str) -> tuple[str, list[str], dict[str, Any]]:
    """``NAME=a+b,id=value`` to the name, the overlays and the overrides."""
    head, *settings = text.split(",")
    name, _, overlays = head.rpartition("=")
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    chosen = [] if overlays in ("train", "") else overlays.split("+")
    return name or text, chosen, overrides


@torch.no_grad()
def evaluate(network: VisualTokenizer, data: PackedSlices, device: torch.device, batch_size: int) -> EvaluationReport:
    """The toolkit's evaluation of the averaged weights over the held-out slices."""
    features = feature_network("efficientnet-lite0").to(device)
    evaluation = ReconstructionEvaluation(
        num_embeddings=network.num_embeddings, lpips=features, fid=features, device=device
    )
    evaluator = TokenizerEvaluator(device=device, val_data_loader=[{}], network=network)
    evaluator.generator = torch.Generator(device).manual_seed(0)
    continuous, kl, kl_content = [], [], []
    for first in range(0, len(data), batch_size):
        items = [data[i] for i in range(first, min(first + batch_size, len(data)))]
        images = torch.stack([item["image"] for item in items]).to(device)
        output = evaluator.reconstruct(images, continuous=True)
        evaluation.update(
            images,
            output["pred"],
            output["indices"],
            metadata={
                "modality": [item["modality"] for item in items],
                "index": list(range(first, first + len(items))),
            },
            regions={"brain": images[:, 0] > -1},
            indices_sample=output.get("indices_sample"),
        )
        encoded = network.encode(images)
        if isinstance(encoded, DiagonalGaussian):
            error = ((output["pred_continuous"].clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
            continuous.append(-10 * error.log10())
            per_token = kl_per_token(encoded.mean, encoded.logvar)
            kl.append(per_token.flatten())
            kl_content.append(per_token[content_mask(images, per_token.shape[-2:])])
    report = evaluation.compute()
    extra = {"psnr_continuous": continuous, "kl": kl, "kl_content": kl_content}
    for name, parts in extra.items():
        if parts:
            report.summary["overall"][name] = {"value": float(torch.cat(parts).mean()), "n": len(data)}
    return report


def _configured(text: str, arguments: argparse.Namespace, steps: int) -> ConfigParser:
    """A row's configuration."""
    _, overlays, overrides = parse_row(text)
    prepare(arguments.seed)
    machine = {"device": torch.device(arguments.device), "batch_size": arguments.batch_size, "seed": arguments.seed}
    shared: dict[str, Any] = {**machine, "val_interval": 10**6, "train#handlers": []}
    if arguments.small:
        shared |= SMALL
    else:
        shared |= {"precision": "auto", "learning_rate": 4e-4, "warmup_steps": 200, "ema_decay": 0.995}
    parser: ConfigParser = configure(
        arguments.data, overlays, {**shared, **overrides}, steps=steps, image_size=arguments.size
    )
    adversarial = parser.get("objective#adversarial")
    if arguments.gan_start is None:
        parser["objective#adversarial"] = None
    elif adversarial is not None and adversarial["start_step"] > 0:
        parser["objective#adversarial#start_step"] = arguments.gan_start
    return parser


def _evaluated(parser: ConfigParser, arguments: argparse.Namespace) -> EvaluationReport:
    test = PackedSlices(file=arguments.data, split="test", image_size=arguments.size)
    ema = parser.get_parsed_content("ema")
    return evaluate(ema.module, test, torch.device(arguments.device), arguments.batch_size)


def run_row(text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row; one that time runs out on is evaluated where it stands, and says so."""
    from ignite.engine import Events

    name, overlays, overrides = parse_row(text)
    started = time.perf_counter()
    if time.time() > arguments.stop_training_at:
        raise TimeoutError("the time is up")
    parser = _configured(text, arguments, arguments.steps)
    trainer = parser.get_parsed_content("train#trainer")

    def stop_in_time(engine: Any) -> None:
        if time.time() > arguments.stop_training_at:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop_in_time)
    trainer.run()
    report = _evaluated(parser, arguments)
    row = {
        "row": name,
        "overlays": overlays,
        "overrides": overrides,
        "steps": trainer.state.iteration,
        "figures": report.overall() | {"seconds": time.perf_counter() - started},
        "last_terms": dict(trainer.state.terms),
        "conventions": report.conventions,
    }
    if trainer.state.iteration < arguments.steps:
        row["cut_off"] = f"the time was up at step {trainer.state.iteration} of {arguments.steps}"
    return row


_TIMED = (3, 8)
"""Steps after which the timing of a step starts and ends."""


def time_row(text: str, arguments: argparse.Namespace, barrier: Any = None) -> dict[str, float]:
    """Seconds that a row takes to be set up, for a step, and to be evaluated, beside the others of a barrier."""
    from ignite.engine import Events

    started = time.perf_counter()
    parser = _configured(text, arguments, _TIMED[1])
    trainer = parser.get_parsed_content("train#trainer")
    moments: dict[int, float] = {}

    def mark(engine: Any) -> None:
        if engine.state.iteration in _TIMED:
            float(engine.state.terms["loss"])  # waits for the device
            moments[engine.state.iteration] = time.perf_counter()
            if barrier is not None and engine.state.iteration == _TIMED[0]:
                with contextlib.suppress(threading.BrokenBarrierError):  # one of the others has failed
                    barrier.wait(120)
                moments[_TIMED[0]] = time.perf_counter()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, mark)
    trainer.run()
    trained = time.perf_counter()
    _evaluated(parser, arguments)
    return {
        "setup": moments[_TIMED[0]] - started,
        "step": (moments[_TIMED[1]] - moments[_TIMED[0]]) / (_TIMED[1] - _TIMED[0]),
        "evaluation": time.perf_counter() - trained,
    }


def steps_within(timed: list[dict[str, float]], rows: int, parallel: int, seconds: float) -> int:
    """Steps that each row can take so that all are done in time, a tenth of it kept; 0 where there is no room.

    Args:
        timed: what :func:`time_row` gave, the slowest of which counts.
        rows: how many there are.
        parallel: how many run beside each other.
        seconds: that are left.

    >>> steps_within([{"setup": 5.0, "step": 0.5, "evaluation": 5.0}], rows=4, parallel=2, seconds=200.0)
    160
    """
    slowest = {key: max(times[key] for times in timed) for key in timed[0]}
    each = 0.9 * seconds / math.ceil(rows / parallel)
    return max(0, int((each - slowest["setup"] - slowest["evaluation"]) / slowest["step"]))


class _Workers:
    """Calls functions of rows in this process, one after the other, or in several beside each other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.count = min(arguments.parallel, len(arguments.rows))
        self.pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            context = multiprocessing.get_context("spawn")
            threads = arguments.threads or max(1, (os.cpu_count() or 1) // self.count)
            self.pool = ProcessPoolExecutor(
                self.count,
                mp_context=context,
                initializer=_start_worker,
                initargs=(context.Barrier(self.count), threads),
            )

    def each(
        self, call: Callable[..., Any], rows: list[str], arguments: argparse.Namespace
    ) -> Iterator[tuple[str, Any]]:
        """Rows and what the call gave, or its exception, as they are done."""
        if self.pool is None:
            for text in rows:
                try:
                    yield text, call(text, arguments)
                except Exception as error:
                    yield text, error
            return
        futures: dict[Future[Any], str] = {self.pool.submit(call, text, arguments): text for text in rows}
        for future in as_completed(futures):
            failure = future.exception()
            yield futures[future], future.result() if failure is None else failure


_barrier: Any = None


def _start_worker(barrier: Any, threads: int) -> None:
    global _barrier
    _barrier = barrier
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no row behind that nobody waits for, when the process that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def time_row_beside(text: str, arguments: argparse.Namespace) -> dict[str, float]:
    """:func:`time_row` in a process that has the others beside it."""
    try:
        return time_row(text, arguments, _barrier)
    except BaseException:
        if _barrier is not None:
            _barrier.abort()
        raise


_HEAD = "| row | " + " | ".join(title for _, title, _ in COLUMNS) + " |\n| --- |" + " ---: |" * len(COLUMNS)


def table_row(row: dict[str, Any]) -> str:
    """A row's line in Markdown."""
    if "error" in row:
        return f"| {row['row']} | {row['error']} |"
    cells = [form.format(row["figures"][k]) if k in row["figures"] else "–" for k, _, form in COLUMNS]
    return f"| {row['row']}{' (cut off)' if 'cut_off' in row else ''} | " + " | ".join(cells) + " |"


def _plan_steps(arguments: argparse.Namespace, workers: _Workers, started: float) -> None:
    """Set ``steps`` and ``stop_training_at`` from ``seconds``, if those are given.

    Raises:
        SystemExit: no row could be timed, or there is no time for a step.
    """
    arguments.stop_training_at = math.inf
    if arguments.seconds is None:
        arguments.steps = arguments.steps or (600 if arguments.small else 500)
        return
    first = arguments.rows[: workers.count]
    timed: list[dict[str, float]] = []
    for text, times in workers.each(time_row_beside, first, arguments):
        if isinstance(times, Exception):
            print(f"{parse_row(text)[0]}: {type(times).__name__}: {times}", flush=True)
        else:
            timed.append(times)
    if not timed:
        raise SystemExit("found no row that could be timed, expected one")
    remaining = arguments.seconds - (time.time() - started)
    arguments.steps = steps_within(timed, len(arguments.rows), workers.count, remaining)
    if arguments.steps < 1:
        raise SystemExit(f"--seconds: found {arguments.seconds:g}, which leaves no step for {len(arguments.rows)} rows")
    arguments.stop_training_at = started + arguments.seconds - max(times["evaluation"] for times in timed)
    step = max(times["step"] for times in timed)
    print(f"{arguments.steps} steps a row: {step:.3f} s each, {workers.count} beside each other\n", flush=True)


def main() -> None:
    """Run the rows, each of which is printed and stored when it is done."""
    started = time.time() - process_age()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="packed slices (.npz)")
    parser.add_argument("--pack", metavar="DATASET", type=Path, help="write --data from this slice data set, and stop")
    parser.add_argument("--pack-items", type=int, default=2000, help="training slices to pack")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="of each row; by default 500, or 600 with --small")
    length.add_argument("--seconds", type=float, help="when all rows have to be done, instead of --steps")
    parser.add_argument("--parallel", type=int, default=1, help="rows beside each other, in processes of their own")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gan-start", type=int, help="step from which the GAN takes part; without it there is none")
    parser.add_argument("--small", action="store_true", help="64 pixels, f = 4, K = 1,024, D = 16: for a CPU")
    parser.add_argument("--threads", type=int, help="CPU threads of a process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="tokenizer_study", help="name of the JSON file")
    parser.add_argument("--output", type=Path, help="folder of the JSON; by default $OUT, or the working directory")
    arguments = parser.parse_args()
    for name in ("steps", "seconds", "parallel"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: found {value:g}, expected more than 0")
    arguments.size = arguments.size or (64 if arguments.small else 256)
    arguments.batch_size = arguments.batch_size or (4 if arguments.small else 16)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.pack:
        pack(arguments.pack, Path(arguments.data), arguments.size, {"training": arguments.pack_items, "test": 400})
        return
    workers = _Workers(arguments)
    _plan_steps(arguments, workers, started)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings["stop_training_at"] = None  # a time of day says nothing later
    rows: dict[str, dict[str, Any]] = {}
    print(f"{hardware()}; {arguments.steps} steps, batch {arguments.batch_size}, {arguments.size} pixels\n\n{_HEAD}")
    for text, found in workers.each(run_row, arguments.rows, arguments):
        if isinstance(found, BaseException):
            trace = "".join(traceback.format_exception(found))
            found = {"row": parse_row(text)[0], "error": f"{type(found).__name__}: {found}", "traceback": trace}
        rows[text] = found
        done = [rows[name] for name in arguments.rows if name in rows]
        write_json(arguments.name, {"hardware": hardware(), "settings": settings, "rows": done}, arguments.output)
        print(table_row(found), flush=True)
    if workers.pool is not None:
        workers.pool.shutdown()
    if all("error" in row for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
