"""Whether a run may go on from a checkpoint: what has to be the same, and what may change and is noted."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import monai.transforms

from vaevq_med.images.dataset import chosen_modalities
from vaevq_med.images.reading import reader
from vaevq_med.trained.file import CheckpointError, stored_shape

_SAME = (
    *("image_size", "in_channels", "seed", "network_def", "discriminator_def", "objective", "loss_def"),
    *("num_train_timesteps", "scheduler", "train#dataset", "freeze"),
    *("optimizer#_target_", "d_optimizer#_target_"),
)
"""Ids whose values, and those of what they refer to, make a run what it is."""
_FREE = frozenset({"device", "dataset_dir", "tokens_dir", "output_dir", "bundle_root", "num_workers"})
"""Ids and arguments that say where and how fast a run runs: a copy of the same data may lie elsewhere."""
_COMPARED = frozenset({"network"})
"""Ids that are built of others here, which are compared by themselves."""
_FREE_LEAVES = frozenset({"objective#adversarial#weight", "objective#adversarial#start_step"})
_UNSAID = frozenset(
    {
        *("_notes_", "_title_", "_desc_", "_meta_", "imports", "initialize", "run", "training", "finalize"),
        *("bundle_root", "resume", "run_name", "parent_run_id"),
    }
)
"""What is not noted as a change: words, and what a run is started by."""
_REFERENCE = re.compile(r"@([\w:#]+)")
_CHAIN = "train#dataset#transform"
_LINK = re.compile(r"#transforms#(\d+)#([^#@]+)")
_MOST_NOTED = 100
_TERM = re.compile(r"objective#terms#([^#@]+)")


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says of the run that it is of.

    Attributes:
        config: the merged configuration, unresolved.
        values: what expressions in it came to, by id, where that is a plain value.
        data: what the data set or the token store says of itself.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Leaf:
    """A plain value of a configuration: the id that a user would set it by, what is written, what that came to."""

    name: str
    written: Any
    value: Any
    known: bool

    def says_as(self, other: _Leaf) -> bool:
        if self.known and other.known:
            return bool(self.value == other.value)
        return bool(self.written == other.written)


def is_expression(value: Any) -> bool:
    """Whether MONAI evaluates it."""
    return isinstance(value, str) and value.startswith("$")


def _found(config: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """What stands under an id, if anything does."""
    found: Any = config
    for part in name.split("#"):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list | tuple) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return False, None
    return True, found


def _component(target: str) -> Any:
    """What a dotted name stands for, None where that is not known.

    A checkpoint gives the name: nothing is imported for it but modules of this package.
    """
    if target.startswith("vaevq_med."):
        try:
            return locate(target)
        except ErrorDuringImport:
            return None
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found
    return None


def _address(target: Any) -> Any:
    """One name for what has several."""
    found = _component(target) if isinstance(target, str) else None
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    return f"{module}.{name}" if module and name else target


def _defaults(component: Any) -> dict[str, Any]:
    """Arguments that need not be given, where their default is a plain value."""
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p.default for name, p in parameters.items() if _is_plain(p.default)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_settled(values: Sequence[Any]) -> bool:
    """Whether no reference and no expression is among them."""
    return not any(isinstance(value, str) and value.startswith(("@", "$")) for value in values)


def _leaves(
    record: RunRecord, value: Any, path: str, name: str, open_ids: tuple[str, ...] = ()
) -> Iterator[tuple[str, _Leaf]]:
    """The plain values below an id by their paths, references followed, arguments that are not given filled in."""
    if isinstance(value, str) and value.startswith(("@", "$")):
        whole = value.startswith("@")
        if not whole:
            yield path, _Leaf(name, value, record.values.get(name), known=name in record.values)
        for found in _REFERENCE.findall(value):
            reference = found.replace("::", "#").rstrip("#")
            is_there, target = _found(record.config, reference)
            if reference in open_ids or reference.split("#")[0] in _FREE | _COMPARED or not is_there:
                if whole:
                    yield path, _Leaf(name, value, None, known=False)
                continue
            below = path if whole else f"{path}@{reference}"
            yield from _leaves(record, target, below, reference, (*open_ids, reference))
    elif isinstance(value, Mapping) and value:
        arguments = {key: item for key, item in value.items() if key not in ("_notes_", "_title_", "_desc_")}
        if "_target_" in arguments:
            component = _component(arguments["_target_"]) if isinstance(arguments["_target_"], str) else None
            target = {"_target_": _address(arguments.pop("_target_"))}
            arguments = {**target, **_defaults(component), **arguments}
            for file in getattr(component, "initial_files", ()):
                arguments.pop(file, None)
        for key, item in arguments.items():
            if key not in _FREE:
                yield from _leaves(record, item, f"{path}#{key}", f"{name}#{key}", open_ids)
    elif isinstance(value, list | tuple) and value and not (_is_plain(value) and _is_settled(value)):
        items: dict[str, _Leaf] = {}
        for number, item in enumerate(value):
            items |= dict(_leaves(record, item, f"{path}#{number}", f"{name}#{number}", open_ids))
        if len(items) == len(value) and all(leaf.known for leaf in items.values()):
            plain = [leaf.value for leaf in items.values()]
            yield path, _Leaf(name, plain, plain, known=True)
        else:
            yield from items.items()
    else:
        plain = list(value) if isinstance(value, tuple) else value
        yield path, _Leaf(name, plain, plain, known=True)


def _of_id(record: RunRecord, name: str) -> dict[str, _Leaf]:
    """The leaves of an id, without what may change and, of the objective, without terms that have no weight."""
    found = dict(_leaves(record, _found(record.config, name)[1], name, name))
    if name != "objective":
        return found
    weights = {path: leaf for path, leaf in found.items() if path.startswith("objective#weights#")}
    used = {path.rpartition("#")[2] for path, leaf in weights.items() if not leaf.known or leaf.value}
    # Its size may change; that there is a term may not.
    kept = {
        path: _Leaf(leaf.name, leaf.written, True if path.rpartition("#")[2] in used else None, known=True)
        for path, leaf in weights.items()
    }
    for path, leaf in found.items():
        term = _TERM.match(path)
        if path not in weights and path not in _FREE_LEAVES and (term is None or term[1] in used):
            kept[path] = leaf
    return kept


def _chain(record: RunRecord, dataset: Any) -> list[str] | None:
    """The transforms that read the training images, in order, with their settings; None where they are not known."""
    definition = _found(record.config, "train#dataset#transform")[1]
    leaves = dict(_leaves(record, definition, "", ""))
    if not all(leaf.known for leaf in leaves.values()):
        return None
    target = leaves["#_target_"].value if "#_target_" in leaves else None
    try:
        if target == _address("vaevq_med.images.reader"):
            arguments = {path[1:]: leaf.value for path, leaf in leaves.items() if path != "#_target_"}
            made = list(reader(dataset.manifest, **arguments).transforms)
        else:
            made = _transforms(leaves)
    except Exception:  # as its own run would have said
        return None
    told = [f"{type(one).__name__}({', '.join(_settings(one))})" for one in made]
    return [one for one in told if not one.startswith("EnsureTyped(")] or None


def _transforms(leaves: Mapping[str, _Leaf]) -> list[Any]:
    """The transforms of a chain that is written out, made of their plain arguments."""
    parts: dict[int, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        if found := _LINK.fullmatch(path):
            parts.setdefault(int(found[1]), {})[found[2]] = leaf.value
        elif path.startswith("#transforms#"):
            raise ValueError(f"{path} is no plain argument")
    made = []
    for _, arguments in sorted(parts.items()):
        target = str(arguments.pop("_target_"))
        component = _component(target) or getattr(monai.transforms, target.rpartition(".")[2])
        made.append(component(**arguments))
    return made


def _settings(transform: Any) -> Iterator[str]:
    """What a transform was made with, as far as it is plain, with what the transforms within it were made with."""
    for name, value in sorted(vars(transform).items()):
        if name.startswith("_") or name == "R":
            continue
        if _is_plain(value):
            yield f"{name}={list(value) if isinstance(value, tuple) else value}"
        elif type(value).__module__.startswith(("monai.transforms", "vaevq_med.")):
            yield f"{name}=({', '.join(_settings(value))})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _differs(name: str, now: Any, before: Any) -> str:
    return f"{name} is {_short(now)}, was {_short(before)}"


def difference(before: RunRecord, now: RunRecord, dataset: Any = None) -> str | None:
    """The first thing in words that makes two runs two, or None: ``modalities is ['t2f'], was ['t1n']``.

    What only one of them says of itself is not compared.

    Args:
        before: the run that a checkpoint is of.
        now: the run that wants to go on.
        dataset: its training data.
    """
    return (
        _data_difference(before, now)
        or _reading_difference(before, now, dataset)
        or _setting_difference(before, now, dataset)
    )


def _data_difference(before: RunRecord, now: RunRecord) -> str | None:
    old, new = before.data.get("tokens", {}), now.data.get("tokens", {})
    if old.get("content_hash") != new.get("content_hash"):
        tokenizers = [one.get("tokenizer", {}).get("content_hash") for one in (new, old)]
        if tokenizers[0] != tokenizers[1] and all(tokenizers):
            return _differs("tokens_dir", f"of the tokenizer {_hash(tokenizers[0])}", _hash(tokenizers[1]))
        hashes = [_hash(one.get("content_hash") or "none") for one in (new, old)]
        return _differs("tokens_dir", f"another token store ({hashes[0]})", hashes[1])
    for key, words in (("content_hash", "images of the content"), ("split_hash", "another split of the data")):
        told = [_hash(one.get(key) or "") for one in (now.data, before.data)]
        if all(told) and told[0] != told[1]:
            return _differs("dataset_dir", f"{words} {told[0]}", told[1])
    return None


def _hash(value: str) -> str:
    """Enough of it to tell two apart."""
    return value[:19]


def _contrasts(record: RunRecord, dataset: Any) -> tuple[bool, list[str]] | None:
    """Whether contrasts are stacked, and which are read of the data; None where that is not known."""
    manifest = getattr(dataset, "manifest", None)
    leaves = _of_id(record, "train#dataset")
    told = [leaves.get(f"train#dataset#{key}") for key in ("stack_modalities", "modalities")]
    if manifest is None or None in told or not all(leaf.known for leaf in told if leaf):
        return None
    stacked, names = (leaf.value for leaf in told if leaf)
    return bool(stacked), chosen_modalities(manifest, dataset.split, names, bool(stacked))


def _reading_difference(before: RunRecord, now: RunRecord, dataset: Any) -> str | None:
    shapes = [stored_shape(one.data, one.config) for one in (now, before)]
    if None not in shapes and shapes[0] != shapes[1]:
        return _differs("train#preprocessing", f"{shapes[0]}, which an overlay of other transforms changes", shapes[1])
    new, old = (_contrasts(one, dataset) for one in (now, before))
    if new and old and new[0] != old[0]:
        return _differs("stack_modalities", new[0], old[0])
    if new and old and new[1] != old[1]:
        return _differs("modalities", new[1], old[1])
    if not _names_two_chains(before, now):
        return None
    chain, stored = (_chain(one, dataset) for one in (now, before))
    if chain is None or stored is None or chain == stored:
        return None
    names = [[link.partition("(")[0] for link in links] for links in (chain, stored)]
    if names[0] != names[1]:
        return _differs("train#preprocessing", *names)
    link, before_it = next(pair for pair in zip(chain, stored, strict=True) if pair[0] != pair[1])
    return _differs("train#preprocessing", link, before_it)


def _setting_difference(before: RunRecord, now: RunRecord, dataset: Any) -> str | None:
    for name in _SAME:
        if not (_found(before.config, name)[0] and _found(now.config, name)[0]):
            continue
        old, new = (_of_id(one, name) for one in (before, now))
        if name == "train#dataset":
            compared = _compared_already(before, now, dataset)
            old, new = ({p: leaf for p, leaf in part.items() if not p.startswith(compared)} for part in (old, new))
        for path in dict.fromkeys((*new, *old)):
            parent = path.rpartition("#")[0]
            found, stored = (part.get(path) or part.get(parent) for part in (new, old))
            above, _, _ = path.partition("@")
            if above != path and all(above in part and part[above].known for part in (new, old)):
                continue  # what an expression refers to does not count where it is known what it came to
            given = [leaf for leaf in (found, stored) if leaf is not None]
            where = path if path in new and path in old else parent if len(given) == 2 else path
            same = given[0].says_as(given[-1]) if len(given) == 2 else given[0].known and given[0].value is None
            if not same:
                words = ["unset" if leaf is None else leaf.written for leaf in (found, stored)]
                spelled = given[0].name if given[0].name == given[-1].name else where
                return _differs(spelled.removesuffix("#_target_"), *words)
    return None


def _compared_already(before: RunRecord, now: RunRecord, dataset: Any) -> tuple[str, ...]:
    """Paths of the data set's arguments that are compared by what they come to."""
    done = []
    if all(_contrasts(one, dataset) for one in (before, now)):
        done += ["train#dataset#modalities", "train#dataset#stack_modalities"]
    if _names_two_chains(before, now):
        done.append(_CHAIN)
    return tuple(done)


def _names_two_chains(before: RunRecord, now: RunRecord) -> bool:
    """Whether the transforms are named in two ways, by a function or one by one: the chains themselves are compared."""
    targets = [_of_id(one, "train#dataset").get(f"{_CHAIN}#_target_") for one in (before, now)]
    return len({leaf.value for leaf in targets if leaf is not None}) == 2


def check_same(path: Path, before: RunRecord, now: RunRecord, dataset: Any, otherwise: str) -> None:
    """Refuse to go on from the checkpoint of another run.

    Args:
        path: the checkpoint.
        before: the run that it is of.
        now: this run.
        dataset: its training data.
        otherwise: what to do instead, for the message.

    Raises:
        CheckpointError: naming the first id that differs, with both values.
    """
    words = difference(before, now, dataset)
    if words is not None:
        raise CheckpointError(f"{words} in {path}; expected the same to go on: {otherwise}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """What two configurations write differently: by id, before and now; ``unset`` where one has nothing.

    Args:
        before: a configuration, unresolved.
        now: another one.

    Examples:
        >>> changes({"learning_rate": 1e-4, "_notes_": "a"}, {"learning_rate": 1e-6, "_notes_": "b"})
        {'learning_rate': ['0.0001', '1e-06']}
    """
    old, new = dict(_written(before)), dict(_written(now))
    pairs = {key: (old.get(key, "unset"), new.get(key, "unset")) for key in dict.fromkeys((*old, *new))}
    different = {key: [str(one)[:200] for one in pair] for key, pair in pairs.items() if pair[0] != pair[1]}
    return dict(list(different.items())[:_MOST_NOTED])


def _written(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            if str(key) not in _UNSAID:
                yield from _written(item, f"{name}#{key}" if name else str(key))
    elif name:
        yield name, list(value) if isinstance(value, tuple) else value


def expressions(config: Mapping[str, Any]) -> Iterator[str]:
    """Ids of the expressions that what makes a run what it is has, or refers to."""
    for name in _SAME:
        for leaf in _of_id(RunRecord(config), name).values():
            if is_expression(leaf.written):
                yield leaf.name
