"""What a comparison trains: methods by their overlays, seeds, one budget; and the commands of each row.

A method is an overlay, or several: any file of ``bundles/overlays`` or of the bundle's own ``overlays/`` can be
compared by its name.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import TYPE_CHECKING, Any, ClassVar

from vaevq_med.core.errors import VaevqMedError, root_cause
from vaevq_med.core.resources import bundle_path, overlay_files, overlay_path, overlay_title
from vaevq_med.images.manifest import load_manifest

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

ALIASES = {"vaevq": "paper"}
ABLATION = ("ablation_m0", "simvq", "ablation_m1", "ablation_m2", "ablation_m3", "ablation_full")
"""The paper's Table 3, and SimVQ, whose codebook M1 to full have: it tells VLQ's part from the codebook's."""
TORCHRUN = ("torchrun", "torch.distributed.run")
# Where and under what name a run is tracked, and on what device it runs, change no figure.
_NOT_SETTINGS = frozenset(
    {
        *(
            "_notes_",
            "_title_",
            "_meta_",
            "imports",
            "bundle_root",
            "dataset_dir",
            "output_dir",
            "device",
            "num_workers",
        ),
        *("tracking_uri", "experiment", "run_name", "parent_run_id", "checkpoint_interval", "resume"),
    }
)


@dataclass(frozen=True)
class Method:
    """One row of the table, seeds apart.

    Attributes:
        name: its folder, e.g. ``vqgan``.
        overlays: names of overlay files, in order.
        title: what tables call it.
        overrides: values that only this method has, as on the command line.
        family: the method that a sweep's point belongs to; otherwise the name.
        num_embeddings: K of a sweep's point.
        decodes: the method whose checkpoints it evaluates by another read-out of the quantizer, without training.
        group: methods of one group compete for the best figure.
    """

    name: str
    overlays: tuple[str, ...]
    title: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    family: str = ""
    num_embeddings: int | None = None
    decodes: str = ""
    group: str = ""


@dataclass(frozen=True)
class Bundle:
    """A MONAI bundle with ``train.json`` and ``evaluate.json``.

    Attributes:
        name: its folder's name.
        path: the folder.
    """

    name: str
    path: Path

    @classmethod
    def find(cls, name: str) -> Bundle:
        """A bundle by the name of an installed one, or by its folder.

        Raises:
            VaevqMedError: there is none, or it lacks a file.
        """
        path = Path(name) if (Path(name) / "train.json").is_file() else bundle_path(name)
        for file in ("train.json", "evaluate.json"):
            if not (path / file).is_file():
                raise VaevqMedError(f"{path}: found no {file}, expected a bundle that trains and evaluates")
        return cls(path.resolve().name, path)

    @property
    def overlays(self) -> list[str]:
        """Names of its overlays."""
        return list(overlay_files(self.path))

    def read(self, file: str, overlays: Sequence[str] = (), kind: str = "") -> dict[str, Any]:
        """A configuration merged with overlays, unresolved.

        Raises:
            VaevqMedError: a file is no configuration.
        """
        from monai.bundle import ConfigParser

        paths = [self.path / file, *(overlay_path(name, self.path, kind) for name in overlays)]
        for path in paths:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise VaevqMedError(f"{path}: found an unreadable file ({error}), expected a configuration") from None
            if not isinstance(content, dict):
                raise VaevqMedError(f"{path}: found {type(content).__name__}, expected a mapping of ids")
        parser = ConfigParser()
        try:
            parser.read_config([str(path) for path in paths])
        except Exception as error:  # MONAI's merging stumbles in several ways over ids without a place
            names = ", ".join(path.name for path in paths)
            raise VaevqMedError(f"{names}: found what cannot be merged ({error}), expected overlays of ids") from error
        return parser.get()


def parse_methods(text: str, bundle: Bundle) -> tuple[Method, ...]:
    """Methods of ``vqgan,simvq,mine=vqgan+vlq``: overlay names, or a name and the overlays it stands for.

    Args:
        text: as on the command line.
        bundle: where the overlays are.

    Raises:
        VaevqMedError: there is no such overlay, no method, or one name twice.
    """
    methods = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        name, _, given = part.partition("=")
        name = name.strip()
        overlays = tuple(piece.strip() for piece in given.split("+")) if given else (ALIASES.get(name, name),)
        if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
            raise VaevqMedError(f"methods: found the name {name!r}, expected letters, digits, '_', '-' and '.'")
        for overlay in overlays:
            overlay_path(overlay, bundle.path)
        title = name if given else overlay_title(overlay_path(overlays[0], bundle.path))
        methods.append(Method(name, overlays, title, family=name))
    titles = [method.title for method in methods]
    methods = [replace(m, title=f"{m.title} ({m.name})") if titles.count(m.title) > 1 else m for m in methods]
    names = [method.name for method in methods]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise VaevqMedError(f"methods: found {', '.join(repeated)} more than once, expected each once")
    if not methods:
        raise VaevqMedError(f"methods: found none, expected some of {', '.join(bundle.overlays)}")
    return tuple(methods)


def parse_integers(text: str, name: str, minimum: int, maximum: int | None = None) -> tuple[int, ...]:
    """Whole numbers of ``0,1,2``, each once, in the order given.

    Raises:
        VaevqMedError: something else stands there, or a number below ``minimum`` or above ``maximum``.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < minimum:
        raise VaevqMedError(f"{name}: found {text!r}, expected whole numbers of at least {minimum}, e.g. 1,2,3")
    if maximum is not None and max(numbers) > maximum:
        raise VaevqMedError(f"{name}: found {max(numbers)}, expected whole numbers of {minimum} to {maximum}")
    return numbers


def parse_overrides(assignments: Sequence[str], methods: Sequence[Method]) -> tuple[dict[str, str], tuple[Method, ...]]:
    """``ID=VALUE`` for every row, ``METHOD:ID=VALUE`` for those of one method.

    Args:
        assignments: as on the command line.
        methods: those of the comparison.

    Returns:
        The overrides of every row, and the methods with their own.

    Raises:
        VaevqMedError: there is no ``=``, or no such method.
    """
    shared, own = parse_assignments(assignments, [method.family for method in methods])
    return shared, tuple(replace(m, overrides={**own[m.family], **m.overrides}) for m in methods)


def parse_assignments(
    assignments: Sequence[str], names: Sequence[str], option: str = "set"
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """``ID=VALUE`` and ``NAME:ID=VALUE``.

    Args:
        assignments: as on the command line.
        names: what may stand before the colon.
        option: what the command line calls them.

    Returns:
        The values of the former, and by name those of the latter.

    Raises:
        VaevqMedError: there is no ``=``, or no such name.
    """
    shared: dict[str, str] = {}
    own: dict[str, dict[str, str]] = {name: {} for name in names}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise VaevqMedError(f"{option}: found {text!r}, expected ID=VALUE, e.g. learning_rate=2e-4")
        name, colon, rest = key.partition(":")
        if not colon or rest.startswith(":"):
            shared[key] = value
        elif name in own:
            own[name][rest] = value
        else:
            raise VaevqMedError(f"{option}: found {text!r} for the method {name!r}, expected one of {', '.join(own)}")
    return shared, own


def with_readouts(
    methods: Sequence[Method], bundle: Bundle, overlays: Sequence[str], overrides: Mapping[str, str]
) -> tuple[Method, ...]:
    """The methods, and after each whose quantizer can be decoded in other ways a row for every other way.

    A read-out that ``readout`` chooses, or that another of the methods is, gets no row of its own.

    Args:
        methods: as parsed, with their own overrides.
        bundle: where the overlays are.
        overlays: those of every row.
        overrides: those of every row.
    """
    if "readout" not in bundle.read("evaluate.json"):
        return tuple(methods)
    given = {method.name for method in methods}
    settings = [(method.overlays, method.overrides) for method in methods]
    found: list[Method] = []
    for method in methods:
        values = {**overrides, **method.overrides}
        readouts, trained = _readouts(bundle.read("train.json", (*overlays, *method.overlays)), values)
        chosen = values.get("readout", "None")
        if not readouts:
            found.append(method)
            continue
        if chosen not in ("None", "null"):
            found.append(replace(method, title=_qualified(method.title, chosen)))
            continue
        found.append(replace(method, title=_qualified(method.title, trained)))
        for readout in readouts:
            name, own = f"{method.name}_{readout}", {**method.overrides, "readout": readout}
            if readout != trained and name not in given and (method.overlays, own) not in settings:
                title, family = _qualified(method.title, readout), f"{method.family}_{readout}"
                found.append(replace(method, name=name, title=title, family=family, overrides=own, decodes=method.name))
    return tuple(found)


def _readouts(config: Mapping[str, Any], overrides: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """Ways to decode the quantizer of a configuration, and the one it is trained with; none where that is not known."""
    network = config.get("network_def")
    quantizer = network.get("quantizer") if isinstance(network, Mapping) else None
    if not isinstance(quantizer, Mapping) or {"network_def", "network_def#quantizer"} & {*overrides}:
        return (), ""
    own = {key: overrides.get(f"network_def#quantizer#{key}", quantizer.get(key)) for key in ("_target_", "readout")}
    try:
        readouts = tuple(getattr(locate(str(own["_target_"])), "readouts", ()))
    except ErrorDuringImport:
        return (), ""
    return readouts, str(own["readout"] or next(iter(readouts), ""))


def _qualified(title: str, readout: str) -> str:
    """``SoftVQ, K = 64`` as ``SoftVQ (hard), K = 64``."""
    name, comma, size = title.partition(", K = ")
    return f"{name} ({readout}){comma}{size}"


@dataclass(frozen=True)
class Budget:
    """How long every row trains; at most one of the three, the bundle's own ``max_epochs`` without any.

    Steps and images are spread over epochs of one length, about as long as the data set: a step or so less an epoch
    may be left over. The conversion is an expression that the run itself evaluates, so that it holds for the batch
    size and the number of processes that the run has.

    Attributes:
        max_epochs: passes over the training split.
        steps: optimizer steps.
        images: training images seen, over all processes.
    """

    max_epochs: int | None = None
    steps: int | None = None
    images: int | None = None

    def overrides(self) -> dict[str, str]:
        """As ids of ``train.json``.

        Raises:
            VaevqMedError: more than one is given, or one below 1.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise VaevqMedError(f"budget: found {' and '.join(given)}, expected one of max-epochs, steps, images")
        for name, value in given.items():
            if value < 1:
                raise VaevqMedError(f"{name}: found {value}, expected 1 or more")
        if self.max_epochs is not None:
            return {"max_epochs": str(self.max_epochs)}
        if not given:
            return {}
        steps = str(self.steps)
        if self.images is not None:
            steps = f"max(1, {self.images} // (@batch_size * training.world_size()))"
        return {
            "max_epochs": f"$max(1, round({steps} / @sampler.batches_per_epoch))",
            "epoch_length": f"$max(1, {steps} // @max_epochs)",
        }

    def options(self) -> dict[str, str]:
        """As on the command line of a comparison, empty where not given."""
        return {f"--{n.replace('_', '-')}": "" if v is None else str(v) for n, v in vars(self).items()}

    def words(self) -> str:
        """For a reader."""
        for name, value in vars(self).items():
            if value is not None:
                words = name.removeprefix("max_")
                return f"{value:,} {words if value > 1 else words.removesuffix('s')}"
        return "the bundle's own number of epochs"


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the rows are.

    Attributes:
        kind: ``compare``, ``ablate`` or ``sweep``.
        bundle: what is run.
        methods: rows of the table.
        seeds: seeds of each.
        output: folder of everything that is written.
        budget: how long each row trains.
        overlays: overlays that every row has, before the method's: what makes a method has the last word.
        overrides: values that every row has; an id of ``evaluate.json`` alone goes to the evaluation.
        dataset_dir: slice data set; None takes the bundle's.
        tracking_uri: MLflow.
        launch: words before ``-m monai.bundle``, e.g. ``torchrun --nproc_per_node=8``; empty runs one process.
        checkpoint: ``best`` or ``last``, which of a run's checkpoints is evaluated.
        changeable: entries of :meth:`shared` that may change from one call to the next in the same output folder.
    """

    changeable: ClassVar[frozenset[str]] = frozenset()

    kind: str
    bundle: Bundle
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    output: Path
    budget: Budget = field(default_factory=Budget)
    overlays: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    dataset_dir: Path | None = None
    tracking_uri: str = "sqlite:///mlflow.db"
    launch: str = ""
    checkpoint: str = "best"

    def check(self) -> None:
        """Refuse what no row could run with.

        Raises:
            VaevqMedError: an overlay, an id or a value that is not known.
        """
        if self.checkpoint not in ("best", "last"):
            raise VaevqMedError(f"checkpoint: found {self.checkpoint!r}, expected 'best' or 'last'")
        self._check_methods()
        budget = self.budget.overrides()
        own = {*budget, "seed", "output_dir", "evaluation_dir", "checkpoint_path", "dataset_dir", "tracking_uri"}
        own |= {"parent_run_id", "run_name", "resume"}
        evaluation = self.bundle.read("evaluate.json")
        configs = {m.name: (self.bundle.read("train.json", self.composed(m)), evaluation) for m in self.methods}
        everywhere = [config for pair in configs.values() for config in pair]
        chosen = [(key, everywhere) for key in self.overrides]
        chosen += [(key, [*configs[m.name]]) for m in self.methods for key in m.overrides]
        check_ids("set", chosen, own, ("train.json", "evaluate.json"))

    def _check_methods(self) -> None:
        """Refuse two methods that would train the same."""
        seen: dict[tuple[Any, ...], str] = {}
        for method in self.methods:
            settings = (method.overlays, tuple(sorted(method.overrides.items())))
            if settings in seen:
                raise VaevqMedError(
                    f"methods: found {seen[settings]} and {method.name}, two names of {'+'.join(method.overlays)} with "
                    f"the same settings, expected each once; --set {method.family}:ID=VALUE makes another of it"
                )
            seen[settings] = method.name

    def composed(self, method: Method) -> tuple[str, ...]:
        """Overlays of a method's rows: the shared ones, ``multi_gpu`` under torchrun, the method's."""
        distributed = self.starts_torchrun and "multi_gpu" not in self.overlays
        return (*self.overlays, *(["multi_gpu"] if distributed else []), *method.overlays)

    def launch_words(self) -> list[str]:
        """The words of ``launch``.

        Raises:
            VaevqMedError: a quotation mark that nothing closes.
        """
        try:
            return shlex.split(self.launch)
        except ValueError as error:
            raise VaevqMedError(f"launch: found {self.launch!r} ({error}), expected words of a shell") from None

    @property
    def starts_torchrun(self) -> bool:
        """Whether ``launch`` has torchrun anywhere: ``srun torchrun ...``, ``python -m torch.distributed.run ...``."""
        return any(word in TORCHRUN or Path(word).name in TORCHRUN for word in self.launch_words())

    def processes(self) -> int:
        """Processes that torchrun starts on a machine, 1 where ``launch`` does not say."""
        words = iter(self.launch_words())
        for word in words:
            option, equals, value = word.partition("=")
            if option.replace("_", "-") == "--nproc-per-node":
                value = value if equals else next(words, "")
                return int(value) if value.isdecimal() and int(value) > 0 else 1
        return 1

    def experiment(self) -> str:
        """MLflow's experiment."""
        default = self.bundle.read("train.json", self.overlays).get("experiment", "vaevq_med")
        return self.overrides.get("experiment", str(default))

    def data(self) -> Path:
        """Folder of the data set."""
        return self.dataset_dir or Path(str(self.bundle.read("train.json", self.overlays)["dataset_dir"]))

    def shared(self) -> dict[str, Any]:
        """What all rows of one output folder have in common, as JSON-ready values.

        Raises:
            DataError: the data set is missing or damaged.
        """
        manifest = load_manifest(self.data())
        return {
            "kind": self.kind,
            "bundle": self.bundle.name,
            "budget": self.budget.words(),
            "overlays": list(self.overlays),
            "set": dict(self.overrides),
            "launch": self.launch,
            "checkpoint": self.checkpoint,
            "data": {"content_hash": manifest.content_hash, "split_hash": manifest.split_hash},
        }

    def rows(self) -> Sequence[Row]:
        """Seeds outermost, so that each method has a first figure early."""
        return [Row(self, method, seed) for seed in self.seeds for method in self.methods]

    def tasks(self) -> list[list[Row]]:
        """Each row that trains, followed by those that decode its checkpoint in another way."""
        return [
            [Row(self, other, seed) for other in self.methods if method.name in (other.name, other.decodes)]
            for seed in self.seeds
            for method in self.methods
            if not method.decodes
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
        return self.plan.output / self.method.name / f"seed_{self.seed}"

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
        return self.trained.folder / "checkpoints" / f"{self.plan.checkpoint}.pt"

    @property
    def label(self) -> str:
        """For a reader."""
        return f"{self.method.name} seed {self.seed}"

    def _split(self) -> tuple[dict[str, str], dict[str, str]]:
        """Overrides of the training and of the evaluation."""
        plan = self.plan
        overlays = plan.composed(self.method)
        train, evaluate = plan.bundle.read("train.json", overlays), plan.bundle.read("evaluate.json")
        both = {**plan.overrides, **self.method.overrides}

        def select(config: Mapping[str, Any]) -> dict[str, str]:
            return {key: value for key, value in both.items() if has_id(config, key)}

        dataset = {} if plan.dataset_dir is None else {"dataset_dir": str(plan.dataset_dir)}
        shared = {**dataset, "output_dir": str(self.folder), "tracking_uri": plan.tracking_uri}
        paths = {
            "checkpoint_path": f"$@output_dir + '/checkpoints/{plan.checkpoint}.pt'",
            "evaluation_dir": "$@output_dir + '/evaluation'",
        }
        if self.method.decodes:
            paths["checkpoint_path"] = str(self.checkpoint)
        training = {**shared, "seed": str(self.seed), **plan.budget.overrides(), **select(train)}
        return training, {**shared, **paths, **select(evaluate)}

    def parser(self, command: str) -> ConfigParser:
        """The configuration of ``training`` or ``evaluating`` with its overrides, unresolved."""
        from monai.bundle import ConfigParser

        training, evaluation = self._split()
        overlays, bundle = self.plan.composed(self.method), self.plan.bundle
        files = {"training": ("train.json", overlays, training), "evaluating": ("evaluate.json", (), evaluation)}
        file, names, overrides = files[command]
        parser = ConfigParser(bundle.read(file, names))
        parser.update({key: literal(value) for key, value in overrides.items()})
        return parser

    def build(self, key: str) -> Any:
        """What the training's configuration has under an id, built.

        Raises:
            VaevqMedError: it cannot be; with the reason.
        """
        try:
            return self.parser("training").get_parsed_content(key)
        except Exception as error:  # whatever the component or MONAI raises
            raise VaevqMedError(f"{self.label}: {str(root_cause(error)).splitlines()[0]}") from error

    def training_number(self, key: str) -> int | None:
        """A whole number that the training has under an id, None where there is none or an expression."""
        value = self.parser("training").get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def commands(self, parent_run_id: str | None = None) -> dict[str, list[str]]:
        """``training``, unless it decodes another's checkpoint, and ``evaluating``, as a user would type them.

        Args:
            parent_run_id: MLflow run to nest the training under.
        """
        plan = self.plan
        folder = plan.bundle.path
        files = [folder / "train.json", *(overlay_path(name, folder) for name in plan.composed(self.method))]
        training, evaluation = self._split()
        if parent_run_id is not None:
            training |= {"parent_run_id": parent_run_id, "run_name": self.label}
        start = [*(plan.launch_words() or [sys.executable]), "-m", "monai.bundle", "run"]
        config = str([str(file) for file in files])
        train = [*start, "training", "--config_file", config, *flags(training)]
        evaluate = [*start, "evaluating", "--config_file", str(folder / "evaluate.json")]
        both = {"training": train, "evaluating": [*evaluate, *flags(evaluation)]}
        return {name: words for name, words in both.items() if name == "evaluating" or not self.method.decodes}

    @property
    def evaluation(self) -> Path:
        """Where its evaluation goes, whatever the split."""
        return self.folder / "evaluation"

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
        overlays = plan.composed(self.method)
        if self.method.decodes:  # a folder of results can be moved
            evaluation["checkpoint_path"] = f"{plan.checkpoint} of {self.trained.label}"
        return {
            "train": decisive(plan.bundle.read("train.json", overlays), training),
            "evaluate": decisive(plan.bundle.read("evaluate.json"), evaluation),
        }


def check_ids(
    option: str,
    chosen: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    own: Collection[str],
    files: Sequence[str],
) -> None:
    """Refuse overrides that no configuration has a place for.

    Args:
        option: what the command line calls them.
        chosen: ids, and the configurations of which one has to have it.
        own: top-level ids that the comparison sets.
        files: names of the configurations.

    Raises:
        VaevqMedError: naming the first such id, and the nearest known one.
    """
    known = {name for _, places in chosen for config in places for name in config}
    for key, places in chosen:
        root = key.split("#")[0].split("::")[0]
        if root in own:
            raise VaevqMedError(f"{option}: found {root!r}, which the comparison sets itself; expected its own option")
        if root not in known:
            close = difflib.get_close_matches(root, sorted(known), n=1)
            missing = "neither file has it" if len(files) > 1 else "the file has no such id"
            hint = f"did you mean {close[0]!r}?" if close else missing
            raise VaevqMedError(
                f"{option}: found the unknown id {root!r}, expected one of {' or '.join(files)}; {hint}"
            )
        if not any(has_id(config, key) for config in places):
            where = f"neither {' nor '.join(files)} has" if len(files) > 1 else f"{files[0]} does not have"
            raise VaevqMedError(f"{option}: found {key!r}, which {where} a place for")


def has_id(config: Mapping[str, Any], key: str) -> bool:
    """Whether a configuration has a place for an override: its top-level id, and mappings or lists on the way down."""
    first, *others = key.replace("::", "#").split("#")
    if first not in config:
        return False
    found: Any = config[first]
    for name in others:
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return False
    return True


def literal(text: str) -> Any:
    """An override as the command line reads it: a literal, or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def flags(overrides: Mapping[str, str]) -> list[str]:
    """Overrides as MONAI's command line has them."""
    return [word for key, value in overrides.items() for word in (f"--{key}", value)]


def decisive(config: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """A configuration's values that change figures, with the overrides beside them."""
    kept = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
    return {
        **json.loads(json.dumps(kept, default=str)),
        "overrides": {key: value for key, value in overrides.items() if key.split("#")[0] not in _NOT_SETTINGS},
    }


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 over sorted JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings, named by their path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flattened(item, f"{prefix}#{key}" if prefix else str(key))
    else:
        yield prefix, value


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first setting that differs, in words; None where all are alike."""
    old, new = dict(flattened(found)), dict(flattened(expected))
    # An override says it best; the rest follows from it.
    for key in sorted({*old, *new}, key=lambda name: ("overrides" not in name, name)):
        if old.get(key) != new.get(key):
            name = key.replace("#overrides", "").replace("train#", "").replace("evaluate#", "")
            return f"{name} {_short(old.get(key, 'unset'))}, expected {_short(new.get(key, 'unset'))}"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
