"""Conversations -> tokens, each with the role that it belongs to; the loss is on the assistant's alone.

A record has a list of messages, each with a role and a content (a text, or a list of parts with `text`), perhaps
tool_calls; tools that the model may call stand in a field `tools` beside it. The model's chat template makes a text of
them, and the question is which part of that text the model is to say:

- where the template marks it ({% generation %}), that;
- otherwise it is rendered up to each response with the prompt for one, and with the response: what the second has more
  is the response. Both must be how the whole conversation begins. A template that rewrites earlier turns (some take the
  thoughts out of them) breaks this, and is refused rather than guessed at.

Either way a response goes up to the token that ends the turn: white space that the template puts after its last special
token is not the model's to say, and a mark that ends just before a special token includes it. Only the template may
spell special tokens, so that data cannot forge the end of a turn: conversations that do are left out and counted.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import ASSISTANT, ROLES
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.chat_template import MARKS, ChatTemplate
from torchtitan.extensions.ingest.text import Fields

FORMAT = 3
"""Version of the way conversations become tokens; part of the key of their corpora."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "tool", "assistant": "assistant"}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. parts: [start, stop) of what belongs to a role, and its number; the rest is 0. marked:
    the template says itself which are the assistant's."""

    text: str
    parts: list[tuple[int, int, int]]
    marked: bool = False

    def __len__(self) -> int:
        """Characters."""
        return len(self.text)


class ChatEncoder:
    """Conversations to documents, int32[2, n]: tokens, and the roles that they belong to."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, messages_field: str) -> None:
        self.fields = Fields("messages_field", messages_field, ("tools",))
        self._tokenizer = tokenizer
        self._template = template
        spelled = [*sorted(tokenizer.special, key=len, reverse=True), *MARKS]
        self._special = re.compile("|".join(map(re.escape, spelled)))
        self._left_out: Counter[str] = Counter()

    def read(self, record: dict[str, Any]) -> Rendered | None:
        """A record's conversation as text, None for one that is left out; ValueError says what is wrong with it."""
        messages, tools = _conversation(record, self.fields.name)
        reason = self._reason(messages, tools)
        if reason:
            self._left_out[reason] += 1
            return None
        # what comes after the last response trains nothing
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]
        text, responses = self._responses(messages, tools)
        prompts = _prompt_parts(text, messages, responses)
        parts = sorted([*prompts, *((start, stop, ASSISTANT) for start, stop in responses)])
        return Rendered(text, parts, self._template.has_marks(tools))

    def encode_batch(self, conversations: Sequence[Rendered | None]) -> list[np.ndarray]:
        """The documents, int32[2, n] each; empty ones for what was left out."""
        return [self._encode(one) if one else np.empty((2, 0), np.int32) for one in conversations]

    def closing(self) -> dict[str, Any]:
        """How many were left out since the last call, by reason, to be kept with a unit's counts."""
        left_out, self._left_out = self._left_out, Counter()
        return {"left_out": dict(left_out)}

    def _encode(self, one: Rendered) -> np.ndarray:
        ids, spans = self._tokenizer.encode_template(one.text)
        starts = [start for start, _ in spans]
        roles = np.zeros(len(ids), np.int32)
        for start, stop, role in one.parts:  # a token belongs where it begins
            first, end = bisect_left(starts, start), bisect_left(starts, stop)
            if one.marked and role == ASSISTANT and first and spans[first - 1][1] > start:
                first -= 1  # but for one that a mark stands in, which is trained: transformers' assistant masks
            roles[first:end] = role
        return np.stack([np.array(ids, np.int32), roles])

    def _reason(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            return "no_response"
        if any(not m["content"].strip() and not m.get("tool_calls") for m in answers):
            return "empty_response"
        if any(self._special.search(text) for text in _strings([messages, tools])):
            return "special_token"
        return ""

    def _responses(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text and the [start, stop) of its responses, with the tokens that end them."""
        if self._template.has_marks(tools):
            text, spans = self._template.render_marked(messages, tools)
            spans = [self._to_end_of_turn(text, *span, may_grow=True) for span in spans if span[0] < span[1]]
            if not spans:
                raise ValueError(f"the chat template in {self._template.path} marks nothing as the assistant's.")
            self._check_written(text, messages[-1])  # what it marks is its choice
            return text, spans
        text = self._template.render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template.render(messages[:i], tools, answering=True)
            after = self._template.render(messages[: i + 1], tools)
            if not (after.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise ValueError(
                    f"message {i + 1} of {len(messages)}: the chat template in {self._template.path} writes what comes "
                    "before a response in another way once the conversation goes on, so that it cannot be told which "
                    "tokens are the assistant's. Put {% generation %} and {% endgeneration %} around them in the "
                    "template, or give it conversations with one response each."
                )
            spans.append(self._to_end_of_turn(text, len(before), len(after), may_grow=False))
        self._check_written(text[slice(*spans[-1])], messages[-1])
        # of the last response's, before and text are what is compared: a header behind it is not the model's to say
        if before == self._template.render(messages[:-1], tools):
            ends_both = os.path.commonprefix([before[::-1], text[::-1]])[::-1]
            # two messages that are equal end alike, with what they say
            if len(self._special.findall(ends_both)) > 1 and messages[-1]["content"].strip() not in ends_both:
                raise ValueError(
                    f"the chat template in {self._template.path} puts the prompt for an answer behind every "
                    "conversation, also where none is asked for, so that it would be trained: make it look at "
                    "add_generation_prompt."
                )
        return text, spans

    def _check_written(self, said: str, message: dict[str, Any]) -> None:
        """ValueError unless what the last message says is in the text, white space aside. Some templates leave out a
        chain of thought, or tool calls."""
        for wanted in (message["content"], *_names_called(message.get("tool_calls"))):
            if "".join(wanted.split()) not in "".join(said.split()):
                raise ValueError(
                    f"the chat template in {self._template.path} does not write all that the last message of the "
                    f"assistant says: {wanted.strip()[:60]!r} is not in the text. Change the template, or the "
                    "conversation."
                )

    def _to_end_of_turn(self, text: str, start: int, stop: int, may_grow: bool) -> tuple[int, int]:
        last = max(self._special.finditer(text, start, stop), key=re.Match.start, default=None)
        if last and not text[last.end() : stop].strip():
            return start, last.end()
        following = self._special.match(text, stop) if may_grow else None
        return start, following.end() if following else stop


def _conversation(record: dict[str, Any], field: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages and tools of a record; ValueError says what is wrong with them."""
    found = record[field]
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        what = "an empty list" if found == [] else f"a {type(found).__name__}"
        raise ValueError(
            f"the field {field!r} is {what}, where messages should be: a list of objects with role and content."
        )
    messages = []
    for number, message in enumerate(found, 1):
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            hint = ""
            if "from" in message:
                hint = " These are ShareGPT's from and value: rename them, human to user and gpt to assistant."
            raise ValueError(
                f"message {number} of {field!r} has the role {role!r}; known are {', '.join(_ROLES)}.{hint}"
            )
        content = message.get("content")
        texts_only = isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        )
        if not (content is None or isinstance(content, str) or texts_only):
            raise ValueError(f"message {number} of {field!r}: its content must be text, or a list of parts with text.")
        if texts_only:  # templates that know only texts would write the list's spelling
            content = "".join(part["text"] for part in content)
        there = {key: value for key, value in message.items() if value is not None}
        messages.append(there | {"content": "" if content is None else content})
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"the field 'tools' is no JSON: {error}.") from error
    if tools and not isinstance(tools, list):
        raise ValueError(f"the field 'tools' is a {type(tools).__name__}, not a list of tools.")
    for text in _strings([messages, tools]):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not UTF-8: {text[:40]!r} of {field!r} has half of a surrogate pair.") from error
    return messages, tools or None


def _names_called(calls: Any) -> Iterator[str]:
    """The tools' names in tool_calls, with or without the API's `function` around them."""
    for call in calls if isinstance(calls, list) else []:
        for about in (call, call.get("function")) if isinstance(call, dict) else ():
            if isinstance(about, dict) and isinstance(about.get("name"), str):
                yield about["name"]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _prompt_parts(
    text: str, messages: list[dict[str, Any]], responses: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Where the contents of the other messages stand in the text, outside of the responses.

    For the report's counts by role alone. What a template does not write as it is, is not found and remains 0.
    """
    parts = []
    at = 0
    for message in messages:
        role = ROLES.index(_ROLES[message["role"]])
        if role == ASSISTANT:
            continue
        content = message["content"].strip()
        start = text.find(content, at) if content else -1
        while start >= 0 and (said := _overlapping(responses, start, start + len(content))):
            start = text.find(content, said[1])
        if start >= 0:
            at = start + len(content)
            parts.append((start, at, role))
    return parts


def _overlapping(spans: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    return next((span for span in spans if start < span[1] and stop > span[0]), None)
