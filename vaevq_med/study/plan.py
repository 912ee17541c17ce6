"""The rows of a study of tokenizers: each method under each seed, one budget; and the commands of each row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vaevq_med.core.errors import VaevqMedError, root_cause
from vaevq_med.core.files import file_sha256
from vaevq_med.images.manifest import SPLITS, load_manifest
from vaevq_med.metrics import figures
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.bundle import (
    Bundle,
    check_components,
    check_ids,
    decisive,
    flags,
    has_id,
    literal,
    texts,
    trusting,
)
from vaevq_med.study.file import Study, TokenizerReport, TokenizerStudy
from vaevq_med.study.methods import Method, make_methods

if TYPE_CHECKING:
    from monai.bundle import ConfigParser


TORCHRUN = ("torchrun", "torch.distributed.run")
OWN_IDS = frozenset({"seed", "output_dir", "dataset_dir", "tracking_uri", "parent_run_id", "run_name", "resume"})
"""Ids that a study's other fields set, or that are set for each row."""


@dataclass(frozen=True)
class Plan:
    """A study whose bundle and methods were looked up.

    Attributes:
        study: as its file says.
        bundle: what is run.
        methods: rows of the table.
        changeable: entries of :meth:`shared` that may change from one call to the next in the same output folder.
        alike: entries of the rows' provenance that have to agree.
        published: which of the paper's tables has figures of the methods.
        per_image: figures of which each image has one; none where rows are of samples of their own.
        per_seed: figures of a whole split that tell the report's reference from each rival, seed by seed.
        known: figures that its table can have, in their order.
    """

    changeable: ClassVar[frozenset[str]] = frozenset()
    alike: ClassVar[tuple[str, ...]] = (
        *("split", "split_hash", "dataset_hash", "n", "lpips_weights_sha256", "fid_weights_sha256"),
    )
    published: ClassVar[str] = "reconstruction"
    per_image: ClassVar[tuple[Figure, ...]] = (figures.PSNR, figures.SSIM, figures.LPIPS)
    per_seed: ClassVar[tuple[Figure, ...]] = (figures.RFID,)
    known: ClassVar[tuple[Figure, ...]] = (
        *(figures.PSNR, figures.SSIM, figures.RFID, figures.LPIPS, figures.UTILIZATION, figures.PERPLEXITY),
        *(figures.BITS_PER_POSITION, figures.MEAN_BITS, figures.BITS_PER_PIXEL),
        *(figures.PARAMETERS, figures.IMAGES_PER_SECOND, figures.PEAK_MEMORY),
    )

    study: Study
    bundle: Bundle
    methods: tuple[Method, ...]

    @classmethod
    def of(cls, study: TokenizerStudy) -> Plan:
        """The plan of a study, checked."""
        bundle = Bundle.find(study.bundle)
        plan = cls(study, bundle, make_methods(study, bundle))
        plan._check_methods()
        own = OWN_IDS | {*study.budget.overrides(), "evaluation_dir", "checkpoint_path"}
        evaluation = bundle.read("evaluate.json")
        configs = {
            m.name: (*([] if m.given else [bundle.read("train.json", plan.composed(m))]), evaluation)
            for m in plan.methods
        }
        everywhere = [config for pair in configs.values() for config in pair]
        chosen = [(key, everywhere) for key in study.set]
        chosen += [(key, [*configs[m.name]]) for m in plan.methods if not m.given for key in m.overrides]
        check_ids("set", chosen, own, ("train.json", "evaluate.json"))
        of_given = [(key, [evaluation]) for m in plan.methods if m.given for key in m.overrides]
        check_ids("set", of_given, own, ("evaluate.json",))
        plan.columns()
        plan._check_reference()
        for row in plan.rows()[: len(plan.methods)]:
            for command in row.commands():
                check_components(row.label, row.parser(command).get())
        if study.sweep:  # sizes that a codebook cannot have
            for row in plan.rows()[: len(plan.methods)]:
                row.build("network_def#quantizer")
        return plan

    def columns(self, further: Sequence[Figure] = ()) -> tuple[Figure, ...]:
        """The columns of its table: the figures that the report names, in its order; all where it names none.

        Args:
            further: figures of metrics from outside that the rows were evaluated with.
        """
        names, known = self.study.report.figures, {figure.name: figure for figure in (*self.known, *further)}
        unknown = [name for name in names or () if name not in known]
        outside = any("metrics" in values for values in (self.study.set, *(m.overrides for m in self.methods)))
        if unknown and not outside:
            raise VaevqMedError(f"report.figures has {unknown[0]}; expected some of {', '.join(known)}")
        return tuple(known[name] for name in (known if names is None else names) if name in known)

    @property
    def reference(self) -> Method | None:
        """The method that the report sets against each other one."""
        report = self.study.report
        name = report.reference if isinstance(report, TokenizerReport) else ""
        return next((method for method in self.methods if method.name == name), None)

    def check_data(self) -> None:
        """Refuse a data set whose split that every row is evaluated on is empty, before anything is trained."""
        config = self.rows()[0].parser("evaluating")
        manifest, split = load_manifest(self.data()), config.get("split")
        if split in SPLITS and not manifest.entries(split):
            raise VaevqMedError(
                f"{manifest.path}: found an empty split {split!r}, on which every row is evaluated; "
                f"{manifest.splitting_advice()}, or name another with set: {{split: validation}}"
            )

    def _check_methods(self) -> None:
        """Refuse two methods that would train the same."""
        seen: dict[tuple[Any, ...], str] = {}
        for method in self.methods:
            settings = (method.overlays, method.given, tuple(sorted(method.overrides.items())))
            if settings in seen:
                what = method.given or "+".join(method.overlays)
                raise VaevqMedError(
                    f"methods: found {seen[settings]} and {method.name}, two names of {what} with "
                    f"the same settings, expected each once; a setting of {method.family} alone makes another of it"
                )
            seen[settings] = method.name

    def _check_reference(self) -> None:
        """Refuse a reference that is none of the methods."""
        report = self.study.report
        if isinstance(report, TokenizerReport) and report.reference and self.reference is None:
            names = ", ".join(method.name for method in self.methods)
            raise VaevqMedError(f"report.reference is {report.reference}; expected one of {names}")

    def composed(self, method: Method) -> tuple[str, ...]:
        """Overlays of a method's rows: the shared ones, ``multi_gpu`` under torchrun, the method's."""
        distributed = self.starts_torchrun and "multi_gpu" not in self.study.overlays
        return (*self.study.overlays, *(["multi_gpu"] if distributed else []), *method.overlays)

    @property
    def starts_torchrun(self) -> bool:
        """Whether ``launch`` has torchrun anywhere: ``srun torchrun ...``, ``python -m torch.distributed.run ...``."""
        return any(word in TORCHRUN or Path(word).name in TORCHRUN for word in self.study.launch)

    def processes(self) -> int:
        """Processes that torchrun starts on a machine, 1 where ``launch`` does not say."""
        words = iter(self.study.launch)
        for word in words:
            option, equals, value = word.partition("=")
            if option.replace("_", "-") == "--nproc-per-node":
                value = value if equals else next(words, "")
                return int(value) if value.isdecimal() and int(value) > 0 else 1
        return 1

    def training_config(self, method: Method | None = None) -> dict[str, Any]:
        """The merged configuration of a method's training, or of what all have, unresolved."""
        return self.bundle.read("train.json", self.composed(method) if method else self.study.overlays)

    def experiment(self) -> str:
        """MLflow's experiment."""
        return str(self.study.set.get("experiment", self.training_config().get("experiment", "vaevq_med")))

    def data(self) -> Path:
        """Folder of the data set."""
        return self.study.dataset_dir or Path(str(self.bundle.read("train.json", self.study.overlays)["dataset_dir"]))

    def shared(self) -> dict[str, Any]:
        """What all rows of one output folder have in common, as JSON-ready values."""
        manifest, study = load_manifest(self.data()), self.study
        return {
            "kind": study.study,
            "bundle": self.bundle.name,
            "budget": study.budget.words(),
            "overlays": study.overlays,
            "set": texts(study.set),
            "launch": study.launch,
            "checkpoint": study.checkpoint,
            "data": {"content_hash": manifest.content_hash, "split_hash": manifest.split_hash},
        }

    def rows(self) -> Sequence[Row]:
        """Seeds outermost, so that each method has a first figure early; what is given as it is has one row."""
        seeds = self.study.seeds
        return [Row(self, m, seed) for seed in seeds for m in self.methods if not m.given or seed == seeds[0]]

    def tasks(self) -> list[list[Row]]:
        """Each row that trains, or is given, followed by those that decode its checkpoint in another way."""
        seeds = self.study.seeds
        return [
            [Row(self, other, seed) for other in self.methods if method.name in (other.name, other.decodes)]
            for seed in seeds
            for method in self.methods
            if not method.decodes and (not method.given or seed == seeds[0])
        ]


@dataclass(frozen=True)
class Row:
    """One method under one seed.

    Attributes:
        plan: what it is part of.
        method: trained method.
        seed: of the initialization, the noise and the order of the data.
        redone: entries of :meth:`settings` that may change in the same output folder, and the command of each from
            which on the row is run again then.
    """

    redone: ClassVar[Mapping[str, str]] = {}

    plan: Plan
    method: Method
    seed: int

    @property
    def folder(self) -> Path:
        """What it writes to: checkpoints, evaluation, logs."""
        return self.plan.study.output / self.method.name / f"seed_{self.seed}"

    @property
    def trained(self) -> Row:
        """The row whose training it evaluates: itself, unless its method decodes another's checkpoints."""
        if not self.method.decodes:
            return self
        (method,) = (m for m in self.plan.methods if m.name == self.method.decodes)
        return replace(self, method=method)

    @property
    def checkpoint(self) -> Path:
        """What is evaluated."""
        if self.method.given is not None:
            return self.method.given
        return self.trained.folder / "checkpoints" / f"{self.plan.study.checkpoint}.pt"

    @property
    def evaluation(self) -> Path:
        """Where its evaluation goes, whatever the split."""
        return self.folder / "evaluation"

    @property
    def label(self) -> str:
        """For a reader."""
        return f"{self.method.name} seed {self.seed}"

    def chosen(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Those of its overrides that a configuration has a place for."""
        both = {**texts(self.plan.study.set), **self.method.overrides}
        return {key: value for key, value in both.items() if has_id(config, key)}

    def _split(self) -> tuple[dict[str, str], dict[str, str]]:
        """Overrides of the training and of the evaluation."""
        plan, study = self.plan, self.plan.study
        dataset = {} if study.dataset_dir is None else {"dataset_dir": str(study.dataset_dir)}
        shared = {**dataset, "output_dir": str(self.folder), "tracking_uri": study.tracking_uri}
        paths = {
            "checkpoint_path": f"$@output_dir + '/checkpoints/{study.checkpoint}.pt'",
            "evaluation_dir": "$@output_dir + '/evaluation'",
        }
        if self.method.decodes or self.method.given:
            paths["checkpoint_path"] = str(self.checkpoint)
        training = {
            "seed": str(self.seed),
            **study.budget.overrides(),
            **self.chosen(plan.training_config(self.method)),
        }
        evaluate = plan.bundle.read("evaluate.json")
        return {**shared, **training}, {**shared, **paths, **trusting(evaluate), **self.chosen(evaluate)}

    def parser(self, command: str) -> ConfigParser:
        """The configuration of ``training`` or ``evaluating`` with its overrides, unresolved."""
        from monai.bundle import ConfigParser

        training, evaluation = self._split()
        is_training = command == "training"
        plan = self.plan
        config = plan.training_config(self.method) if is_training else plan.bundle.read("evaluate.json")
        parser = ConfigParser(config)
        parser.update({key: literal(value) for key, value in (training if is_training else evaluation).items()})
        return parser

    def build(self, key: str) -> Any:
        """What the training's configuration has under an id, built."""
        try:
            return self.parser("training").get_parsed_content(key)
        except Exception as error:  # whatever the component or MONAI raises
            raise VaevqMedError(f"{self.label}: {str(root_cause(error)).splitlines()[0]}") from error

    def training_number(self, key: str) -> int | None:
        """A whole number that the training has under an id, None where there is none or an expression."""
        value = self.parser("training").get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def run_words(
        self, command: str, files: Sequence[Path], overrides: Mapping[str, str], *, launched: bool = True
    ) -> list[str]:
        """A command of the bundle, in the way that the study launches it or as a process of its own."""
        start = (self.plan.study.launch if launched else []) or [sys.executable]
        paths = str([str(path) for path in files]) if len(files) > 1 else str(files[0])
        return [*start, "-m", "monai.bundle", "run", command, "--config_file", paths, *flags(overrides)]

    def training_words(
        self, file: str, overrides: dict[str, str], parent_run_id: str | None, kind: str = ""
    ) -> list[str]:
        """The training, nested under an MLflow run."""
        if parent_run_id is not None:
            overrides = overrides | {"parent_run_id": parent_run_id, "run_name": self.label}
        bundle = self.plan.bundle
        overlays = [bundle.overlay(name, kind) for name in self.plan.composed(self.method)]
        return self.run_words("training", [bundle.path / file, *overlays], overrides)

    def commands(self, parent_run_id: str | None = None) -> dict[str, list[str]]:
        """``training``, unless its checkpoint is given or another row's, and ``evaluating``, as a user would type them.

        Args:
            parent_run_id: MLflow run to nest the training under.
        """
        training, evaluation = self._split()
        evaluate = self.run_words("evaluating", [self.plan.bundle.path / "evaluate.json"], evaluation)
        if self.method.decodes or self.method.given:
            return {"evaluating": evaluate}
        return {"training": self.training_words("train.json", training, parent_run_id), "evaluating": evaluate}

    def outputs(self) -> dict[str, Path]:
        """By name of a command, the last in order, a file that it leaves behind: what has ended is not run again.

        Commands that are not named here are run again until the row is finished; a training that has ended ends at
        once.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """Everything that decides the row's figures, as JSON-ready values."""
        plan = self.plan
        training, evaluation = self._split()
        if self.method.given is not None:  # which file, wherever it is
            evaluation["checkpoint_path"] = file_sha256(self.method.given)
            return {"evaluate": decisive(plan.bundle.read("evaluate.json"), evaluation)}
        if self.method.decodes:  # a folder of results can be moved
            evaluation["checkpoint_path"] = f"{plan.study.checkpoint} of {self.trained.label}"
        return {
            "train": decisive(plan.training_config(self.method), training),
            "evaluate": decisive(plan.bundle.read("evaluate.json"), evaluation),
        }
