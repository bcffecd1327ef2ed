"""The commands of docs/guides/, in their order, as they stand but for the port and searches that are short."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from running_server import running
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.server.settings import load

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
SHORT = {
    "compress": ["--method", "weighted", "--codec", "int4", "--block", "16", "--rank", "32"],
    "push": ["--method", "dense"],
}
"""What leaves a search few points."""


def test_every_command_of_the_guides_works(
    deltaserve: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in this process and the server in a thread of it, which saves a dozen imports of torch."""
    order = re.findall(r"\(([\w-]+\.md)\)", (GUIDES / "README.md").read_text())
    assert {*order, "README.md"} == {guide.name for guide in GUIDES.iterdir()}
    names, url, said = inputs(tmp_path), "", dict.fromkeys(order, "")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        for guide in order:
            for words in commands(guide, names):
                if words[:2] == ["deltaserve", "serve"]:
                    url = stack.enter_context(started(words[2:])).url
                elif words[0] == "deltaserve":
                    where = ["--url", url] if words[1] in ("push", "list") else []
                    code, out, err = deltaserve(*shortened(words[1:]), *where)
                    assert code == 0, (words, err)
                    said[guide] += out
                else:
                    asked = [word.replace("http://127.0.0.1:8000", url) for word in words]
                    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
                    assert done.returncode == 0, (asked, done.stdout, done.stderr)
                    said[guide] += done.stdout + "\n"
    assert '"model":"reviews"' in said["first-fine-tune.md"]
    assert [one["version"] for one in json.loads(said["first-fine-tune.md"].splitlines()[-1])["data"]] == [2, 1]
    assert '"model":"support"' in said["from-lora.md"]
    assert "small: version 1" in said["choose-a-tolerance.md"]
    assert '"status":"succeeded"' in said["full-checkpoint.md"]
    assert '"model":"whole"' in said["full-checkpoint.md"]


def commands(guide: str, names: dict[str, str]) -> Iterator[list[str]]:
    """The words of each command, with ``$NAME`` filled in."""
    blocks = re.findall(r"```sh\n(.*?)```", (GUIDES / guide).read_text(), re.S)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        yield shlex.split(re.sub(r"\$(\w+)", lambda name: names[name[1]], line))


def started(words: list[str]):
    """The server that ``deltaserve serve BASE --flag value ... &`` starts, on a free port."""
    base, *flags, background = words
    assert background == "&"
    given = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(*[iter(flags)] * 2, strict=True)}
    settings = load({"base": base, **given})
    return running(Path(settings.base), settings.folder, served_name=settings.served_name)


def shortened(words: list[str]) -> list[str]:
    """A command whose search has few points, if it searches."""
    if "2%" in words or "--bytes" in words:
        return ["30%" if word == "2%" else word for word in words] + SHORT[words[0]]
    return words


def inputs(folder: Path) -> dict[str, str]:
    """What the guides name."""
    adapter = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")
    words = ("one", "two", "three", "four", "five")
    lines = [{"prompt": f"say {word}", "answer": f"{word} it is"} for word in words * 3]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "BASE": str(save(tiny_llama(), folder / "base", vocab=64)),
        "FINE_TUNED": str(save(fine_tuned(tiny_llama(), scale=0.01), folder / "fine", vocab=64)),
        "ADAPTER": str(folder / "adapter"),
        "TEXTS": str(folder / "texts.jsonl"),
    }
