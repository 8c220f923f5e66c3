"""Conversations -> tokens, each with its role: the assistant's, which the loss is on, or other.

A record has a list of messages, each with a role and a content (a text, or a list of parts with `text`), perhaps
tool_calls; tools that the model may call stand in a field `tools` beside it. The model's chat template makes a text of
them. The loss is on this part of that text:

- If the template marks what the model says ({% generation %}), the marked part.
- Otherwise the template renders the conversation up to each response, with the prompt for it, and then with the
  response: the response is what the second text adds. The whole conversation must begin with both texts. A template
  that rewrites earlier turns (some remove the thoughts from them) breaks this, and is refused.

Either way a response includes the token that ends the turn: white space that the template puts after its last special
token is not the model's to say, and a mark that ends just before a special token includes it. Only the template may
spell special tokens, so that data cannot forge the end of a turn: conversations that do are left out and counted.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import ASSISTANT, CORPUS_FORMAT
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.chat_template import MARKS, ChatTemplate
from torchtitan.extensions.ingest.encoder import tokenizer_metadata
from torchtitan.extensions.ingest.text import Fields

CHAT_FORMAT = 3
"""Version of the way conversations become tokens and labels; part of the key of their corpora."""

_ROLES = ("system", "developer", "user", "tool", "assistant")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. responses: the characters [start, stop) of what the assistant says. marked: the
    template marks them."""

    text: str
    responses: list[tuple[int, int]]
    marked: bool = False


class ChatEncoder:
    """Conversations to documents, int32[2, n]: tokens, and their roles (assistant, or 0 for other)."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, messages_field: str) -> None:
        self.fields = Fields("messages_field", messages_field, ("tools",))
        self.key = [CORPUS_FORMAT, tokenizer.fingerprint, "chat", CHAT_FORMAT, template.fingerprint, messages_field]
        source = {"messages_field": messages_field, "chat_template": template.fingerprint}
        self.metadata = tokenizer_metadata(tokenizer) | source
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
        # nothing after the last response is trained
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]
        text, responses = self._responses(messages, tools)
        return Rendered(text, responses, self._template.has_marks(tools))

    def encode(self, one: Rendered | None) -> np.ndarray:
        """The document, int32[2, n]; an empty one for what was left out."""
        if one is None:
            return np.empty((2, 0), np.int32)
        ids, spans = self._tokenizer.encode_template(one.text)
        starts = [start for start, _ in spans]
        roles = np.zeros(len(ids), np.int32)
        for start, stop in one.responses:  # a token belongs where it begins
            first, end = bisect_left(starts, start), bisect_left(starts, stop)
            if one.marked and first and spans[first - 1][1] > start:
                first -= 1  # but a token that a mark falls into is trained, as in transformers' assistant masks
            roles[first:end] = ASSISTANT
        return np.stack([np.array(ids, np.int32), roles])

    def closing(self) -> dict[str, Any]:
        """How many conversations were left out since the last call, by reason, for the counts of a unit."""
        left_out, self._left_out = self._left_out, Counter()
        return {"left_out": dict(left_out)}

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
        # If asking for an answer changes nothing, the text may end with the prompt for one, which must not be trained.
        if before == self._template.render(messages[:-1], tools):
            ends_both = os.path.commonprefix([before[::-1], text[::-1]])[::-1]
            # two equal messages have a common end too, but that holds what they say
            if len(self._special.findall(ends_both)) > 1 and messages[-1]["content"].strip() not in ends_both:
                raise ValueError(
                    f"the chat template in {self._template.path} puts the prompt for an answer after every "
                    "conversation, even if none is asked for, so that the loss would be on it: make it depend on "
                    "add_generation_prompt."
                )
        return text, spans

    def _check_written(self, text: str, message: dict[str, Any]) -> None:
        """ValueError unless the text holds what the last message says, white space aside. Some templates leave out a
        chain of thought, or tool calls."""
        for wanted in (message["content"], *_names_called(message.get("tool_calls"))):
            if "".join(wanted.split()) not in "".join(text.split()):
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
    value = record[field]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        what = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(
            f"the field {field!r} is {what}, where messages should be: a list of objects with role and content."
        )
    messages = []
    for number, message in enumerate(value, 1):
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
    for text in _strings([messages, tools]):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not UTF-8: {text[:40]!r} of {field!r} has half of a surrogate pair.") from error
    return messages, tools or None


def _names_called(calls: Any) -> Iterator[str]:
    """The tools' names in tool_calls, with or without the API's `function` around them."""
    for call in calls if isinstance(calls, list) else []:
        for function in (call, call.get("function")) if isinstance(call, dict) else ():
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                yield function["name"]


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
