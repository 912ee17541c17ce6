"""What a reader of a table has to know, in sentences under it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from vaevq_med.core.intervals import LEVEL, RESAMPLES
from vaevq_med.study.generation import GenerationPlan
from vaevq_med.study.over_seeds import MethodResult
from vaevq_med.study.plan import Plan
from vaevq_med.study.rows import RowResult

_TITLES = {
    **{"lpips": "LPIPS", "rfid": "rFID", "gfid": "gFID", "precision": "Precision", "recall": "Recall"},
    **{"memorization": "Memorized", "inception_score": "Inception score"},
}


def notes(plan: Plan, results: Sequence[RowResult], methods: Sequence[MethodResult]) -> Iterator[str]:
    """Under the table over finished rows, at least one."""
    if isinstance(plan, GenerationPlan):
        return _generator_notes(plan, results)
    return _tokenizer_notes(plan, results, methods)


def _tokenizer_notes(plan: Plan, results: Sequence[RowResult], methods: Sequence[MethodResult]) -> Iterator[str]:
    first = results[0]
    unit, units = methods[0].images.units()
    count = len(set(units.tolist()))
    yield from _head(plan, "method", any(len(result.seeds) > 1 for result in methods))
    interval = f"{100 * (1 - LEVEL):.0f} % bootstrap interval over {count} {unit} ({RESAMPLES:,} resamples)"
    brackets = f"In brackets: {interval}." if count > 1 else "No interval: there is one image."
    yield f"Split {first.provenance.get('split', 'evaluated')}: {first.provenance.get('n')} images. {brackets}"
    if len({name for name in methods[0].images.patients if name}) == 1:
        yield "All images are of one patient: the interval says nothing of other patients."
    elif unit == "patients" and count < 6:
        yield f"An interval from {count} patients is rough."
    yield from _conventions(first, "lpips", "rfid")
    known = {figure.name for figure in plan.known}
    yield from (f"{f.title}: {f.convention}." for f in first.figures if f.convention and f.name not in known)
    kinds = {"cuda": "GPU memory allocated", "process": "resident memory of the process"}
    memory = sorted({kinds[str(result.run["peak_memory_of"])] for result in results if "peak_memory_of" in result.run})
    yield from _devices(results, f"; peak memory: {', '.join(memory)}")
    yield from _schedule(results, methods)
    yield from plan.study.report.notes
    measured = {figure.name for figure in first.figures} | known
    yield from (f"{name}: not measured." for name in plan.study.report.figures or () if name not in measured)
    continuous = [result.method.title for result in methods if not result.is_discrete]
    if continuous:
        who = ", ".join(continuous)
        yield f"{who}: continuous, no indices hold what is decoded; left out of the tests and the bold."
    yield from _reference(plan, methods)
    yield from _given(results)
    yield from _sides(results)
    yield from _stages(methods)
    yield from _missing(plan, results)


def _generator_notes(plan: GenerationPlan, results: Sequence[RowResult]) -> Iterator[str]:
    first, many = results[0], len(plan.study.seeds) > 1
    told = first.provenance
    yield from _head(plan, "generator", many)
    if many:
        yield (
            "One tokenizer serves all seeds: the spread is that of the generators alone."
            if plan.study.tokenizers.source is None
            else "Each seed has a tokenizer of its own: the spread is that of both stages."
        )
    elif len(results) > 1:
        yield "One seed: nothing says how far a difference is due to chance."
    yield f"N = {told['n']:,} samples of each, against {told['n_reference']:,} images of split {told['split']}."
    yield from _conventions(first, "gfid", "precision", "recall", "memorization", "inception_score")
    bounds = [result.row.method.title for result in results if result.run.get("likelihood") == "bound"]
    if bounds:
        yield f"Bits per token: an upper bound of {', '.join(dict.fromkeys(bounds))}."
    yield from _drawn(plan)
    groups = {method.group for method in plan.methods}
    if len(groups) > 1 and len(plan.methods) > len(groups):
        yield "Bold: the best of each generator."
    yield from _devices(results)
    yield from plan.study.report.notes
    yield from _missing(plan, results)


def _head(plan: Plan, what: str, many: bool) -> Iterator[str]:
    study, seeds = plan.study, plan.study.seeds
    budget, checkpoint = study.budget.words(), study.checkpoint
    yield f"Budget: {budget} for each {what}; bundle {plan.bundle.name}; the {checkpoint} checkpoint."
    spread = "; mean ± standard deviation over seeds" if many else ""
    yield f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{spread}."


def _conventions(result: RowResult, *names: str) -> Iterator[str]:
    yield from (f"{_TITLES[name]}: {result.conventions[name]}." for name in names if name in result.conventions)


def _devices(results: Sequence[RowResult], more: str = "") -> Iterator[str]:
    devices = sorted({str(result.run["device"]) for result in results if "device" in result.run})
    if devices:
        yield f"Trained on {', '.join(devices)}{more}."


def _missing(plan: Plan, results: Sequence[RowResult]) -> Iterator[str]:
    there = {result.row.label for result in results}
    missing = [row.label for row in plan.rows() if row.label not in there]
    if missing:
        yield f"Missing: {', '.join(missing)}."


def _schedule(results: Sequence[RowResult], methods: Sequence[MethodResult]) -> Iterator[str]:
    """What a budget is too short for: settings that count steps do not follow it."""
    for key, text in (
        ("objective#adversarial#start_step", "No GAN: it starts at step {start:,}, not within the {steps:,} of {who}."),
        ("warmup_steps", "The learning rate rises over {start:,} steps, all {steps:,} of {who}."),
    ):
        found: dict[tuple[int, int], list[str]] = {}
        for method in methods:
            result = next(result for result in results if result.row.method.name == method.method.name)
            start, steps = result.row.trained.training_number(key), result.run.get("iterations")
            if start is not None and steps is not None and start >= steps:
                found.setdefault((start, int(steps)), []).append(method.method.title)
        for (start, steps), titles in found.items():
            who = "each method" if len(titles) == len(methods) else ", ".join(titles)
            yield text.format(start=start, steps=steps, who=who) + f" Set {key}."


def _reference(plan: Plan, methods: Sequence[MethodResult]) -> Iterator[str]:
    """Why the report's reference is set against nothing."""
    if plan.reference is None:
        return
    discrete = {result.method.name: result.is_discrete for result in methods}
    if not discrete.get(plan.reference.name, False):
        why = "its codes are continuous" if plan.reference.name in discrete else "none of its rows is finished"
        yield f"{plan.reference.title}, the reference, is set against no rival: {why}."


def _given(results: Sequence[RowResult]) -> Iterator[str]:
    """Which rows were not trained here, and whose they are."""
    for result in results:
        method, told = result.row.method, result.provenance.get("adopted", {})
        if method.given is None or method.decodes:
            continue
        files = ", ".join(f"{name} {digest[:12]}" for name, digest in told.get("files", {}).items())
        source = (
            f"adopted from {told.get('title')} ({files}); its training data are not known here" if told else "given"
        )
        latent = told.get("latent", {}).get("how")
        yield f"{method.title}: {source}; not trained here{f'; range of its latent {latent}' if latent else ''}."


def _sides(results: Sequence[RowResult]) -> Iterator[str]:
    """Which rows are of images of another size, so that their figures are of other pixels."""
    found: dict[int, list[str]] = {}
    for result in results:
        side = result.provenance.get("image_size")
        if isinstance(side, int) and result.row.method.title not in found.setdefault(side, []):
            found[side].append(result.row.method.title)
    if len(found) > 1:
        told = "; ".join(f"{side} pixels: {', '.join(titles)}" for side, titles in sorted(found.items()))
        yield (
            f"The sides of the images differ, {told}. Their figures are of the same slices at different sizes: PSNR, "
            "SSIM and the like, bits an image and the tests do not compare tokenizers of different sizes."
        )


def _stages(methods: Sequence[MethodResult]) -> Iterator[str]:
    """Which methods of a sweep have several indices a position, so that K is not that of one codebook."""
    said = set()
    for method in methods:
        size, bits = method.method.num_embeddings, method.figures.get("bits_per_position")
        if size is None or bits is None or method.method.family in said:
            continue
        said.add(method.method.family)
        indices = round(bits.mean / math.log2(size))
        if indices > 1:
            title = method.method.title.rsplit(", K = ", 1)[0]
            yield f"{title}: K counts the codewords of one of its {indices} stages or groups."


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
