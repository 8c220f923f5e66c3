"""Chat templates in the style of published models: what ends a response, calls of tools, and keys that are not written.

The templates are ours; the witness for texts and ids is transformers' apply_chat_template.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT, open_corpus
from torchtitan.datasets.ends_of_turn import ends_of_turn
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.chat_template import load_chat_template
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.planner.data_report import format_report, make_report

ASSETS = Path(__file__).parents[4] / "assets" / "tokenizer"
EOS = "<|end_of_text|>"

USER, ANSWER = {"role": "user", "content": "Is 4 even?"}, {"role": "assistant", "content": "Yes."}
TALK = [USER, ANSWER, {"role": "user", "content": "And 木?"}, {"role": "assistant", "content": "No. \n"}]
THOUGHT = {"role": "assistant", "content": "Yes.", "reasoning_content": "Two and two are four."}

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """
{%- for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
VICUNA = """
{{- 'A chat between a user and an assistant. ' }}
{%- for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
GEMMA = """
{{- bos_token }}
{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """
{{- bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
QWEN3 = """
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content and loop.index0 > last.user %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
DEEPSEEK = """
{{- bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""
LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{{- m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

STYLES = {  # template, its tokens, what ends a response
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama 2": (LLAMA2, [], EOS),
    "llama 3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "vicuna": (VICUNA, [], EOS),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], EOS),
    "qwen 3": (QWEN3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "deepseek": (DEEPSEEK, ["<|User|>", "<|Assistant|>"], EOS),
}

GLM = """
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
HUMAN = """
{%- for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"""
MARKED = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content }}{% endgeneration %}END{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}{% endfor %}"""

ENDLESS = {
    "the next turn's marker": (GLM, ["<|user|>", "<|assistant|>"]),
    "nothing": (HUMAN, []),
    "a text that is no token": (CHATML, ["<|im_start|>"]),
    "vicuna without EOS": (VICUNA.replace("+ eos_token", "+ ' '"), []),
    "llama 2 without EOS": (LLAMA2.replace("+ ' ' + eos_token", ""), ["[INST]", "[/INST]"]),
    "marks, and nothing behind them": (MARKED.replace("END", ""), ["<|im_start|>", "<|im_end|>"]),
    "marks, and a space before the end": (MARKED.replace("END", " <|im_end|>"), ["<|im_start|>", "<|im_end|>"]),
    "marks, and an end for the last alone": (
        MARKED.replace("END", "{% if loop.last %}<|im_end|>{% endif %}"),
        ["<|im_start|>", "<|im_end|>"],
    ),
    "marks, and the next turn's marker": (
        MARKED.replace("END{% else", "{% else").replace("{{- '\\n' }}", ""),
        ["<|im_start|>", "<|im_end|>"],
    ),
}


def assets(folder: Path, template: str, tokens: list[str], special: bool = True) -> Path:
    """The repository's tokenizer with these tokens more, and a chat template."""
    shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    like = content["added_tokens"][0] | {"special": special}
    content["added_tokens"] += [like | {"id": 4096 + i, "content": token} for i, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@cache
def encoder_of(folder: Path) -> ChatEncoder:
    tokenizer = load_tokenizer(folder)
    return ChatEncoder(tokenizer, load_chat_template(tokenizer), "messages")


def trained(folder: Path, record: dict[str, Any]) -> str:
    """The trained tokens as text."""
    encoder = encoder_of(folder)
    ids, roles = encoder.encode(encoder.read(record))
    return load_tokenizer(folder).decode(ids[roles == ASSISTANT].tolist())


@pytest.mark.parametrize("style", STYLES)
def test_every_response_ends_with_the_token_that_ends_a_turn(style: str, tmp_path: Path) -> None:
    template, tokens, end = STYLES[style]
    folder = assets(tmp_path / "assets", template, tokens)
    encoder, tokenizer = encoder_of(folder), load_tokenizer(folder)
    ids, roles = encoder.encode(encoder.read({"messages": TALK}))
    assert ids.tolist() == witness(folder).apply_chat_template(TALK)["input_ids"]
    said = [part.strip() for part in trained(folder, {"messages": TALK}).split(end)]
    assert [part.split("ASSISTANT:")[-1].split("<|Assistant|>")[-1].strip() for part in said] == ["Yes.", "No.", ""]
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": TALK}) + "\n")
    source = Source(name="chat", path=str(chat), messages_field="messages")
    corpus = resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))
    assert [tokenizer.decode([i]) for i in ends_of_turn([corpus], tokenizer)] == [end]


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_an_end_is_refused(kind: str, tmp_path: Path) -> None:
    encoder = encoder_of(assets(tmp_path, *ENDLESS[kind]))
    with pytest.raises(ValueError, match="chat_template.jinja ends a response with .*would not learn to stop"):
        encoder.read({"messages": TALK})


def test_several_marks_in_a_response_have_one_end(tmp_path: Path) -> None:
    template = MARKED.replace(
        "{{ m.content }}{% endgen",
        "{{ m.reasoning_content }}{% endgeneration %}</think>{% generation %}{{ m.content }}{% endgen",
    )
    folder = assets(tmp_path, template.replace("END", "<|im_end|>"), ["<|im_start|>", "<|im_end|>"])
    assert trained(folder, {"messages": [USER, THOUGHT]}) == "Two and two are four.Yes.<|im_end|>"


def test_an_end_that_is_not_marked_special(tmp_path: Path) -> None:
    """It ends a turn all the same; but data may not spell it, and the corpus is another than that of older versions,
    which trained the line break behind it."""
    folder = assets(tmp_path / "assets", CHATML, ["<|im_start|>", "<|im_end|>"], special=False)
    assert trained(folder, {"messages": TALK}) == "Yes.<|im_end|>No. \n<|im_end|>"
    encoder = encoder_of(folder)
    assert encoder.closing()["changed"] == 1
    assert encoder.read({"messages": [USER | {"content": "<|im_end|>"}, ANSWER]}) is None
    assert encoder.closing() == {
        "left_out": {"special_token": 1},
        "not_written": {},
        "changed": 1,
        "message_weights": True,
        "formats": {},
    }


# calls of tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
OBJECT, TEXT = {"city": "Bonn", "über": [1, None]}, '{"city":"Bonn",  "über":[1,null]}'
WRITES = {  # how a template writes the arguments; what it wants
    "tojson": ("{{ c.function.arguments | tojson }}", "object"),
    "either": (
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
        "either",
    ),
    "items": ("{% for k, v in c.function.arguments.items() %}<{{ k }}={{ v | tojson }}>{% endfor %}", "object"),
    "items filter": ("{% for k, v in c.function.arguments | items %}<{{ k }}={{ v | tojson }}>{% endfor %}", "object"),
    "as it is": ("{{ c.function.arguments }}", "text"),
    "joined": ("{{ 'with ' + c.function.arguments }}", "text"),
}
CALLS = """
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}ARGUMENTS{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TOKENS = ["<|im_start|>", "<|im_end|>"]


def calling(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def templated(folder: Path, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return witness(folder).apply_chat_template(messages, tools=tools, tokenize=False)


@cache
def witness(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("writes", WRITES)
def test_arguments_are_given_as_the_template_takes_them(writes: str, tmp_path: Path) -> None:
    """An object and its JSON text train the same; the witness gets what the template wants."""
    how, wants = WRITES[writes]
    folder = assets(tmp_path, CALLS.replace("ARGUMENTS", how), TOKENS)
    spelled = json.dumps(OBJECT, ensure_ascii=False)
    as_text = {"object": OBJECT, "either": TEXT, "text": TEXT}[wants]
    nothing = "{}" if wants == "text" else {}
    cases = [(OBJECT, spelled if wants == "text" else OBJECT), (TEXT, as_text), ("{}", nothing), ({}, nothing)]
    cases += [
        (json.dumps(TEXT), TEXT if wants == "text" else OBJECT),
        *((none, nothing) for none in (None, "", "null")),
    ]
    for given, wanted in cases:
        later = [{"role": "tool", "content": TEXT}, ANSWER]
        for after in ([], later):  # the call is the last response, or one before it
            made = encoder_of(folder).read({"messages": [USER, calling(given), *after]})
            assert made and made.text == templated(folder, [USER, calling(wanted), *after]), (given, wanted)


def test_calls_and_tools_as_json_text(tmp_path: Path) -> None:
    """Whole calls, whole tools and the parameters of a tool; a template that writes a tool as it is gets its text."""
    folder = assets(tmp_path, CALLS.replace("ARGUMENTS", WRITES["tojson"][0]), TOKENS)
    good = calling(OBJECT)
    expected = templated(folder, [USER, good], [WEATHER])
    (call,) = good["tool_calls"]
    function = call["function"] | {"arguments": TEXT}
    calls = [json.dumps([call]), [json.dumps(call)], [call | {"function": json.dumps(function)}]]
    parameters = WEATHER["function"] | {"parameters": json.dumps(WEATHER["function"]["parameters"])}
    tools = [json.dumps([WEATHER]), [json.dumps(WEATHER)], [WEATHER | {"function": parameters}]]
    tools += [[WEATHER | {"function": json.dumps(parameters)}], json.dumps([json.dumps(WEATHER)])]
    for of_message in ([call], *calls):
        for of_record in ([WEATHER], *tools):
            messages = [USER, good | {"tool_calls": of_message}]
            made = encoder_of(folder).read({"messages": messages, "tools": of_record})
            assert made and made.text == expected, (of_message, of_record)
    plain = assets(tmp_path / "plain", CALLS.replace("t | tojson", "t"), TOKENS)
    made = encoder_of(plain).read({"messages": [USER, ANSWER], "tools": [json.dumps(WEATHER)]})
    assert made and made.text == f"<|im_start|>system\n{json.dumps(WEATHER)}<|im_end|>\n" + templated(
        plain, [USER, ANSWER]
    )


def test_a_template_for_tools_stands_beside_the_default(tmp_path: Path) -> None:
    """Where transformers 5 saves it."""
    folder = assets(tmp_path, CHATML, TOKENS)
    (folder / "additional_chat_templates").mkdir()
    with_tools = CALLS.replace("ARGUMENTS", WRITES["tojson"][0])
    (folder / "additional_chat_templates/tool_use.jinja").write_text(with_tools)
    for messages, tools in (([USER, ANSWER], None), ([USER, calling(OBJECT)], [WEATHER])):
        made = encoder_of(folder).read({"messages": messages, "tools": tools})
        assert made and made.text == templated(folder, messages, tools)
        assert ("weather" in made.text) == (tools is not None)


def test_arguments_that_are_no_json(tmp_path: Path) -> None:
    """A template that writes them as they are may have them; one that would write them in quotes may not."""
    plain = assets(tmp_path / "plain", CALLS.replace("ARGUMENTS", WRITES["as it is"][0]), TOKENS)
    assert trained(plain, {"messages": [USER, calling("print('木')")]}) == "weatherprint('木')<|im_end|>"
    quoting = assets(tmp_path / "quoting", CALLS.replace("ARGUMENTS", WRITES["tojson"][0]), TOKENS)
    for arguments in ("print('木')", '{"city": "Bonn"', "Bonn", "7", '{"a": NaN}', "[" * 100_000):
        with pytest.raises(ValueError, match="the arguments of a call are .*which is not the JSON of an object"):
            encoder_of(quoting).read({"messages": [USER, calling(arguments)]})
    with pytest.raises(ValueError, match="Write a tool's answer as JSON text"):
        encoder_of(plain).read({"messages": [USER, calling({}), {"role": "tool", "content": {"a": 1}}, ANSWER]})


def test_json_text_cannot_hide_a_special_token(tmp_path: Path) -> None:
    folder = assets(tmp_path, CALLS.replace("ARGUMENTS", WRITES["tojson"][0]), TOKENS)
    hidden = '{"city": "\\u003c|im_end|>"}'
    assert json.loads(hidden) == {"city": "<|im_end|>"} and "<|im_end|>" not in hidden
    encoder = encoder_of(folder)
    assert encoder.read({"messages": [USER, calling(hidden)]}) is None
    assert encoder.closing()["left_out"] == {"special_token": 1}
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        encoder.read({"messages": [USER, calling('{"city": "\\ud800"}')]})


# keys that a template does not write


def test_what_the_assistant_says_must_be_written(tmp_path: Path) -> None:
    """Case by case: thoughts, calls, tools; of the last response and of earlier ones."""
    folder = assets(tmp_path, CHATML, TOKENS)
    later = [USER, ANSWER]
    thought, calls = "'Two and two are four.' is not in the text", "'weather' is not in the text"
    for messages, tools, message in (
        ([USER, THOUGHT], None, thought),
        ([USER, THOUGHT, *later], None, thought),
        ([USER, {"role": "assistant", "content": "Yes.", "thinking": "Two and two are four."}], None, thought),
        ([USER, {"role": "assistant", "content": "Yes.", "reasoning": [{"text": "2 + 2"}]}], None, "write 'reasoning'"),
        ([USER, calling({}), {"role": "tool", "content": "4"}, ANSWER], None, calls),
        ([USER, calling({}) | {"content": "Let me look."}], None, calls),
        ([USER, ANSWER | {"function_call": {"name": "weather", "arguments": "{}"}}], None, "write 'function_call'"),
        ([USER, ANSWER], [WEATHER], "write 'tools'"),
        ([USER, ANSWER], json.dumps([WEATHER]), "write 'tools'"),
    ):
        with pytest.raises(
            ValueError, match=f"chat_template.jinja does not write .*{message}" if message[0] == "'" else message
        ):
            encoder_of(folder).read({"messages": messages, "tools": tools})
    qwen = assets(tmp_path / "qwen", QWEN3, TOKENS)
    twice = THOUGHT | {"reasoning": THOUGHT["reasoning_content"]}  # some interfaces return both
    for message in (THOUGHT, twice, THOUGHT | {"thinking": " "}, THOUGHT | {"tool_calls": []}):
        assert trained(qwen, {"messages": [USER, message]}).count("Two and two are four.") == 1
    assert trained(qwen, {"messages": [USER, THOUGHT]}) == "<think>\nTwo and two are four.\n</think>\n\nYes.<|im_end|>"
    with pytest.raises(ValueError, match="writes what comes before a response in another way"):
        encoder_of(qwen).read({"messages": [USER, THOUGHT, USER, THOUGHT]})
    deepseek = assets(tmp_path / "deepseek", *STYLES["deepseek"][:2])
    with pytest.raises(ValueError, match=thought):
        encoder_of(deepseek).read({"messages": [USER, THOUGHT]})


def test_other_keys_that_are_not_written_are_counted(tmp_path: Path) -> None:
    """By conversation, into corpus.json and the report; a key that the template writes is not."""
    template = CHATML.replace("m.role + '\\n'", "m.role + (' ' + m.name if m.name else '') + '\\n'")
    folder = assets(tmp_path / "assets", template, TOKENS)
    tokenizer = load_tokenizer(folder)
    named = [USER | {"name": "Ada", "id": "7"}, ANSWER | {"score": 0}, USER | {"id": "8", "empty": None}, ANSWER]
    records = [
        {"messages": TALK},
        {"messages": named},
        {"messages": [USER, ANSWER | {"score": 2, "weight": 1}], "tools": []},
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(name="chat", path=str(tmp_path / "chat.jsonl"), messages_field="messages", long_document="drop")
    data = Data(sources=(source,), cache_folder=str(tmp_path / "cache"))
    corpus = resolve_source(source, tokenizer, data)
    file = Path(corpus.folder) / "corpus.json"
    content = json.loads(file.read_text())
    assert content["not_written"] == {"id": 1, "score": 2} and content["left_out"] == {}
    report = make_report(Plan(data, [corpus], seq_len=96, rows_per_step=2, steps=2, seed=1), 1, 1, 1.0, 0.0)
    assert report["sources"][0]["conversations_not_written"] == {"id": 1, "score": 2}
    lines = format_report(report)
    assert "does not write 'score' of the messages of 2 conversations of chat" in lines and "older" not in lines
    del content["message_weights"]  # as an older version wrote it
    file.write_text(json.dumps(content))
    report = make_report(Plan(data, [corpus], seq_len=96, rows_per_step=2, steps=2, seed=1), 1, 1, 1.0, 0.0)
    assert "was made by an older version" in format_report(report)


def test_thoughts_of_earlier_turns_that_a_marked_template_leaves_out_are_counted(tmp_path: Path) -> None:
    template = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}
{{- (m.reasoning_content or '') if loop.last else '' }}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
    folder = assets(tmp_path, template, TOKENS)
    encoder = encoder_of(folder)
    first = THOUGHT | {"reasoning_content": "It ends with a 4."}
    assert encoder.read({"messages": [USER, THOUGHT]}) and not encoder.closing()["not_written"]
    assert encoder.read({"messages": [USER, first, USER, THOUGHT]})
    assert encoder.closing()["not_written"] == {"reasoning_content": 1}


def test_a_corpus_is_another_only_if_its_tokens_are(tmp_path: Path) -> None:
    """Checkpoints of older versions go on with corpora that are made again, unless calls are written in another way."""
    folder = assets(tmp_path / "assets", CALLS.replace("ARGUMENTS", WRITES["tojson"][0]), TOKENS)
    tokenizer = load_tokenizer(folder)
    for name, arguments, same in (("object", OBJECT, True), ("text", TEXT, False)):
        chat = tmp_path / f"{name}.jsonl"
        chat.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (TALK, [USER, calling(arguments)])))
        source = Source(name=name, path=str(chat), messages_field="messages")
        corpus = resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))
        of_folder = corpus.folder.rpartition("-")[2]
        assert (corpus.fingerprint == of_folder) == same and corpus.fingerprint.startswith(of_folder)
        assert open_corpus(corpus.folder).fingerprint == corpus.fingerprint
