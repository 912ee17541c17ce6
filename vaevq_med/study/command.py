"""What every study does as a command: run its rows, then write the table over those that finished."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import OutputFolder
from vaevq_med.study.bundle import tool_words
from vaevq_med.study.file import GeneratorStudy, Study, TokenizerStudy
from vaevq_med.study.generation import GenerationPlan
from vaevq_med.study.plan import Plan, Row
from vaevq_med.study.rows import (
    STATE,
    STUDY,
    RowResult,
    RowState,
    check_settings,
    read_plan_record,
    read_result,
    run_row,
    write_plan_record,
)
from vaevq_med.study.tables import make_table
from vaevq_med.study.tracking import ParentRun, log_to_training

Update = Callable[[Sequence[RowState]], None]


@dataclass(frozen=True)
class StudyReport:
    """What a study ends with.

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


@dataclass(frozen=True)
class RunStudy:
    """The rows of a study, each in processes of its own, one after the other, and the table over them.

    Args:
        study: as its file says.
        on_update: called with all rows whenever one has changed.
    """

    study: Study
    on_update: Update = field(default=lambda states: None)

    @cached_property
    def plan(self) -> Plan:
        """The rows, checked."""
        if isinstance(self.study, GeneratorStudy):
            return GenerationPlan.of(self.study)
        assert isinstance(self.study, TokenizerStudy)
        return Plan.of(self.study)

    @property
    def words(self) -> list[str]:
        """The command line that runs this study, once its output folder holds it."""
        return [*tool_words(), "study", str(self.study.output / STUDY)]

    def dry_run(self) -> list[tuple[str, list[str]]]:
        """Label and commands, as shell lines, of every row, a token store once; nothing is written."""
        check_settings(self.plan)
        seen: set[str] = set()
        rows = []
        for row in self.plan.rows():
            lines = [shlex.join(command) for command in row.commands().values()]
            rows.append((row.label, [line for line in lines if line not in seen]))
            seen.update(lines)
        return rows

    def open(self) -> str | None:
        """Check the output folder and note the study; the id of the MLflow run."""
        check_settings(self.plan)
        run_id = read_plan_record(self.study.output).get("parent_run_id") or ParentRun(self.plan).open()
        write_plan_record(self.plan, run_id)
        return run_id

    def run(self) -> StudyReport:
        """Run what is not done, then write tables and figures over what is.

        Raises:
            VaevqMedError: a field that cannot be, or an output folder of other settings.
            BusyError: another call is at work in the output folder.
            KeyboardInterrupt: on Ctrl-C or SIGTERM; the same call goes on.
        """
        check_settings(self.plan)
        self.plan.check_data()
        with OutputFolder(self.study.output, STATE, self.study.label, "rows").lock():
            return self._run()

    def _run(self) -> StudyReport:
        parent = ParentRun(self.plan, self.open())
        run_id = parent.open()
        states = [RowState(row) for row in self.plan.rows()]
        try:
            for state in states:
                run_row(state, run_id, lambda: self.on_update(states))
                if state.status == "finished" and not self.plan.per_image:
                    self._log(state.row)
            results = [read_result(state.row) for state in states if state.done]
            files, table, figures = self._write(results)
        except KeyboardInterrupt:
            parent.close("KILLED", {})
            raise
        except Exception:
            parent.close("FAILED", {})
            raise
        report = StudyReport(self.study.output, tuple(states), tuple(files), table)
        parent.close("FAILED" if report.failed else "FINISHED", figures, files)
        return report

    def _write(self, results: Sequence[RowResult]) -> tuple[list[Path], str, dict[str, float]]:
        if not results:
            return [], "", {}
        output, table = self.study.output, make_table(self.plan, results)
        record: dict[str, Any] = {
            "comparison": self.plan.shared(),
            "study": self.study.model_dump(mode="json", by_alias=True),
            "command": shlex.join(self.words[1:]),
            "table": table.record(),
            "rows": [
                {
                    "method": result.row.method.name,
                    "seed": result.row.seed,
                    "folder": str(result.row.folder.relative_to(output)),
                    "metrics": dict(result.metrics),
                    "provenance": dict(result.provenance),
                    "run": dict(result.run),
                }
                for result in results
            ],
        }
        if table.against is not None:
            record["reference"] = table.against.record()
        texts = {"table.md": table.markdown(), "table.csv": table.csv(), "table.tex": table.latex()}
        texts["results.json"] = json.dumps(record, indent=2) + "\n"
        for name, text in texts.items():
            atomic_write_text(output / name, text)
        files = [output / name for name in texts]
        from vaevq_med.study.figures import draw

        return [*files, *draw(self.plan, table, results)], table.markdown(), table.flat()

    def _log(self, row: Row) -> None:
        """Log the figures of samples to the run of their generator's training, which knows nothing of them."""
        figures = {f"samples/{name}": float(entry["value"]) for name, entry in read_result(row).metrics.items()}
        log_to_training(self.plan, row.checkpoint, figures)

    def run_task(self, number: int) -> StudyReport:
        """Run one row that trains and those that decode it, as a task of an array job does.

        Tables are left to :meth:`run`.
        """
        tasks = self.plan.tasks()
        if not 0 <= number < len(tasks):
            raise VaevqMedError(f"row or task {number}: expected 0 to {len(tasks) - 1}")
        check_settings(self.plan)
        record = read_plan_record(self.study.output)
        if not record:
            write_plan_record(self.plan, None)
        states = [RowState(row) for row in tasks[number]]
        for state in states:
            run_row(state, record.get("parent_run_id"), lambda: self.on_update(states))
        return StudyReport(self.study.output, tuple(states))

    def script(self) -> str:
        """A SLURM array script with a task a training; notes the study and its MLflow run, which the tasks share."""
        tasks, processes = self.plan.tasks(), self.plan.processes()
        log = self._slurm_log()
        self.open()
        command = shlex.join(self.words)
        return "\n".join(
            [
                "#!/bin/bash",
                f"#SBATCH --job-name=vaevq-{self.study.label}",
                f"#SBATCH --array=0-{len(tasks) - 1}",
                f"#SBATCH --output={log}",
                "#SBATCH --nodes=1",
                "#SBATCH --ntasks=1",
                f"#SBATCH --gpus-per-task={processes}",
                f"#SBATCH --cpus-per-task={8 * processes}",
                "#SBATCH --time=24:00:00",
                "#SBATCH --signal=B:TERM@120",
                *(f"# task {number}: {', '.join(row.label for row in rows)}" for number, rows in enumerate(tasks)),
                "set -euo pipefail",
                f"cd {shlex.quote(str(Path.cwd()))}",
                f'exec {command} --task "$SLURM_ARRAY_TASK_ID"',
                "# A task that ran out of time goes on where it stood when submitted again. Once all are done, this",
                "# trains nothing more and writes tables and figures:",
                f"# {command}",
                "",
            ]
        )

    def _slurm_log(self) -> str:
        """The log of a task, as ``sbatch`` reads it: quoted for blanks, its own ``%`` doubled."""
        folder = str(Path.cwd() / self.study.output)
        # To sbatch a backslash escapes, and one that is left in the name turns off %A and %a.
        if any(character in folder for character in "\\\n\r"):
            raise VaevqMedError(
                f"output: found {folder!r}, expected one without backslashes and line breaks, for SLURM's logs"
            )
        escaped = folder.replace("%", "%%").replace('"', '\\"')
        return f'"{escaped}/slurm_%A_%a.log"'
