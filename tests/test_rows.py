import json
import math
import pickle

import pytest

from dist_sft.errors import UserError
from dist_sft.row_fields import BadRow
from dist_sft.rows import CALL_ROLES, ROLES, Conversation, ToolCall, Turn, parse

USER, ANSWER = Turn("user", "2 + 2?"), Turn("assistant", "4")
CALL = ToolCall("get_weather", {"city": "巴黎", "days": 2})
TOOL = {"name": "get_weather", "parameters": {"type": "object"}}


def test_alpaca():
    row = {"instruction": "Add", "input": "2 2", "output": "4"}
    assert parse(row).turns == (Turn("user", "Add", input="2 2"), ANSWER)
    assert parse(row).turns[0].text == "Add\n2 2"
    assert parse({**row, "input": ""}).turns[0].text == "Add"


def test_alpaca_with_system_and_history():
    row = {
        "system": "Be brief.",
        "history": [["1 + 1?", "2"]],
        "instruction": "2 + 2?",
        "output": "4",
    }
    first = (Turn("system", "Be brief."), Turn("user", "1 + 1?"), Turn("assistant", "2"))
    assert parse(row).turns == (*first, USER, ANSWER)


@pytest.mark.parametrize("nothing", [None, math.nan, ""])
def test_empty_cells_of_tables(nothing):
    row = {"instruction": "2 + 2?", "input": nothing, "output": "4", "system": nothing}
    assert parse(row).turns == (USER, ANSWER)
    table = {**row, "messages": None, "conversations": math.nan, "tools": nothing}
    assert parse(table) == Conversation((USER, ANSWER))


def test_messages_with_parts_and_developer():
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "4", "name": None},
    ]
    assert parse({"messages": messages}).turns == (Turn("system", "Be brief."), USER, ANSWER)
    assert parse({"messages": json.dumps(messages)}) == parse({"messages": messages})


@pytest.mark.parametrize("as_text", [True, False])
def test_messages_with_tool_calls(as_text):
    arguments = json.dumps(dict(CALL.arguments)) if as_text else dict(CALL.arguments)
    call = {"id": "x", "type": "function", "function": {"name": CALL.name, "arguments": arguments}}
    tools = [{"type": "function", "function": TOOL}]
    row = {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": {"sky": "蓝"}},
            {"role": "assistant", "content": "4", "tool_calls": None},
        ],
        "tools": json.dumps(tools) if as_text else tools,
    }
    calls, result = Turn("assistant", "", (CALL,)), Turn("tool", '{"sky": "蓝"}')
    assert parse(row) == Conversation((USER, calls, result, ANSWER), tuple(tools))


def test_the_old_function_call_of_openai():
    message = {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": null}'}}
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, message]}
    assert parse(row).turns[1].tool_calls == (ToolCall("f", {"x": None}),)


def test_nulls_of_another_call_are_left_out():
    call = {"name": "f", "arguments": {"x": 1, "of_another_call": None}}
    row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    }
    assert parse(row).turns[1].tool_calls == (ToolCall("f", {"x": 1}),)


def test_weight_zero_is_not_learned():
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "3", "weight": 0},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "weight": 1},
    ]
    assert [t.learned for t in parse({"messages": messages}).turns] == [True, False, True, True]


@pytest.mark.parametrize("role", sorted(ROLES))
def test_sharegpt_roles_of_the_wild(role):
    before = {
        "system": [],
        "user": [],
        "assistant": [("human", "2 + 2?")],
        "tool": [("human", "2 + 2?"), ("function_call", '{"name": "f"}')],
    }[ROLES[role]]
    after = {
        "system": [("human", "2 + 2?"), ("gpt", "4")],
        "user": [("gpt", "4")],
        "assistant": [],
        "tool": [("gpt", "4")],
    }[ROLES[role]]
    pairs = [*before, (role, "some words"), *after]
    row = {"conversations": [{"from": name, "value": value} for name, value in pairs]}
    assert Turn(ROLES[role], "some words") in parse(row).turns
    openai = {"conversations": [{"role": name, "content": value} for name, value in pairs]}
    assert parse(openai) == parse(row)


@pytest.mark.parametrize("role", CALL_ROLES)
def test_sharegpt_calls(role):
    value = json.dumps({"name": CALL.name, "arguments": dict(CALL.arguments)})
    row = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": role, "value": f"[{value}, {value}]"},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "4"},
        ],
    }
    system, calls = Turn("system", "Be brief."), Turn("assistant", "", (CALL, CALL))
    turns = (system, USER, calls, Turn("tool", "sunny"), ANSWER)
    assert parse(row) == Conversation(turns, ({"type": "function", "function": TOOL},))


def test_hermes_writes_calls_as_text():
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    pairs = [("human", "?"), ("gpt", call), ("tool", "sunny"), ("gpt", "4")]
    row = {"conversations": [{"from": name, "value": value} for name, value in pairs]}
    assert parse(row).turns[1] == Turn("assistant", call)


def test_prompt_completion():
    assert parse({"prompt": "2 + 2?", "completion": "4"}).turns == (USER, ANSWER)
    row = {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "completion": [{"role": "assistant", "content": "4"}],
    }
    assert parse(row).turns == (USER, ANSWER)


def test_a_prompt_without_an_answer():
    for row in (
        {"instruction": "2 + 2?"},
        {"messages": [{"role": "user", "content": "2 + 2?"}]},
        {"prompt": "2 + 2?"},
    ):
        assert parse(row, answered=False).turns == (USER,)
        with pytest.raises(BadRow, match="nothing to learn") as caught:
            parse(row)
        assert caught.value.reason == "no_answer"


def test_the_format_by_name():
    row = {"instruction": "2 + 2?", "output": "4", "prompt": "other", "completion": "words"}
    assert parse(row).turns == (USER, ANSWER)
    assert parse(row, "alpaca").turns == (USER, ANSWER)
    assert parse(row, "prompt_completion").turns[0].text == "other"
    with pytest.raises(UserError, match="'csv'; allowed: auto, alpaca, messages, sharegpt"):
        parse(row, "csv")


def _messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _call(**call):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **call}]}


BAD_ROWS = {
    "not_a_row": [["a", "list"]],
    "wrong_columns": [
        {"text": "only text"},
        {},
        {"instruction": None, "output": "4"},
        {"messages": []},
        {"conversations": "[]"},
    ],
    "ambiguous_columns": [{"instruction": "a", "output": "b", **_messages(("user", "a"))}],
    "wrong_role": [
        _messages(("narrator", "Once"), ("assistant", "4")),
        {"conversations": [{"from": None, "value": "x"}]},
    ],
    "bad_turn": [{"messages": ["2 + 2?"]}, {"conversations": ["2 + 2?"]}],
    "bad_turns": [{"messages": 3}],
    "bad_history": [{"instruction": "a", "output": "b", "history": [["only a question"]]}],
    "bad_json": [{"messages": "[{"}, _call(tool_calls="{"), {**_call(content="4"), "tools": "["}],
    "bad_tools": [{**_call(content="4"), "tools": "3"}],
    "bad_tool_call": [
        _call(tool_calls=[{"arguments": {}}]),
        _call(tool_calls=["x"]),
        _call(tool_calls=[{"name": "f", "arguments": "[1]"}]),
    ],
    "bad_weight": [_call(content="4", weight=0.5)],
    "unsupported_field": [_call(content="4", reasoning_content="hm")],
    "not_text": [
        {"instruction": 5, "output": "4"},
        {"instruction": "2 + 2?", "output": 4},
        _messages(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "4")),
        _messages(("user", 5), ("assistant", "4")),
    ],
    "invalid_unicode": [
        {"instruction": "\ud83d", "output": "4"},
        _messages(("user", "a"), ("assistant", "\udc00")),
        _call(tool_calls=[{"name": "f", "arguments": {"x": "\ud83d"}}]),
    ],
    "assistant_first": [
        _messages(("assistant", "Hello"), ("user", "a"), ("assistant", "b")),
        _messages(("system", "Hello"), ("assistant", "b")),
    ],
    "assistant_twice": [_messages(("user", "a"), ("assistant", "b"), ("assistant", "c"))],
    "empty_answer": [
        _messages(("user", "a"), ("assistant", " \n")),
        _messages(("user", "a"), ("assistant", None)),
        {"instruction": "a", "output": " "},
    ],
    "empty_prompt": [
        {"instruction": " ", "output": "4"},
        _messages(("user", ""), ("assistant", "4")),
    ],
    "tool_without_call": [
        _messages(("user", "a"), ("tool", "b"), ("assistant", "c")),
        _messages(("tool", "b"), ("assistant", "c")),
        _messages(("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")),
    ],
    "no_user": [_messages(("system", "a"))],
    "no_answer": [_messages(("user", "a")), {"instruction": "a", "output": None}],
    "unanswered": [_messages(("user", "a"), ("assistant", "b"), ("user", "c"))],
}


@pytest.mark.parametrize(
    ("reason", "row"), [(reason, row) for reason, rows in BAD_ROWS.items() for row in rows]
)
def test_bad_rows(reason, row):
    with pytest.raises(BadRow) as caught:
        parse(row)
    assert caught.value.reason == reason
    message = str(caught.value)
    if reason != "not_a_row":
        assert all(key in message for key in row), message
    if reason == "wrong_columns":
        assert "instruction/input/output" in message
        assert "prompt/completion" in message
    if reason == "wrong_role":
        assert "observation" in message


def test_a_bad_row_crosses_processes():
    error = pickle.loads(pickle.dumps(BadRow("not_text", "the row ...")))
    assert (error.reason, str(error)) == ("not_text", "the row ...")


def test_prompt_completion_without_a_prompt():
    with pytest.raises(BadRow, match="has no prompt"):
        parse({"prompt": None, "completion": "4"}, "prompt_completion")
