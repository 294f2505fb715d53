"""Rows of any known shape -> one `Conversation`. Knows data formats, nothing of tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dist_sft.errors import UserError
from dist_sft.row_fields import (
    COLUMNS,
    BadRow,
    check_text,
    decode_json,
    has,
    is_absent,
    read_optional_turns,
    read_text,
    read_turns,
    refuse,
    shorten,
)

Role = Literal["system", "user", "assistant", "tool"]

FORMATS = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion")

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
# ShareGPT writes the assistant's calls as turns of their own.
CALL_ROLES = ("function_call", "tool_call")
# Part of what the assistant said. Dropping them would silently change the answer that is learned.
UNSUPPORTED_MESSAGE_KEYS = ("reasoning_content", "reasoning", "thinking", "refusal", "audio")


class ToolCall(NamedTuple):
    """One call of a tool by the assistant; `arguments` is the decoded JSON object."""

    name: str
    arguments: Mapping[str, Any]


class Turn(NamedTuple):
    """What one party said.

    `input` is the second column of an Alpaca row: the alpaca template words it on its own, every
    other template reads `text`. `learned` is false for an assistant turn with `weight: 0`.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    input: str = ""
    learned: bool = True

    @property
    def text(self) -> str:
        """Join content and input as one text."""
        return f"{self.content}\n{self.input}" if self.input else self.content


class Conversation(NamedTuple):
    """The turns of one row, and the JSON schemas of the tools that the assistant may call."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def parse(row: Mapping[str, Any], format: str = "auto", *, answered: bool = True) -> Conversation:
    """Read a row as a conversation.

    `format` is one of `FORMATS`; "auto" decides by the row's columns. With `answered`, as training
    needs it, the conversation has to end with an assistant turn that says something; without it,
    as generation needs it, the answer may be missing.

    Raises `BadRow` for a row that cannot be read, `UserError` for an unknown format.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    if not isinstance(row, Mapping):
        raise BadRow("not_a_row", f"a row must be a JSON object, got {type(row).__name__}")
    kind = _detect(row) if format == "auto" else format
    if kind == "alpaca":
        conversation = _from_alpaca(row)
    elif kind == "messages":
        conversation = _from_messages(row)
    elif kind == "sharegpt":
        conversation = _from_sharegpt(row)
    else:
        conversation = _from_prompt_completion(row)
    _check_order(conversation.turns, row, answered)
    return conversation


def _detect(row: Mapping[str, Any]) -> str:
    """Name the format by the columns that hold something."""
    found = []
    if has(row, "messages"):
        found.append("messages")
    if has(row, "conversations"):
        found.append("sharegpt")
    if has(row, "instruction"):
        found.append("alpaca")
    if has(row, "prompt") and not found:
        # Many Alpaca and chat files carry a rendered `prompt` column besides their own.
        found.append("prompt_completion")
    if len(found) == 1:
        return found[0]
    if found:
        refuse(row, "ambiguous_columns", f"fits several formats ({', '.join(found)}); set format")
    refuse(row, "wrong_columns", f"fits no known format; allowed columns: {COLUMNS}")


def _from_alpaca(row: Mapping[str, Any]) -> Conversation:
    turns = []
    if system := read_text(row, "system", required=False):
        turns.append(Turn("system", system))
    for pair in read_optional_turns(row, "history"):
        if not (
            isinstance(pair, Sequence)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            refuse(row, "bad_history", "history must be a list of [question, answer] pairs of text")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    instruction = read_text(row, "instruction")
    turns.append(Turn("user", instruction, input=read_text(row, "input", required=False)))
    if output := read_text(row, "output", required=False):
        turns.append(Turn("assistant", output))
    return Conversation(tuple(turns), _tools(row))


def _from_messages(row: Mapping[str, Any]) -> Conversation:
    messages = read_turns(row, "messages")
    return Conversation(tuple(_message(row, m) for m in messages), _tools(row))


def _from_sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = []
    if system := read_text(row, "system", required=False):
        turns.append(Turn("system", system))
    for item in read_turns(row, "conversations"):
        if not isinstance(item, Mapping):
            refuse(row, "bad_turn", f"a turn must be an object, got {type(item).__name__}")
        if "from" in item:
            turns.append(
                _message(row, {**item, "role": item["from"], "content": item.get("value")})
            )
        else:
            turns.append(_message(row, item))
    return Conversation(tuple(turns), _tools(row))


def _from_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    turns: list[Turn] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        if is_absent(value):
            if key == "prompt":
                refuse(row, "wrong_columns", f"has no prompt; allowed columns: {COLUMNS}")
        elif isinstance(value, str):
            turns.append(Turn(ROLES[role], read_text(row, key)))
        else:
            turns += [_message(row, message) for message in read_turns(row, key)]
    return Conversation(tuple(turns), _tools(row))


def _message(row: Mapping[str, Any], message: object) -> Turn:
    """Read one message in OpenAI's words: role, content, tool_calls."""
    if not isinstance(message, Mapping):
        refuse(row, "bad_turn", f"a turn must be an object, got {type(message).__name__}")
    name = message.get("role")
    if name in CALL_ROLES:
        return Turn("assistant", "", _calls(row, message.get("content")))
    if not isinstance(name, str) or name not in ROLES:
        allowed = ", ".join((*ROLES, *CALL_ROLES))
        refuse(row, "wrong_role", f"has a turn with role {name!r}; allowed: {allowed}")
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if message.get(key):
            refuse(row, "unsupported_field", f"has a turn with {key!r}: move it into content")
    role = ROLES[name]
    content = _content(row, message.get("content"), role)
    calls = () if role != "assistant" else _message_calls(row, message)
    return Turn(role, content, calls, learned=_weight(row, message) != 0)


def _message_calls(row: Mapping[str, Any], message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    calls = message.get("tool_calls")
    if not is_absent(calls):
        return _calls(row, calls)
    legacy = message.get("function_call")
    return () if is_absent(legacy) else _calls(row, legacy)


def _weight(row: Mapping[str, Any], message: Mapping[str, Any]) -> int:
    """Read OpenAI's per-message weight: 0 keeps an assistant turn from being learned."""
    weight = message.get("weight")
    if is_absent(weight):
        return 1
    if weight not in (0, 1):
        refuse(row, "bad_weight", f"has a turn with weight {weight!r}; allowed: 0, 1")
    return int(weight)


def _content(row: Mapping[str, Any], content: object, role: Role) -> str:
    """Read text, a list of text parts, or nothing; a tool may also answer with JSON."""
    if is_absent(content):
        return ""
    if isinstance(content, str):
        return check_text(row, "content", content)
    if isinstance(content, Sequence) and all(_is_text_part(part) for part in content):
        return check_text(row, "content", "".join(part["text"] for part in content))
    if role == "tool" and isinstance(content, Mapping):
        return check_text(row, "content", json.dumps(content, ensure_ascii=False))
    refuse(
        row,
        "not_text",
        f"has a {role} turn whose content is {shorten(content)}; allowed: text, or a list of "
        '{"type": "text", "text": ...} parts',
    )


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _calls(row: Mapping[str, Any], value: object) -> tuple[ToolCall, ...]:
    """Read tool calls: one or a list, as objects or JSON text, with or without `function`."""
    value = decode_json(row, value, "tool call")
    if not isinstance(value, Sequence):
        value = [value]
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            refuse(row, "bad_tool_call", f"has a tool call without a name: {shorten(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        calls.append(ToolCall(name, _arguments(row, name, arguments)))
    return tuple(calls)


def _arguments(row: Mapping[str, Any], name: str, value: object) -> Mapping[str, Any]:
    arguments = {} if is_absent(value) else decode_json(row, value, "tool call's arguments")
    if not isinstance(arguments, Mapping):
        refuse(row, "bad_tool_call", f"has arguments of {name} that are no JSON object")
    if isinstance(value, Mapping):
        # Tables with one schema for all rows fill the keys of other calls with null.
        arguments = {key: item for key, item in arguments.items() if item is not None}
    check_text(row, "tool call", json.dumps([name, arguments], ensure_ascii=False))
    return arguments


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    value = row.get("tools")
    if is_absent(value) or value == "":
        return ()
    tools = decode_json(row, value, "tools")
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        refuse(
            row, "bad_tools", "tools must be a list of JSON schemas, or such a list as JSON text"
        )
    check_text(row, "tools", json.dumps(tools, ensure_ascii=False, default=str))
    # Chat templates read OpenAI's form; many files hold the bare function.
    return tuple(
        {"type": "function", "function": tool} if "name" in tool else tool for tool in tools
    )


def _check_order(turns: tuple[Turn, ...], row: Mapping[str, Any], answered: bool) -> None:
    """Refuse conversations that nobody could have had."""
    previous: Turn | None = None
    for turn in turns:
        if turn.role == "assistant":
            if previous is None or previous.role == "system":
                refuse(row, "assistant_first", "has an assistant turn that answers nothing")
            if previous.role == "assistant":
                refuse(row, "assistant_twice", "has two assistant turns in a row; join them")
            if not turn.tool_calls and not turn.content.strip():
                refuse(row, "empty_answer", "has an assistant turn without text or tool call")
        elif turn.role == "tool":
            # Hermes files write their calls as text, in the same words as chatml.
            called = previous is not None and (
                previous.role == "tool" or previous.tool_calls or "<tool_call>" in previous.content
            )
            if not called:
                refuse(row, "tool_without_call", "has a tool result without a tool call before it")
        elif turn.role == "user" and not turn.text.strip():
            refuse(row, "empty_prompt", "has a user turn without text")
        previous = turn
    if not any(turn.role == "user" for turn in turns):
        refuse(row, "no_user", "has no user turn")
    if answered and not any(turn.role == "assistant" for turn in turns):
        refuse(row, "no_answer", "has no assistant turn: there is nothing to learn")
    if answered and turns[-1].role != "assistant":
        refuse(row, "unanswered", f"ends with a {turns[-1].role} turn: remove it or answer it")
