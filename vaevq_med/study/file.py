"""The study file: what is compared, on what and for how long, checked before anything runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    model_validator,
)

from vaevq_med.core.declared import with_lists
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.resources import study_path
from vaevq_med.evaluation.options import EvaluateOptions
from vaevq_med.study.content import assign, complaint, read_content
from vaevq_med.study.part import AnyStudy, Count, Name, Part, by_name, check_names, each_once, named, refuse
from vaevq_med.study.rates.file import RateDistortionStudy
from vaevq_med.study.tasks.file import TasksStudy
from vaevq_med.tokens.options import EncodeOptions


def _given(kind: type) -> WrapValidator:
    """Those of a command's options that a file gives, checked."""

    def given(value: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        options = handler(with_lists(value, get_type_hints(kind)))
        check_names(value, [entry.name for entry in fields(options)])
        return {name: getattr(options, name) for name in value}

    return WrapValidator(given)


Seeds = Annotated[list[Annotated[int, Field(ge=0, le=2**32 - 1)]], Field(min_length=1), AfterValidator(each_once)]
Values = dict[str, Any]
"""Overrides by id. A text is read as on MONAI's command line: ``1e-4`` is a number, ``$...`` an expression."""
_plain = PlainSerializer(lambda given: {k: str(v) if isinstance(v, Path) else v for k, v in given.items()})
Encode = Annotated[
    dict[str, Any], GetPydanticSchema(lambda _, handler: handler(EncodeOptions)), _given(EncodeOptions), _plain
]
Evaluate = Annotated[
    dict[str, Any], GetPydanticSchema(lambda _, handler: handler(EvaluateOptions)), _given(EvaluateOptions), _plain
]


class Budget(Part):
    """How long every row trains; at most one of the three, the bundle's own ``max_epochs`` without any.

    Steps and images are spread over epochs of one length, about as long as the data set: a step or so less an epoch
    may be left over. The conversion is an expression that the run itself evaluates, so that it holds for the batch
    size and the number of processes that the run has.

    Attributes:
        max_epochs: passes over the training split.
        steps: optimizer steps.
        images: training images seen, over all processes.
    """

    max_epochs: Count | None = None
    steps: Count | None = None
    images: Count | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [*self.model_dump(exclude_none=True)]
        if len(given) > 1:
            raise refuse(f"{' and '.join(given)}; expected one of max_epochs, steps, images")
        return self

    def overrides(self) -> dict[str, str]:
        """As ids of ``train.json``."""
        if self.max_epochs is not None:
            return {"max_epochs": str(self.max_epochs)}
        if self.steps is None and self.images is None:
            return {}
        steps = str(self.steps)
        if self.images is not None:
            steps = f"max(1, {self.images} // (@batch_size * training.world_size()))"
        return {
            "max_epochs": f"$max(1, round({steps} / @sampler.batches_per_epoch))",
            "epoch_length": f"$max(1, {steps} // @max_epochs)",
        }

    def words(self) -> str:
        """For a reader."""
        for name, value in self.model_dump(exclude_none=True).items():
            words = name.removeprefix("max_")
            return f"{value:,} {words if value > 1 else words.removesuffix('s')}"
        return "the bundle's own number of epochs"


class _Named(Part):
    """What is compared.

    Attributes:
        name: of its folder.
        title: what tables call it; by default its overlay's title, or the name.
        set: overrides of its trainings alone.
    """

    name: Name
    title: str = ""
    set: Values = {}


class MethodPart(_Named):
    """A tokenizer to train, or one that is given.

    Attributes:
        overlays: names of the bundle's overlays, or paths, in order; None for the one of the method's name.
        readouts: ways to decode its quantizer that have a row beside the trained one; None for all there are.
        checkpoint: of a tokenizer that is evaluated as it is, one of ``vaevq-med adopt`` for instance.
    """

    overlays: list[str] | None = None
    readouts: list[str] | None = None
    checkpoint: Path | None = None

    @model_validator(mode="after")
    def _given_or_trained(self) -> MethodPart:
        if self.checkpoint is not None and self.overlays is not None:
            raise refuse(f"{self.name} with overlays and a checkpoint; expected one of them")
        return self


class _Stage(_Named):
    """Either half of a row of a study of generators.

    Attributes:
        sample: overrides of drawing.
        encode: further options of the encoding.
    """

    sample: Values = {}
    encode: Encode = {}


class TokenizerPart(_Stage):
    """A trained tokenizer, and what the rows of its tokens have of their own.

    Attributes:
        checkpoint: that serves all seeds; None where ``from`` names the folder of a study.
    """

    checkpoint: Path | None = None


class TokenizersPart(Part):
    """Trained tokenizers: those that a study trained, seed by seed, or checkpoints.

    Attributes:
        source: output folder of a study of tokenizers.
        methods: its methods, or names with a checkpoint each.
    """

    source: Path | None = Field(None, alias="from")
    methods: Annotated[
        list[Annotated[TokenizerPart, BeforeValidator(named)]], Field(min_length=1), AfterValidator(by_name)
    ]

    @model_validator(mode="before")
    @classmethod
    def _checkpoints(cls, value: Any) -> Any:
        """``{vqgan: a.pt}`` in full."""
        if not isinstance(value, Mapping) or "from" in value or isinstance(value.get("methods"), list):
            return value
        full = [
            {"name": name, **(entry if isinstance(entry, Mapping) else {"checkpoint": entry})}
            for name, entry in value.items()
        ]
        return {"methods": full}

    @model_validator(mode="after")
    def _one(self) -> TokenizersPart:
        for part in self.methods:
            if (self.source is None) == (part.checkpoint is None):
                found = "neither" if self.source is None else "both"
                raise refuse(f"{part.name} with {found} of a checkpoint and 'from'; expected one of them")
        return self


class GeneratorPart(_Stage):
    """A generator to train over each tokenizer's tokens.

    Attributes:
        config: the bundle's file that trains it.
        overlays: names of the bundle's overlays of generators, or paths, beside those of the study.
    """

    config: str
    overlays: list[str] = []


class Sweep(Part):
    """The methods at several sizes of the codebook.

    Attributes:
        num_embeddings: values of K.
    """

    num_embeddings: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1), AfterValidator(each_once)]


class Report(Part):
    """What is made of the finished rows.

    Attributes:
        published: set the paper's figures beside the measured ones.
        pictures: images of each row or method in the figure; 0 leaves it out.
        figures: names of the columns; None for all that were measured.
        notes: sentences that stand under the table.
    """

    published: bool = False
    pictures: Annotated[int, Field(ge=0)] = 6
    figures: list[str] | None = None
    notes: list[str] = []


class TokenizerReport(Report):
    """What is made of the finished rows of tokenizers.

    Attributes:
        reference: name of the method that is set against each other one; none where empty.
    """

    reference: str = ""


class Study(AnyStudy):
    """What studies say that train.

    Attributes:
        name: what MLflow, locks and SLURM call it; see :attr:`label` where empty.
        bundle: name of an installed bundle, or its folder.
        output: folder of everything that is written.
        seeds: of each method.
        budget: how long each row trains.
        overlays: of every row, before the method's: what makes a method has the last word.
        set: overrides of every row; an id of ``evaluate.json`` alone goes to the evaluation.
        dataset_dir: data set of images; None takes the bundle's.
        tracking_uri: MLflow; ``none`` turns it off.
        launch: words before ``-m monai.bundle`` of a training, e.g. ``[torchrun, --nproc_per_node=8]``, or one text.
        checkpoint: which of a training's is used.
        report: what is made of the finished rows.
    """

    bundle: str = "brats"
    output: Path
    seeds: Seeds = [0]
    budget: Budget = Budget()
    overlays: list[str] = []
    set: Values = {}
    dataset_dir: Path | None = None
    tracking_uri: str = "sqlite:///mlflow.db"
    launch: list[str] = []
    checkpoint: Literal["best", "last"] = "best"
    report: Report = Report()

    @model_validator(mode="before")
    @classmethod
    def _launched(cls, value: Any) -> Any:
        """``launch`` as it is typed, in words."""
        typed = value.get("launch") if isinstance(value, Mapping) else None
        try:
            return {**value, "launch": shlex.split(typed)} if isinstance(typed, str) else value
        except ValueError:
            raise refuse(f"launch is {json.dumps(typed)}; expected words, each quote closed") from None

    @property
    def label(self) -> str:
        """Its name, or what it does."""
        does = {"generators": "compare-generation"}.get(self.study, "compare")
        return self.name or ("sweep" if getattr(self, "sweep", None) else does)


class TokenizerStudy(Study):
    """Tokenizers under one budget.

    Attributes:
        methods: rows of the table.
        sweep: sizes that each method has.
        report: what is made of the finished rows.
    """

    study: Literal["tokenizers"]
    methods: Annotated[
        list[Annotated[MethodPart, BeforeValidator(named)]], Field(min_length=1), AfterValidator(by_name)
    ]
    sweep: Sweep | None = None
    report: TokenizerReport = TokenizerReport()

    @model_validator(mode="after")
    def _sizes_of_trained_ones(self) -> TokenizerStudy:
        given = [part.name for part in self.methods if part.checkpoint is not None]
        if self.sweep is not None and given:
            raise refuse(f"{given[0]} with a checkpoint, whose codebook has its size; expected a study without a sweep")
        return self


class GeneratorStudy(Study):
    """Generators over the tokens of trained tokenizers, under one budget.

    Attributes:
        tokenizers: whose tokens.
        generators: that are trained.
        samples: that each row draws.
        sample: overrides of every drawing.
        encode: further options of every encoding.
        evaluate: further options of every evaluation.
    """

    study: Literal["generators"]
    tokenizers: TokenizersPart
    generators: Annotated[list[GeneratorPart], Field(min_length=1), AfterValidator(by_name)]
    samples: Count = 5000
    sample: Values = {}
    encode: Encode = {}
    evaluate: Evaluate = {}

    @model_validator(mode="after")
    def _names(self) -> GeneratorStudy:
        shared = {part.name for part in self.generators} & {part.name for part in self.tokenizers.methods}
        if shared:
            raise refuse(f"tokenizers has {min(shared)}, which is a generator's name; expected another", "name")
        return self


_KINDS: dict[str, type[AnyStudy]] = {
    "tokenizers": TokenizerStudy,
    "generators": GeneratorStudy,
    "rate_distortion": RateDistortionStudy,
    "tasks": TasksStudy,
}


def read_study(name: str, assignments: Sequence[str] = ()) -> AnyStudy:
    """A study of ``bundles/studies/`` by its name, or any by its path.

    Args:
        name: ``table1``, or the path of a ``.yaml`` or ``.json`` file.
        assignments: ``FIELD=VALUE`` in place of the file's, the value in YAML: ``output=elsewhere``,
            ``budget.steps=10``, ``set.learning_rate=1e-4``.

    Raises:
        VaevqMedError: there is no such file, or it is no study; one line that names the place.
    """
    path = study_path(name)
    content = read_content(path)
    for text in assignments:
        assign(content, text)
    return check_study(content, str(path))


def check_study(content: Any, where: str) -> AnyStudy:
    """A study of plain values.

    Args:
        content: as a file has it.
        where: what messages call it.

    Raises:
        VaevqMedError: it is none; one line that names the place.
    """
    kind = content.get("study") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        found = "missing" if kind is None else json.dumps(kind, default=str)
        *others, last = _KINDS
        raise VaevqMedError(f"{where}: study is {found}; expected {', '.join(others)} or {last}")
    try:
        # As JSON, so that nothing is converted but texts to paths.
        text = json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise VaevqMedError(f"{where}: found no plain value ({error}); expected texts, numbers, lists") from None
    try:
        return _KINDS[kind].model_validate_json(text, strict=True)
    except ValidationError as error:
        raise VaevqMedError(f"{where}: {complaint(error)}") from None
