"""The conversation of a record, in one of three shapes -> messages with role and content, as OpenAI has them.

ShareGPT: a list of {"from", "value"}, perhaps `system` beside it. Alpaca: the fields instruction, input, output,
perhaps system and history (pairs of instruction and answer); messages_field names `instruction`. Which of them a record
is shows in it: messages with role, messages with from, or a text with an answer beside it.
"""

from __future__ import annotations

import json
from typing import Any

from torchtitan.extensions.ingest.bad_records import RecordError
from torchtitan.extensions.ingest.tool_calls import Messages, Tools

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",
}
"""ShareGPT's `from` -> role. The value of function_call is the JSON of a call, or of a list of calls."""

ROLES = ("system", "developer", "user", "tool", "assistant")

SHAREGPT = ("from", "value")
ALPACA = ("input", "output", "system", "history")
"""Fields beside `instruction`."""


def conversation(record: dict[str, Any], field: str, shape: str = "auto") -> tuple[Messages, Tools, str]:
    """Messages and tools of a record, and what it was: openai, sharegpt or alpaca. ValueError says what is wrong.

    shape: messages_format.
    """
    value, found = _as_messages(record, field, shape)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        what = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(
            f"the field {field!r} is {what}, where messages should be: a list of objects with role and content."
        )
    messages = []
    for number, message in enumerate(value, 1):
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number} of {field!r} has the role {role!r}; known are {', '.join(ROLES)}.")
        content = message.get("content")
        texts_only = isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        )
        if not (content is None or isinstance(content, str) or texts_only):
            raise ValueError(
                f"message {number} of {field!r}: its content must be text, or a list of parts with text."
                + (" Write a tool's answer as JSON text." if role == "tool" else "")
            )
        if texts_only:  # templates that know only texts would write the list's spelling
            content = "".join(part["text"] for part in content)
        present = {key: inner for key, inner in message.items() if inner is not None}
        messages.append(present | {"content": "" if content is None else content})
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"the field 'tools' is not JSON: {error}.") from error
    if tools and not isinstance(tools, list):
        raise ValueError(f"the field 'tools' is a {type(tools).__name__}, not a list of tools.")
    return messages, tools or None, found


def _as_messages(record: dict[str, Any], field: str, shape: str) -> tuple[Any, str]:
    """The conversation of a record in OpenAI's form, not checked further, and what it was: openai, sharegpt or alpaca.

    shape: messages_format. RecordError for what fits two shapes, or is not of the one that is asked for.
    """
    value = record[field]
    found = _shape(record, field, value)
    if shape == "alpaca" and isinstance(value, str) and found != shape:
        raise RecordError("missing field", "no field 'output', which has the answer of an Alpaca record.")
    if shape not in ("auto", found):
        raise RecordError("other format", f'messages_format = "{shape}", but {field!r} looks like {found}.')
    if found == "sharegpt":
        return _of_sharegpt(record, field, value), found
    return (_of_alpaca(record, value), found) if found == "alpaca" else (value, found)


def _shape(record: dict[str, Any], field: str, value: Any) -> str:
    if isinstance(value, str) and "output" in record:
        return "alpaca"
    messages = [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []
    by_speaker = [number for number, message in enumerate(messages, 1) if "from" in message]
    by_role = [number for number, message in enumerate(messages, 1) if "role" in message]
    if by_speaker and by_role:
        raise RecordError(
            "two formats",
            f"message {by_speaker[0]} of {field!r} has from, and message {by_role[0]} has role: it cannot be told "
            "which of the two speaks. Write all messages with role and content.",
        )
    return "sharegpt" if by_speaker else "openai"


def _of_sharegpt(record: dict[str, Any], field: str, value: list[Any]) -> Messages:
    messages = []
    for number, message in enumerate(value, 1):
        place = f"message {number} of {field!r}"
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise RecordError("no value", f"{place}: value must be a text, beside from.")
        speaker = message.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            known = ", ".join(SPEAKERS)
            raise RecordError("unknown speaker", f"{place} is from {speaker!r}; known are {known}. Rename it.")
        if "content" in message:
            raise RecordError("two formats", f"{place} has value and content: take one of them out.")
        made = {key: inner for key, inner in message.items() if key not in SHAREGPT}
        made |= {"role": SPEAKERS[speaker], "content": message["value"]}
        if speaker == "function_call":
            made |= {"content": "", "tool_calls": _calls(message["value"], place)}
        messages.append(made)
    return _with_system(record, messages)


def _calls(text: str, place: str) -> list[dict[str, Any]]:
    """The calls of a function_call."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("no call", f"{place}, a function_call, is not JSON: {error}.") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RecordError(
            "no call", f"{place}, a function_call, must be the JSON of an object with name and arguments."
        )
    return [{"type": "function", "function": call} for call in calls]


def _of_alpaca(record: dict[str, Any], instruction: str) -> Messages:
    beside = {name: record.get(name) for name in ALPACA}
    for name in ("input", "output", "system"):
        if not isinstance(beside[name], str | None):
            raise RecordError("wrong type", f"the field {name!r} is a {type(beside[name]).__name__}, not text.")
    history = beside["history"] or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise RecordError("wrong type", "the field 'history' must be a list of pairs of texts: instruction, answer.")
    turns = [*history, [_question(instruction, beside["input"]), beside["output"] or ""]]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return _with_system(beside, messages)


def _question(instruction: str, context: str | None) -> str:
    """Instruction and input, a line break between them if there are both."""
    return "\n".join(text for text in (instruction, context) if text)


def _with_system(beside: dict[str, Any], messages: Messages) -> Messages:
    """The messages behind the system prompt that stands beside them, if one does."""
    system = beside.get("system")
    if not isinstance(system, str) or not system:
        return messages
    if messages and messages[0]["role"] == "system":
        raise RecordError(
            "two system prompts", "system stands beside the conversation and in it: take one of them out."
        )
    return [{"role": "system", "content": system}, *messages]
