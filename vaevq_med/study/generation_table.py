"""The paper's Table 2: figures of generators over tokenizers, with what a reader has to know of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vaevq_med.study.generation import GenerationPlan
from vaevq_med.study.published import load_published
from vaevq_med.study.rows import RowResult
from vaevq_med.study.tables import Table, check_alike, summarize_all

_ALIKE = ("split", "split_hash", "content_hash", "modalities", "image_size", "n", "n_reference")
_TITLES = {"gfid": "gFID", "precision": "Precision", "recall": "Recall", "memorization": "Memorized"}


def make_generation_table(plan: GenerationPlan, results: Sequence[RowResult]) -> Table:
    """The table over finished rows, in the order of the methods.

    Args:
        plan: what was compared.
        results: finished rows, at least one.

    Raises:
        VaevqMedError: rows were evaluated with different feature networks, on different data or at another N.
    """
    check_alike(results, (*_ALIKE, "feature_weights_sha256"))
    published = load_published(plan.bundle.name, "generation") if plan.study.report.published else None
    notes = (*_notes(plan, results), *plan.study.report.notes)
    return Table(summarize_all(plan, results, plan.columns), (), notes, published, plan.columns)


def _notes(plan: GenerationPlan, results: Sequence[RowResult]) -> Iterator[str]:
    first = results[0]
    told, words = first.provenance, first.conventions
    budget = plan.study.budget.words()
    yield f"Budget: {budget} for each generator; bundle {plan.bundle.name}; the {plan.study.checkpoint} checkpoint."
    seeds = ", ".join(map(str, plan.study.seeds))
    many = len(plan.study.seeds) > 1
    yield f"Seed{'s' if many else ''} {seeds}{'; mean ± standard deviation over seeds' if many else ''}."
    if many:
        shared = plan.study.tokenizers.source is None
        yield (
            "One tokenizer serves all seeds: the spread is that of the generators alone."
            if shared
            else "Each seed has a tokenizer of its own: the spread is that of both stages."
        )
    elif len(results) > 1:
        yield "One seed: nothing says how far a difference is due to chance."
    yield f"N = {told['n']:,} samples of each, against {told['n_reference']:,} images of split {told['split']}."
    yield from (f"{title}: {words[name]}." for name, title in _TITLES.items() if name in words)
    if "inception_score" in words:
        yield f"Inception score: {words['inception_score']}."
    yield from _drawn(plan)
    groups = {method.group for method in plan.methods}
    if len(groups) > 1 and len(plan.methods) > len(groups):
        yield "Bold: the best of each generator."
    devices = sorted({str(result.run["device"]) for result in results if "device" in result.run})
    if devices:
        yield f"Trained on {', '.join(devices)}."
    missing = [row.label for row in plan.rows() if row.label not in {result.row.label for result in results}]
    if missing:
        yield f"Missing: {', '.join(missing)}."


def _drawn(plan: GenerationPlan) -> Iterator[str]:
    """What differs from the settings of ``generate.json``, and for whom where that is not everybody."""
    found: dict[str, list[str]] = {}
    for method in plan.methods:
        for key, value in method.sampling.items():
            if key not in ("device", "batch_size"):
                found.setdefault(f"{key} = {value}", []).append(method.title)
    if found:
        everybody = len(plan.methods)
        texts = (k if len(titles) == everybody else f"{k} ({'; '.join(titles)})" for k, titles in found.items())
        yield f"Drawn with {', '.join(texts)}."
