from pathlib import Path

import pytest

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.prompts import prompts_from_file, random_prompts, word_range


def test_random_prompts_have_the_length_asked_for_and_follow_the_seed() -> None:
    prompts = random_prompts(words=12, count=3, seed=5)
    assert [len(prompt.split()) for prompt in prompts] == [12, 12, 12]
    assert len(set(prompts)) == 3
    assert prompts == random_prompts(words=12, count=3, seed=5) != random_prompts(words=12, count=3, seed=6)


def test_lengths_between_two_bounds() -> None:
    lengths = [len(prompt.split()) for prompt in random_prompts((3, 6), 200, seed=5)]
    assert set(lengths) == {3, 4, 5, 6}


def test_shared_prefix_begins_every_prompt() -> None:
    prompts = [prompt.split() for prompt in random_prompts((2, 4), 20, seed=5, shared_prefix=10)]
    assert len({tuple(words[:10]) for words in prompts}) == 1
    assert len({tuple(words[10:]) for words in prompts}) > 15
    assert {len(words) for words in prompts} == {12, 13, 14}


@pytest.mark.parametrize(("text", "found"), [("32", (32, 32)), ("8:128", (8, 128)), ("5:5", (5, 5))])
def test_length_as_it_is_written(text: str, found: tuple[int, int]) -> None:
    assert word_range(text) == found


@pytest.mark.parametrize("text", ["0", "", "9:8", "-1:4", "a:b", "4:", ":4", "1:2:3"])
def test_bad_length_is_named_with_what_to_write(text: str) -> None:
    with pytest.raises(OptionError, match=rf"--prompt-words {text} is no length; write WORDS or LOW:HIGH"):
        word_range(text)


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
