"""``vaevq-med overlays``: the methods and sizes that a bundle can be run with."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vaevq_med.core.resources import overlay_text, overlay_title, overlays_that_fit


def overlays(
    bundle: Annotated[
        str,
        typer.Option(help="The bundle whose overlays are listed, shared ones that fit it and its own: name or folder."),
    ] = "brats",
    as_json: Annotated[bool, typer.Option("--json", help="Print names, titles, notes and files as JSON.")] = False,
) -> None:
    """List the overlays: what each changes in a bundle's training, and its file."""
    from rich.console import Console
    from rich.table import Table

    from vaevq_med.study.bundle import Bundle

    folder = Bundle.find(bundle).path
    files = {**overlays_that_fit(folder), **overlays_that_fit(folder, "generation")}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "title": overlay_title(path),
            "notes": overlay_text(path, "_notes_", ""),
            "file": str(path),
        }
        for name, path in files.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table("overlay", "title", "about")
    for row in rows:
        title = row["title"] if row["title"] != row["name"] else ""
        table.add_row(row["name"], title, row["notes"].partition(". ")[0])
    Console().print(table)
    typer.echo("train with one: --config_file \"['BUNDLE/train.json','FILE']\"; --json prints the files")
