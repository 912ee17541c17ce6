"""A trained tokenizer as a row of a study of rate against distortion: whole cases, compressed and decompressed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from vaevq_med.codec.case import CompressedCase
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.registry import make_coder
from vaevq_med.codec.compress import check_contrasts, compress_case
from vaevq_med.codec.container import unpack
from vaevq_med.codec.decompress import restore, window
from vaevq_med.codec.model import Model
from vaevq_med.core.files import file_sha256
from vaevq_med.study.rates.candidates import Candidate, Coded, processor_seconds
from vaevq_med.study.rates.file import TokenizerPart
from vaevq_med.study.rates.scans import Scan, ScanFile
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.trained.patients import first_seen

_TOKENS = "tokens/"


@dataclass(frozen=True)
class TokenizerCandidate(Candidate):
    """A checkpoint, an entropy coder, and weights of the code lengths.

    A case is one file of all its contrasts. A contrast is counted with its own stream of tokens and its share of all
    else (the description, the headers, the masks, the container): those bytes divided by the number of contrasts, as
    is the stream of a tokenizer that stacks them.

    Attributes:
        part: as the study's file says.
    """

    has_mask: ClassVar[bool] = True

    part: TokenizerPart
    _last: dict[tuple[str, float], Mapping[str, Coded]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, part: TokenizerPart) -> TokenizerCandidate:
        """A row of a study's file."""
        return cls(part.name, part.title or part.name, tuple(part.settings), part)

    @property
    def slices_alone(self) -> bool:
        """A tokenizer of single slices looks at each by itself; its entropy coder may look at the slice below."""
        return not self.model.network.takes_volumes

    def first_seen(self, patients: Collection[str]) -> tuple[str, str] | None:
        """By the checkpoint's training, or what it started from."""
        stored = self._stored
        return first_seen(stored.data, str(stored.path), patients)

    @cached_property
    def _stored(self) -> StoredTokenizer:
        return StoredTokenizer(self.part.checkpoint)

    @cached_property
    def model(self) -> Model:
        """The tokenizer, on one core."""
        return Model(self._stored, device="cpu")

    @cached_property
    def coder(self) -> IndexCoder:
        """Of the indices."""
        model = self.model
        return make_coder(self.part.coder, model.description, self.part.coder_model, network=model.network)

    @cached_property
    def shipped(self) -> int:
        """Bytes of what a decoder needs besides the files, once: the network's weights, and the coder's model."""
        state = self.model.network.state_dict().values()
        own = sum(tensor.numel() * tensor.element_size() for tensor in state)
        return own + (self.part.coder_model.stat().st_size if self.part.coder_model is not None else 0)

    @cached_property
    def _made_of(self) -> Mapping[str, Any]:
        model = self.part.coder_model
        return {
            "tokenizer": self.model.description["hash"],
            "coder": self.part.coder,
            "coder_model": None if model is None else file_sha256(model),
        }

    def made_of(self) -> Mapping[str, Any]:
        """The checkpoint and the coder."""
        return self._made_of

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        """Compress the case, decompress it, and look at the contrast through its window."""
        key = file.case.name, setting
        if key not in self._last:
            self._last.clear()  # a setting is asked for by all contrasts of a case in turn
            self._last[key] = self._coded(file, setting)
        return self._last[key][file.contrast]

    def _coded(self, file: ScanFile, setting: float) -> Mapping[str, Coded]:
        """All contrasts of a case."""
        model, coder, recipe = self.model, self.coder, file.recipe.changed(size=self.model.image_size)
        check_contrasts(model, recipe.modalities)
        begun = processor_seconds()
        content = compress_case(file.case, recipe, model, coder, rate_weight=setting).content
        encoded = processor_seconds()
        case = CompressedCase.from_bytes(f"{file.case.name}.vvq", content, model=self.part.coder_model)
        units = {
            case.contrasts[number].name: window(case, restored, number).numpy()
            for restored in restore(case, model)
            for number in restored.contrasts
        }
        decoded = processor_seconds()
        count = len(case.contrasts)
        found = {}
        for name, (size, parts) in shares(content, case).items():
            times = (encoded - begun) / count, (decoded - encoded) / count
            found[name] = Coded(size, np.ascontiguousarray(units[name], np.float32), *times, parts)
        return found


def shares(content: bytes, case: CompressedCase) -> dict[str, tuple[int, dict[str, int]]]:
    """Bytes of a file that each of its contrasts takes, rounded up, and what they are made of.

    Args:
        content: of the file.
        case: that it holds.
    """
    parts = unpack(case.name, content)
    streams = {
        number: len(parts[f"{_TOKENS}{place}"]) / len(stream.contrasts)
        for place, stream in enumerate(case.streams)
        for number in stream.contrasts
    }
    masks = len(parts["masks"]) / len(case.contrasts)
    common = (len(content) - sum(len(part) for name, part in parts.items() if name.startswith(_TOKENS))) / len(
        case.contrasts
    )
    found = {}
    for number, contrast in enumerate(case.contrasts):
        size = int(np.ceil(streams[number] + common))
        own = {"tokens": int(streams[number]), "masks": int(masks)}
        found[contrast.name] = size, {**own, "common": size - sum(own.values())}
    return found
