"""``vaevq-med compare-generation``: train generators over the tokens of tokenizers, draw, evaluate, and tabulate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.command import Comparison
from vaevq_med.study.generation import GenerationPlan, combine, read_generation
from vaevq_med.study.plan import Bundle, parse_assignments, parse_integers
from vaevq_med.study.rows import RowResult, RowState
from vaevq_med.study.stages import GENERATORS, compared_tokenizers, parse_generators, parse_tokenizers
from vaevq_med.study.words import split_words

if TYPE_CHECKING:
    from vaevq_med.study.tables import Table

METHODS = "vqgan,vaevq"


@dataclass(frozen=True, kw_only=True)
class CompareGeneration(Comparison):
    """Generators times tokenizers times seeds, each row the real commands.

    Overlays are those of ``bundles/overlays/generation``; the part of a name that says whose it is may be left out. The
    arguments of every comparison, and these.

    Args:
        tokenizers: ``name=checkpoint``, separated by commas.
        source: output folder of ``vaevq-med compare``, in place of ``tokenizers``.
        methods: which of its methods; empty takes VQGAN and VAEVQ.
        generators: ``llamagen``, ``ldm``, separated by commas.
        sampling: the same overrides of ``generate.json``.
        num_samples: drawn by each row.
        encode: further words of ``encode-tokens``, after ``NAME:`` those for a generator or tokenizer alone.
        evaluate: further words of ``evaluate-samples``.
    """

    tokenizers: str = ""
    source: Path | None = None
    methods: str = ""
    generators: str = ",".join(GENERATORS)
    sampling: tuple[str, ...] = ()
    num_samples: int = 5000
    encode: tuple[str, ...] = ()
    evaluate: str = ""
    pictures: int = 8

    @cached_property
    def plan(self) -> GenerationPlan:
        """The rows, checked.

        Raises:
            VaevqMedError: an option that cannot be.
        """
        bundle = Bundle.find(self.bundle)
        seeds = parse_integers(self.seeds, "seeds", 0, 2**32 - 1)
        generators = parse_generators(self.generators)
        if (self.source is None) != bool(self.tokenizers):
            found = "both" if self.tokenizers else "neither"
            raise VaevqMedError(f"tokenizers: found {found} of --tokenizers and --from, expected one of them")
        if self.source is None:
            if self.methods:
                raise VaevqMedError("methods: found it with --tokenizers, which names them itself; expected --from")
            tokenizers = parse_tokenizers(self.tokenizers, seeds)
        else:
            tokenizers = compared_tokenizers(self.source, self.methods or METHODS, seeds)
        if not tokenizers:
            raise VaevqMedError("tokenizers: found none, expected NAME=CHECKPOINT, or methods of --from")
        names = [*(generator.name for generator in generators), *(tokenizer.name for tokenizer in tokenizers)]
        training = parse_assignments(self.assignments, names)
        sampling = parse_assignments(self.sampling, names, "generate-set")
        plan = GenerationPlan(
            kind="compare-generation",
            bundle=bundle,
            methods=combine(tokenizers, generators, bundle, self.overlays, training, sampling, self._encode(names)),
            seeds=seeds,
            output=self.output,
            budget=self.budget,
            overlays=self.overlays,
            overrides=training[0],
            dataset_dir=self.dataset_dir,
            tracking_uri=self.tracking_uri,
            launch=self.launch,
            checkpoint=self.checkpoint,
            num_samples=self.num_samples,
            evaluate=split_words("evaluate", self.evaluate),
        )
        plan.check()
        return plan

    def _encode(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Words of ``encode-tokens`` by name of a generator or tokenizer, those for all under an empty one."""
        found: dict[str, list[str]] = {name: [] for name in ("", *names)}
        for text in self.encode:
            head, colon, rest = text.partition(":")
            name = head.strip() if colon and not head.lstrip().startswith("-") else ""
            if name not in found:
                raise VaevqMedError(f"encode: found {text!r} for {name!r}, expected one of {', '.join(names)}")
            found[name] += split_words("encode", rest if name else text)
        return found

    def words(self) -> list[str]:
        """The command line that makes this comparison."""
        options = {
            "--tokenizers": self.tokenizers,
            "--from": "" if self.source is None else str(self.source),
            "--methods": self.methods,
            "--generators": self.generators,
            "--bundle": self.bundle,
            "--seeds": self.seeds,
            **self.budget.options(),
            "--num-samples": str(self.num_samples),
            "--evaluate": self.evaluate,
            "--dataset-dir": "" if self.dataset_dir is None else str(self.dataset_dir),
            "--output-dir": str(self.output),
            "--tracking-uri": self.tracking_uri,
            "--launch": self.launch,
            "--checkpoint": self.checkpoint,
            "--pictures": str(self.pictures),
        }
        words = [sys.executable, "-m", "vaevq_med.cli.app", "compare-generation"]
        words += [word for name, value in options.items() if value for word in (name, value)]
        repeated = {"--overlay": self.overlays, "--set": self.assignments}
        repeated |= {"--generate-set": self.sampling, "--encode": self.encode}
        words += [word for name, values in repeated.items() for value in values for word in (name, value)]
        return [*words, *(["--published"] if self.published else [])]

    def dry_run(self) -> list[tuple[str, list[str]]]:
        """Label and commands, as shell lines, of every row, a token store once; nothing is written.

        Raises:
            VaevqMedError: an option that cannot be, or an output folder of other settings.
        """
        seen: set[str] = set()
        rows = []
        for label, lines in super().dry_run():
            rows.append((label, [line for line in lines if line not in seen]))
            seen.update(lines)
        return rows

    def read(self, state: RowState) -> RowResult:
        """The figures of a finished row.

        Raises:
            VaevqMedError: its record is damaged.
        """
        return read_generation(state.row)

    def log(self, state: RowState) -> None:
        """Log the figures of the samples to the run of the training."""
        from vaevq_med.study.tracking import log_to_training

        figures = {f"samples/{name}": float(entry["value"]) for name, entry in self.read(state).metrics.items()}
        log_to_training(self.plan, state.row.checkpoint, figures)

    def tabulate(self, results: Sequence[RowResult]) -> Table:
        """The table over finished rows, at least one."""
        from vaevq_med.study.generation_table import make_generation_table
        from vaevq_med.study.published import load_published

        published = load_published(self.plan.bundle.name, "generation") if self.published else None
        return make_generation_table(self.plan, results, published)

    def draw(self, table: Table, results: Sequence[RowResult]) -> list[Path]:
        """Draw samples of the first finished seed of each method; the file."""
        from vaevq_med.study.figures import sample_grid

        if not self.pictures:
            return []
        first = {result.row.method.name: result.row for result in reversed(results)}
        rows = [first[method.name] for method in self.plan.methods if method.name in first]
        path = self.output / "samples.png"
        sample_grid(rows, [row.folder / "generated" for row in rows], self.pictures, path)
        return [path]
