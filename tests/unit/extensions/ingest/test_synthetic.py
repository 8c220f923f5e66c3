"""Synthetic sources: a reader of the text alone finds each answer, which is what is trained; lengths, bytes, errors."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tests.distributed.harness import ASSETS
from torchtitan.config import JobConfig
from torchtitan.config.data_schema import Data, Source, SyntheticTask
from torchtitan.config.schema import Training
from torchtitan.datasets.corpus import ASSISTANT, Corpus, open_corpus
from torchtitan.datasets.data_checks import check_data
from torchtitan.datasets.loader import micro_batch
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.synthetic_checks import OF_ONE_TEXT
from torchtitan.datasets.tokenizer import LLAMA3_PATTERN, Tokenizer, load_tokenizer
from torchtitan.extensions.ingest.check import check_source
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.synthetic import source as synthetic_source
from torchtitan.extensions.ingest.synthetic.facts import INTRO
from torchtitan.extensions.ingest.synthetic.infill import SENTINELS
from torchtitan.extensions.ingest.tokenize import tokenize_shard, tokenize_source
from torchtitan.extensions.planner.data_report import format_report, make_report
from torchtitan.tools.errors import UserError

TOKENIZER = load_tokenizer(ASSETS)
BYTES_OF_FIM = {spelled: 258 + i for i, spelled in enumerate(SENTINELS[0])}


def write_texts(folder: Path) -> list[str]:
    """Ten texts of paragraphs, with indented lines, long lines, and characters of several bytes, as two files."""
    rng = np.random.default_rng(7)
    texts = []
    for number in range(10):
        paragraphs = []
        for _ in range(60):
            words = ["".join(chr(97 + c) for c in rng.integers(26, size=rng.integers(2, 9))) for _ in range(60)]
            lines = [" ".join(words[i : i + 12]).capitalize() + ".?!"[rng.integers(3)] for i in range(0, 60, 12)]
            joint = (" ", "\n", "\n    ", " – ", " é 漢字。")[rng.integers(5)]
            paragraphs.append(joint.join(lines))
        texts.append(f"Text {number} begins.\n\n" + "\n\n".join(paragraphs) + "\n")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:6]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[6:]))
    return texts


def flat(text: str) -> str:
    return " ".join(text.split())


def body_and_question(prompt: str) -> tuple[str, str]:
    body, _, question = prompt.rpartition("\nQuestion: ")
    return body, question


FACTS = (  # a fact with its value and key, and the question
    (r"The catalogue lists (?P<v>\S+) as the entry for (?P<k>[a-z ]+)\.", r"as the entry for (.+)\?"),
    (r"In the ledger, (?P<k>[a-z ]+) is filed under (?P<v>\S+)\.", r"Under what is (.+) filed in"),
    (r"Whoever asks after (?P<k>[a-z ]+) is shown to box (?P<v>\S+)\.", r"to whoever asks after (.+)\?"),
)


def read_needles(keys: int, values: int, queries: int) -> Callable[[str, list[str]], str]:
    def read(prompt: str, texts: list[str]) -> str:
        body, question = body_and_question(prompt)
        ((told, asked),) = [(told, found[1]) for told, ask in FACTS if (found := re.search(ask, question))]
        facts = [(match["k"], match["v"]) for match in re.finditer(told, body)]
        names = asked.split(" and of ")
        assert len(facts) == keys * values and len({k for k, _ in facts}) == keys and len(names) == queries
        for key, value in facts:  # nowhere else
            assert body.count(value) == 1 and body.count(key) == values and value not in question
        return "; ".join(value for name in names for key, value in facts if key == name)

    return read


def read_variables(prompt: str, texts: list[str]) -> str:
    body, question = body_and_question(prompt)
    held: dict[str, str] = {}
    for name, other, number in re.findall(r"Now (\w+) is set to (?:what (\w+) holds|(\d+))\.", body):
        assert name not in held
        held[name] = held[other] if other else number
    (asked,) = re.findall(r"hold (\d+),", question)
    assert body.count(asked) == 1
    return ", ".join(name for name, number in held.items() if number == asked)


def read_key_value(prompt: str, texts: list[str]) -> str:
    body, question = body_and_question(prompt)
    records = [json.loads(line) for line in body.splitlines() if line.startswith("{")]
    content = {record["id"]: record["content"] for record in records}
    assert len(content) == len(records) > 4
    return "; ".join(content[key] for key in re.findall(r"[0-9a-f-]{36}", question))


def read_common_words(prompt: str, texts: list[str]) -> str:
    body, _ = body_and_question(prompt)
    ranked = Counter(body.split("\n\n")[1].split()).most_common()
    assert len({count for _, count in ranked[:6]}) == 6  # no tie
    return ", ".join(f"{word} {count} times" for word, count in ranked[:5])


def parts_of(body: str, heading: str) -> dict[str, str]:
    pieces = re.split(rf"^{heading} (\S+)\n", body, flags=re.M)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def read_documents(prompt: str, texts: list[str]) -> str:
    body, question = body_and_question(prompt)
    sentence = question.splitlines()[1]
    holders = [name for name, text in parts_of(body, "Document").items() if sentence in text]
    assert len(holders) == 1 and body.count(sentence) == 1
    return holders[0]


def read_quotes(prompt: str, texts: list[str]) -> str:
    body, question = body_and_question(prompt)
    begun = question.splitlines()[1]
    assert body.count(begun) == 1
    after = body[body.index(begun) + len(begun) :]
    return re.split(r"(?<=[.!?])\s|\n|(?<=。)", after)[0].strip()


def read_occurrences(prompt: str, texts: list[str]) -> str:
    body, question = body_and_question(prompt)
    (word,) = re.findall(r'the exact word "(\w+)"', question)
    counts = {name: re.split(r"\W+", text).count(word) for name, text in parts_of(body, "Section").items()}
    return f"{sum(counts.values())} times, in the sections {', '.join(n for n, count in counts.items() if count)}"


def read_chunk_order(prompt: str, texts: list[str]) -> str:
    body, _ = body_and_question(prompt)
    parts = {name: flat(text) for name, text in parts_of(body, "Part").items()}
    (whole,) = [text for text in map(flat, texts) if all(part in text for part in parts.values())]
    assert all(whole.count(part) == 1 for part in parts.values())
    order = sorted(parts, key=lambda name: whole.index(parts[name]))
    assert "".join(parts[n].replace(" ", "") for n in order) in whole.replace(" ", "")
    return ", ".join(order)


def read_paragraph_order(prompt: str, texts: list[str]) -> str:
    body, _ = body_and_question(prompt)
    parts = [part for part in body.split("\n\n")[1:] if part]
    (whole,) = [text for text in texts if all(part in text for part in parts)]
    joints = ("\n\n", "\n")
    after = {p: (joint, q) for p in parts for q in parts for joint in joints if p + joint + q in whole}
    (first,) = {*parts} - {q for _, q in after.values()}
    ordered = first
    while first in after:
        joint, first = after[first]
        ordered += joint + first
    assert len(after) == len(parts) - 1
    return ordered.strip()


READERS: dict[str, Callable[[str, list[str]], str]] = {
    "needle": read_needles(1, 1, 1),
    "needle_keys": read_needles(4, 1, 1),
    "needle_values": read_needles(1, 4, 1),
    "needle_queries": read_needles(4, 1, 3),
    "variables": read_variables,
    "key_value": read_key_value,
    "common_words": read_common_words,
    "documents": read_documents,
    "quotes": read_quotes,
    "occurrences": read_occurrences,
    "chunk_order": read_chunk_order,
    "paragraph_order": read_paragraph_order,
}
TOLERANCE = {"key_value": 80, "occurrences": 160}
"""Tokens by which a document may be shorter than asked; the others 40."""


def make(tmp_path: Path, *tasks: str, **options: Any) -> tuple[Source, Data]:
    chosen: dict[str, Any] = {"make_tokens": 12_000, "lengths": (800, 3000), "train_on": "answer"} | options
    source = Source(name="s", kind="synthetic", tasks=tasks, **chosen)  # type: ignore[arg-type]
    return source, Data(cache_folder=str(tmp_path / "cache"))


def open_made(source: Source, data: Data, tokenizer: Tokenizer = TOKENIZER) -> Corpus:
    return open_corpus(tokenize_source(source, tokenizer, data, 1))


def test_every_task_is_read_here() -> None:
    assert {*READERS, "fill_middle"} == {*get_args(SyntheticTask)} == {*synthetic_source.TASKS, *OF_ONE_TEXT}


@pytest.mark.parametrize("task", READERS)
@pytest.mark.parametrize("grammar", [False, True])
def test_a_reader_finds_the_answer_and_it_alone_is_trained(tmp_path: Path, task: str, grammar: bool) -> None:
    if grammar and task in OF_ONE_TEXT:
        return
    (tmp_path / "texts").mkdir()
    texts = write_texts(tmp_path / "texts")
    path = "" if grammar or task in ("key_value", "common_words") else str(tmp_path / "texts")
    source, data = make(tmp_path, task, path=path)
    corpus = open_made(source, data)
    _, lengths = synthetic_source.lay_out(source)
    assert 12_000 <= lengths.sum() < 12_000 + lengths[-1] and lengths.min() >= 800 and lengths.max() <= 3000
    if task not in OF_ONE_TEXT:
        assert len(corpus) == len(lengths)
        short = lengths - corpus.lengths
        assert short.min() >= 0 and short.max() <= TOLERANCE.get(task, 40), short
    assert corpus.lengths.min() >= 700 and corpus.lengths.max() <= 3000
    for index in range(len(corpus)):
        ids, trained = corpus.document(index).tolist(), corpus.roles(index) == ASSISTANT
        assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
        begin = int(np.argmax(trained))
        assert trained[begin:].all() and not trained[:begin].any() and begin
        prompt, answer = TOKENIZER.decode(ids[1:begin]), TOKENIZER.decode(ids[begin:-1])
        expected = READERS[task](prompt, texts)
        assert answer.strip() == expected
        assert ids[1:begin] == TOKENIZER.encode(prompt)  # as if it had been tokenized in one go


QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.mark.parametrize("pattern", [LLAMA3_PATTERN, QWEN_PATTERN])
def test_tokens_are_those_of_the_whole_text(tmp_path: Path, pattern: str) -> None:
    """Of tokenizers that divide text by the patterns of Llama 3 and Qwen2.5; the answer of a prompt is apart."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    (tmp_path / "texts").mkdir()
    texts = write_texts(tmp_path / "texts")
    library = tokenizers.Tokenizer(models.BPE())
    divide = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([divide, as_bytes])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    library.train_from_iterator([texts[0], INTRO * 9, "\n\n.\n\n Question: Which?\nAnswer:\n" * 9], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    tasks = [task for task in READERS if task not in ("key_value", "common_words")]
    source, data = make(tmp_path, *tasks, path=str(tmp_path / "texts"), make_tokens=60_000, lengths=(3000,))
    corpus = open_made(replace(source, train_on="all"), data, tokenizer)
    for index in range(len(corpus)):
        ids = corpus.document(index)[1:-1].tolist()
        assert ids == tokenizer.encode(tokenizer.decode(ids))


def test_all_tokens_are_trained_unless_asked_otherwise(tmp_path: Path) -> None:
    source, data = make(tmp_path, "needle")
    only, every = open_made(source, data), open_made(replace(source, train_on="all"), data)
    assert not every.has_roles and only.has_roles and len(only) == len(every)
    assert all(np.array_equal(only.document(i), every.document(i)) for i in range(len(only)))
    assert open_made(replace(source, seed=1), data).document(0).tolist() != only.document(0).tolist()


def test_shares_of_tasks_are_those_of_tokens(tmp_path: Path) -> None:
    shares = {"needle": 6.0, "key_value": 3.0, "variables": 1.0}
    source, _ = make(tmp_path, *shares, task_shares=tuple(shares.values()), make_tokens=10**7)
    tasks, lengths = synthetic_source.lay_out(source)
    for task, share in enumerate(shares.values()):
        assert abs(lengths[tasks == task].sum() - share / 10 * lengths.sum()) <= 2 * 3000
    logs = np.log(lengths)
    assert abs(logs.mean() - (np.log(800) + np.log(3000)) / 2) < 0.02


def test_the_bytes_do_not_depend_on_processes_or_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_source, "UNIT_TOKENS", 3000)
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    source, data = make(tmp_path, "needle", "occurrences", "chunk_order", path=str(tmp_path / "texts"))
    made = []
    for number, processes in enumerate((1, 3)):
        there = replace(data, cache_folder=str(tmp_path / str(number)))
        made.append(tokenize_source(source, TOKENIZER, there, processes))
    there = replace(data, cache_folder=str(tmp_path / "shards"))
    assert tokenize_shard(source, TOKENIZER, there, 1, 2, 1) is None  # the rest is made by another process
    made.append(tokenize_source(source, TOKENIZER, there, 1))
    first, *others = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in made]
    assert len([name for name in first if name.endswith(".arrow")]) > 3
    assert all(other == first for other in others)
    assert json.loads(first["corpus.json"])["synthetic"]["tasks"] == dict.fromkeys(source.tasks, 1.0)
    with (tmp_path / "texts" / "b.jsonl").open("a") as file:  # another haystack, another corpus
        file.write('{"text": "more"}\n')
    assert tokenize_source(source, TOKENIZER, replace(data, cache_folder=str(tmp_path / "0"))) != made[0]


def test_text_that_is_gone_is_not_needed_and_no_other_source_takes_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    source, data = make(tmp_path, "needle", path=str(tmp_path / "texts"))
    made = resolve_source(source, TOKENIZER, data)
    assert check_source(source, TOKENIZER, data, 1)[1] == ""
    for file in (tmp_path / "texts").iterdir():
        file.unlink()
    assert resolve_source(source, TOKENIZER, data).folder == made.folder
    for other in (replace(source, seed=1), Source(name="s", path=source.path)):
        with pytest.raises(UserError, match="other options: .*synthetic"):
            resolve_source(other, TOKENIZER, data)


def fim_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode()

    return replace(tokenizer, vocab_size=261, added=BYTES_OF_FIM, _decode=decode)


def test_a_text_with_its_middle_at_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "texts").mkdir()
    texts = write_texts(tmp_path / "texts")
    spelled = "A text that spells <|fim_suffix|> is not used. " * 100
    (tmp_path / "texts" / "c.jsonl").write_text(json.dumps({"text": spelled}) + "\n")
    pre, suf, mid = BYTES_OF_FIM.values()
    for spm in (0.0, 1.0):
        source, data = make(tmp_path, "fill_middle", path=str(tmp_path / "texts"), fim_rate=1.0, fim_spm_rate=spm)
        corpus = open_made(replace(source, make_tokens=80_000), data, fim_tokenizer(tokenizer))
        assert corpus.lengths.min() >= 700 and corpus.lengths.max() <= 3000
        shares = []
        for index in range(len(corpus)):
            ids, trained = corpus.document(index), corpus.roles(index) == ASSISTANT
            assert (ids[0], ids[-1]) == (256, 257) and [int((ids == one).sum()) for one in (pre, suf, mid)] == [1, 1, 1]
            middle = bytes(ids[trained][:-1].tolist())
            inner = ids[1:-1].tolist()
            at_suf, at_mid = inner.index(suf), inner.index(mid)
            assert inner[0] == pre and bytes(inner[at_mid + 1 :]).endswith(middle)
            if spm:
                assert at_suf == 1
                suffix, prefix = inner[at_suf + 1 : at_mid], inner[at_mid + 1 : len(inner) - len(middle)]
            else:
                prefix, suffix = inner[1:at_suf], inner[at_suf + 1 : at_mid]
                assert inner[at_mid + 1 :] == list(middle)
            whole = (bytes(prefix) + middle + bytes(suffix)).decode()
            assert any(whole in text for text in texts) and "fim_suffix" not in whole
            shares.append(len(middle) / len(whole.encode()))
        assert 0.2 < np.mean(shares) < 0.46  # of two uniform cuts a third is between them
    some = replace(source, train_on="all", fim_rate=0.5, make_tokens=150_000)
    mixed = open_made(some, data, fim_tokenizer(tokenizer))
    filled = [int((mixed.document(i) == mid).sum()) for i in range(len(mixed))]
    assert {*filled} == {0, 1} and 0.3 < np.mean(filled) < 0.7


def test_markers_of_fill_middle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    source, data = make(tmp_path, "fill_middle", path=str(tmp_path / "texts"), fim_rate=1.0)
    named = replace(source, fim_markers=("<PRE>", "<SUF>", "<MID>"))
    with pytest.raises(UserError, match="no tokens for prefix, suffix and middle: give three texts"):
        tokenize_source(source, tokenizer, data)
    with pytest.raises(UserError, match="has tokens for this .*leave fim_markers out"):
        tokenize_source(named, fim_tokenizer(tokenizer), data)
    text = bytes(open_made(named, data, tokenizer).document(0)[1:-1].tolist()).decode()
    assert text.startswith("<PRE>") and text.count("<SUF>") == text.count("<MID>") == 1


OK: dict[str, Any] = {"tasks": ("needle",), "make_tokens": 10**6, "lengths": (1024, 2048)}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "data", "path": "x"}, "only a source with kind"),
    ({"tasks": ()}, "needs tasks"),
    ({"tasks": ("needle", "needle")}, "each once"),
    ({"task_shares": (1.0, 2.0)}, "1 tasks and 2 task_shares"),
    ({"make_tokens": None}, "needs make_tokens"),
    ({"lengths": ()}, "lengths"),
    ({"lengths": (2048, 1024)}, "lengths"),
    ({"lengths": (1024, 4096)}, "at most 2048"),
    ({"tasks": ("chunk_order",)}, "chunk_order needs text that people wrote"),
    ({"tasks": ("key_value",), "path": "x"}, "leave path out"),
    ({"path": "hub:a/b"}, "names the hub"),
    ({"text_field": "body"}, "no path with text"),
    ({"fim_rate": 1.0}, "only the task fill_middle"),
    ({"tasks": ("fill_middle",), "path": "x", "fim_markers": ("a", "b")}, "three texts"),
    ({"tasks": ("fill_middle",), "path": "x", "train_on": "answer"}, "fim_rate = 1"),
    ({"format": "npy", "path": "x"}, "format"),
    ({"messages_field": "messages", "long_document": "drop"}, "messages_field"),
    ({"chunk_length": 1500}, "at most 1500"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_keys_that_have_no_effect_are_refused(options: dict[str, Any], message: str) -> None:
    def config(**keys: Any) -> JobConfig:
        source = Source(**{"name": "s", "kind": "synthetic", **OK, **keys})
        return JobConfig(data=Data(sources=(source,)), training=Training(seq_len=2048))

    check_data(config())
    with pytest.raises(UserError, match=re.escape(message)):
        check_data(config(**options))


@pytest.mark.parametrize("options", [{"packing": "concat"}, {"strategy": "cut_4k"}])
def test_rows_that_would_cut_documents_are_refused(options: dict[str, Any]) -> None:
    source = Source(name="s", kind="synthetic", **(OK | {"lengths": (1024, 8192)}))
    with pytest.raises(UserError, match=r"data.sources\[0\].*question"):
        check_data(JobConfig(data=Data(sources=(source,), **options), training=Training(seq_len=8192)))


def test_what_cannot_be_made_is_said_before_work(tmp_path: Path) -> None:
    source, data = make(tmp_path, "needle", lengths=(64,))
    with pytest.raises(UserError, match="'s', task needle: no document of 62 tokens .*longer"):
        tokenize_source(source, TOKENIZER, data)
    (tmp_path / "short.jsonl").write_text('{"text": "A short one."}\n' * 50)
    source, data = make(tmp_path, "chunk_order", path=str(tmp_path / "short.jsonl"))
    with pytest.raises(UserError, match="task chunk_order: no text at its path has .* give longer text"):
        tokenize_source(source, TOKENIZER, data)
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="task needle: its path holds no text"):
        tokenize_source(make(tmp_path, "needle", path=str(tmp_path / "blank.jsonl"))[0], TOKENIZER, data)


def test_the_report_names_synthetic_sources_with_their_shares(tmp_path: Path, one_process: None) -> None:
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": f"Book {i}. " * 400}) + "\n" for i in range(40)))
    made, _ = make(tmp_path, "needle", make_tokens=30_000, lengths=(1000, 2000), weight=0.3)
    sources = (Source(name="books", path=str(tmp_path / "books.jsonl"), weight=0.7), made)
    data = Data(cache_folder=str(tmp_path / "cache"), sources=sources)
    corpora = [resolve_source(source, TOKENIZER, data) for source in sources]
    plan = Plan(data, corpora, seq_len=2048, rows_per_step=4, steps=10, seed=0)
    report = make_report(plan, 1, 1, 1.0, 1.0)
    assert [bool(s["synthetic"]) for s in report["sources"]] == [False, True]
    labels = np.zeros(2, np.int64)
    for step in range(10):
        batch = micro_batch(plan, step, [0, 1, 2, 3])
        of = np.repeat(batch.source.numpy(), np.diff(batch.cu_documents.numpy()))
        labels += np.bincount(of[batch.labels.numpy() >= 0], minlength=2)
    (line,) = [line for line in format_report(report).splitlines() if "is synthetic" in line]
    share, of_labels = re.findall(r"([\d.]+)% of the", line)
    assert line.startswith("s is synthetic (needle)") and "other tasks" in line
    assert abs(float(of_labels) / 100 - labels[1] / labels.sum()) < 1e-4 and abs(float(share) - 30) < 2
