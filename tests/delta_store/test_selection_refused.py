"""Searches that make no sense are refused before any work, and nothing is written."""

import json
from pathlib import Path

import pytest
from tiny_models import fine_tuned, save, tiny_llama
from transformers import BertConfig, BertModel

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.selection.select import select
from deltaserve.delta_store.selection.texts import Files
from deltaserve.delta_store.selection.tolerance import Tolerance

pytestmark = pytest.mark.usefixtures("own_cache")
TEN_PERCENT = Tolerance("max_kl", 0.1, relative=True)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(fine_tuned(tiny_llama()), tmp_path_factory.mktemp("fine"), vocab=64)


def conversations(path: Path, count: int) -> Path:
    lines = [{"prompt": f"what is {i}", "answer": f"it is {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"options": {"judge": "output"}}, "the search itself finds q, so judge has no meaning"),
        ({"options": {"unit": "rows", "linear_rank": 2}}, "No method that is searched takes all of: unit, linear_rank"),
        ({"method": "dense", "options": {"drop": 0.5}}, "The method dense has no option drop"),
        ({"method": "lora"}, "lora cannot store a full checkpoint"),
        ({"options": {"codec": "int3"}}, "Unknown codec 'int3'"),
        ({"plot": Path("plot.gif")}, "plot.gif is no kind of plot"),
        ({"tolerance": Tolerance("min_score", 0.5)}, "A score needs a task"),
        ({"files": Files(None, Path("held-out.txt"))}, "none to search on"),
        ({"files": Files(Path("nowhere.txt"), None)}, "Cannot read the text file nowhere.txt"),
    ],
)
def test_a_refusal_comes_before_any_work(
    more: dict[str, object], message: str, base: Path, fine: Path, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"tolerance": TEN_PERCENT, **more}
    with pytest.raises(OptionError, match=message):
        select(base, fine, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


def test_too_little_text_is_refused(base: Path, fine: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="to hold some out"):
        select(base, fine, tmp_path / "out", TEN_PERCENT, files=Files(conversations(tmp_path / "text.jsonl", 2), None))


def test_a_file_that_is_no_journal_is_not_overwritten(base: Path, fine: Path, tmp_path: Path) -> None:
    (tmp_path / "out.search.jsonl").write_text("my notes\n")
    files = Files(conversations(tmp_path / "text.jsonl", 6), None)
    with pytest.raises(OptionError, match="is no journal of a search"):
        select(base, fine, tmp_path / "out", TEN_PERCENT, files=files)
    assert (tmp_path / "out.search.jsonl").read_text() == "my notes\n"


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    sizes = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertModel(sizes)
    base, fine = save(model, tmp_path / "base"), save(fine_tuned(model), tmp_path / "fine")
    with pytest.raises(OptionError, match="BertModel predicts no tokens"):
        select(base, fine, tmp_path / "out", TEN_PERCENT)
