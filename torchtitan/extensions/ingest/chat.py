"""Conversations -> tokens, each with its role: the assistant's, which the loss is on, or other.

A record has a list of messages, each with a role and a content (a text, or a list of parts with `text`), perhaps
tool_calls; tools that the model may call stand in a field `tools` beside it. The model's chat template makes a text of
them. The loss is on this part of that text:

- If the template marks what the model says ({% generation %}), the marked part.
- Otherwise the template renders the conversation up to each response, with the prompt for it, and then with the
  response: the response is what the second text adds. The whole conversation must begin with both texts. A template
  that rewrites earlier turns (some remove the thoughts from them) breaks this, and is refused.

Either way a response must end with the token that ends the turn: white space that the template puts after its last
special token is not the model's to say, and a mark that ends just before a special token includes it. Only the template
may spell special tokens, so that data cannot forge the end of a turn: conversations that do are left out and counted.
Calls of tools are given to the template in the form that it takes (tool_calls.py).
"""

from __future__ import annotations

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
from torchtitan.datasets.where import Where
from torchtitan.extensions.ingest.bad_records import BadRecords
from torchtitan.extensions.ingest.chat_shapes import ALPACA, conversation
from torchtitan.extensions.ingest.chat_template import MARKS, ChatTemplate
from torchtitan.extensions.ingest.encoder import tokenizer_metadata
from torchtitan.extensions.ingest.message_weights import WEIGHTS, is_trained, trained_marks
from torchtitan.extensions.ingest.records import Fields
from torchtitan.extensions.ingest.tool_calls import Messages, Tools, called, forms, suits, undecodable

CHAT_FORMAT = 3
"""Version of the way conversations become tokens and labels; part of the key of their corpora."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
"""Keys of a message that hold what the model has thought."""

_SAID = (*THOUGHTS, "tool_calls", "function_call")
"""Keys of a message, beside content, that hold what the model says: a template must write them."""

_BESIDE = ("system", "system_prompt", *WEIGHTS)
"""Fields of a record that others read beside the messages, and that are not read here."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. responses: the characters [start, stop) of what the assistant says. marked: the
    template marks them."""

    text: str
    responses: list[tuple[int, int]]
    marked: bool = False


class ChatEncoder:
    """Conversations to documents, int32[2, n]: tokens, and their roles (assistant, or 0 for other)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages_field: str,
        where: Where | None = None,
        bad: BadRecords | None = None,
        shape: str = "auto",
    ) -> None:
        beside = ("tools", *dict.fromkeys((*ALPACA, *_BESIDE)))
        self.fields = Fields("messages_field", messages_field, beside, where, bad or BadRecords())
        self.key = [CORPUS_FORMAT, tokenizer.fingerprint, "chat", CHAT_FORMAT, template.fingerprint, messages_field]
        self.key += [["where", where.text]] if where else []
        self.key += [["messages_format", shape]] if shape != "auto" else []
        self._shape = shape
        source = {"messages_field": messages_field, "chat_template": template.fingerprint}
        source |= {"messages_format": shape} if shape != "auto" else {}
        self.metadata = tokenizer_metadata(tokenizer) | source | ({"where": where.text} if where else {})
        self._tokenizer = tokenizer
        self._template = template
        spelled = [*sorted(tokenizer.special, key=len, reverse=True), *MARKS]
        self._special = re.compile("|".join(map(re.escape, spelled)))
        added = sorted(tokenizer.added | tokenizer.special, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added or MARKS)))
        self._reset()

    def read(self, record: dict[str, Any]) -> Rendered | None:
        """A record's conversation as text, None for one that is left out; ValueError says what is wrong with it."""
        messages, tools, shape = conversation(record, self.fields.name, self._shape)
        asked = [is_trained(message, number, self.fields.name) for number, message in enumerate(messages, 1)]
        trained = [is_asked is not False for is_asked, m in zip(asked, messages) if _is_answer(m)]
        spelled = forms(messages, tools)
        _check_text(spelled, self.fields.name)
        reasons = [self._reason(*form) for form in spelled]
        if reason := next(filter(None, reasons), "" if any(trained) else "not_trained"):
            self._left_out[reason] += 1
            self._changed += not reasons[0]
            return None
        # nothing after the last response is trained
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        spelled = [(of_form[: last + 1], its_tools) for of_form, its_tools in spelled]
        messages, tools = self._form(spelled)
        text, responses = self._responses(messages, tools)
        # an end that is not marked as special could be spelled by data
        ends = {self._end_of(text, stop) for _, stop in responses} - {"", *self._tokenizer.special}
        if any(end in said for end in ends for said in _strings([messages, tools])):
            self._left_out["special_token"] += 1
            self._changed += 1
            return None
        self._note_not_written(text, messages, tools)
        self._note_not_read(record, asked, messages, read=("system",) if shape != "openai" else ())
        self._shapes[shape] += 1
        self._changed += bool(ends) or messages is not spelled[0][0] or not all(trained)
        if not all(trained):
            responses = self._trained(text, responses, messages, tools, trained)
        return Rendered(text, responses, self._template.has_marks(tools))

    def _form(self, spelled: list[tuple[Messages, Tools]]) -> tuple[Messages, Tools]:
        """The first form of a conversation that the template writes right. ValueError if it takes none."""
        if len(spelled) == 1:
            return spelled[0]
        failures = []
        for form in spelled:
            try:
                if suits(self._template.render(*form), *form):
                    return form
            except ValueError as error:
                failures.append(error)
        if len(failures) == len(spelled):
            raise failures[0]
        if arguments := undecodable(spelled[1][0]):
            raise ValueError(
                f"the arguments of a call are {arguments[:60]!r}, which is not the JSON of an object, and the chat "
                f"template in {self._template.path} would write it in quotes."
            )
        return spelled[1]

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
        """For the counts of a unit, since the last call: how many conversations were left out, by reason; how many have
        a key that the template does not write, by key; and of how many older versions made other tokens."""
        counts = self.fields.where.counts() if self.fields.where else {"left_out": {}}
        counts["left_out"] |= self._left_out
        counts |= {"not_written": dict(self._not_written), "changed": self._changed, "formats": dict(self._shapes)}
        self._reset()
        return counts | {"message_weights": True} | self.fields.bad.counts()

    def _reset(self) -> None:
        self._left_out: Counter[str] = Counter()
        self._not_written: Counter[str] = Counter()
        self._shapes: Counter[str] = Counter()
        self._changed = 0

    def _reason(self, messages: Messages, tools: Tools) -> str:
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            return "no_response"
        if any(not m["content"].strip() and not m.get("tool_calls") for m in answers):
            return "empty_response"
        if any(self._special.search(text) for text in _strings([messages, tools])):
            return "special_token"
        return ""

    def _responses(self, messages: Messages, tools: Tools) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text and the [start, stop) of its responses, with the tokens that end them."""
        if self._template.has_marks(tools):
            text, spans = self._template.render_marked(messages, tools)
            spans = [self._to_end_of_turn(text, *span, may_grow=True) for span in spans if span[0] < span[1]]
            if not spans:
                raise ValueError(f"the chat template in {self._template.path} marks nothing as the assistant's.")
            self._check_written(text, messages[-1])  # what it marks is its choice
            for (_, stop), (following, _) in zip(spans, [*spans[1:], (len(text), 0)]):
                # of several marks in one response the last has its end
                if following == len(text) or self._special.search(text, stop, following):
                    self._check_end(text, stop)
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
            self._check_written(text[slice(*spans[-1])], message)
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
        for _, stop in spans:
            self._check_end(text, stop)
        return text, spans

    def _trained(
        self, text: str, spans: list[tuple[int, int]], messages: Messages, tools: Tools, trained: list[bool]
    ) -> list[tuple[int, int]]:
        """The spans of the messages that are to be trained. ValueError if marks cannot be told apart."""
        if not self._template.has_marks(tools):
            return [span for span, wanted in zip(spans, trained, strict=True) if wanted]
        responses: list[list[tuple[int, int]]] = [[]]  # the marks of a response, of which the last has its end
        for span, (following, _) in zip(spans, [*spans[1:], (len(text), 0)]):
            responses[-1].append(span)
            if self._end_of(text, span[1]) or self._special.search(text, span[1], following):
                responses.append([])
        answers = list(filter(_is_answer, messages))
        if (of_trained := trained_marks(text, list(filter(None, responses)), answers, trained)) is not None:
            return of_trained
        keys = [key for key in WEIGHTS if any(m.get(key) is not None for m in answers)]
        raise ValueError(
            f"a message is not to be trained ({', '.join(keys)}), but it cannot be told which marks of the chat "
            f"template in {self._template.path} are of it. Let the template mark each message of the assistant "
            "whole, or take the key out of the messages."
        )

    def _check_written(self, text: str, message: dict[str, Any]) -> None:
        """ValueError unless the text holds what a message of the assistant says, white space aside. Some templates
        leave out a chain of thought, or tool calls."""
        names = [function["name"] for function in called([message]) if isinstance(function.get("name"), str)]
        thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
        for wanted in (message["content"], *names, *thoughts):
            if "".join(wanted.split()) not in "".join(text.split()):
                raise ValueError(
                    f"the chat template in {self._template.path} does not write all that a message of the assistant "
                    f"says: {wanted.strip()[:60]!r} is not in the text. Change the template, or the conversation."
                )

    def _note_not_written(self, text: str, messages: Messages, tools: Tools) -> None:
        """Count the keys of messages that change nothing in the text; ValueError for tools, and for keys that hold what
        the assistant says."""
        keys = {key for m in messages for key in m if _holds(m, key)} - {"role", "content", *WEIGHTS}
        unwritten = keys if keys and self._is_same(text, messages, tools, keys) else set()
        if keys and not unwritten:
            unwritten = {key for key in keys if self._is_same(text, messages, tools, {key})}
        said = [
            key for key in _SAID if key in unwritten and any(_holds_more(m, key) for m in filter(_is_answer, messages))
        ]
        if tools and self._is_same(text, messages, None, set()):
            said.append("tools")
        if said:
            raise ValueError(
                f"the chat template in {self._template.path} does not write {said[0]!r} of the conversation: take a "
                "template that does, or data without it."
            )
        # a template that marks what it trains may leave out the thoughts of earlier responses
        dense = "".join(text.split()) if keys.intersection(THOUGHTS) else ""
        for message in filter(_is_answer, messages):
            unwritten |= {key for key in THOUGHTS if "".join(str(message.get(key) or "").split()) not in dense}
        self._not_written.update(unwritten)

    def _note_not_read(
        self, record: dict[str, Any], asked: list[bool | None], messages: Messages, read: tuple[str, ...]
    ) -> None:
        """Count what stands beside the messages and is not read, and conversations that ask to train other messages
        than the assistant's."""
        self._not_written.update(
            f"{key} beside the messages" for key in _BESIDE if key not in read and _holds(record, key)
        )
        if any(is_asked and not _is_answer(m) for is_asked, m in zip(asked, messages)):
            self._not_written["to be trained, not the assistant's"] += 1

    def _is_same(self, text: str, messages: Messages, tools: Tools, without: set[str]) -> bool:
        """Whether the text would be the same without these keys of messages."""
        fewer = [{key: value for key, value in m.items() if key not in without} for m in messages]
        try:
            return self._template.render(fewer, tools) == text
        except ValueError:
            return False  # the template needs them

    def _end_of(self, text: str, stop: int) -> str:
        """The token of the vocabulary's additions that ends at `stop`, "" for none."""
        start = max(0, stop - max(map(len, self._tokenizer.added), default=0))
        return next((m[0] for m in self._added.finditer(text, start, stop) if m.end() == stop), "")

    def _check_end(self, text: str, stop: int) -> None:
        if not self._end_of(text, stop):
            raise ValueError(
                f"the chat template in {self._template.path} ends a response with {self._tail(text, stop)!r}, "
                "which is no special token of the tokenizer: the model would not learn to stop. Let the template write "
                "one, as eos_token, after each message of the assistant (and inside {% generation %}, if it has that)."
            )

    def _tail(self, text: str, stop: int) -> str:
        """The last 30 characters or so before `stop`, from the beginning of a token of the vocabulary's additions."""
        start = max(0, stop - 30)
        cut = (m.start() for m in self._added.finditer(text, max(0, start - 100), stop) if m.start() < start < m.end())
        return text[next(cut, start) : stop]

    def _to_end_of_turn(self, text: str, start: int, stop: int, may_grow: bool) -> tuple[int, int]:
        last = max(self._added.finditer(text, start, stop), key=re.Match.start, default=None)
        if last and not text[last.end() : stop].strip():
            return start, last.end()
        following = self._special.match(text, stop) if may_grow else None
        return start, following.end() if following else stop


def _is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant"


def _holds(message: dict[str, Any], key: str) -> bool:
    """Whether the message has anything under the key."""
    value = message.get(key)
    return isinstance(value, (bool, int, float)) or bool(value.strip() if isinstance(value, str) else value)


def _holds_more(message: dict[str, Any], key: str) -> bool:
    """Whether it has what _check_written does not look for: thoughts as text may stand there under another key too."""
    return _holds(message, key) and not (key in THOUGHTS and isinstance(message[key], str))


def _check_text(values: Any, field: str) -> None:
    """ValueError if a text in a JSON value is not Unicode."""
    for text in _strings(values):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not UTF-8: {text[:40]!r} of {field!r} has half of a surrogate pair.") from error


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
