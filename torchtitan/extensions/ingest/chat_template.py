"""A model's chat template: the Jinja text in its tokenizer's files that makes one text of a conversation.

It is where Hugging Face keeps it: chat_template.jinja, or `chat_template` in tokenizer_config.json, which may be a list
of named templates; the one for tools can stand in additional_chat_templates/tool_use.jinja. A template gets what
Hugging Face gives it: messages, tools, add_generation_prompt, the spelling of special tokens (bos_token, ...),
raise_exception; whitespace is trimmed around blocks, and it runs in a sandbox. Only strftime_now is missing, which
would put today's date into a corpus; templates that ask whether it is defined then use a date of their own.
`{% generation %}` marks what the model says.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchtitan.datasets.tokenizer import Tokenizer, json_if_present
from torchtitan.tools.errors import UserError

BEGINS, ENDS = "_generation_begins", "_generation_ends"
MARKS = ("\ufdd0", "\ufdd1")
"""Put around what {% generation %} encloses: two characters that Unicode never assigns to text."""


class ChatTemplate:
    """Made by load_chat_template. path: the file it is in. fingerprint: hex, of all that its output depends on."""

    def __init__(self, path: Path, texts: dict[str, str], special: dict[str, str]) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(json.dumps([texts, special], sort_keys=True).encode()).hexdigest()[:16]
        self._special = special
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _as_json  # Jinja's own escapes it for HTML
        environment.globals["raise_exception"] = _refuse
        try:
            self._compiled = {name: environment.from_string(text) for name, text in texts.items()}
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template in {path} is not Jinja: line {error.lineno}: {error.message}."
            ) from error
        self._marked = {
            name
            for name, text in texts.items()
            if any(used.name == BEGINS for used in environment.parse(text).find_all(nodes.Name))
        }

    def has_marks(self, tools: list[Any] | None) -> bool:
        """Whether the template marks what the model says with {% generation %}."""
        return self._name(tools) in self._marked

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, answering: bool = False) -> str:
        """The conversation as text; with answering it ends where the model's answer would begin.

        ValueError if the template refuses the conversation or cannot take it.
        """
        return self._render(messages, tools, answering, ("", ""))

    def render_marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the [start, stop) that {% generation %} encloses in it."""
        parts = self._render(messages, tools, False, MARKS).split(MARKS[0])
        text, spans = parts[0], []
        for part in parts[1:]:
            marked, mark, rest = part.partition(MARKS[1])
            if not mark:
                raise ValueError(f"the chat template in {self.path} has {{% generation %}} in {{% generation %}}.")
            spans.append((len(text), len(text) + len(marked)))
            text += marked + rest
        if text != self.render(messages, tools):
            raise ValueError(
                f"the chat template in {self.path} does something with the text that it marks by {{% generation %}}, "
                "so that marks would change it: take {% generation %} out of the template."
            )
        return text, spans

    def _name(self, tools: list[Any] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._compiled else "default"

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, answering: bool, marks: tuple[str, str]
    ) -> str:
        begin, end = marks
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": answering}
        try:
            return self._compiled[self._name(tools)].render(**self._special, **values, **{BEGINS: begin, ENDS: end})
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template in {self.path} does not take the conversation: {error}") from error


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: its content between two marks, which are variables of the template.

    Variables set inside are not visible outside, as in transformers.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (BEGINS, ENDS)]
        return nodes.Scope([marks[0], *body, marks[1]], lineno=line)


def _as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template in the tokenizer's folder; UserError if there is none."""
    folder = Path(tokenizer.folder)
    config = json_if_present(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    if path.is_file():
        texts: Any = {"default": path.read_text(encoding="utf-8")}
        with_tools = folder / "additional_chat_templates" / "tool_use.jinja"
        texts |= {"tool_use": with_tools.read_text(encoding="utf-8")} if with_tools.is_file() else {}
    else:
        path = folder / "tokenizer_config.json"
        texts = config.get("chat_template")
        if isinstance(texts, str):
            texts = {"default": texts}
        elif isinstance(texts, list):
            texts = {entry["name"]: entry["template"] for entry in texts}
    if not texts or "default" not in texts:
        raise UserError(
            f"Chat data (messages_field of a source) need the model's chat template, and {folder} has none: looked for "
            "chat_template.jinja and for chat_template in tokenizer_config.json. Base models often lack one: copy the "
            "chat_template.jinja of the model's instruct version into that folder, or write one."
        )
    special = {}
    for names in (json_if_present(folder / "special_tokens_map.json"), config):
        for name, token in names.items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str):
                special[name] = content
    for name, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if number is not None and name not in special and any(re.search(rf"\b{name}\b", t) for t in texts.values()):
            spelled = next((text for text, other in tokenizer.special.items() if other == number), "...")
            raise UserError(
                f"The chat template in {path} writes {name}, which neither tokenizer_config.json nor "
                f"special_tokens_map.json in {folder} names, so that the text would lack it, though the token is "
                f'known by its id, {number}. Add "{name}": "{spelled}" to tokenizer_config.json '
                "(if that is missing, make it)."
            )
    return ChatTemplate(path, texts, special)
