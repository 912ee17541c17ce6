"""``vaevq-med compare``, ``ablate`` and ``sweep``: train and evaluate methods under one budget, and tabulate them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.command import CompareReport, Comparison
from vaevq_med.study.plan import (
    ABLATION,
    Bundle,
    Method,
    Plan,
    parse_integers,
    parse_methods,
    parse_overrides,
    with_readouts,
)
from vaevq_med.study.rows import (
    RowResult,
    RowState,
    check_settings,
    read_plan_record,
    read_result,
    run_row,
    write_plan_record,
)

if TYPE_CHECKING:
    from vaevq_med.study.tables import Table

_FIXED = {
    "FSQ": "levels and embedding_dim",
    "IFSQ": "levels and embedding_dim",
    "LFQ": "embedding_dim",
}
"""Quantizers whose K follows from other settings, which a sweep would leave as they are."""


@dataclass(frozen=True, kw_only=True)
class Compare(Comparison):
    """Methods times seeds, each row the real bundle. The arguments of every comparison, and these.

    Args:
        kind: ``compare``; ``ablate``, whose methods are the ablation's rows; or ``sweep``, over ``num_embeddings``.
        methods: overlay names, or ``name=overlay+overlay``, separated by commas.
        num_embeddings: values of K of a sweep, separated by commas.
    """

    kind: str = "compare"
    methods: str = ",".join(ABLATION)
    num_embeddings: str = ""

    @cached_property
    def plan(self) -> Plan:
        """The rows, checked.

        Raises:
            VaevqMedError: an option that cannot be.
        """
        bundle = Bundle.find(self.bundle)
        methods = parse_methods(self.methods, bundle)
        if self.kind == "sweep":
            methods = self._points(bundle, methods)
        for text in self.assignments:
            if self.kind == "sweep" and text.partition("=")[0].split(":")[-1].strip() == "num_embeddings":
                raise VaevqMedError(f"set: found {text!r}, which the sweep sets itself; expected --num-embeddings")
        overrides, methods = parse_overrides(self.assignments, methods)
        methods = with_readouts(methods, bundle, self.overlays, overrides)
        plan = Plan(
            kind=self.kind,
            bundle=bundle,
            methods=methods,
            seeds=parse_integers(self.seeds, "seeds", 0, 2**32 - 1),
            output=self.output,
            budget=self.budget,
            overlays=self.overlays,
            overrides=overrides,
            dataset_dir=self.dataset_dir,
            tracking_uri=self.tracking_uri,
            launch=self.launch,
            checkpoint=self.checkpoint,
        )
        plan.check()
        if self.kind == "sweep":  # sizes that a codebook cannot have
            for row in plan.rows()[: len(methods)]:
                row.build("network_def#quantizer")
        return plan

    def _points(self, bundle: Bundle, methods: Sequence[Method]) -> tuple[Method, ...]:
        """Each method at each K.

        Raises:
            VaevqMedError: a method's codebook does not take its size from ``num_embeddings``, or not from it alone.
        """
        sizes = parse_integers(self.num_embeddings, "num-embeddings", 2)
        for method in methods:
            network = bundle.read("train.json", (*self.overlays, *method.overlays)).get("network_def")
            if not isinstance(network, dict):
                raise VaevqMedError(f"method {method.name}: found network_def {network!r}, expected a tokenizer")
            quantizer = network.get("quantizer")
            kind = str(quantizer.get("_target_", "")).rpartition(".")[2] if isinstance(quantizer, dict) else ""
            if kind in _FIXED:
                raise VaevqMedError(
                    f"method {method.name}: found {kind}, whose K changes together with {_FIXED[kind]}, expected a "
                    "codebook whose K changes alone; name it once a size, with compare and --set"
                )
            if "@num_embeddings" not in json.dumps(quantizer):
                raise VaevqMedError(
                    f"method {method.name}: found a codebook whose size does not follow num_embeddings, expected one "
                    "that does; sweep it by an overlay a size, with compare"
                )
        return tuple(
            Method(
                name=f"{method.name}_k{size}",
                overlays=method.overlays,
                title=f"{method.title}, K = {size:,}",
                overrides={"num_embeddings": str(size)},
                family=method.name,
                num_embeddings=size,
            )
            for method in methods
            for size in sizes
        )

    def words(self) -> list[str]:
        """The command line that makes this comparison."""
        options = {
            "--bundle": self.bundle,
            "--methods": "" if self.kind == "ablate" else self.methods,
            "--num-embeddings": self.num_embeddings,
            "--seeds": self.seeds,
            **self.budget.options(),
            "--dataset-dir": "" if self.dataset_dir is None else str(self.dataset_dir),
            "--output-dir": str(self.output),
            "--tracking-uri": self.tracking_uri,
            "--launch": self.launch,
            "--checkpoint": self.checkpoint,
            "--pictures": str(self.pictures),
        }
        words = [sys.executable, "-m", "vaevq_med.cli.app", self.kind]
        words += [word for name, value in options.items() if value for word in (name, value)]
        words += [word for name in self.overlays for word in ("--overlay", name)]
        words += [word for text in self.assignments for word in ("--set", text)]
        return [*words, *(["--published"] if self.published else [])]

    def script(self) -> str:
        """A SLURM array script with a task a row; notes settings and MLflow run, so that the tasks share them.

        Raises:
            VaevqMedError: an option that cannot be, or an output folder of other settings.
        """
        self.open()
        tasks, processes = self.plan.tasks(), self.plan.processes()
        command = shlex.join(self.words())
        return "\n".join(
            [
                "#!/bin/bash",
                f"#SBATCH --job-name=vaevq-{self.kind}",
                f"#SBATCH --array=0-{len(tasks) - 1}",
                f"#SBATCH --output={self._slurm_log()}",
                "#SBATCH --nodes=1",
                "#SBATCH --ntasks=1",
                f"#SBATCH --gpus-per-task={processes}",
                f"#SBATCH --cpus-per-task={8 * processes}",
                "#SBATCH --time=24:00:00",
                "#SBATCH --signal=B:TERM@120",
                *(f"# task {number}: {', '.join(row.label for row in rows)}" for number, rows in enumerate(tasks)),
                "set -euo pipefail",
                f"cd {shlex.quote(str(Path.cwd()))}",
                f'exec {command} --row "$SLURM_ARRAY_TASK_ID"',
                "# A task that ran out of time goes on where it stood when submitted again. Once all are done, this",
                "# trains nothing more and writes tables and figures:",
                f"# {command}",
                "",
            ]
        )

    def _slurm_log(self) -> str:
        """The log of a task, as ``sbatch`` reads it: quoted for blanks, its own ``%`` doubled.

        Raises:
            VaevqMedError: the folder has a character that no directive can hold.
        """
        folder = str(Path.cwd() / self.output)
        # To sbatch a backslash escapes, and one that is left in the name turns off %A and %a.
        if any(character in folder for character in "\\\n\r"):
            raise VaevqMedError(
                f"output-dir: found {folder!r}, expected one without backslashes and line breaks, for SLURM's logs"
            )
        escaped = folder.replace("%", "%%").replace('"', '\\"')
        return f'"{escaped}/slurm_%A_%a.log"'

    def run_row(self, number: int) -> CompareReport:
        """Run one row that trains and those that decode it, as a task of an array job does.

        Tables are left to :meth:`run`.

        Raises:
            VaevqMedError: there is no such row, or see :meth:`run`.
        """
        tasks = self.plan.tasks()
        if not 0 <= number < len(tasks):
            raise VaevqMedError(f"row: found {number}, expected 0 to {len(tasks) - 1}")
        check_settings(self.plan)
        record = read_plan_record(self.output)
        if not record:
            write_plan_record(self.plan, None)
        states = [RowState(row) for row in tasks[number]]
        for state in states:
            run_row(state, record.get("parent_run_id"), lambda: self.on_update(states))
        return CompareReport(self.output, tuple(states))

    def read(self, state: RowState) -> RowResult:
        """The figures of a finished row.

        Raises:
            VaevqMedError: its record is damaged.
        """
        return read_result(state.row)

    def tabulate(self, results: Sequence[RowResult]) -> Table:
        """The table over finished rows, at least one."""
        from vaevq_med.study.published import load_published
        from vaevq_med.study.tables import make_table

        return make_table(self.plan, results, load_published(self.plan.bundle.name) if self.published else None)

    def draw(self, table: Table, results: Sequence[RowResult]) -> list[Path]:
        """Draw the utilization, a sweep's curves and reconstructions; their files."""
        from vaevq_med.study.figures import reconstructions, sweep_curves, utilization_bars

        files = []
        if utilization_bars(table.methods, self.output / "utilization.png"):
            files.append(self.output / "utilization.png")
        if self.kind == "sweep" and sweep_curves(table.methods, self.output / "sweep.png"):
            files.append(self.output / "sweep.png")
        if self.pictures:
            first = {result.row.method.name: result.row for result in reversed(results)}
            rows = [first[method.name] for method in self.plan.methods if method.name in first]
            reconstructions(rows, self.pictures, self.output / "reconstructions.png")
            files.append(self.output / "reconstructions.png")
        return files
