"""``deltaserve remove``: take a variant off a running server."""

import json
from typing import Annotated

import typer

from deltaserve.server.client import DEFAULT_URL, AsJson, Url, answer, connected, variant_path


def command(
    name: Annotated[str, typer.Argument(help="Name of the variant.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Remove a variant with all its versions; requests that run are finished.

    Example: `deltaserve remove reviews`
    """
    with connected(url) as client:
        removed = answer(client.delete(variant_path(name)))
    typer.echo(json.dumps(removed) if as_json else f"removed {name}")
