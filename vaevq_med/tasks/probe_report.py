"""What ``vaevq-med probe`` tells: a table with a row a tokenizer, a CSV file and lines for a reader."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vaevq_med.core.intervals import LEVEL, RESAMPLES

HEADS = ("chance", "linear", "mlp")
"""Who answers: the shares of the training images by chance; logistic regression; one hidden layer of 64 units."""
_SCORES = (
    "accuracy",
    "balanced_accuracy",
    "balanced_accuracy_low",
    "balanced_accuracy_high",
    "auc",
    "dice",
    "converged",
)

_SHOWN = ("accuracy", "balanced_accuracy", "auc", "dice")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As CSV: a line for each tokenizer, probe and head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tokenizer", "quantizer", "embedding_dim", "probe", "n_training", "n_test", "head", *_SCORES])
    for row in rows:
        for task, found in row["probes"].items():
            for head in HEADS:
                if head in found:
                    scores = [found[head].get(name, "") for name in _SCORES]
                    about = [row["name"], row["quantizer"], row["embedding_dim"], task]
                    writer.writerow([*about, found["n_training"], found["n_test"], head, *scores])
    return text.getvalue()


def markdown(record: Mapping[str, Any]) -> str:
    """As Markdown: a row a tokenizer, for each probe the balanced accuracy of chance and of each head, and notes."""
    rows, notes = record["tokenizers"], []
    tasks = [task for task in record["asked"] if any("left_out" not in row["probes"][task] for row in rows)]
    head = ["Tokenizer", "Quantizer", "D", *(f"{task}, {who}" for task in tasks for who in HEADS)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        cells = [_cell(row["probes"][task].get(who)) for task in tasks for who in HEADS]
        lines.append([row["name"].replace("|", "\\|"), row["quantizer"], str(row["embedding_dim"]), *cells])
    for task, question in record["asked"].items():
        notes.append(f"{task}: {question}.")
        notes += [f"{row['name']}, {task}: left out, {why}." for row in rows if (why := _left_out(row, task))]
    interval = f"{100 * (1 - LEVEL):.0f} % bootstrap interval over patients ({RESAMPLES:,} resamples)"
    patients = rows[0]["patients"][record["split"]]
    few = "one patient" if patients == 1 else "the images do not all name a patient"
    shown = any("[" in cell for line in lines[2:] for cell in line[3:])
    brackets = f"in brackets: {interval}" if shown else f"no interval: {few}"
    counted = f"{patients} known patient{'' if patients == 1 else 's'}"
    notes.append(
        f"Balanced accuracy, of {counted} of split {record['split']}; {brackets}. chance: what guessing reaches."
    )
    stopped = [
        f"{row['name']}, {task}, {who}"
        for row in rows
        for task in tasks
        for who in HEADS
        if not row["probes"][task].get(who, {}).get("converged", True)
    ]
    notes += [f"Stopped by the limit of iterations: {'; '.join(stopped)}."] if stopped else []
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes)]) + "\n"


def _left_out(row: Mapping[str, Any], task: str) -> str:
    return str(row["probes"][task].get("left_out", ""))


def _cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "–"
    return f"{scores['balanced_accuracy']:.3f}{_interval(scores)}"


def _interval(scores: Mapping[str, Any]) -> str:
    ends = [scores.get(f"balanced_accuracy_{end}") for end in ("low", "high")]
    return "" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each tokenizer, probe and head, for a reader."""
    for row in record["tokenizers"]:
        yield f"{row['name']}: {row['quantizer']}, D = {row['embedding_dim']}"
        for task, found in row["probes"].items():
            if "left_out" in found:
                yield f"  {task}: left out, {found['left_out']}"
                continue
            yield f"  {task}: {found['n_training']:,} to learn from, {found['n_test']:,} asked"
            for head in HEADS:
                scores = found[head]
                figures = ", ".join(
                    f"{name.replace('_', ' ')} {scores[name]:.3f}{interval}"
                    for name, interval in zip(_SHOWN, ("", _interval(scores), "", ""), strict=True)
                    if name in scores
                )
                yield f"    {head}: {figures}{'' if scores['converged'] else ', not converged'}"
