from pathlib import Path

import pytest

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.prompts import prompts_from_file, random_prompts


def test_random_prompts_have_the_length_asked_for_and_follow_the_seed() -> None:
    prompts = random_prompts(words=12, count=3, seed=5)
    assert [len(prompt.split()) for prompt in prompts] == [12, 12, 12]
    assert len(set(prompts)) == 3
    assert prompts == random_prompts(words=12, count=3, seed=5) != random_prompts(words=12, count=3, seed=6)


def test_file_is_read_line_by_line_and_again_from_the_top(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("erste Frage?\n\n  second\u2028question \r\n", encoding="utf-8")
    assert prompts_from_file(file, 3) == ["erste Frage?", "second\u2028question", "erste Frage?"]


def test_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    with pytest.raises(OptionError, match="has no prompt"):
        prompts_from_file(file, 3)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read prompts from .*absent\.txt"):
        prompts_from_file(tmp_path / "absent.txt", 3)
