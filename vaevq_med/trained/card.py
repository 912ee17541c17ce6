"""The model card of a packed bundle: what the network is, of which data and training, how good, for what and what not.

It has the front matter that Hugging Face reads (https://huggingface.co/docs/hub/model-cards), and says of what is not
known that it is not known. No name of a patient and no path of the machine of the training goes into it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vaevq_med.core.components import OWN
from vaevq_med.images.manifest import SPLITS
from vaevq_med.trained.figures import Evaluation
from vaevq_med.trained.network import StoredNetwork

UNKNOWN = "unknown"
_UNSAID = frozenset(
    {
        *("dataset_dir", "output_dir", "bundle_root", "device", "num_workers", "tokens_dir", "tracking_uri", "resume"),
        *("experiment", "run_name", "parent_run_id", "feature_weights", "init_from", "imports", "_notes_", "_title_"),
    }
)
"""Of the machine, the place and the words of a run: not told."""
_PARTS = ("network_def", "objective", "discriminator_def", "optimizer", "d_optimizer")
"""Whose inner settings are told, besides plain settings of the first level."""
_PLAIN_WORD = re.compile(r"[\w.:+-]{1,80}")
_SIZES = {
    "codewords in a codebook, K": "num_embeddings",
    "channels of the latent, D": "embedding_dim",
    "indices at a position, G": "num_codebooks",
}
"""What a quantizer says of its sizes, by what the card calls them."""
_NOT_FOR = (
    "It is not a medical device. Nothing that it makes may be used for the diagnosis, the treatment or the monitoring "
    "of a patient, and no diagnosis may be made on reconstructions: they look plausible where they are wrong, and "
    "small lesions can vanish or appear.",
    "Scanners, sequences, organs, species, ages and diseases that are not in the training data are untested.",
    "Reconstructions are no replacement for the originals: keep those.",
    "Codes and latents are not anonymous: an image can be decoded from them.",
)


@dataclass(frozen=True)
class CardFacts:
    """What a card is filled from.

    Attributes:
        stored: the network that is packed.
        network: it, built.
        metadata: of the bundle, as packed.
        bundle: name of the bundle.
        defaults: the bundle's own ``train.json``.
        files: SHA-256 of the files of weights, by their paths.
        evaluation: figures, if there are some.
        hashed_patients: persons of whom a hash travels along.
    """

    stored: StoredNetwork
    network: nn.Module
    metadata: Mapping[str, Any]
    bundle: str
    defaults: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    hashed_patients: int = 0


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML in front."""
    metadata = facts.metadata
    sections = (
        ("What it is", [_origin(facts), "", *_table(_identity(facts))]),
        ("Data", [*_table(_data(facts)), "", *_counts(facts)]),
        ("Training", [*_table(_training(facts)), "", *_settings(facts)]),
        ("Figures", [*_figures(facts.evaluation)]),
        ("Intended use", [f"{_line(str(metadata.get('intended_use', 'Research')))}."]),
        ("What it must not be used for", [f"- {sentence}" for sentence in _NOT_FOR]),
        ("License", [*_license(metadata, _adopted(facts))]),
        ("How to load it", [*_loading(facts)]),
    )
    lines = [*_front_matter(facts), f"# {_line(str(metadata.get('name', facts.bundle)))}"]
    for title, body in sections:
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _front_matter(facts: CardFacts) -> Iterator[str]:
    """What a hub reads: JSON strings are YAML."""
    tags = ["monai", "medical", OWN, facts.bundle]
    yield "---"
    license = str(facts.metadata.get("license", UNKNOWN)).lower()
    yield f"license: {json.dumps(license if re.fullmatch(r'[a-z0-9.-]+', license) else 'other')}"
    yield f"library_name: {OWN}"
    yield f"tags: {json.dumps(tags)}"
    if facts.evaluation is not None:
        yield f"metrics: {json.dumps([figure.name for figure in facts.evaluation.figures])}"
    yield "---"


def _line(text: str) -> str:
    """A text of a file in one line, in which nothing of Markdown or HTML is read."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))


def _origin(facts: CardFacts) -> str:
    """What the bundle says of itself, which an overlay may have changed; of a network of others, whose it is."""
    if adopted := _adopted(facts):
        files = adopted.get("files")
        known = files.items() if isinstance(files, Mapping) else ()
        told = ", ".join(f"{_line(str(name))} (SHA-256 {_code(digest) or UNKNOWN})" for name, digest in known)
        return (
            f"A network that others trained, taken over: {_line(str(adopted.get('title', UNKNOWN)))}, of "
            f"{told or UNKNOWN}. What the configurations of the bundle "
            f"`{facts.bundle}` say of training is not how it was trained."
        )
    return (
        f"A network that was trained by the bundle `{facts.bundle}` ({_line(str(facts.metadata.get('description')))}). "
        "An overlay may have changed that; the tables are of this network itself."
    )


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    for name, value in rows:
        yield f"| {name} | {value or UNKNOWN} |"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _none_or(value: float | None) -> str:
    """A number, or that there is none, as of a latent without a codebook."""
    return "none" if value is None else _number(value)


def _identity(facts: CardFacts) -> Iterator[tuple[str, str]]:
    stored, network = facts.stored, facts.network
    title = stored.config.get("_title_")
    yield "method", _line(title) if isinstance(title, str) else "not named; see the quantizer and the settings"
    yield "network", f"`{type(network).__name__}`"
    quantizer = getattr(network, "quantizer", None)
    if quantizer is not None:
        yield "quantizer", f"`{type(quantizer).__name__}`"
        for title, name in _SIZES.items():
            yield title, _none_or(getattr(quantizer, name, None))
        yield "indices decode to its images", "yes" if getattr(quantizer, "is_discrete", False) else "no"
    factors = getattr(network, "factors", None)
    if quantizer is not None and factors is not None:
        bits = getattr(quantizer, "bits_per_position", None)
        # Of a gate they are those of codes that are all there.
        most = "" if getattr(quantizer, "gate", None) is None else ", at most"
        yield "downsampling factor, f", " x ".join(map(str, factors))
        yield f"bits a position{most}", _none_or(bits)
        yield f"bits a pixel{most}", _none_or(None if bits is None else bits / math.prod(factors))
    shape = facts.metadata["network_data_format"]["inputs"]["image"]
    sides = " x ".join(map(str, shape["spatial_shape"]))
    yield "input: channels, sides, range", f"{shape['num_channels']}, {sides}, {shape['value_range']}"
    yield "parameters", _number(sum(parameter.numel() for parameter in network.parameters()))
    for name, part in network.named_children():
        yield f"parameters of `{name}`", _number(sum(parameter.numel() for parameter in part.parameters()))
    yield "weights", "the average over steps (EMA)" if stored.kept == "ema" else "those of the last step"
    yield "hash of definition and weights", f"`{stored.content_hash}`"
    for name, digest in facts.files.items():
        yield f"SHA-256 of `{name}`", f"`{digest}`"


def _data(facts: CardFacts) -> Iterator[tuple[str, str]]:
    data = facts.stored.data
    yield "name of the data set", _line(str(data.get("name") or ""))
    yield "content hash", _code(data.get("content_hash"))
    yield "split hash", _code(data.get("split_hash"))
    recipe = data.get("recipe")
    named = recipe.get("name") if isinstance(recipe, Mapping) else None
    yield "recipe", _line(str(named or ""))
    yield "read as", _line(str(getattr(facts.stored, "shape", None) or ""))
    contrasts = facts.stored.value("modalities", None)
    yield "contrasts", _line(", ".join(map(str, contrasts))) if isinstance(contrasts, list) else "all of the data set"
    known = len(facts.stored.patients)
    yield "patients of the training", _number(known) if known else ""
    if facts.hashed_patients:
        said = (
            "not in this bundle; a salted hash of each is, by which an evaluation refuses them. Where names follow a "
            "scheme, who knows it can try them all"
        )
    else:
        said = "not in this bundle, and no hashes either: an evaluation cannot refuse single patients of the training"
    yield "names of patients", said


def _code(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and re.fullmatch(r"[\w:.-]+", value) else ""


def _counts(facts: CardFacts) -> Iterator[str]:
    counts = facts.stored.data.get("counts")
    known = counts if isinstance(counts, Mapping) else {}
    yield "| split | images | patients |"
    yield "| --- | ---: | ---: |"
    for split in SPLITS:
        entry = known.get(split)
        told = [entry.get(name) if isinstance(entry, Mapping) else None for name in ("images", "patients")]
        cells = [_number(value) if isinstance(value, int) else UNKNOWN for value in told]
        # Photographs have no patients.
        cells[1] = "none named" if told[1] == 0 and told[0] else cells[1]
        yield f"| {split} | {' | '.join(cells)} |"


def _training(facts: CardFacts) -> Iterator[tuple[str, str]]:
    stored = facts.stored
    start = stored.data.get("started_from")
    file = start.get("file") if isinstance(start, Mapping) else None
    digest = _code(start.get("sha256")) if isinstance(start, Mapping) else ""
    yield "started from", f"{_line(str(file))}, SHA-256 {digest or UNKNOWN}" if file else "no file is recorded"
    yield "steps", _number(stored.iteration) if stored.iteration else ""
    seed = stored.config.get("seed")
    yield "seed", _number(seed) if isinstance(seed, int) else ""
    spent = stored.spent
    images, seconds = spent.get("images"), spent.get("timed_seconds")
    yield "images seen", _number(images) if isinstance(images, int) and images else ""
    yield "time of its steps", f"{_number(round(seconds, 1))} s" if isinstance(seconds, float) and seconds else ""
    yield "hardware", _line(str(spent.get("device") or ""))
    for name, digest in stored.feature_weights.items():
        yield f"loss of features by `{_line(name)}`", _code(digest)


def _settings(facts: CardFacts) -> Iterator[str]:
    written, usual = dict(_leaves(facts.stored.config)), dict(_leaves(facts.defaults))
    rows = [(name, usual.get(name), value) for name, value in written.items() if value != usual.get(name)]
    if not rows:
        yield f"All settings that are known are those of the bundle {facts.bundle}."
        return
    yield f"Settings that differ from those of the bundle {facts.bundle}:"
    yield ""
    yield "| setting | here | in the bundle |"
    yield "| --- | --- | --- |"
    for name, before, now in rows:
        yield f"| `{name}` | `{json.dumps(now)}` | {'not there' if before is None else f'`{json.dumps(before)}`'} |"


def _leaves(config: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings that are plain: numbers, truths and single words, and lists of them; never a path or a sentence."""
    for key, value in config.items():
        inner = f"{name}#{key}" if name else str(key)
        if key in _UNSAID or not re.fullmatch(r"[\w#]+", inner):
            continue
        if isinstance(value, Mapping) and inner.split("#")[0] in _PARTS:
            yield from _leaves(value, inner)
        elif _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value))):
            yield inner, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return _PLAIN_WORD.fullmatch(value) is not None
    return isinstance(value, bool | int | float)


def _figures(evaluation: Evaluation | None) -> Iterator[str]:
    if evaluation is None:
        yield (
            "Unknown: the bundle was packed without a record of an evaluation (`vaevq-med bundle pack --metrics "
            "metrics.json`)."
        )
        return
    told = evaluation.provenance
    split = _line(str(told.get("split", UNKNOWN)))
    yield f"Over the split {split} ({_code(told.get('split_hash')) or f'split hash {UNKNOWN}'})."
    if evaluation.unit:
        yield f"Intervals hold 95 % of 10,000 draws of {evaluation.unit} with replacement."
    yield ""
    yield "| figure | value | 95 % interval | images |"
    yield "| --- | ---: | --- | ---: |"
    for figure in evaluation.figures:
        interval = f"{figure.low:.5g} to {figure.high:.5g}" if figure.unit else "none"
        yield f"| {_line(figure.title)} | {figure.value:.5g} | {interval} | {_number(figure.n)} |"
    words = [f"- {_line(name)}: {_line(str(text))}" for name, text in evaluation.conventions.items()]
    if words:
        yield ""
        yield from words


def _adopted(facts: CardFacts) -> Mapping[str, Any]:
    """What is told of a network that others trained; empty of one of this toolkit."""
    told = facts.stored.data.get("adopted")
    return told if isinstance(told, Mapping) else {}


def _license(metadata: Mapping[str, Any], adopted: Mapping[str, Any]) -> Iterator[str]:
    if adopted:
        yield (
            f"The weights are those of others: {_line(str(adopted.get('title', UNKNOWN)))}. Their license: "
            f"{_line(str(adopted.get('license', UNKNOWN)))}. `LICENSE` is that of the code of {OWN} alone."
        )
        return
    yield (
        f"Code and weights: {_line(str(metadata.get('license', UNKNOWN)))}, see `LICENSE`. The data of the training "
        "has terms of its own, which are not known here: look whether they allow to give weights on that were trained "
        "on it."
    )
    yield ""
    yield f"Source of the data: {_line(str(metadata.get('data_source', UNKNOWN)))}."


def foreign_packages(definition: Any) -> list[str]:
    """The packages besides this one whose classes a network's definition names."""
    if isinstance(definition, Mapping):
        own = [str(definition["_target_"]).split(".")[0]] if "_target_" in definition else []
        inner: Iterable[Any] = definition.values()
    elif isinstance(definition, list):
        own, inner = [], definition
    else:
        return []
    return sorted({*own, *(name for item in inner for name in foreign_packages(item))} - {OWN})


def told_by_parts(network: nn.Module, name: str) -> dict[str, str]:
    """What the classes of a network's parts say of what they need, as adapters of other packages' networks do.

    Args:
        network: built.
        name: of the class attribute, texts or a mapping of them: ``needed_packages``, ``needed_trust``.
    """
    found: dict[str, str] = {}
    for part in network.modules():
        told = getattr(type(part), name, ())
        found |= told if isinstance(told, Mapping) else dict.fromkeys(told, "")
    return found


def _loading(facts: CardFacts) -> Iterator[str]:
    packages = foreign_packages(facts.stored.value("network_def"))
    programs = told_by_parts(facts.network, "needed_trust")
    trusted = [*packages, *programs]
    command = "".join(f" --trusted {name}" for name in trusted)
    bundle = f' --trusted "{trusted!r}"' if trusted else ""
    versions = facts.metadata.get("required_packages_version", {})
    if needed := [
        f"{name} {versions.get(name, '')}".strip() for name in told_by_parts(facts.network, "needed_packages")
    ]:
        yield f"It was packed with {', '.join(needed)}, whose classes it is built of: that has to be installed."
        yield ""
    if packages:
        yield f"The network has parts of {', '.join(packages)}, whose code runs: it has to be installed and trusted."
        yield ""
    for name, why in programs.items():
        yield f"{why[0].upper()}{why[1:]}: load it where you trust its makers alone, by the word {name}."
        yield ""
    kind = type(facts.stored).__name__
    trust = [f"from {OWN}.core.components import trust", "", f"trust({trusted!r})"] if trusted else []
    yield from (
        f"Where `{OWN}` is installed, `FOLDER` being this bundle and `DATA` a data set of it:",
        "",
        "```bash",
        f"vaevq-med{command} bundle verify FOLDER",
        "cd FOLDER && python -m monai.bundle run evaluating --config_file configs/evaluate.json "
        f"--dataset_dir DATA{bundle}",
        "```",
        "",
        "```python",
        f"from {OWN}.trained import {kind}",
        *trust,
        "",
        f'network = {kind}("FOLDER").network()',
        "```",
        "",
        "Other commands take the folder wherever they take a checkpoint. "
        + (
            "Its weights are programs, and so are the configurations in `configs/`, of MONAI: read those, too, before "
            "you run one of a stranger."
            if programs
            else "Nothing in it is unpickled or run but the configurations in `configs/`, which are programs of MONAI: "
            "read them before you run one of a stranger."
        ),
    )
