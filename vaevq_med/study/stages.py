"""The two stages that a comparison of generators combines: trained tokenizers, and generators that a bundle trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.resources import bundle_path, overlay_files, overlay_title
from vaevq_med.study.plan import ALIASES, Bundle
from vaevq_med.study.rows import read_plan_record

KIND = "generation"
"""The folder of the generators' overlays among the overlays."""
BOTH = "generator"
"""What the names of overlays of either generator begin with."""


@dataclass(frozen=True)
class Generator:
    """A generator that a bundle trains.

    Attributes:
        name: on the command line.
        title: what tables call it.
        file: its configuration in the bundle.
        kind: of the tokens that it is trained on, ``indices`` or ``latents``.
        prefix: what the names of its overlays begin with.
    """

    name: str
    title: str
    file: str
    kind: str
    prefix: str

    def overlays(self, names: Sequence[str], bundle: Bundle) -> tuple[str, ...]:
        """The overlays of this generator among ``names``, of which each may leave out the prefix."""
        known = overlay_files(bundle.path, KIND)
        found = []
        for name in names:
            forms = (name, f"{self.prefix}_{name}", f"{BOTH}_{name}")
            found += [form for form in forms if form in known and form.startswith((f"{self.prefix}_", f"{BOTH}_"))][:1]
        return tuple(found)

    def check_sampling(self, ids: Iterable[str], row: str) -> None:
        """Refuse settings of ``generate.json`` that are those of the other kind of generator.

        Args:
            ids: that are chosen.
            row: name of what they are chosen for.

        Raises:
            VaevqMedError: naming the first.
        """
        from vaevq_med.networks import LatentDiffusionUNet, LlamaGen

        settings = {network.kind: network.settings for network in (LlamaGen, LatentDiffusionUNet)}
        own = settings[self.kind]
        wrong = [name for name in ids if name not in own and any(name in others for others in settings.values())]
        if wrong:
            other = next(name for name, known in GENERATORS.items() if wrong[0] in settings[known.kind])
            raise VaevqMedError(
                f"generate-set: found {wrong[0]} for {row}, expected {', '.join(own)}; {other}:{wrong[0]}=VALUE is for "
                "those that have it"
            )


GENERATORS = {
    "llamagen": Generator("llamagen", "LlamaGen", "train_autoregressive.json", "indices", "autoregressive"),
    "ldm": Generator("ldm", "LDM", "train_diffusion.json", "latents", "diffusion"),
}


@dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer.

    Attributes:
        name: on the command line, and in the names of folders.
        checkpoints: of each seed.
        shared: whether one checkpoint serves all seeds.
    """

    name: str
    checkpoints: Mapping[int, Path]
    shared: bool

    @property
    def title(self) -> str:
        """What tables call it."""
        overlay = overlay_files(bundle_path("brats")).get(ALIASES.get(self.name, self.name))
        return self.name if overlay is None else overlay_title(overlay)


def parse_generators(text: str) -> tuple[Generator, ...]:
    """Generators of ``llamagen,ldm``, each once.

    Raises:
        VaevqMedError: there is no such generator, or none is named.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in GENERATORS]
    if unknown or not names:
        raise VaevqMedError(f"generators: found {unknown[0] if unknown else text!r}, expected {', '.join(GENERATORS)}")
    return tuple(GENERATORS[name] for name in names)


def parse_tokenizers(text: str, seeds: Sequence[int]) -> tuple[Tokenizer, ...]:
    """Tokenizers of ``vqgan=a.pt,vaevq=b.pt``: a name, and the checkpoint that serves all seeds.

    Raises:
        VaevqMedError: something else stands there, a name twice, or there is no such file.
    """
    found: dict[str, Tokenizer] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, equals, path = (piece.strip() for piece in part.partition("="))
        if not equals or not path:
            raise VaevqMedError(f"tokenizers: found {part!r}, expected NAME=CHECKPOINT")
        _add(found, Tokenizer(name, dict.fromkeys(seeds, Path(path)), shared=True))
    return tuple(found.values())


def compared_tokenizers(folder: Path, methods: str, seeds: Sequence[int]) -> tuple[Tokenizer, ...]:
    """Tokenizers that ``vaevq-med compare`` trained, of each seed its own.

    Args:
        folder: its output.
        methods: their names, separated by commas.
        seeds: which.

    Raises:
        VaevqMedError: it is no such folder, or has no checkpoint of a method under a seed.
    """
    record = read_plan_record(folder)
    if "checkpoint" not in record.get("shared", {}):
        raise VaevqMedError(f"from: found no comparison in {folder}, expected an output folder of vaevq-med compare")
    file = Path("checkpoints") / f"{record['shared']['checkpoint']}.pt"
    found: dict[str, Tokenizer] = {}
    for name in (part.strip() for part in methods.split(",") if part.strip()):
        _add(found, Tokenizer(name, {s: folder / name / f"seed_{s}" / file for s in seeds}, shared=False))
    return tuple(found.values())


def tokenizer_hash(path: Path) -> str:
    """Content hash of a tokenizer whose tokens a comparison can use.

    Args:
        path: its checkpoint.

    Raises:
        CheckpointError: it is no tokenizer's checkpoint.
        VaevqMedError: the tokenizer's images are several contrasts at once.
    """
    from vaevq_med.trained.network import StoredTokenizer

    stored = StoredTokenizer(path)
    stored.check_target()
    channels = int(stored.value("in_channels"))
    if stored.value("stack_modalities", False) or channels not in (1, 3):
        raise VaevqMedError(
            f"{path}: found a tokenizer of {channels} stacked contrasts, expected one of single contrasts or "
            "photographs, which evaluate-samples can compare"
        )
    return stored.content_hash


def _add(found: dict[str, Tokenizer], tokenizer: Tokenizer) -> None:
    name = tokenizer.name
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise VaevqMedError(f"tokenizers: found the name {name!r}, expected letters, digits, '_', '-' and '.'")
    if name in found or name in GENERATORS:
        taken = "more than once" if name in found else "which is a generator's name"
        raise VaevqMedError(f"tokenizers: found {name} {taken}, expected another name")
    for seed, path in tokenizer.checkpoints.items():
        if not path.is_file():
            raise VaevqMedError(f"tokenizer {name}, seed {seed}: found no checkpoint {path}, expected a trained one")
    found[name] = tokenizer
