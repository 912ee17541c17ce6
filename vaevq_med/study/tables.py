"""The table of a comparison: figures over seeds, and the same table as Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics import figures
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.against import Against, set_against, titled
from vaevq_med.study.notes import notes
from vaevq_med.study.over_seeds import Cell, MethodResult, summarize
from vaevq_med.study.plan import Plan
from vaevq_med.study.published import Published, load_published
from vaevq_med.study.rows import RowResult
from vaevq_med.study.statistics import PairedTest, best_against_next

_KNOWN = {figure.name: figure for figure in vars(figures).values() if isinstance(figure, Figure)}


@dataclass(frozen=True)
class Table:
    """Methods and what is said of them.

    Attributes:
        methods: rows.
        tests: best against next.
        notes: what was compared and on what, in sentences; the caption in LaTeX.
        published: the paper's figures, or None.
        candidates: columns that it may have.
        against: the report's reference minus each rival, or None.
    """

    methods: tuple[MethodResult, ...]
    tests: tuple[PairedTest, ...]
    notes: tuple[str, ...]
    published: Published | None = None
    candidates: tuple[Figure, ...] = ()
    against: Against | None = None

    @property
    def columns(self) -> list[Figure]:
        """Those that at least one method has a figure of."""
        return [column for column in self.candidates if any(column.name in m.figures for m in self.methods)]

    def _paper(self, result: MethodResult) -> Mapping[str, str]:
        """The paper's figures of a method, by column; empty texts where others have one."""
        if self.published is None:
            return {}
        own = self.published.figures.get(result.method.family, {})
        return {name: own.get(name, "") for name in self.published.metrics([m.method.family for m in self.methods])}

    def _sources(self) -> list[str]:
        return [] if self.published is None else [f"Paper: {self.published.source}", *self.published.notes]

    def _is_best(self, column: Figure, result: MethodResult) -> bool:
        rivals = [m for m in self.methods if m.is_discrete and m.method.group == result.method.group]
        if column.higher_is_better is None or len(rivals) < 2 or not result.is_discrete:
            return False
        means = [m.figures[column.name].mean for m in rivals if column.name in m.figures]
        return result.figures[column.name].mean == (max(means) if column.higher_is_better else min(means))

    def _head(self) -> list[str]:
        titles = map(titled, self.columns)
        return ["Method", *titles, *(f"{_KNOWN[name].title}, paper" for name in self._paper(self.methods[0]))]

    def _body(self, escape: Callable[[str], str], plus_minus: str, bold: str) -> Iterator[list[str]]:
        """The cells of each method."""
        for result in self.methods:
            cells = []
            for column in self.columns:
                text = _cell(column, result.figures[column.name], plus_minus) if column.name in result.figures else ""
                cells.append(bold % text if text and self._is_best(column, result) else text)
            yield [escape(result.method.title), *cells, *map(escape, self._paper(result).values())]

    def markdown(self) -> str:
        """As Markdown, the best of each column in bold, with notes; the reference minus each rival below."""
        titles = {result.method.name: result.method.title for result in self.methods}
        rows = [*self._body(_markdown_text, "±", "**%s**")]
        known = {column.name: column for column in self.columns}
        said = (_sentence(test, known[test.metric].title, titles) for test in self.tests)
        notes = [*self.notes, *said, *self._sources()]
        lines = _markdown_table(self._head(), rows, notes)
        for section in () if self.against is None else self.against.sections():
            cells = [[_markdown_text(cell) for cell in row] for row in section.rows]
            lines += ["", f"## {_markdown_text(section.title)}", ""]
            lines += _markdown_table(section.head, cells, section.notes, section.num_names)
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """As CSV: unscaled means, with ``_std``, ``_low`` and ``_high`` columns where there are such."""
        from pandas import DataFrame

        rows = []
        for result in self.methods:
            row: dict[str, Any] = {"method": result.method.name, "title": result.method.title}
            row |= {"overlays": "+".join(result.method.overlays), "seeds": " ".join(map(str, result.seeds))}
            for column in self.columns:
                row |= _named_parts(column.name, result.figures.get(column.name, Cell(math.nan)))
            rows.append(row | {f"{name}_paper": value for name, value in self._paper(result).items()})
        return DataFrame(rows).dropna(axis=1, how="all").to_csv(index=False, lineterminator="\n")

    def latex(self) -> str:
        """As a LaTeX table (packages ``booktabs`` and ``graphicx``), the best of each column in bold."""
        head = [latex_text(title) for title in self._head()]
        rows = [" & ".join(row) + r" \\" for row in (head, *self._body(latex_text, r"$\pm$", r"\textbf{%s}"))]
        lines = [
            r"\begin{table}",
            r"\centering",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\caption{{{latex_text(' '.join([*self.notes, *self._sources()[:1]]))}}}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def flat(self) -> dict[str, float]:
        """Cells for a tracker: ``vqgan/psnr``, ``vqgan/psnr_std``, ..."""
        return {
            f"{result.method.name}/{part}": value
            for result in self.methods
            for name, figure in result.figures.items()
            for part, value in _named_parts(name, figure).items()
            if not math.isnan(value)
        }

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        papers = {} if self.published is None else self.published.figures
        methods = [
            {
                "name": result.method.name,
                "title": result.method.title,
                "overlays": list(result.method.overlays),
                "overrides": dict(result.method.overrides),
                "seeds": list(result.seeds),
                "figures": {
                    name: {part: None if math.isnan(value) else value for part, value in vars(figure).items()}
                    for name, figure in result.figures.items()
                },
                "paper": dict(papers.get(result.method.family, {})),
            }
            for result in self.methods
        ]
        notes = [*self.notes, *self._sources()]
        return {"methods": methods, "tests": [asdict(test) for test in self.tests], "notes": notes}


def _named_parts(name: str, figure: Cell) -> dict[str, float]:
    return {name if part == "mean" else f"{name}_{part}": value for part, value in vars(figure).items()}


def make_table(plan: Plan, results: Sequence[RowResult]) -> Table:
    """The table over finished rows, at least one, in the order of the plan.

    Raises:
        VaevqMedError: rows were evaluated with different feature networks, on different data or at another N.
    """
    _check_alike(results, plan.alike)
    own = {
        f.name: f for result in results for f in result.figures if f.name not in {known.name for known in plan.known}
    }
    further, per_image = [*own.values()], [*plan.per_image, *own.values()]
    rows = {m.name: [result for result in results if result.row.method.name == m.name] for m in plan.methods}
    methods = tuple(summarize(found, (*plan.known, *further), per_image) for found in rows.values() if found)
    images = {result.method.name: result.images for result in methods if result.is_discrete}
    columns = plan.columns(further)
    tests = tuple(test for figure in per_image if figure in columns for test in best_against_next(figure, images))
    published = load_published(plan.bundle.name, plan.published) if plan.study.report.published else None
    reference, against = plan.reference, None
    if reference is not None:
        against = set_against(reference.name, methods, results, columns, per_image, plan.per_seed)
    return Table(methods, tests, tuple(notes(plan, results, methods)), published, columns, against)


def _check_alike(results: Sequence[RowResult], keys: Sequence[str]) -> None:
    """Cells of different feature networks or data never share a column.

    Args:
        results: finished rows.
        keys: of their provenance, which have to agree.

    Raises:
        VaevqMedError: naming two rows that differ.
    """
    for key in keys:
        found = {str(result.provenance.get(key, "")): result.row.label for result in results}
        if len(found) > 1:
            (first, one), (second, other) = list(found.items())[:2]
            raise VaevqMedError(
                f"{one} and {other}: found evaluations of different {key} ({first[:19]} and {second[:19]}), expected "
                "one; remove their evaluation folders and run again"
            )


def _sentence(test: PairedTest, figure: str, titles: Mapping[str, str]) -> str:
    pair = f"{figure}: {titles[test.best]} over {titles[test.next]}, mean difference"
    head = f"{pair} {test.difference:+.4g} over {test.n} {test.unit if test.n != 1 else test.unit[:-1]}"
    value = "no p-value" if test.p_value is None else f"Wilcoxon signed-rank p = {test.p_value:.3g}"
    return f"{head}, {value}{f' ({test.note})' if test.note else ''}."


def _cell(column: Figure, figure: Cell, plus_minus: str) -> str:
    text = column.show(figure.mean)
    if not math.isnan(figure.std):
        text += f" {plus_minus} {column.show(figure.std)}"
    if not math.isnan(figure.low):
        text += f" [{column.show(figure.low)}, {column.show(figure.high)}]"
    return text


def _markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], num_names: int = 1
) -> list[str]:
    """Lines of a table whose first columns are words, and of the notes under it."""
    rule = [*["---"] * num_names, *["---:"] * (len(head) - num_names)]
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    return [*lines, *([""] if notes else []), *(f"- {_markdown_text(note)}" for note in notes)]


def _markdown_text(text: str) -> str:
    for character in "\\|*_<":
        text = text.replace(character, "\\" + character)
    return text


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"},
    }
)


def latex_text(text: str) -> str:
    r"""Text with LaTeX's special characters escaped.

    Example:
        >>> print(latex_text("50 % of vq_gan"))
        50 \% of vq\_gan
    """
    return text.translate(_LATEX)
