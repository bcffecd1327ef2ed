"""The command line: gathers the commands and turns errors into one line."""

from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console

from deltaserve.delta_store.errors import DeltaServeError
from deltaserve.server.commands import keys
from deltaserve.server.version import installed_version

COMMANDS = ("compress", "inspect", "merge", "serve", "push", "list", "remove", "bench")

app = typer.Typer(
    name="deltaserve",
    help="Serve many full fine-tunes of one base model from compressed deltas.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

for _name in COMMANDS:
    app.command(_name)(import_module(f"deltaserve.server.commands.{_name}").command)
app.add_typer(keys.app, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deltaserve {installed_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve many full fine-tunes of one base model from compressed deltas."""


def main() -> None:
    """Run the command line; a DeltaServeError is one line on stderr and exit status 1."""
    try:
        app()
    except DeltaServeError as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
