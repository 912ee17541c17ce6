"""The rows of a study of generators: tokenizers times generators times seeds; and the commands of each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

from vaevq_med.core.components import resolve
from vaevq_med.core.declared import as_words
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.resources import overlay_files
from vaevq_med.evaluation.options import BITS_NAME, EvaluateOptions
from vaevq_med.images.generated import LIST_NAME
from vaevq_med.images.manifest import load_manifest
from vaevq_med.metrics import figures
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.bundle import Bundle, check_components, check_ids, decisive, texts, tool_words, trusting
from vaevq_med.study.file import GeneratorPart, GeneratorStudy, TokenizerPart
from vaevq_med.study.methods import Method
from vaevq_med.study.plan import OWN_IDS, Plan, Row
from vaevq_med.study.rows import read_json, read_plan_record
from vaevq_med.tokens.options import EncodeOptions
from vaevq_med.tokens.store import FILE_NAME

_GENERATE = "generate.json"
KIND = "generation"
"""The folder of the generators' overlays among the overlays."""
_BOTH = "generator_"
"""What the names of overlays of every generator begin with."""
_OWN_SAMPLE_IDS = frozenset(
    {
        *("output_dir", "checkpoint_path", "tokenizer_path", "generated_dir", "num_samples", "seed", "overwrite"),
        *("inpaint_tokens", "inpaint_split", "inpaint_box", "inpaint_images", "dataset_dir"),
    }
)
# What is found does not depend on them.
_NOT_SETTINGS = frozenset({"workers", "device", "batch_size", "cache_dir"})


def _decisive(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that change what is found, as JSON-ready values."""
    chosen = {name: value for name, value in given.items() if name not in _NOT_SETTINGS}
    return json.loads(json.dumps(chosen, sort_keys=True, default=str))


@dataclass(frozen=True)
class GenerationMethod(Method):
    """A generator over a tokenizer's tokens; ``overrides`` are of its training.

    Attributes:
        tokenizer: its name.
        checkpoints: of the tokenizer, by seed.
        config: the bundle's file that trains the generator.
        kind: of the tokens that it is trained on, ``indices`` or ``latents``.
        has_bits: whether it has a likelihood of tokens, or a bound of it.
        settings: names of what it draws by.
        sampling: overrides of ``generate.json``.
        encode: further options of ``encode-tokens``.
    """

    tokenizer: str = field(kw_only=True)
    checkpoints: Mapping[int, Path] = field(kw_only=True)
    config: str = field(kw_only=True)
    kind: str = field(kw_only=True)
    has_bits: bool = field(kw_only=True)
    settings: Sequence[str] = field(kw_only=True)
    sampling: Mapping[str, str] = field(default_factory=dict)
    encode: Mapping[str, Any] = field(default_factory=dict)


def _overlays(part: GeneratorPart, names: Sequence[str], bundle: Bundle) -> tuple[str, ...]:
    """The overlays of a generator among a study's, of which each may leave out the prefix, and its own.

    The prefix is that of its configuration: ``autoregressive_`` for ``train_autoregressive.json``.
    """
    known, prefix = overlay_files(bundle.path, KIND), f"{Path(part.config).stem.removeprefix('train_')}_"

    def full(name: str) -> str:
        return next((form for form in (name, prefix + name, _BOTH + name) if form in known), name)

    shared = [form for form in map(full, names) if form.startswith((prefix, _BOTH)) or form.endswith(".json")]
    own = [full(name) for name in part.overlays]
    return tuple(dict.fromkeys([*shared, *own]))


def overlaid_generators(bundle: Bundle) -> dict[str, str]:
    """Titles of the generators that an overlay makes, by its name: of the generators' overlays those with a title."""
    contents = {name: read_json(path) or {} for name, path in overlay_files(bundle.path, KIND).items()}
    return {name: str(content["_title_"]) for name, content in contents.items() if "_title_" in content}


def overlaid_part(bundle: Bundle, name: str) -> dict[str, Any]:
    """The generator of an overlay as a study names it.

    It is trained by that of the bundle's ``train_*.json`` whose token store is of the kind that its network takes.

    Args:
        bundle: where it is trained.
        name: one of :func:`overlaid_generators`.

    Raises:
        VaevqMedError: no file of the bundle trains on tokens of that kind.
    """
    from vaevq_med.networks.generators.base import Generator

    content = read_json(bundle.overlay(name, KIND)) or {}
    target = content.get("network_def#_target_") or content.get("network_def", {}).get("_target_")
    kind = cast(type[Generator], resolve(str(target), Generator)).kind
    for path in sorted(bundle.path.glob("train_*.json")):
        if bundle.read(path.name).get("train", {}).get("dataset", {}).get("kind") == kind:
            return {"name": name, "title": str(content["_title_"]), "config": path.name, "overlays": [name]}
    raise VaevqMedError(f"{bundle.path}: found no file that trains on {kind}, expected one for the generator {name!r}")


def make_methods(study: GeneratorStudy, bundle: Bundle) -> tuple[GenerationMethod, ...]:
    """Each generator, in the outer order, over each tokenizer; the tokenizers under one compete for the best figure."""
    from vaevq_med.networks.generators.base import Generator

    methods = []
    for part in study.generators:
        if not (bundle.path / part.config).is_file():
            raise VaevqMedError(f"{bundle.path}: found no {part.config}, expected a bundle that trains generators")
        overlays = _overlays(part, study.overlays, bundle)
        definition = bundle.read(part.config, overlays, KIND).get("network_def")
        target = definition.get("_target_") if isinstance(definition, dict) else None
        network = cast(type[Generator], resolve(str(target), Generator))
        for tokenizer in study.tokenizers.methods:
            methods.append(
                GenerationMethod(
                    name=f"{tokenizer.name}_{part.name}",
                    overlays=overlays,
                    title=f"{part.title or part.name}, {tokenizer.title or bundle.title(tokenizer.name)}",
                    overrides=texts({**part.set, **tokenizer.set}),
                    family=f"{tokenizer.name}_{part.name}",
                    group=part.name,
                    tokenizer=tokenizer.name,
                    checkpoints=_checkpoints(study, tokenizer),
                    config=part.config,
                    kind=network.kind,
                    has_bits=network.likelihood is not None,
                    settings=tuple(network.settings),
                    sampling=texts({**study.sample, **part.sample, **tokenizer.sample}),
                    encode={**study.encode, **part.encode, **tokenizer.encode},
                )
            )
    names = [method.name for method in methods]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise VaevqMedError(f"names of tokenizers and generators make {repeated[0]} twice; expected each row's once")
    return tuple(methods)


def _checkpoints(study: GeneratorStudy, tokenizer: TokenizerPart) -> dict[int, Path]:
    """The checkpoint of each seed, of the study that trained the tokenizer or the one that serves all."""
    folder = study.tokenizers.source
    if folder is None:
        found = dict.fromkeys(study.seeds, tokenizer.checkpoint or Path())
    else:
        record = read_plan_record(folder)
        if "checkpoint" not in record.get("shared", {}):
            raise VaevqMedError(f"from: found no comparison in {folder}, expected an output folder of vaevq-med study")
        file = Path("checkpoints") / f"{record['shared']['checkpoint']}.pt"
        found = {seed: folder / tokenizer.name / f"seed_{seed}" / file for seed in study.seeds}
    for seed, path in found.items():
        if not path.exists():
            raise VaevqMedError(
                f"tokenizer {tokenizer.name}, seed {seed}: found no checkpoint {path}, expected a trained one"
            )
    return found


@dataclass(frozen=True)
class GenerationPlan(Plan):
    """A study of generators whose bundle, tokenizers and methods were looked up."""

    changeable: ClassVar[frozenset[str]] = frozenset({"num_samples", "evaluate"})
    alike: ClassVar[tuple[str, ...]] = (
        *("split", "split_hash", "content_hash", "modalities", "image_size", "n", "n_reference"),
        "feature_weights_sha256",
    )
    published: ClassVar[str] = "generation"
    per_image: ClassVar[tuple[Figure, ...]] = ()
    known: ClassVar[tuple[Figure, ...]] = (
        *(figures.GFID, figures.PRECISION, figures.RECALL, figures.INCEPTION_SCORE),
        *(figures.MEMORIZED_FEATURE, figures.MEMORIZED_PIXEL),
        *(figures.HELD_OUT_BITS, figures.TOKEN_BITS, figures.NETWORK_CALLS, figures.SECONDS_PER_IMAGE),
        *(figures.PARAMETERS, figures.IMAGES_PER_SECOND, figures.COUNT),
    )

    study: GeneratorStudy
    methods: tuple[GenerationMethod, ...]

    @classmethod
    def of(cls, study: GeneratorStudy) -> GenerationPlan:  # type: ignore[override]
        """The plan of a study, checked."""
        bundle = Bundle.find(study.bundle)
        plan = cls(study, bundle, make_methods(study, bundle))
        for name in study.overlays:
            if not any(_overlays(part, [name], bundle) for part in study.generators):
                bundle.overlay(name, KIND)
                raise VaevqMedError(f"overlay: found {name!r}, expected one of a generator that is compared")
        configs = {m.name: plan.training_config(m) for m in plan.methods}
        files = tuple(dict.fromkeys(m.config for m in plan.methods))
        chosen = [(key, [*configs.values()]) for key in study.set]
        chosen += [(key, [configs[m.name]]) for m in plan.methods for key in m.overrides]
        check_ids("set", chosen, OWN_IDS | {*study.budget.overrides(), "tokens_dir"}, files)
        generate = bundle.read(_GENERATE)
        drawn = [(key, [generate]) for m in plan.methods for key in m.sampling]
        check_ids("sample", drawn, _OWN_SAMPLE_IDS, (_GENERATE,))
        settings = generate.get("sampling", {}).values()
        for method in plan.methods:
            wrong = [key for key in method.sampling if f"@{key}" in settings and key not in method.settings]
            if wrong:
                raise VaevqMedError(
                    f"sample: found {wrong[0]} for {method.name}, expected {', '.join(method.settings)}; a setting of "
                    "another generator stands with that"
                )
        for method in plan.methods:
            check_components(method.name, configs[method.name])
        plan._check_evaluation()
        plan.columns()
        _ = plan.hashes
        return plan

    def check_data(self) -> None:
        """Nothing: the real images that samples are compared with are named by the study."""

    def _check_evaluation(self) -> None:
        """Refuse what the evaluation of every row would refuse after the training."""
        from vaevq_med.metrics.statistics import MIN_EXTRAPOLATED
        from vaevq_med.networks.features import feature_network

        chosen, given = self.evaluation, self.study.evaluate
        chosen.check()
        for method in self.methods:
            EncodeOptions(**cast(GenerationMethod, method).encode).check()
        count = min(self.study.samples, chosen.max_items or self.study.samples)
        least = {"precision and recall": chosen.neighbors + 1}
        if chosen.fid_infinity:
            least["fid_infinity"] = MIN_EXTRAPOLATED
        for figure, number in least.items():
            if count < number:
                raise VaevqMedError(f"samples: found {count} to evaluate, expected at least {number} for {figure}")
        if {"feature_network", "feature_weights"} & {*given}:
            feature_network(chosen.feature_network, chosen.feature_weights)

    @cached_property
    def evaluation(self) -> EvaluateOptions:
        """The options of ``evaluate-samples``."""
        return EvaluateOptions(**self.study.evaluate)

    def composed(self, method: Method) -> tuple[str, ...]:
        """Overlays of a method's training, ``generator_multi_gpu`` under torchrun among them."""
        distributed = [f"{_BOTH}multi_gpu"] if self.starts_torchrun else []
        return tuple(dict.fromkeys([*method.overlays, *distributed]))

    def training_config(self, method: Method | None = None) -> dict[str, Any]:
        """The merged configuration of a method's training, or the first one's, unresolved."""
        chosen = cast(GenerationMethod, method or self.methods[0])
        return self.bundle.read(chosen.config, self.composed(chosen), KIND)

    def data(self) -> Path:
        """Folder of the images."""
        return self.study.dataset_dir or Path(str(self.bundle.read("train.json")["dataset_dir"]))

    def shared(self) -> dict[str, Any]:
        """What all rows of one output folder have in common, as JSON-ready values."""
        evaluate = _decisive(self.study.evaluate)
        return {**super().shared(), "num_samples": self.study.samples, "evaluate": evaluate}

    def rows(self) -> Sequence[GenerationRow]:
        """Seeds outermost, so that each method has a first figure early."""
        return [GenerationRow(self, method, seed) for seed in self.study.seeds for method in self.methods]

    def tasks(self) -> list[list[Row]]:
        """None: rows share token stores, which one of them writes."""
        raise VaevqMedError("study is generators, whose rows share token stores; expected tokenizers for tasks")

    @cached_property
    def has_test_images(self) -> bool:
        """Whether the data set has a test split with images, as far as that is known before it is there."""
        try:
            return bool(load_manifest(self.data()).entries("test"))
        except DataError:
            return True

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """Content hash of each tokenizer, whose images are not several contrasts at once."""
        from vaevq_med.trained.network import StoredTokenizer

        found = {}
        for path in dict.fromkeys(path for method in self.methods for path in method.checkpoints.values()):
            stored = StoredTokenizer(path)
            stored.check_target()
            channels = int(stored.value("in_channels"))
            if stored.value("stack_modalities", False) or channels not in (1, 3):
                raise VaevqMedError(
                    f"{path}: found a tokenizer of {channels} stacked contrasts, expected one of single contrasts or "
                    "photographs, which evaluate-samples can compare"
                )
            found[path] = stored.content_hash
        return found


@dataclass(frozen=True)
class GenerationRow(Row):
    """One generator over one tokenizer's tokens, under one seed."""

    redone: ClassVar[Mapping[str, str]] = {"generate": "generating", "evaluate": "evaluating"}

    plan: GenerationPlan
    method: GenerationMethod

    @property
    def tokenizer(self) -> Path:
        """Checkpoint of the tokenizer."""
        return self.method.checkpoints[self.seed]

    @property
    def tokens(self) -> Path:
        """The token store, which rows of the same tokenizer, kind and options of ``encode-tokens`` share."""
        method, options = self.method, _decisive(self.method.encode)
        seed = () if self.plan.study.tokenizers.source is None else (f"seed_{self.seed}",)
        mark = f"_{hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]}" if options else ""
        return self.plan.study.output.joinpath("tokens", method.tokenizer, *seed, method.kind + mark)

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

    @property
    def bits_measured(self) -> bool:
        """Whether the bits of held-out tokens are: the generator has them, and test images are encoded."""
        encoded = "test" in (self.method.encode.get("split") or ("test",))
        return self.method.has_bits and encoded and self.plan.has_test_images

    def _training(self) -> dict[str, str]:
        own = {"{tokenizer}": self.method.tokenizer, "{seed}": str(self.seed)}
        chosen = self.chosen(self.plan.training_config(self.method))
        for name, value in own.items():
            chosen = {key: text.replace(name, value) for key, text in chosen.items()}
        return {"seed": str(self.seed), **self.plan.study.budget.overrides(), **chosen}

    def _generating(self) -> dict[str, str]:
        study = self.plan.study
        last = {"checkpoint_path": "$@output_dir + '/checkpoints/last.pt'"} if study.checkpoint == "last" else {}
        return {"seed": str(self.seed), "num_samples": str(study.samples), **last, **self.method.sampling}

    def commands(self, parent_run_id: str | None = None) -> dict[str, list[str]]:
        """``encoding``, unless that is done, ``training``, ``generating``, ``evaluating``, and ``counting`` of bits.

        They are as a user would type them.

        Args:
            parent_run_id: MLflow run to nest the training under.
        """
        plan, study, method = self.plan, self.plan.study, self.method
        data, output, tokenizer = str(plan.data()), {"output_dir": str(self.folder)}, str(self.tokenizer)
        encode = ["encode-tokens", tokenizer, data, str(self.tokens), "--kind", method.kind]
        training = {"tokens_dir": str(self.tokens), **output, "tracking_uri": study.tracking_uri, **self._training()}
        # The folder is the study's own; samples of the same settings are kept.
        generating = {**output, "tokenizer_path": tokenizer, "overwrite": "True"}
        generating |= {**trusting(plan.bundle.read(_GENERATE)), **self._generating()}
        evaluate = ["evaluate-samples", str(self.generated), data, "--output-dir", str(self.evaluation)]
        if plan.evaluation.memorization:
            evaluate += ["--tokenizer", tokenizer]
        count = ["token-bits", str(self.checkpoint), str(self.tokens), str(self.folder / BITS_NAME), "--overwrite"]
        for name in ("weights", "device", "batch_size"):
            if name in method.sampling:
                count += [f"--{name.replace('_', '-')}", method.sampling[name]]
        words = as_words(EvaluateOptions, study.evaluate)
        drawing = [plan.bundle.path / _GENERATE]
        encoding = {"encoding": [*tool_words(), *encode, *as_words(EncodeOptions, method.encode)]}
        return {
            **({} if self.is_encoded else encoding),
            "training": self.training_words(method.config, training, parent_run_id, KIND),
            "generating": self.run_words("generating", drawing, generating, launched=False),
            "evaluating": [*tool_words(), *evaluate, *words],
            **({"counting": [*tool_words(), *count]} if self.bits_measured else {}),
        }

    def outputs(self) -> dict[str, Path]:
        """What training, drawing, evaluation and counting leave behind."""
        return {
            "training": self.checkpoint,
            "generating": self.generated / LIST_NAME,
            "evaluating": self.evaluation / "metrics.json",
            **({"counting": self.folder / BITS_NAME} if self.bits_measured else {}),
        }

    def settings(self) -> dict[str, Any]:
        """Everything that decides the row's figures, as JSON-ready values."""
        plan, tokenizer = self.plan, self.plan.hashes[self.tokenizer]
        return {
            "tokenizer": tokenizer,
            "encode": _decisive(self.method.encode),
            "train": decisive(plan.training_config(self.method), self._training()),
            "generate": decisive(plan.bundle.read(_GENERATE), self._generating()),
            "evaluate": {**_decisive(plan.study.evaluate), "tokenizer": tokenizer},
        }
