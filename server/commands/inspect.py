"""``deltaserve inspect``: what an artifact holds."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deltaserve.server.client import AsJson

if TYPE_CHECKING:
    from deltaserve.delta_store.inspect import Inspection


def command(
    file: Annotated[Path, typer.Argument(help="Artifact that deltaserve compress wrote.")], as_json: AsJson = False
) -> None:
    """Show what an artifact holds: its parts by kind, what it was made from and how, and its quality report.

    Example: `deltaserve inspect reviews.safetensors`
    """
    from deltaserve.delta_store.inspect import inspect

    found = inspect(file)
    if as_json:
        rows = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in found.rows]
        typer.echo(json.dumps({**asdict(found), "rows": rows}, indent=2))
        return
    typer.echo("\n".join(f"{name:<26}{value}" for name, value in _fields(found)) + "\n")
    Console().print(_parts(found))


def _fields(found: "Inspection") -> Iterator[tuple[str, str]]:
    yield "digest", found.digest
    yield "format", str(found.format_version)
    yield "base", found.base
    yield "profile", found.profile or "none needed"
    yield "head", "follows the embedding" if found.tied_head else "its own"
    for title, fields in (("made by", found.provenance), ("quality", found.quality or {})):
        for name, value in fields.items():
            yield f"{title}: {name}", value if isinstance(value, str) else json.dumps(value)
    yield "files", ", ".join(found.files) or "none"


def _parts(found: "Inspection") -> Table:
    table = Table("part", "codec", box=None)
    for title in ("tensors", "bytes", "bits a weight"):
        table.add_column(title, justify="right")
    for row in found.rows:
        table.add_row(row.kind, row.codec, str(row.tensors), f"{row.size_bytes:,}", f"{row.bits_per_weight:.4f}")
    for name, size in found.overhead_bytes.items():
        table.add_row(name, "", "", f"{size:,}", "")
    table.add_row("total", "", "", f"{found.size_bytes:,}", "")
    return table
