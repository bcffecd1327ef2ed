"""Tools in words, for chat templates that know none."""

from typing import Any

from deltaserve.server.api.tools_prompt import in_words, knows_tools

TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "4C"},
    {"role": "tool", "tool_call_id": "1", "content": "5C"},
    {"role": "assistant", "content": "cold"},
]


def test_the_system_message_introduces_the_tools() -> None:
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        first, *rest = in_words([*system, CONVERSATION[0]], [TOOL])
        assert first["role"] == "system"
        assert first["content"].startswith("Be brief.\n\nYou may call" if system else "You may call")
        assert '\n{"type": "function", "function": {"name": "weather"}}\n' in first["content"]
        assert '{"name": <name>, "arguments"' in first["content"]
        assert rest == [CONVERSATION[0]]


def test_calls_become_text_and_results_the_user_s() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert in_words(CONVERSATION, []) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"{call}\n{call}"},
        {
            "role": "user",
            "content": "<tool_response>\n4C\n</tool_response>\n<tool_response>\n5C\n</tool_response>",
        },
        {"role": "assistant", "content": "cold"},
    ]


def test_which_templates_know_tools() -> None:
    assert knows_tools("{% if tools %}<tool_call>{% endif %}")
    assert not knows_tools("{{ messages }}")
    assert not knows_tools("{% if tools %}[TOOL_CALLS]{% endif %}")
