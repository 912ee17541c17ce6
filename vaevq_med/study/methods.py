"""The methods of a study of tokenizers: overlays, each size of a sweep, and each read-out of a quantizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.bundle import Bundle, texts
from vaevq_med.study.file import MethodPart, TokenizerStudy


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
        given: a checkpoint that is evaluated as it is, in place of a training's.
    """

    name: str
    overlays: tuple[str, ...]
    title: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    family: str = ""
    num_embeddings: int | None = None
    decodes: str = ""
    group: str = ""
    given: Path | None = None


def make_methods(study: TokenizerStudy, bundle: Bundle) -> tuple[Method, ...]:
    """The methods of a study: each at each size of a sweep, and after it a row for every other read-out."""
    if "objective" not in bundle.read("train.json"):
        raise VaevqMedError(f"{bundle.path}: found no objective in train.json, expected a bundle of tokenizers")
    titles = [part.title or (bundle.title(part.name) if _is_overlay(part) else part.name) for part in study.methods]
    found: list[tuple[Method, MethodPart]] = []
    for part, title in zip(study.methods, titles, strict=True):
        names = (part.name,) if _is_overlay(part) else tuple(part.overlays or ())
        for name in names:
            bundle.overlay(name)
        title = f"{title} ({part.name})" if titles.count(title) > 1 else title
        method = Method(part.name, names, title, texts(part.set), family=part.name, given=part.checkpoint)
        if not study.sweep:
            found.append((method, part))
            continue
        _check_sweep(study, bundle, method)
        for size in study.sweep.num_embeddings:
            overrides = {**method.overrides, "num_embeddings": str(size)}
            point = replace(method, name=f"{part.name}_k{size}", title=f"{title}, K = {size:,}", overrides=overrides)
            found.append((replace(point, num_embeddings=size), part))
    if "readout" not in bundle.read("evaluate.json"):
        return tuple(method for method, _ in found)
    given = {method.name for method, _ in found}
    settings = [(method.overlays, method.overrides) for method, _ in found]
    return tuple(
        row
        for method, part in found
        for row in _with_readouts(study, bundle, method, part)
        if not row.decodes
        or (row.name not in given and (row.given is not None or (row.overlays, row.overrides) not in settings))
    )


def _is_overlay(part: MethodPart) -> bool:
    """Whether a method is the overlay of its name."""
    return part.overlays is None and part.checkpoint is None


def _check_sweep(study: TokenizerStudy, bundle: Bundle, method: Method) -> None:
    """Refuse a method whose codebook does not take its size from ``num_embeddings``, or not in this study."""
    if "num_embeddings" in {**study.set, **method.overrides}:
        raise VaevqMedError("set: found num_embeddings, which the sweep sets itself; expected sizes of the sweep")
    network = bundle.read("train.json", (*study.overlays, *method.overlays)).get("network_def")
    if not isinstance(network, dict):
        raise VaevqMedError(f"method {method.name}: found network_def {network!r}, expected a tokenizer")
    quantizer = network.get("quantizer")
    quantizer = quantizer if isinstance(quantizer, Mapping) else {}
    sizes: tuple[str, ...] = getattr(_located(quantizer), "size_arguments", ("num_embeddings",))
    if len(sizes) > 1 or "@num_embeddings" not in json.dumps(quantizer.get(sizes[0])):
        fixed = f"{' and '.join(sizes)} fix{'' if len(sizes) > 1 else 'es'}"
        raise VaevqMedError(
            f"method {method.name}: found a codebook whose size {fixed}, expected one whose size follows "
            "num_embeddings alone; name it once a size, with an overlay each"
        )


def _with_readouts(study: TokenizerStudy, bundle: Bundle, method: Method, part: MethodPart) -> list[Method]:
    """A method, and a row for each other way to decode its quantizer that neither it nor the study chooses."""
    values = {**texts(study.set), **method.overrides}
    readouts, trained = _readouts(_config(study, bundle, method), values)
    unknown = [name for name in part.readouts or () if name not in readouts]
    if unknown:
        known = f"of {', '.join(readouts)}" if readouts else "none, since its quantizer is decoded in one way"
        raise VaevqMedError(f"method {method.name}: found the read-out {unknown[0]!r}, expected {known}")
    if not readouts:
        return [method]
    chosen = values.get("readout", "None")
    if chosen not in ("None", "null"):
        return [replace(method, title=_qualified(method.title, chosen))]
    others = [name for name in readouts if name != trained and (part.readouts is None or name in part.readouts)]
    return [
        replace(method, title=_qualified(method.title, trained)),
        *(
            replace(
                method,
                name=f"{method.name}_{readout}",
                title=_qualified(method.title, readout),
                family=f"{method.family}_{readout}",
                overrides={**method.overrides, "readout": readout},
                decodes=method.name,
            )
            for readout in others
        ),
    ]


def _config(study: TokenizerStudy, bundle: Bundle, method: Method) -> Mapping[str, Any]:
    """The configuration of a method's training, or what a given checkpoint has of it."""
    if method.given is None:
        return bundle.read("train.json", (*study.overlays, *method.overlays))
    from vaevq_med.trained.network import StoredTokenizer

    stored = StoredTokenizer(method.given)
    stored.check_target()
    return {"network_def": stored.value("network_def")}


def _readouts(config: Mapping[str, Any], overrides: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """Ways to decode the quantizer of a configuration, and the one it is trained with; none where that is not known."""
    network = config.get("network_def")
    quantizer = network.get("quantizer") if isinstance(network, Mapping) else None
    if not isinstance(quantizer, Mapping) or {"network_def", "network_def#quantizer"} & {*overrides}:
        return (), ""
    own = {key: overrides.get(f"network_def#quantizer#{key}", quantizer.get(key)) for key in ("_target_", "readout")}
    readouts = tuple(getattr(_located(own), "readouts", ()))
    return readouts, str(own["readout"] or next(iter(readouts), ""))


def _located(definition: Mapping[str, Any]) -> Any:
    """The class of a component; None where it is not found, which is refused later."""
    try:
        return locate(str(definition.get("_target_")))
    except ErrorDuringImport:
        return None


def _qualified(title: str, readout: str) -> str:
    """``SoftVQ, K = 64`` as ``SoftVQ (hard), K = 64``; a title that says it already stays."""
    name, comma, size = title.partition(", K = ")
    if name.endswith(f"({readout})"):
        return title
    return f"{name} ({readout}){comma}{size}"
