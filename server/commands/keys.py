"""``deltaserve keys``: make, list and revoke API keys, in a server's store; one that runs follows at once."""

import json
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from deltaserve.server.access.keys import Key, KeyStore, Limits
from deltaserve.server.client import AsJson
from deltaserve.server.settings import Settings

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True, rich_markup_mode="markdown")

Store = Annotated[Path, typer.Option(help="Folder of the server's store.", envvar="DELTASERVE_STORE")]
DEFAULT_STORE: Path = Settings.model_fields["store"].default
Most = Annotated[int | None, typer.Option(min=1, help="The server's default if not given.")]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Whose key it is.")],
    role: Annotated[Literal["infer", "admin"], typer.Option(help="What it may do.")] = "infer",
    models: Annotated[
        str | None, typer.Option(help="Models it may use, comma-separated; team/* is a pattern. All if not given.")
    ] = None,
    requests_per_minute: Most = None,
    tokens_per_minute: Most = None,
    concurrent: Most = None,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it: it cannot be shown again.

    Example: `deltaserve keys create --name alice --models reviews,team/* --requests-per-minute 60`
    """
    allowed = None if models is None else [model.strip() for model in models.split(",") if model.strip()]
    with closing(_opened(store)) as keys:
        key, text = keys.create(name, role, allowed, Limits(requests_per_minute, tokens_per_minute, concurrent))
    typer.echo(json.dumps({"key": text, **_described(key)}) if as_json else text)


@app.command("list")
def list_keys(store: Store = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List all keys, without their texts.

    Example: `deltaserve keys list --store ./store`
    """
    with closing(_opened(store)) as keys:
        found = keys.listed()
    if as_json:
        typer.echo(json.dumps([_described(key) for key in found], indent=2))
        return
    table = Table("id", "name", "role", "models", "created", "revoked", box=None)
    for key in found:
        models = "all" if key.models is None else ",".join(key.models)
        table.add_row(key.id, key.name, key.role, models, _date(key.created), _date(key.revoked))
    Console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `deltaserve keys list` shows it.")],
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Let a key open nothing any more.

    Example: `deltaserve keys revoke 0f3a5c7e9b1d`
    """
    with closing(_opened(store)) as keys:
        key = keys.revoke(key_id)
    typer.echo(json.dumps(_described(key)) if as_json else f"revoked {key.name} ({key.id})")


def _opened(store: Path) -> KeyStore:
    return KeyStore(store.expanduser() / "keys.sqlite3")


def _described(key: Key) -> dict[str, object]:
    models = None if key.models is None else list(key.models)
    about = {"id": key.id, "name": key.name, "role": key.role, "models": models}
    return about | {"created": int(key.created), "revoked": None if key.revoked is None else int(key.revoked)}


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
