"""A conversation with tools as a chat template reads it: by the template's own means, else in words of ours."""

import json
from collections.abc import Sequence
from typing import Any

Turn = dict[str, Any]

INTRODUCTION = """\
You may call functions to help with the user's request. These are the functions, one a line, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments in this form:
<tool_call>
{{"name": <name>, "arguments": <arguments as a JSON object>}}
</tool_call>
The results come back between <tool_response> and </tool_response>."""


def knows_tools(template: Any) -> bool:
    """Whether a chat template takes tools and has the model write calls in the form that ``tools.py`` reads."""
    text = str(template)
    return "tools" in text and "<tool_call>" in text


def in_words(turns: Sequence[Turn], tools: Sequence[Turn]) -> list[Turn]:
    """The same conversation for a template that knows no tools: the system message has them, the user's the results."""
    plain: list[Turn] = []
    for turn in turns:
        if turn["role"] == "tool":
            response = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += "\n" + response
            else:
                plain.append({"role": "user", "content": response, "results": True})
        else:
            calls = [_written(call["function"]) for call in turn.get("tool_calls", ())]
            content = "\n".join(filter(None, [turn["content"], *calls]))
            plain.append({key: turn[key] for key in turn if key != "tool_calls"} | {"content": content})
    plain = [{key: value for key, value in turn.items() if key != "results"} for turn in plain]
    if not tools:
        return plain
    introduction = INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [plain[0] | {"content": f"{plain[0]['content']}\n\n{introduction}"}, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _written(function: Turn) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
