"""What a comparison of generators trains: tokenizers times generators times seeds; and the commands of each row."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.resources import overlay_path
from vaevq_med.images.generated import LIST_NAME
from vaevq_med.study.plan import Bundle, Method, Plan, Row, check_ids, decisive, flags, has_id
from vaevq_med.study.rows import RowResult, read_json
from vaevq_med.study.stages import BOTH, KIND, Generator, Tokenizer, tokenizer_hash
from vaevq_med.study.words import Words
from vaevq_med.tokens.store import FILE_NAME

_GENERATE = "generate.json"


@dataclass(frozen=True)
class GenerationMethod(Method):
    """A generator over a tokenizer's tokens; ``overrides`` are of its training.

    Attributes:
        tokenizer: whose tokens.
        generator: what is trained.
        sampling: overrides of ``generate.json``.
        encode: further words of ``encode-tokens``.
    """

    tokenizer: Tokenizer = field(kw_only=True)
    generator: Generator = field(kw_only=True)
    sampling: Mapping[str, str] = field(default_factory=dict)
    encode: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationPlan(Plan):
    """Everything that decides what the rows are; ``overlays`` are the names that were given.

    Attributes:
        methods: generators over tokenizers.
        num_samples: drawn by each row.
        evaluate: further words of ``evaluate-samples``.
    """

    methods: tuple[GenerationMethod, ...]
    changeable: ClassVar[frozenset[str]] = frozenset({"num_samples", "evaluate"})

    num_samples: int = 5000
    evaluate: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what no row could run with.

        Raises:
            VaevqMedError: an overlay, an id or a value that is not known.
        """
        if self.checkpoint not in ("best", "last"):
            raise VaevqMedError(f"checkpoint: found {self.checkpoint!r}, expected 'best' or 'last'")
        for file in dict.fromkeys([*(m.generator.file for m in self.methods), _GENERATE]):
            if not (self.bundle.path / file).is_file():
                raise VaevqMedError(f"{self.bundle.path}: found no {file}, expected a bundle that trains generators")
        for name in self.overlays:
            if not any(m.generator.overlays([name], self.bundle) for m in self.methods):
                overlay_path(name, self.bundle.path, KIND)
                raise VaevqMedError(f"overlay: found {name!r}, expected one of a generator that is compared")
        for option, words, own in (
            ("encode", [word for m in self.methods for word in m.encode], ("--kind", "--overwrite", "--help")),
            ("evaluate", self.evaluate, ("--output-dir", "--tokenizer", "--json", "--help")),
        ):
            taken = [word for word in words if word.partition("=")[0] in own]
            if taken:
                raise VaevqMedError(f"{option}: found {taken[0]}, which the comparison sets itself; expected others")
        generate = self.bundle.read(_GENERATE)
        configs = {m.name: self.training_config(m) for m in self.methods}
        files = tuple(dict.fromkeys(m.generator.file for m in self.methods))
        own_ids = {*self.budget.overrides(), "seed", "output_dir", "tokens_dir", "dataset_dir", "tracking_uri"}
        own_ids |= {"parent_run_id", "run_name", "resume"}
        chosen = [(key, [*configs.values()]) for key in self.overrides]
        chosen += [(key, [configs[m.name]]) for m in self.methods for key in m.overrides]
        check_ids("set", chosen, own_ids, files)
        own_ids = {"output_dir", "checkpoint_path", "tokenizer_path", "generated_dir", "num_samples", "seed"}
        own_ids |= {"overwrite", "inpaint_tokens", "inpaint_split", "inpaint_box", "dataset_dir"}
        check_ids("generate-set", [(k, [generate]) for m in self.methods for k in m.sampling], own_ids, (_GENERATE,))
        for method in self.methods:
            method.generator.check_sampling(method.sampling, method.name)
        for row in self.rows():
            row.check_encoding()
        self._check_evaluation()
        _ = self.hashes

    def _check_evaluation(self) -> None:
        """Refuse what the evaluation of every row would refuse after the training."""
        from vaevq_med.metrics.statistics import MIN_EXTRAPOLATED
        from vaevq_med.networks.features import feature_network

        words = self.evaluation
        count = min(self.num_samples, words.values["max_items"] or self.num_samples)
        if self.num_samples < 1 or count <= words.values["neighbors"]:
            raise VaevqMedError(
                f"num-samples: found {count} to evaluate, expected more than the {words.values['neighbors']} neighbors "
                "that precision and recall look at"
            )
        if words.values["fid_infinity"] and count < MIN_EXTRAPOLATED:
            raise VaevqMedError(
                f"num-samples: found {count} to evaluate, expected at least {MIN_EXTRAPOLATED} for --fid-infinity"
            )
        if {"feature_network", "feature_weights"} & {*words.given}:
            feature_network(words.values["feature_network"], words.values["feature_weights"])

    @cached_property
    def evaluation(self) -> Words:
        """The words of ``evaluate-samples``, as that reads them.

        Raises:
            VaevqMedError: it would refuse them.
        """
        return Words.of("evaluate", [*self.rows()[0].evaluating(), *self.evaluate], self.evaluate)

    def composed(self, method: Method) -> tuple[str, ...]:
        """Overlays of a method's training, ``generator_multi_gpu`` under torchrun among them."""
        distributed = f"{BOTH}_multi_gpu"
        if not self.starts_torchrun or distributed in method.overlays:
            return method.overlays
        return (*method.overlays, distributed)

    def training_config(self, method: GenerationMethod) -> dict[str, Any]:
        """The merged configuration of a method's training, unresolved."""
        return self.bundle.read(method.generator.file, self.composed(method), KIND)

    def experiment(self) -> str:
        """MLflow's experiment."""
        default = self.training_config(self.methods[0]).get("experiment", "vaevq_med")
        return self.overrides.get("experiment", str(default))

    def data(self) -> Path:
        """Folder of the images."""
        return self.dataset_dir or Path(str(self.bundle.read("train.json")["dataset_dir"]))

    def shared(self) -> dict[str, Any]:
        """What all rows of one output folder have in common, as JSON-ready values.

        Raises:
            DataError: the data set is missing or damaged.
        """
        return {**super().shared(), "num_samples": self.num_samples, "evaluate": list(self.evaluate)}

    def rows(self) -> Sequence[GenerationRow]:
        """Seeds outermost, so that each method has a first figure early."""
        return [GenerationRow(self, method, seed) for seed in self.seeds for method in self.methods]

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """Content hash of each tokenizer.

        Raises:
            CheckpointError: a file is no tokenizer's checkpoint.
            VaevqMedError: a tokenizer's images are several contrasts at once.
        """
        paths = dict.fromkeys(path for method in self.methods for path in method.tokenizer.checkpoints.values())
        return {path: tokenizer_hash(path) for path in paths}


@dataclass(frozen=True)
class GenerationRow(Row):
    """One generator over one tokenizer's tokens, under one seed."""

    redone: ClassVar[Mapping[str, str]] = {"generate": "generating", "evaluate": "evaluating"}

    plan: GenerationPlan
    method: GenerationMethod

    @property
    def tokenizer(self) -> Path:
        """Checkpoint of the tokenizer."""
        return self.method.tokenizer.checkpoints[self.seed]

    @property
    def tokens(self) -> Path:
        """The token store, which rows of the same tokenizer, kind and words of ``encode-tokens`` share."""
        tokenizer, words = self.method.tokenizer, self.method.encode
        seed = () if tokenizer.shared else (f"seed_{self.seed}",)
        mark = f"_{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}" if words else ""
        return self.plan.output.joinpath("tokens", tokenizer.name, *seed, self.method.generator.kind + mark)

    @property
    def generated(self) -> Path:
        """Where its samples go."""
        return self.folder / "generated"

    @property
    def is_encoded(self) -> bool:
        """Whether the token store is finished and of this tokenizer."""
        try:
            header = read_json(self.tokens / FILE_NAME, "content_hash", "tokenizer")
        except VaevqMedError:
            return False
        return header is not None and header["tokenizer"]["content_hash"] == self.plan.hashes[self.tokenizer]

    def _training(self) -> dict[str, str]:
        config, plan = self.plan.training_config(self.method), self.plan
        both = {**plan.overrides, **self.method.overrides}
        chosen = {key: value for key, value in both.items() if has_id(config, key)}
        return {"seed": str(self.seed), **plan.budget.overrides(), **chosen}

    def _generating(self) -> dict[str, str]:
        last = {"checkpoint_path": "$@output_dir + '/checkpoints/last.pt'"} if self.plan.checkpoint == "last" else {}
        return {"seed": str(self.seed), "num_samples": str(self.plan.num_samples), **last, **self.method.sampling}

    def commands(self, parent_run_id: str | None = None) -> dict[str, list[str]]:
        """``encoding``, unless that is done, ``training``, ``generating`` and ``evaluating``, as typed by a user.

        Args:
            parent_run_id: MLflow run to nest the training under.
        """
        plan, generator = self.plan, self.method.generator
        start, app = [sys.executable], [sys.executable, "-m", "vaevq_med.cli.app"]
        paths = {"output_dir": str(self.folder)}
        folder = plan.bundle.path
        files = [folder / generator.file, *(overlay_path(n, folder, KIND) for n in plan.composed(self.method))]
        training = {"tokens_dir": str(self.tokens), **paths, "tracking_uri": plan.tracking_uri, **self._training()}
        if parent_run_id is not None:
            training |= {"parent_run_id": parent_run_id, "run_name": self.label}
        run = ["-m", "monai.bundle", "run"]
        config = ["--config_file", str([str(file) for file in files])]
        train = [*(plan.launch_words() or start), *run, "training", *config, *flags(training)]
        # The folder is the comparison's own; samples of the same settings are kept.
        generating = {**paths, "tokenizer_path": str(self.tokenizer), "overwrite": "True", **self._generating()}
        config = ["--config_file", str(folder / _GENERATE)]
        return {
            **({} if self.is_encoded else {"encoding": [*app, *self.encoding(), *self.method.encode]}),
            "training": train,
            "generating": [*start, *run, "generating", *config, *flags(generating)],
            "evaluating": [*app, *self.evaluating(), *plan.evaluate],
        }

    def encoding(self) -> list[str]:
        """``encode-tokens``, without the further words."""
        data, store = str(self.plan.data()), str(self.tokens)
        return ["encode-tokens", str(self.tokenizer), data, store, "--kind", self.method.generator.kind]

    def evaluating(self) -> list[str]:
        """``evaluate-samples``, without the further words."""
        generated, evaluation = str(self.generated), str(self.evaluation)
        words = ["evaluate-samples", generated, str(self.plan.data()), "--output-dir", evaluation]
        return words if "--no-memorization" in self.plan.evaluate else [*words, "--tokenizer", str(self.tokenizer)]

    def check_encoding(self) -> None:
        """Refuse words that ``encode-tokens`` would refuse.

        Raises:
            VaevqMedError: naming the first.
        """
        if self.method.encode:
            Words.of("encode", [*self.encoding(), *self.method.encode], self.method.encode)

    def outputs(self) -> dict[str, Path]:
        """What training, drawing and evaluation leave behind."""
        return {
            "training": self.checkpoint,
            "generating": self.generated / LIST_NAME,
            "evaluating": self.evaluation / "metrics.json",
        }

    def settings(self) -> dict[str, Any]:
        """Everything that decides the row's figures, as JSON-ready values."""
        return {
            "tokenizer": self.plan.hashes[self.tokenizer],
            "encode": shlex.join(self.method.encode),
            "train": decisive(self.plan.training_config(self.method), self._training()),
            "generate": decisive(self.plan.bundle.read(_GENERATE), self._generating()),
            "evaluate": {**self.plan.evaluation.decisive(), "tokenizer": self.plan.hashes[self.tokenizer]},
        }


def combine(
    tokenizers: Sequence[Tokenizer],
    generators: Sequence[Generator],
    bundle: Bundle,
    overlays: Sequence[str],
    training: tuple[Mapping[str, str], Mapping[str, Mapping[str, str]]],
    sampling: tuple[Mapping[str, str], Mapping[str, Mapping[str, str]]],
    encode: Mapping[str, Sequence[str]],
) -> tuple[GenerationMethod, ...]:
    """Each generator over each tokenizer.

    Args:
        tokenizers: inner order of the rows.
        generators: outer order; the tokenizers under one compete for the best figure.
        bundle: where the overlays are.
        overlays: as given, see :meth:`Generator.overlays`.
        training: overrides of ``--set``: of all, which the plan has, and by name of a tokenizer or generator.
        sampling: those of ``--generate-set``.
        encode: words of ``--encode`` by name of a tokenizer or generator, those for all under an empty one.
    """

    def own(chosen: Mapping[str, Mapping[str, str]], names: Iterable[str]) -> dict[str, str]:
        return {key: value for name in names for key, value in chosen[name].items()}

    return tuple(
        GenerationMethod(
            name=f"{tokenizer.name}_{generator.name}",
            overlays=generator.overlays(overlays, bundle),
            title=f"{generator.title}, {tokenizer.title}",
            overrides=own(training[1], (generator.name, tokenizer.name)),
            family=f"{tokenizer.name}_{generator.name}",
            group=generator.name,
            tokenizer=tokenizer,
            generator=generator,
            sampling={**sampling[0], **own(sampling[1], (generator.name, tokenizer.name))},
            encode=tuple(word for name in ("", generator.name, tokenizer.name) for word in encode[name]),
        )
        for generator in generators
        for tokenizer in tokenizers
    )


def read_generation(row: Row) -> RowResult:
    """Read the record of a finished row: figures of its samples, shares of memorized ones, cost of the training.

    Raises:
        VaevqMedError: it is damaged.
    """
    run = read_json(row.folder / "run.json") or {}
    try:
        record = json.loads((row.evaluation / "metrics.json").read_text(encoding="utf-8"))
        metrics = {**record["summary"]["overall"], "n": {"value": record["provenance"]["n"]}}
        for space in ("feature", "pixel"):
            share = record.get("memorization", {}).get(space, {}).get("share")
            if share is not None:
                metrics[f"memorized_{space}"] = {"value": share}
        return RowResult(row, metrics, record["provenance"], record["conventions"], run, [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VaevqMedError(
            f"{row.label}: found a damaged evaluation ({error}); remove {row.evaluation} and run again"
        ) from None
