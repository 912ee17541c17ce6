"""The main job on one GPU, in one process: train, resume, run out of memory and go on, evaluate; and how fast that is.

Each line is printed when it is known, and the JSON file is written again after each, so that a run that is killed
leaves what it had; an error of one part is a line, and the next part follows::

    python benchmarks/gpu/check.py --seconds 300                     # random images; --data slices.npz for real ones
    python benchmarks/gpu/check.py --small                           # a minute on a CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _common import PackedSlices, configure, hardware, prepare
from throughput import Batches
from tokenizer_study import SMALL

TERA_FLOP_AN_IMAGE = 3.57
"""Of a step of the default configuration, forward and backward, both paths, without the perceptual loss."""
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16, 8 at once": {"precision": "bf16", "micro_batch_size": 8},
    "bf16, 16 at once": {"precision": "bf16", "micro_batch_size": 16},
    "bf16, 8 at once, two levels recomputed": {
        "precision": "bf16",
        "micro_batch_size": 8,
        "activation_checkpointing": [0, 1],
    },
    "fp32 (TF32), 8 at once": {"precision": "fp32", "micro_batch_size": 8},
}


class Check:
    """Runs the parts and keeps their lines."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.started = time.monotonic()
        self.lines: list[dict[str, Any]] = []
        self.path = (arguments.output or Path(os.environ.get("OUT", "."))) / "check.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.images = self._images()
        self.rate: float | None = None

    def _images(self) -> Tensor:
        batch, size = self.arguments.batch_size, self.arguments.size
        if self.arguments.data is None:
            return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        data = PackedSlices(file=self.arguments.data, split="training", image_size=size)
        return torch.stack([data[i * len(data) // batch]["image"] for i in range(batch)])

    def say(self, part: str, **figures: Any) -> None:
        """Print a line and store all of them."""
        self.lines.append({"part": part, **figures, "at_seconds": round(time.monotonic() - self.started, 1)})
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
        shown.pop("traceback", None)
        print(f"{part}: {', '.join(f'{key} {value}' for key, value in shown.items())}", flush=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps({"hardware": hardware(), "lines": self.lines}, indent=1, default=str) + "\n")
        temporary.replace(self.path)

    def run(self, name: str, part: Callable[[], None]) -> None:
        """Run a part, unless the time is up; an error is a line."""
        if time.monotonic() - self.started > self.arguments.seconds:
            self.say(name, skipped="the time is up")
            return
        try:
            part()
        except Exception as error:
            self.say(name, error=" ".join(str(error).split())[:300], traceback=traceback.format_exc())
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float | None:
        """Most memory held since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak

    def parser(self, steps: int, **overrides: Any) -> Any:
        """The bundle's configuration for so many steps on the images."""
        prepare(0)
        return configure(
            "",
            [],
            {
                **(SMALL if self.arguments.small else {}),
                "device": self.device,
                "batch_size": self.arguments.batch_size,
                "train#dataset": None,
                "validate#dataset": None,
                "sampler": None,
                "train#dataloader": Batches(self.images.to(self.device), steps),
                "train#handlers": [],
                "val_interval": 10**6,
                "objective#adversarial#start_step": 0,
                **overrides,
            },
            steps=steps,
            image_size=self.arguments.size,
        )

    def machine(self) -> None:
        """The card and its rate in bf16 products."""
        size = 256 if self.device.type == "cpu" else 8192
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        for _ in range(3):
            a @ a
        self.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            a @ a
        self.synchronize()
        self.rate = 10 * 2 * size**3 / (time.perf_counter() - started)
        self.say("machine", hardware=hardware(), bf16_tflops=self.rate / 1e12)

    def speed(self, name: str) -> None:
        """Images a second and peak memory of one configuration, GAN on."""
        from ignite.engine import Events

        warm, timed = (1, 1) if self.arguments.small else (2, 4)
        settings = dict(ROWS[name])
        if "micro_batch_size" in settings:
            settings["micro_batch_size"] = min(settings["micro_batch_size"], self.arguments.batch_size)
        trainer = self.parser(warm + timed, **settings).get_parsed_content("train#trainer")
        moments: list[float] = []

        def mark(engine: Any) -> None:
            self.synchronize()
            moments.append(time.perf_counter())

        trainer.add_event_handler(Events.ITERATION_COMPLETED, mark)
        self.peak_gib()
        trainer.run()
        rate = self.arguments.batch_size * timed / (moments[-1] - moments[warm - 1])
        share = None if self.arguments.small or not self.rate else TERA_FLOP_AN_IMAGE * 1e12 * rate / self.rate
        self.say(
            f"training, {name}",
            images_a_second=rate,
            peak_gib=self.peak_gib(),
            at_once=trainer.micro_batch_size,
            share_of_bf16_rate=share,
            loss=trainer.state.terms["loss"],
        )

    def resume(self) -> None:
        """Losses of a run that was broken off and went on, against one that was not."""
        losses: dict[str, list[float]] = {"whole": [], "broken": []}
        state: dict[str, Any] = {}
        for name, lengths in (("whole", [4]), ("broken", [2, 4])):
            for length in lengths:
                from ignite.engine import Events

                from vaevq_med.engines import TrainingCheckpoint

                parser = self.parser(4, micro_batch_size=min(8, self.arguments.batch_size), deterministic=True)
                trainer = parser.get_parsed_content("train#trainer")
                folder = Path(parser.get_parsed_content("output_dir"))
                checkpoint = TrainingCheckpoint(directory=folder, sampler=argparse.Namespace(start=0), resume=False)
                if name == "broken" and length == 4:
                    checkpoint.load(trainer, state["path"])

                def seen(engine: Any, name: str = name, length: int = length) -> None:
                    losses[name].append(engine.state.terms["loss"])
                    if engine.state.iteration == length:
                        engine.terminate()

                trainer.add_event_handler(Events.ITERATION_COMPLETED, seen)
                trainer.run()
                if name == "broken" and length == 2:
                    checkpoint.save(trainer)
                    state["path"] = checkpoint.last
                    size = checkpoint.last.stat().st_size / 2**20
                    self.say("checkpoint", mib=size)
        worst = max(abs(a - b) / abs(a) for a, b in zip(losses["whole"], losses["broken"], strict=True))
        self.say("resume", whole=str(losses["whole"]), broken=str(losses["broken"]), largest_relative_difference=worst)

    def out_of_memory(self) -> None:
        """Take most of the memory away, ask for the whole batch at once, and see the step survive."""
        if self.device.type != "cuda":
            self.say("out of memory", skipped="needs a GPU")
            return
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / total))
        try:
            trainer = self.parser(2, micro_batch_size=self.arguments.batch_size).get_parsed_content("train#trainer")
            trainer.run()
            self.say(
                "out of memory",
                asked=self.arguments.batch_size,
                went_on_with=trainer.micro_batch_size,
                within_gib=24,
                free_before_gib=free / 2**30,
                loss=trainer.state.terms["loss"],
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def evaluation(self) -> None:
        """Images a second of the evaluator with PSNR, SSIM, LPIPS-style distance and rFID."""
        from vaevq_med.engines import TokenizerEvaluator
        from vaevq_med.metrics import ReconstructionEvaluation
        from vaevq_med.networks.features import feature_network

        network = self.parser(1).get_parsed_content("network").eval()
        features = feature_network("efficientnet-lite0").to(self.device)
        images = self.images.to(self.device)
        for precision in ("fp32", "bf16"):
            measured = ReconstructionEvaluation(
                num_embeddings=network.num_embeddings, lpips=features, fid=features, device=self.device
            )
            evaluator = TokenizerEvaluator(
                device=self.device, val_data_loader=[{}], network=network, precision=precision
            )
            evaluator.generator = torch.Generator(self.device).manual_seed(0)
            rounds = 1 if self.arguments.small else 4
            for number in range(rounds + 1):
                if number == 1:
                    self.synchronize()
                    started = time.perf_counter()
                with evaluator._autocast():
                    output = evaluator.reconstruct(images)
                names = [str(i) for i in range(len(images))]
                measured.update(images, output["pred"], output["indices"], metadata={"path": names})
            self.synchronize()
            rate = rounds * len(images) / (time.perf_counter() - started)
            report = measured.compute()
            self.say(
                f"evaluation, {precision}",
                images_a_second=rate,
                peak_gib=self.peak_gib(),
                psnr=float(report.summary["overall"]["psnr"]["value"]),
            )


def main() -> None:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="no part starts later")
    parser.add_argument("--data", help="packed slices (.npz) of tokenizer_study.py --pack; by default random images")
    parser.add_argument("--small", action="store_true", help="64 pixels and a small network: for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of check.json; by default $OUT, or the working directory")
    arguments = parser.parse_args()
    arguments.size = 64 if arguments.small else 256
    arguments.batch_size = 4 if arguments.small else 32
    check = Check(arguments)
    check.run("machine", check.machine)
    check.run("training, default", lambda: check.speed("default"))
    check.run("resume", check.resume)
    check.run("out of memory", check.out_of_memory)
    check.run("evaluation", check.evaluation)
    for name in list(ROWS)[1:]:
        check.run(f"training, {name}", lambda name=name: check.speed(name))
    check.say("end", parts=len(check.lines))


if __name__ == "__main__":
    main()
