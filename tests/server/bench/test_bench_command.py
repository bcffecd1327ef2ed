import json
from pathlib import Path

import pytest
from fake_server import Script, fake_server
from typer.testing import CliRunner

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.cli import app

QUICK = Script(first_s=0.01, every_s=0.001)


def test_json_on_stdout_and_in_a_file_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with fake_server(base=QUICK, tuned=QUICK) as server:
        arguments = ["bench", server.url, "--requests", "6", "--mix", "distinct", "--json", "--save", str(file)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads(file.read_text())
    assert document["setup"]["models"] == ["base", "tuned"], "the models that the server lists, where none are named"
    assert document["setup"]["warmup_requests"] == 2
    assert document["setup"]["endpoint"] == "chat"
    assert "asking" not in document["setup"]
    assert {model: part["outcomes"]["completed"] for model, part in document["per_model"].items()} == {
        "base": 3,
        "tuned": 3,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_named_models_and_prompts_of_a_file(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    options = ["--models", "tuned", "--prompts", str(prompts), "--requests", "3", "--warmup", "0"]
    with fake_server(base=QUICK, tuned=QUICK) as server:
        result = CliRunner().invoke(app, ["bench", server.url, *options, "--concurrency", "1"])
    assert result.exit_code == 0
    asked = [(body["model"], body["messages"][0]["content"]) for body in server.bodies]
    assert asked == [("tuned", "one"), ("tuned", "two"), ("tuned", "one")]


def test_open_loop_with_goodput_and_plot(tmp_path: Path) -> None:
    picture = tmp_path / "run.svg"
    loop = ["--rate", "200", "--burstiness", "0.5", "--requests", "6", "--mix", "rotation"]
    wanted = ["--goodput", "ttft:60000", "--goodput", "e2e:60000", "--prompt-words", "2:5", "--shared-prefix", "3"]
    with fake_server(base=QUICK, tuned=QUICK) as server:
        result = CliRunner().invoke(app, ["bench", server.url, *loop, *wanted, "--json", "--plot", str(picture)])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    setup = document["setup"]
    assert (setup["loop"], setup["rate"], setup["burstiness"], setup["concurrency"]) == ("open", 200.0, 0.5, None)
    assert setup["prompts"] == "prompts of 2 to 5 random words after 3 shared ones"
    assert document["goodput"]["limits_ms"] == {"ttft": 60000.0, "e2e": 60000.0}
    assert (document["goodput"]["requests"], document["goodput"]["share"]) == (6, 1.0)
    assert document["cold_loads"] is None, "this server has no metrics"
    assert "TTFT" in picture.read_text()
    said = [body["messages"][0]["content"].split() for body in server.bodies]
    assert len({tuple(words[:3]) for words in said}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix", "gauss"], "'gauss' is unknown"),
        (["--save", "absent/report.json"], "there is no folder absent"),
        (["--models", ","], "there is no model to ask"),
        (["--prompt-words", "9:8"], "--prompt-words 9:8 is no length"),
        (["--goodput", "fast"], "--goodput fast is no limit"),
        (["--plot", "run.txt"], "--plot run.txt has no known suffix"),
        (["--engine", "base"], "either the address of a server or --engine"),
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(options: list[str], message: str) -> None:
    with fake_server(m=QUICK) as server:
        result = CliRunner().invoke(app, ["bench", server.url, *options])
    assert isinstance(result.exception, OptionError)
    assert message in str(result.exception)
    assert server.sent == []
