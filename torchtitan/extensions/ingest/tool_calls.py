"""Calls of tools in conversations: as JSON objects, or as the JSON text that OpenAI's interface returns.

Most templates want the arguments of a call as an object, which they write as JSON themselves, and would write a text in
quotes, with its own quotes escaped: JSON encoded twice. Some want a text, and would write an object as Python spells it
({'city': 'Bonn'}), or fail. Which kind a template is shows in what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Messages = list[dict[str, Any]]
Tools = list[Any] | None


def forms(messages: Messages, tools: Tools) -> list[tuple[Messages, Tools]]:
    """A conversation's calls and tools as they are; as objects; and with the arguments of the calls as JSON text. Only
    as they are if there is nothing to decode."""
    if not any(message.get("tool_calls") for message in messages) and not any(_texts(messages, tools)):
        return [(messages, tools)]
    decoded = [_with_calls(message, _object) for message in messages]
    as_objects = (decoded, _decoded_tools(tools))
    as_text = ([_with_calls(message, _spelled) for message in messages], as_objects[1])
    # a text that is given stays as it is: another spelling would be other tokens
    return [(messages, tools), as_objects, as_text]


def suits(text: str, messages: Messages, tools: Tools) -> bool:
    """Whether a template has written these calls and tools as JSON, once: texts as they are, and no object as Python
    spells it."""
    dense = "".join(text.split())
    for json_text in _texts(messages, tools):
        if _is_nothing(json_text) or _unwrapped(json_text) != json_text:
            return False  # an empty object is wanted, or the text was encoded twice before
        quoted = (json.dumps(json_text, ensure_ascii=ascii_only) for ascii_only in (False, True))
        if "".join(json_text.split()) not in dense or any(spelling in text for spelling in quoted):
            return False
    for function in called(messages):
        arguments = function.get("arguments", {})
        if arguments is None:
            return False
        if isinstance(arguments, (dict, list)) and str(arguments) in text and str(arguments) != json.dumps(arguments):
            return False
    return True


def undecodable(messages: Messages) -> str | None:
    """The first arguments of a call that are neither an object nor its JSON text."""
    for function in called(messages):
        if not isinstance(_object(function.get("arguments")), (dict, list)):
            return str(function.get("arguments"))
    return None


def called(messages: Messages) -> Iterator[dict[str, Any]]:
    """The calls of all messages, each {"name", "arguments"}, without the interface's `function` around it."""
    for message in messages:
        calls = _decode(message.get("tool_calls"))
        for call in map(_decode, calls if isinstance(calls, list) else []):
            function = _decode(call.get("function", call)) if isinstance(call, dict) else None
            if isinstance(function, dict):
                yield function


def _texts(messages: Messages, tools: Tools) -> Iterator[str]:
    """What a template gets as text, and may have to get as an object: arguments, whole calls, tools."""
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, str):
            yield calls
        for call in calls if isinstance(calls, list) else []:
            yield from _texts_in(call, "arguments")
    for tool in tools or []:
        yield from _texts_in(tool, "parameters")


def _texts_in(value: Any, key: str) -> Iterator[str]:
    """Of a call or a tool: itself, its function or the value of a key in it, whichever is a text."""
    inner = value.get("function", value) if isinstance(value, dict) else value
    inner = inner.get(key) if isinstance(inner, dict) else inner
    if isinstance(inner, str):
        yield inner


def _with_calls(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The message with the arguments of its calls changed; what is around them becomes objects."""
    calls = _decode(message.get("tool_calls"))
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_inner(call, "arguments", change) for call in calls]}


def _with_inner(value: Any, key: str, change: Callable[[Any], Any]) -> Any:
    value = _decode(value)
    if not isinstance(value, dict):
        return value
    if "function" in value:
        return value | {"function": _with_inner(value["function"], key, change)}
    if key in value or key == "arguments":
        return value | {key: change(value.get(key))}
    return value


def _decoded_tools(tools: Tools) -> Tools:
    return tools and [_with_inner(tool, "parameters", _decode) for tool in tools]


def _object(arguments: Any) -> Any:
    """Arguments as an object, {} for none; a text that is not the JSON of an object or a list stays as it is."""
    if _is_nothing(arguments):
        return {}
    value = _decode(arguments)
    return value if isinstance(value, (dict, list)) else arguments


def _spelled(arguments: Any) -> Any:
    """Arguments as JSON text: one that is given stays as it is."""
    if isinstance(arguments, str) and not _is_nothing(arguments):
        return _unwrapped(arguments)
    return json.dumps(_object(arguments), ensure_ascii=False)


def _decode(value: Any) -> Any:
    """What a JSON text holds, also one that was encoded twice; anything else as it is."""
    while isinstance(value, str) and value.strip():
        try:
            value = _parse(value)
        except ValueError:
            break
    return value


def _parse(text: str) -> Any:
    """json.loads; ValueError also for NaN and infinity, which are not JSON, and for what is too deep."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _unwrapped(text: str) -> str:
    """A JSON text as it was before it was encoded as JSON once more; any other text as it is."""
    try:
        inner = _parse(text)
    except ValueError:
        return text
    return _unwrapped(inner) if isinstance(inner, str) and isinstance(_decode(inner), (dict, list)) else text


def _is_nothing(value: Any) -> bool:
    """Whether JSON, or its text, says that there is nothing."""
    value = _decode(value)
    return value is None or isinstance(value, str) and not value.strip()
