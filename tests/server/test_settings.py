"""Settings: read from the environment and flags, refused by name, documented in one table."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.settings import PREFIX, Settings, load

TABLE = Path(__file__).parents[2] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def row(name: str) -> str:
    """A setting's line in the table."""
    field = Settings.model_fields[name]
    flag = "`BASE`" if name == "base" else f"`--{name.replace('_', '-')}`"
    default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
    return f"| `{PREFIX}{name.upper()}` | {flag} | {default} | {field.description} |"


def test_the_table_in_the_documentation_equals_the_fields():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{PREFIX}")]
    assert rows == [row(name) for name in Settings.model_fields]


def test_a_flag_goes_before_the_environment_which_goes_before_the_default(monkeypatch):
    monkeypatch.setenv("DELTASERVE_PORT", "1234")
    monkeypatch.setenv("DELTASERVE_HOST", "0.0.0.0")
    settings = load({"base": "folder/model", "port": "4321", "host": None})
    assert (settings.port, settings.host, settings.max_running) == (4321, "0.0.0.0", 32)


def test_the_base_is_served_under_the_last_part_of_its_path():
    assert load({"base": "folder/model"}).base_name == "model"
    assert load({"base": "folder/model", "served_name": "other"}).base_name == "other"


def test_an_unknown_variable_stops_start_up_and_is_named(monkeypatch):
    monkeypatch.setenv("DELTASERVE_MAX_RUNING", "3")
    with pytest.raises(OptionError, match=r"DELTASERVE_MAX_RUNING.*DELTASERVE_MAX_RUNNING"):
        load({"base": "model"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "eighty"), ("PORT", "65536"), ("DTYPE", "int8"), ("MAX_UPLOAD_BYTES", "0"), ("CONTEXT", "-1")],
)
def test_a_malformed_value_stops_start_up_and_is_named(monkeypatch, name, value):
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(OptionError, match=rf"{PREFIX}{name} = '{value}'"):
        load({"base": "model"})


def test_no_base_is_named_too():
    with pytest.raises(OptionError, match=r"DELTASERVE_BASE \(argument BASE\)"):
        load()


def test_settings_cannot_change():
    settings = load({"base": "model"})
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


def test_uploads_have_a_finite_limit_by_default():
    assert 0 < load({"base": "model"}).max_upload_bytes < 2**40
