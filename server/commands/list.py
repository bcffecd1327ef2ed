"""``deltaserve list``: the variants of a running server."""

import json
from datetime import datetime

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from deltaserve.server.client import DEFAULT_URL, AsJson, Url, answer, connected


def command(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the variants that a server has.

    Example: `deltaserve list --url http://127.0.0.1:8000`
    """
    with connected(url) as client:
        variants = answer(client.get("/v1/variants"))["data"]
    if as_json:
        typer.echo(json.dumps(variants, indent=2))
        return
    table = Table("variant", "version", "digest", "size", "tensors", "created", box=None)
    for one in variants:
        created = datetime.fromtimestamp(one["created"]).isoformat(" ")
        size, tensors = decimal(one["size_bytes"]), str(one["tensors_applied"])
        table.add_row(one["id"], str(one["version"]), one["digest"][:12], size, tensors, created)
    Console().print(table)
