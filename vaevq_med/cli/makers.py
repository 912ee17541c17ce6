"""The commands from before there were study files: their flags, and the study that each stands for.

What the paper's tables have is said by the files of ``bundles/studies/``, which these take it from.
"""

from __future__ import annotations

import ast
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vaevq_med.cli.flags import parse_flags
from vaevq_med.core.declared import option
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.options import EvaluateOptions
from vaevq_med.tokens.options import EncodeOptions

if TYPE_CHECKING:
    from vaevq_med.study.file import Study


@dataclass(frozen=True, kw_only=True)
class Maker(ABC):
    """The flags of all of them."""

    command: ClassVar[str]

    bundle: str = option("brats", "Name of an installed bundle, or a bundle's folder.")
    seeds: str = option("0", "Seeds of each row, separated by commas.")
    max_epochs: int | None = option(None, "Budget: epochs. Without a budget, the bundle's.")
    steps: int | None = option(None, "Budget: optimizer steps.")
    images: int | None = option(None, "Budget: training images seen.")
    overlay: list[str] | None = option(None, "Overlay of every row, e.g. small_cpu; repeat.")
    assignments: list[str] | None = option(
        None, "Override of every row, or of a name's; repeat.", flag="--set", metavar="[NAME:]ID=VALUE"
    )
    dataset_dir: Path | None = option(None, "Folder of dataset.json; by default the bundle's.")
    output_dir: Path = option(Path("outputs/compare"), "Folder of everything that is written.")
    tracking_uri: str = option("sqlite:///mlflow.db", "MLflow; 'none' turns it off.")
    launch: str = option("", "How to start a training, e.g. 'torchrun --nproc_per_node=8'.")
    checkpoint: str = option("best", "Which checkpoint is used: 'best' on validation, or 'last'.")
    published: bool = option(False, "Set the paper's figures in columns of their own.")
    pictures: int = option(6, "Images of each row or method in the figure; 0 leaves it out.", min=0)
    dry_run: bool = option(False, "Print the commands of every row and end.")
    show_study: bool = option(False, "Print the study file that the command stands for and end.")

    def study(self) -> Study:
        """The study that the flags stand for."""
        from vaevq_med.study.file import Study, check_study

        budget = {"max_epochs": self.max_epochs, "steps": self.steps, "images": self.images}
        optional = {
            "overlays": self.overlay,
            "dataset_dir": self.dataset_dir and str(self.dataset_dir),
            "launch": _words("launch", self.launch),
            "budget": {name: value for name, value in budget.items() if value is not None},
        }
        report = {"published": self.published, "pictures": self.pictures}
        own = self.content()
        content = {
            "bundle": self.bundle,
            "output": str(self.output_dir),
            "seeds": _integers("seeds", self.seeds),
            **{name: value for name, value in optional.items() if value},
            "tracking_uri": self.tracking_uri,
            "checkpoint": self.checkpoint,
            **own,
            "report": {**own.get("report", {}), **report},
        }
        found = check_study(content, self.command)
        assert isinstance(found, Study)
        return found

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What the study is of, as a file has it."""


@dataclass(frozen=True, kw_only=True)
class _Tokenizers(Maker):
    reference: str = option(
        "", "Method that is set against each other one, over pairs of patient and seed.", metavar="NAME"
    )
    slurm: Path | None = option(
        None,
        "Prepare the output folder, write a SLURM array script with a task a training ('-' prints it), and end.",
    )
    row: int | None = option(None, "Do this training only, from 0, and evaluate it: a task of an array job.")

    @abstractmethod
    def chosen(self) -> list[dict[str, Any]]:
        """The methods."""

    def content(self) -> dict[str, Any]:
        """What the study is of, as a file has it."""
        methods = self.chosen()
        shared, own = _assignments("set", self.assignments, [method["name"] for method in methods])
        full = [_with(method, set=own[method["name"]]) for method in methods]
        report = {"reference": self.reference} if self.reference else {}
        return {"study": "tokenizers", "methods": full, **_with({}, set=shared, report=report)}


@dataclass(frozen=True, kw_only=True)
class Compare(_Tokenizers):
    """Train and evaluate tokenizers under one budget; write the table, its statistics and the figures.

    The same command goes on after an interruption and keeps what is finished. Exit code 0: all rows are there; 1: some
    failed; 2: nothing could be done; 130: interrupted.
    """

    command = "compare"

    methods: str = option(
        "vqgan,simvq,vaevq,coherent", "Overlays of the bundle, separated by commas; NAME=OVERLAY+OVERLAY joins several."
    )
    tokenizers: str = option(
        "", "Checkpoints that are evaluated as they are, in rows of their own.", metavar="NAME=CHECKPOINT,..."
    )

    def chosen(self) -> list[dict[str, Any]]:
        """The methods."""
        known, methods = _bundled("table1", "methods"), []
        for text in _parts(self.methods):
            name, equals, overlays = (piece.strip() for piece in text.partition("="))
            joined = {"name": name, "overlays": [piece.strip() for piece in overlays.split("+")]}
            methods.append(joined if equals else known.get(name, {"name": name}))
        return [*methods, *_checkpoints(self.tokenizers)]


@dataclass(frozen=True, kw_only=True)
class Ablate(_Tokenizers):
    """Run the ablation (VQGAN; VLQ; VLQ + RCS; VLQ + DCR; all three), as ``compare`` does."""

    command = "ablate"

    output_dir: Path = option(Path("outputs/ablate"), "Folder of everything that is written.")

    def chosen(self) -> list[dict[str, Any]]:
        """The methods."""
        return [*_bundled("ablation", "methods").values()]

    def content(self) -> dict[str, Any]:
        """What the study is of, as a file has it."""
        return {"name": "ablate", **_with(super().content(), report={"notes": _bundled("ablation")["report"]["notes"]})}


@dataclass(frozen=True, kw_only=True)
class Sweep(Compare):
    """Run each method at several codebook sizes, as ``compare`` does; draw utilization, rFID and PSNR over K."""

    command = "sweep"

    num_embeddings: str = option(help="Codebook sizes K, separated by commas.")
    output_dir: Path = option(Path("outputs/sweep"), "Folder of everything that is written.")
    pictures: int = option(0, "Images of the figure of reconstructions; 0 leaves it out.", min=0)

    def content(self) -> dict[str, Any]:
        """What the study is of, as a file has it."""
        return {**super().content(), "sweep": {"num_embeddings": _integers("num-embeddings", self.num_embeddings)}}


@dataclass(frozen=True, kw_only=True)
class CompareGeneration(Maker):
    """Train generators over tokenizers' tokens, draw and evaluate images; write the table and a grid of samples.

    The same command goes on after an interruption and keeps what is finished. Exit code 0: all rows are there; 1: some
    failed; 2: nothing could be done; 130: interrupted.
    """

    command = "compare-generation"

    tokenizers: str = option("", "Trained tokenizers; each serves all seeds.", metavar="NAME=CHECKPOINT,...")
    source: Path | None = option(
        None, "Output folder of compare, whose tokenizer of each seed is taken.", flag="--from"
    )
    methods: str = option("", "Methods of --from; by default those of the study 'table2'.")
    generators: str = option(
        "llamagen,ldm",
        "llamagen (over indices), ldm (over latents), and by its name any overlay that makes a generator, such as "
        "maskgit or flow: those of bundles/overlays/generation that have a title.",
    )
    generate_set: list[str] | None = option(
        None, "Override of generate.json, e.g. ldm:num_steps=50; repeat.", metavar="[NAME:]ID=VALUE"
    )
    num_samples: int = option(5000, "Images that each row draws.", min=1)
    encode: list[str] | None = option(
        None, "Further options of encode-tokens, e.g. 'llamagen: --ten-crop'.", metavar="'[NAME:] OPTIONS'"
    )
    evaluate: str = option("", "Further options of evaluate-samples, in quotes.")
    output_dir: Path = option(Path("outputs/compare-generation"), "Folder of everything that is written.")
    pictures: int = option(8, "Samples of each row in samples.png; 0 leaves it out.", min=0)

    def content(self) -> dict[str, Any]:
        """What the study is of, as a file has it."""
        from vaevq_med.study.bundle import Bundle
        from vaevq_med.study.generation import overlaid_generators, overlaid_part

        bundle, own_files = Bundle.find(self.bundle), _bundled("table2", "generators")
        overlaid = overlaid_generators(bundle)
        known = _bundled("table2", "tokenizers", "methods")
        chosen = list(dict.fromkeys(_parts(self.generators)))
        unknown = [name for name in chosen if name not in own_files and name not in overlaid]
        if unknown or not chosen:
            found = unknown[0] if unknown else self.generators
            raise VaevqMedError(f"generators: found {found!r}, expected {', '.join([*own_files, *overlaid])}")
        generators = {name: own_files.get(name) or overlaid_part(bundle, name) for name in chosen}
        tokenizers = self._tokenizers(known)
        names = [*chosen, *(part["name"] for part in tokenizers)]
        every, own = _assignments("set", self.assignments, names)
        sample, own_sample = _assignments("generate-set", self.generate_set, names)
        encode = self._encode(names)

        def full(part: dict[str, Any]) -> dict[str, Any]:
            name = part["name"]
            return _with(part, set=own[name], sample=own_sample[name], encode=encode[name])

        evaluate = _given("evaluate", EvaluateOptions, _words("evaluate", self.evaluate))
        source = {} if self.source is None else {"from": str(self.source)}
        return {
            "study": "generators",
            "tokenizers": {**source, "methods": [full({**known.get(t["name"], {}), **t}) for t in tokenizers]},
            "generators": [full(part) for part in generators.values()],
            "samples": self.num_samples,
            **_with({}, set=every, sample=sample, encode=encode[""], evaluate=evaluate),
        }

    def _tokenizers(self, known: Mapping[str, Any]) -> list[dict[str, Any]]:
        if (self.source is None) != bool(self.tokenizers):
            found = "both" if self.tokenizers else "neither"
            raise VaevqMedError(f"tokenizers: found {found} of --tokenizers and --from, expected one of them")
        if self.source is not None:
            return [{"name": name} for name in _parts(self.methods) or known]
        if self.methods:
            raise VaevqMedError("methods: found it with --tokenizers, which names them itself; expected --from")
        return _checkpoints(self.tokenizers)

    def _encode(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Options of ``encode-tokens`` by name of a generator or tokenizer, those for all under an empty one."""
        found: dict[str, dict[str, Any]] = {name: {} for name in ("", *names)}
        for text in self.encode or ():
            head, colon, rest = text.partition(":")
            name = head.strip() if colon and not head.lstrip().startswith("-") else ""
            if name not in found:
                raise VaevqMedError(f"encode: found {text!r} for {name!r}, expected one of {', '.join(names)}")
            found[name] |= _given("encode", EncodeOptions, _words("encode", rest if name else text))
        return found


def _bundled(name: str, *way: str) -> dict[str, Any]:
    """A bundled study, or one of its lists by name."""
    import yaml

    from vaevq_med.core.resources import study_path

    content = yaml.safe_load(study_path(name).read_text(encoding="utf-8"))
    for key in way:
        content = content[key]
    parts = [{"name": part} if isinstance(part, str) else part for part in content]
    return {part["name"]: part for part in parts} if way else content


def _with(part: Mapping[str, Any], **further: Any) -> dict[str, Any]:
    """A part with what is not empty of more, which has the last word."""
    content = dict(part)
    for name, values in further.items():
        if values:
            content[name] = {**content.get(name, {}), **values}
    return content


def _checkpoints(text: str) -> list[dict[str, Any]]:
    """``NAME=CHECKPOINT,...`` as a study file has it."""
    found = []
    for part in _parts(text):
        name, _, path = (piece.strip() for piece in part.partition("="))
        if not path:
            raise VaevqMedError(f"tokenizers: found {part!r}, expected NAME=CHECKPOINT")
        found.append({"name": name, "checkpoint": path})
    return found


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(name: str, text: str) -> list[int]:
    """Whole numbers of ``0,1,2``, each once, in the order given."""
    try:
        return list(dict.fromkeys(int(part) for part in _parts(text)))
    except ValueError:
        raise VaevqMedError(f"{name}: found {text!r}, expected whole numbers, e.g. 1,2,3") from None


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise VaevqMedError(f"{name}: found {text!r} ({error}), expected words of a shell") from None


def _assignments(
    flag: str, given: Sequence[str] | None, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Values of ``ID=VALUE``, and by name those of ``NAME:ID=VALUE``."""
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in given or ():
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise VaevqMedError(f"{flag}: found {text!r}, expected ID=VALUE, e.g. learning_rate=2e-4")
        name, colon, rest = key.partition(":")
        if not colon or rest.startswith(":"):
            shared[key] = _value(value)
        elif name in own:
            own[name][rest] = _value(value)
        else:
            raise VaevqMedError(f"{flag}: found {text!r} for the method {name!r}, expected one of {', '.join(own)}")
    return shared, own


def _value(text: str) -> Any:
    """A number, truth or list where a study file can say it so that the same text comes out; otherwise the text."""
    try:
        value = ast.literal_eval(text)
        alike = not isinstance(value, str) and repr(value) == text and json.loads(json.dumps(value)) == value
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return value if alike else text


def _given(flag: str, kind: type, words: Sequence[str]) -> dict[str, Any]:
    """The options of a command that words of its line give."""
    try:
        return parse_flags(kind, words)
    except ValueError as error:
        raise VaevqMedError(f"{flag}: found {shlex.join(words)!r} ({error}), expected further options") from None
