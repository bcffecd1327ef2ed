"""What is logged, and where it goes."""

import io
import logging
import sys

import pytest

from deltaserve.server import logs


def test_a_line_goes_to_what_stderr_is_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test runner replaces the stream, and closes the one before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    first, second = io.StringIO(), io.StringIO()
    try:
        monkeypatch.setattr(sys, "stderr", first)
        logs.configure("info", "text")
        logging.getLogger("some.where").info("one")
        assert first.getvalue() == "INFO: one\n"
        first.close()
        monkeypatch.setattr(sys, "stderr", second)
        logging.getLogger("some.where").info("two")
        assert second.getvalue() == "INFO: two\n"
    finally:
        root.handlers[:], root.level = handlers, level
