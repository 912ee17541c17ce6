"""What every comparison does as a command: run its rows, then write the table over those that finished."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import Workplace
from vaevq_med.study.plan import Budget, Plan
from vaevq_med.study.rows import (
    STATE,
    RowResult,
    RowState,
    check_settings,
    read_plan_record,
    run_row,
    write_plan_record,
)

if TYPE_CHECKING:
    from vaevq_med.study.tables import Table

Update = Callable[[Sequence[RowState]], None]


@dataclass(frozen=True)
class CompareReport:
    """What a comparison ends with.

    Attributes:
        output: folder of everything that was written.
        states: how each row ended.
        files: tables, figures and the record; empty where no row finished.
        table: the table as Markdown; empty where no row finished.
    """

    output: Path
    states: tuple[RowState, ...]
    files: tuple[Path, ...] = ()
    table: str = ""

    @property
    def failed(self) -> list[RowState]:
        """Rows without figures."""
        return [state for state in self.states if not state.done]


@dataclass(frozen=True, kw_only=True)
class Comparison(ABC):
    """Rows of a plan, each in processes of its own, one after the other, and the table over them.

    Args:
        output: folder of everything that is written.
        bundle: name of an installed bundle, or its folder.
        seeds: separated by commas.
        budget: how long each row trains.
        overlays: overlays of every row.
        assignments: ``ID=VALUE`` overrides of every training, ``NAME:ID=VALUE`` of those of that name.
        dataset_dir: data set of images; None takes the bundle's.
        tracking_uri: MLflow; ``none`` turns it off.
        launch: words before ``-m monai.bundle`` of a training, e.g. ``torchrun --nproc_per_node=8``.
        checkpoint: ``best`` or ``last``, which is evaluated.
        published: set the paper's figures beside the measured ones.
        pictures: images of each row or method in the figure; 0 leaves it out.
        on_update: called with all rows whenever one has changed.
    """

    output: Path
    bundle: str = "brats"
    seeds: str = "0"
    budget: Budget = field(default_factory=Budget)
    overlays: tuple[str, ...] = ()
    assignments: tuple[str, ...] = ()
    dataset_dir: Path | None = None
    tracking_uri: str = "sqlite:///mlflow.db"
    launch: str = ""
    checkpoint: str = "best"
    published: bool = False
    pictures: int = 6
    on_update: Update = field(default=lambda states: None)

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """The rows, checked.

        Raises:
            VaevqMedError: an option that cannot be.
        """

    @abstractmethod
    def words(self) -> list[str]:
        """The command line that makes this comparison."""

    @abstractmethod
    def read(self, state: RowState) -> RowResult:
        """The figures of a finished row.

        Raises:
            VaevqMedError: its record is damaged.
        """

    @abstractmethod
    def tabulate(self, results: Sequence[RowResult]) -> Table:
        """The table over finished rows, at least one."""

    @abstractmethod
    def draw(self, table: Table, results: Sequence[RowResult]) -> list[Path]:
        """Draw the figures; their files."""

    def log(self, state: RowState) -> None:  # noqa: B027 (most log nothing)
        """Log what a row found to its own MLflow run, where its commands have not done so."""

    def dry_run(self) -> list[tuple[str, list[str]]]:
        """Label and commands, as shell lines, of every row; nothing is written.

        Raises:
            VaevqMedError: an option that cannot be, or an output folder of other settings.
        """
        check_settings(self.plan)
        return [(row.label, [shlex.join(command) for command in row.commands().values()]) for row in self.plan.rows()]

    def open(self) -> str | None:
        """Check the output folder and note the shared settings; the id of the MLflow run."""
        from vaevq_med.study.tracking import ParentRun

        check_settings(self.plan)
        known = read_plan_record(self.output).get("parent_run_id")
        run_id = known or ParentRun(self.plan).open()
        write_plan_record(self.plan, run_id)
        return run_id

    def run(self) -> CompareReport:
        """Run what is not done, then write tables and figures over what is.

        Raises:
            VaevqMedError: an option that cannot be, or an output folder of other settings.
            BusyError: another call is at work in the output folder.
            KeyboardInterrupt: on Ctrl-C or SIGTERM; the same call goes on.
        """
        check_settings(self.plan)
        with Workplace(self.output, STATE, self.plan.kind, "rows").lock():
            return self._run()

    def _run(self) -> CompareReport:
        from vaevq_med.study.tracking import ParentRun

        parent = ParentRun(self.plan, self.open())
        run_id = parent.open()
        states = [RowState(row) for row in self.plan.rows()]
        try:
            for state in states:
                run_row(state, run_id, lambda: self.on_update(states))
                if state.status == "finished":
                    self.log(state)
            results = [self.read(state) for state in states if state.done]
            files, table, figures = self._write(results)
        except KeyboardInterrupt:
            parent.close("KILLED", {})
            raise
        except Exception:
            parent.close("FAILED", {})
            raise
        report = CompareReport(self.output, tuple(states), tuple(files), table)
        parent.close("FAILED" if report.failed else "FINISHED", figures, files)
        return report

    def _write(self, results: Sequence[RowResult]) -> tuple[list[Path], str, dict[str, float]]:
        if not results:
            return [], "", {}
        table = self.tabulate(results)
        texts = {"table.md": table.markdown(), "table.csv": table.csv(), "table.tex": table.latex()}
        record: dict[str, Any] = {
            "comparison": self.plan.shared(),
            "command": shlex.join(self.words()[1:]),
            "table": table.record(),
            "rows": [
                {
                    "method": result.row.method.name,
                    "seed": result.row.seed,
                    "folder": str(result.row.folder.relative_to(self.output)),
                    "metrics": dict(result.metrics),
                    "provenance": dict(result.provenance),
                    "run": dict(result.run),
                }
                for result in results
            ],
        }
        texts["results.json"] = json.dumps(record, indent=2) + "\n"
        files = []
        for name, text in texts.items():
            atomic_write_text(self.output / name, text)
            files.append(self.output / name)
        return [*files, *self.draw(table, results)], table.markdown(), table.flat()
