"""Which deltaserve this is."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version of the installed package, or ``0+checkout`` where only the source tree is there."""
    try:
        return version("deltaserve")
    except PackageNotFoundError:
        return "0+checkout"
