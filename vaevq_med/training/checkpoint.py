"""Checkpoints of state dictionaries: written atomically, loadable with ``weights_only=True``, resumable."""

from __future__ import annotations

import json
import math
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from ignite.engine import Engine, Events

from vaevq_med import __version__
from vaevq_med.core.errors import VaevqMedError, foreseen
from vaevq_med.images.manifest import SPLITS
from vaevq_med.trained.file import FORMAT, CheckpointError, atomic_save, load_state, read_checkpoint
from vaevq_med.trained.patients import STARTED_FROM, first_seen
from vaevq_med.training import distributed
from vaevq_med.training.base import BaseTrainer
from vaevq_med.training.current import known_values
from vaevq_med.training.distributed import unwrapped
from vaevq_med.training.resuming import RunRecord, changes, check_same, expressions

_REQUIRED = ("network", "optimizer", "objective", "schedulers", "iteration", "epoch_length", "rng", "best")
_READ = ("image_size", "in_channels", "modalities", "stack_modalities")
"""Settings that say how images are read, beside their shape."""
_OTHERWISE = "choose another output_dir, or start anew with --resume False"
_LONGEST_TAG = 5000


def resumed_file(directory: str | Path, resume: bool | str) -> Path | None:
    """The checkpoint that a run goes on from; None for one that starts.

    Args:
        directory: of the run's checkpoints.
        resume: as for :class:`TrainingCheckpoint`.
    """
    if not resume:
        return None
    source = Path(directory) / "last.pt" if resume in ("auto", True) else Path(str(resume))
    if resume == "auto" and not source.is_file():
        source = Path(directory) / "best.pt"  # which a run that began anew would take the place of
    return source if resume != "auto" or source.is_file() else None


def _identity(dataset: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on: what this says of itself, or its ``manifest``."""
    if hasattr(dataset, "identity"):
        return dataset.identity()
    manifest = getattr(dataset, "manifest", None)
    if manifest is None:
        return {}
    shape = getattr(dataset, "shape", None)
    reading = {"reading": {"shape": shape, **{key: config[key] for key in _READ if key in config}}} if shape else {}
    recipe = manifest.content.get("recipe")
    return {
        "split_hash": manifest.split_hash,
        "content_hash": manifest.content_hash,
        **({"recipe": recipe} if recipe else {}),
        "name": str(manifest.content.get("name", "")),
        "counts": {split: _counts(manifest.entries(split)) for split in SPLITS},
        "patients": _patients(dataset, manifest),
        **reading,
    }


def _patients(dataset: Any, manifest: Any) -> list[str]:
    """Those of a data set's images, or of the whole split where it does not say."""
    known = getattr(dataset, "patients", None)
    if known is not None:
        return list(known)
    return sorted({str(entry["patient"]) for entry in manifest.entries(dataset.split) if "patient" in entry})


def _counts(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Images of a split, and the patients that are named in it."""
    return {"images": len(entries), "patients": len({str(entry["patient"]) for entry in entries if "patient" in entry})}


def _feature_weights(engine: BaseTrainer) -> dict[str, str]:
    """Hashes of the weights of the feature networks that an objective measures by, whose files may be replaced."""
    objective = getattr(engine, "objective", None)
    modules = objective.modules() if isinstance(objective, torch.nn.Module) else ()
    return {str(m.name): str(m.weights_sha256) for m in modules if hasattr(m, "weights_sha256")}


def _load_scheduler(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Take up a schedule where it stood, at the base rates and length of this configuration."""
    base = list(scheduler.base_lrs)
    scheduler.load_state_dict(dict(state))
    scheduler.base_lrs = base
    for group, rate, factor in zip(scheduler.optimizer.param_groups, base, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = rate
        group["lr"] = rate * factor(scheduler.last_epoch)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take up the averages; rates, decay, and by which kernels a step is computed are for this configuration to say."""
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    groups = [{**stored, **own} for stored, own in zip(state["param_groups"], settings, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _check_averages(optimizer)


def _check_averages(optimizer: torch.optim.Optimizer) -> None:
    """Find out now what would end the first step; PyTorch takes up whatever is stored.

    Raises:
        ValueError: a parameter lacks what its like have, or something has another shape than theirs.
    """
    fits: dict[tuple[str, str], list[bool]] = {}
    names: dict[bool, set[str]] = {}
    for parameter, kept in optimizer.state.items():
        if kept and names.setdefault(parameter.ndim > 1, set(kept)) != set(kept):
            raise ValueError(f"the optimizer keeps {sorted(kept)} of one parameter and other things of the others")
        for name, value in kept.items():
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            fits.setdefault((name, "the shape of its parameter"), []).append(shape == parameter.shape)
            fits.setdefault((name, "one number"), []).append(math.prod(shape) == 1)
    for (name, expected), found in fits.items():
        if len(found) / 2 < sum(found) < len(found):
            raise ValueError(f"{name} of the optimizer has not {expected}")


class TrainingCheckpoint:
    """Save and resume a :class:`BaseTrainer`: nothing is lost to a kill but the last few iterations.

    ``last.pt`` is written every ``interval`` iterations, at the end of each epoch after its validation, and on
    SIGINT or SIGTERM (which end the run after the current iteration); ``best.pt`` when the validation metric
    improves. A resumed run on the CPU ends with the same bits as an unbroken one.

    Args:
        directory: where checkpoints go.
        sampler: the training ``ResumableBatchSampler``, which a resumed run starts at its iteration.
        dataset: the training data set, whose images and split a resumed run has to share.
        interval: iterations between checkpoints.
        resume: ``auto`` takes up ``last.pt``, or ``best.pt`` where only that is left, if there is one; False starts
            anew, and the first checkpoint takes the place of what an earlier run left; a path takes up that file.
        metric: validation metric that decides ``best.pt``.
        mode: ``max`` or ``min``.
        config: the run's configuration, stored as JSON. A run resumes only where what makes it what it is (data,
            reading, network, terms of the objective, seed) is the same; what else has changed is noted.
        evaluator: validation engine whose ``state.metrics`` hold ``metric``.
        start: what the run started from, whose ``record`` the checkpoints keep; a resumed run keeps that of its own.

    Attributes:
        changes: with what the run went on in another way: ``iteration``, and ``changed``, by id what was and what is.
    """

    def __init__(
        self,
        *,
        directory: str | Path,
        sampler: Any,
        dataset: Any = None,
        interval: int = 1000,
        resume: bool | str = "auto",
        metric: str = "psnr",
        mode: str = "max",
        config: Mapping[str, Any] | None = None,
        evaluator: Engine | None = None,
        start: Any = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise VaevqMedError(f"checkpoint mode: found {mode!r}, expected 'max' or 'min'")
        if interval < 1:
            raise VaevqMedError(f"checkpoint_interval: found {interval}, expected 1 or more")
        self.directory = Path(directory)
        self.sampler = sampler
        self.interval = interval
        self.resume = resume
        self.metric = metric
        self.mode = mode
        self.config = dict(config or {})
        self.dataset = dataset
        self.data = _identity(dataset, self.config)
        if getattr(start, "record", None):
            self.data = {**self.data, STARTED_FROM: start.record}
        self.values: dict[str, Any] = {}
        self.changes: list[dict[str, Any]] = []
        self.evaluator = evaluator
        self.best: dict[str, Any] | None = None
        self.extra: dict[str, Any] = {}
        self.interrupted_by: str | None = None
        self._begun_anew = resume != "auto"
        self._old_handlers: dict[int, Any] = {}
        self._newest: Path | None = None

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.directory / "last.pt"

    def attach(self, engine: BaseTrainer) -> None:
        """Resume if there is something to resume, and register the events.

        Raises:
            CheckpointError: the checkpoint does not fit, or the directory cannot be written to.
        """
        self._check_directory()
        self.values = known_values(expressions(self.config))
        source = resumed_file(self.directory, self.resume)
        if source is not None:
            self.load(engine, source)
        self._warn_of_seen(engine)
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE | Events.EXCEPTION_RAISED, self._finished)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._exception)

    def _check_directory(self) -> None:
        """Find out now, and not after an hour, whether checkpoints can be written."""
        if not distributed.is_main():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise CheckpointError(
                f"output_dir {self.directory.parent}: found it not writable ({error.strerror}), expected a folder to "
                "write to; name another with --output_dir"
            ) from None

    def state_dict(self, engine: BaseTrainer) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state: dict[str, Any] = {
            "format": FORMAT,
            "version": __version__,
            "network": engine.network.state_dict(),
            "optimizer": engine.optimizer.state_dict(),
            "objective": engine.control_state(),
            "schedulers": [scheduler.state_dict() for scheduler in engine.schedulers],
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            "best": self.best,
            "config": json.dumps(self.config, default=str),
            "extra": dict(self.extra),
            "data": self.data,
            "values": dict(self.values),
            "changes": list(self.changes),
            "feature_weights": _feature_weights(engine),
        }
        if engine.ema is not None:
            state["ema"] = engine.ema.module.state_dict()
            state["ema_updates"] = int(engine.ema.n_averaged)
        if engine.discriminator is not None:
            state["discriminator"] = unwrapped(engine.discriminator).state_dict()
        if engine.d_optimizer is not None:
            state["d_optimizer"] = engine.d_optimizer.state_dict()
        return state

    def load(self, engine: BaseTrainer, path: Path) -> None:
        """Put a checkpoint's state into the engine and everything it holds.

        Raises:
            CheckpointError: it is no checkpoint, or one of another run, or damaged.
        """
        state = read_checkpoint(path)
        try:
            self._restore(engine, state, path)
        except Exception as error:  # whatever a state that is not what it was makes its owner raise
            if foreseen(error) is not None:
                raise
            said = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path}: found a state that cannot be taken up ({type(error).__name__}: {said}), expected a "
                f"checkpoint as training writes it: {_OTHERWISE}"
            ) from error

    def _restore(self, engine: BaseTrainer, state: dict[str, Any], path: Path) -> None:
        missing = [key for key in _REQUIRED if key not in state]
        if missing:
            raise CheckpointError(f"{path}: found no {', '.join(missing)}, expected a checkpoint to resume from")
        self._check_same(state, path)
        self._check_feature_weights(_feature_weights(engine), state.get("feature_weights", {}), path)
        if state.get("epoch_length") != engine.state.epoch_length:
            now, before = (config.get("batch_size") for config in (self.config, self._stored(state).config))
            lengths = f"{engine.state.epoch_length} iterations, was {state.get('epoch_length')}"
            batches = "" if now == before else f"batch_size is {now}, was {before}: "
            raise CheckpointError(f"{batches}an epoch is {lengths} in {path}; expected the same to go on: {_OTHERWISE}")
        kept = state.get("data", {}).get(STARTED_FROM)
        self.data = {name: value for name, value in self.data.items() if name != STARTED_FROM}
        if kept is not None:
            self.data[STARTED_FROM] = kept
        load_state(engine.network, state["network"], path, "network")
        if engine.ema is not None and "ema" in state:
            load_state(engine.ema.module, state["ema"], path, "ema")
            engine.ema.n_averaged.fill_(state["ema_updates"])
        if engine.discriminator is not None and "discriminator" in state:
            load_state(unwrapped(engine.discriminator), state["discriminator"], path, "discriminator")
        load_optimizer(engine.optimizer, state["optimizer"])
        if engine.d_optimizer is not None and "d_optimizer" in state:
            load_optimizer(engine.d_optimizer, state["d_optimizer"])
        engine.load_control_state(state["objective"])
        for scheduler, scheduler_state in zip(engine.schedulers, state["schedulers"], strict=True):
            _load_scheduler(scheduler, scheduler_state)
        torch.set_rng_state(state["rng"]["torch"])
        if torch.cuda.is_available() and len(state["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        if path.resolve().parent == self.directory.resolve():
            self.best = state["best"]
            self._begun_anew = False
            self.extra = dict(state.get("extra", {}))
        engine.state.iteration = state["iteration"]
        engine.state.epoch = state["iteration"] // state["epoch_length"]
        self.sampler.start = state["iteration"]
        self._newest = path
        engine.logger.warning("Resuming from %s at iteration %d", path, state["iteration"])
        if self.changes and self.changes[-1]["iteration"] == state["iteration"]:
            engine.logger.warning("From here on with %s", self.change_tags()[f"changed.{state['iteration']}"])

    @staticmethod
    def _stored(state: Mapping[str, Any]) -> RunRecord:
        return RunRecord(json.loads(state.get("config") or "{}"), state.get("values", {}), state.get("data", {}))

    def _check_same(self, state: Mapping[str, Any], path: Path) -> None:
        """Refuse another run, and note what this one changes.

        Raises:
            CheckpointError: naming what differs.
        """
        stored = self._stored(state)
        config = json.loads(json.dumps(self.config, default=str))
        check_same(path, stored, RunRecord(config, self.values, self.data), self.dataset, _OTHERWISE)
        self.changes = list(state.get("changes", []))
        changed = changes(stored.config, config) if stored.config and config else {}
        if changed:
            self.changes.append({"iteration": state["iteration"], "changed": changed})

    @staticmethod
    def _check_feature_weights(now: Mapping[str, str], before: Mapping[str, str], path: Path) -> None:
        for name in now.keys() & before.keys():
            if now[name] != before[name]:
                raise CheckpointError(
                    f"feature_weights is a file of {name} of the hash {now[name][:19]}, was {before[name][:19]} in "
                    f"{path}; expected the same to go on: {_OTHERWISE}"
                )

    def _warn_of_seen(self, engine: BaseTrainer) -> None:
        """Say in a line where the file that the run started from has seen patients that are to judge it."""
        before, manifest = self.data.get(STARTED_FROM) or {}, getattr(self.dataset, "manifest", None)
        if not before or manifest is None or not distributed.is_main():
            return
        for split in ("validation", "test"):
            patients = {str(entry["patient"]) for entry in manifest.entries(split) if "patient" in entry}
            seen = first_seen(before.get("data") or {}, str(before.get("file")), patients)
            if seen is not None:
                engine.logger.warning(
                    "found patient %s in the %s split, whom %s was trained on, expected none: figures of validation "
                    "and best.pt may rest on patients that were seen, and an evaluation on them is refused",
                    seen[0],
                    split,
                    seen[1],
                )
                return

    @property
    def started_from(self) -> dict[str, Any]:
        """The file that the run started from and what was taken of it, without the data behind it; empty without."""
        return {name: value for name, value in self.data.get(STARTED_FROM, {}).items() if name != "data"}

    def start_tags(self) -> dict[str, str]:
        """The same as tags of a tracked run: ``started_from.file``, ``started_from.encoder`` and so on."""
        told = self.started_from
        parts = {name: part["told"] for name, part in told.pop("parts", {}).items()}
        return {f"started_from.{name}": str(value)[:_LONGEST_TAG] for name, value in {**told, **parts}.items()}

    def change_tags(self) -> dict[str, str]:
        """The changes as tags of a tracked run: ``changed.400`` to ``learning_rate 0.0001 -> 1e-06``."""
        tags: dict[str, str] = {}
        for change in self.changes:
            words = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in change["changed"].items())
            key = f"changed.{change['iteration']}"
            tags[key] = f"{tags[key]}; {words}" if key in tags else words
        return {key: words[:_LONGEST_TAG] for key, words in tags.items()}

    def save(self, engine: BaseTrainer, name: str = "last.pt") -> None:
        """Write a checkpoint, on the main process.

        Raises:
            TrainingError: a term of an iteration since the last one was not finite; nothing is written.
        """
        engine.check_terms()
        if distributed.is_main():
            self._forget_what_is_gone(engine)
            atomic_save(self.state_dict(engine), self.directory / name)
            if self.best is None and self._begun_anew:
                (self.directory / "best.pt").unlink(missing_ok=True)  # of the run that this one takes the place of
            self._begun_anew = False
            self._newest = self.directory / name

    def _forget_what_is_gone(self, engine: BaseTrainer) -> None:
        """Where somebody removed the folder, begin another one: what is trained so far is only in memory now."""
        if self._newest is not None and not self._newest.is_file():
            engine.logger.warning("%s is gone; checkpoints begin anew in %s", self._newest, self.directory)
            self._newest, self.best = None, None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted_by = signal.Signals(number).name

    def _started(self, engine: BaseTrainer) -> None:
        self.interrupted_by = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)

    def _iteration_completed(self, engine: BaseTrainer) -> None:
        at_epoch_end = engine.state.iteration % engine.state.epoch_length == 0
        if self.interrupted_by is not None:
            engine.state.interrupted = True
        if self.interrupted_by is not None and not at_epoch_end:
            self.save(engine)
            engine.terminate()
        elif engine.state.iteration % self.interval == 0 and not at_epoch_end:
            self.save(engine)

    def _epoch_completed(self, engine: BaseTrainer) -> None:
        metrics = self.evaluator.state.metrics if self.evaluator is not None else {}
        fresh = self.evaluator is not None and self.evaluator.state.epoch > 0
        value: Any = metrics.get(self.metric) if fresh else None
        self._forget_what_is_gone(engine)
        improved = value is not None and (
            self.best is None or (value > self.best["value"] if self.mode == "max" else value < self.best["value"])
        )
        if improved:
            self.best = {"metric": self.metric, "value": float(value), "epoch": engine.state.epoch}
            self.save(engine, "best.pt")
        self.save(engine)
        if self.interrupted_by is not None:
            engine.terminate()

    def _exception(self, engine: BaseTrainer, error: BaseException) -> None:
        """Note on the error what is left, once; ignite calls this for an epoch and for the whole run."""
        if self._newest is None or not self._newest.is_file():
            return
        how = "" if self._newest == self.last else f", from which --resume {self._newest} goes on"
        note = f"the last good checkpoint is {self._newest}{how}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)

    def _finished(self, engine: BaseTrainer, *error: BaseException) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()
