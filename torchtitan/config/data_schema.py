"""The tables of a stage's data: [data], and a [[data.sources]] table per source; a part of schema.py, by its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torchtitan.config.keys import Decides, Range

SyntheticTask = Literal[
    "needle",
    "needle_keys",
    "needle_values",
    "needle_queries",
    "variables",
    "key_value",
    "common_words",
    "documents",
    "quotes",
    "occurrences",
    "chunk_order",
    "paragraph_order",
    "fill_middle",
]
"""What a synthetic document asks for (docs/synthetic.md)."""


@dataclass(frozen=True)
class Point:
    """What a source's schedule asks for at a step."""

    step: Annotated[int, Range(min=0), Decides("rows")] = 0
    """How many steps are finished. No two points have the same."""

    weight: Annotated[float | None, Range(min=0, max=1e15), Decides("rows")] = None
    """The source's weight there, instead of its key weight."""

    length_shares: Annotated[tuple[float, ...], Range(min=0, max=1), Decides("rows")] = ()
    """The shares of its length_bins there, instead of its key length_shares."""


@dataclass(frozen=True)
class Source:
    """A source of documents: text that is tokenized once into the cache, or a tokenized folder."""

    name: Annotated[str, Decides("rows")] = ""
    """Name in reports and metrics."""

    path: Annotated[str, Decides("documents")] = ""
    """A folder written by scripts/tokenize_corpus.py or by datasets' save_to_disk; a file, folder or glob of .jsonl,
    .json, .parquet, .arrow, .txt or source code, perhaps compressed, or of .bin or .npy token ids; a folder of MDS
    shards; or hub:OWNER/NAME, a dataset of the Hugging Face hub, which is downloaded and tokenized into the cache.
    All but the last can be a URL, such as s3://bucket/books, fetched into the cache. Relative to data.folder."""

    weight: Annotated[float, Range(min=0, max=1e15), Decides("rows")] = 1.0
    """Share of the training tokens, relative to the weights of the other sources."""

    format: Annotated[
        Literal["auto", "text", "megatron", "npy", "llm.c", "raw_uint16", "raw_uint32"], Decides("documents")
    ] = "auto"
    """Layout of files that hold token ids, which are read in place: a .bin with its .idx, a .npy with NumPy's header, a
    .bin with llm.c's header, or ids without any header (nanoGPT's .bin, Dolma's .npy). auto: found out, and logged."""

    document_end: Annotated[int | None, Range(min=-1), Decides("documents")] = None
    """Id that ends a document, where files of token ids say it in no other way. Unset: the tokenizer's EOS (of llm.c,
    document_start). -1: each file is one document. Of tokenized rows: it cuts a row; -1: a row is a document as it
    stands, and gets no BOS or EOS."""

    document_start: Annotated[int | None, Range(min=0), Decides("documents")] = None
    """Instead of document_end: the id that begins a document."""

    ids_field: Annotated[str, Decides("documents")] = ""
    """Column of tokenized rows (Parquet, Arrow, MDS) that holds the token ids. Unset: input_ids, tokens or token_ids,
    whichever there is."""

    mask_field: Annotated[str, Decides("documents")] = ""
    """Column of tokenized rows that is 1 for the tokens to train on and 0 for others, if it has no usual name such as
    loss_mask or assistant_masks, which are found out (docs/sources.md)."""

    labels_field: Annotated[str, Decides("documents")] = ""
    """Column of tokenized rows with labels, the token's own id or -100 (not shifted), if it is not called labels."""

    ignore_fields: Annotated[tuple[str, ...], Decides("documents")] = ()
    """Columns of tokenized rows that are not read, though their names say something about the loss."""

    text_field: Annotated[str, Decides("documents")] = "text"
    """Field of a jsonl, json, parquet or hub record that holds the text; "a.b": the field b of the object a;
    "files[].content": the files of the list `files` make one document."""

    group_by: Annotated[str, Decides("documents")] = ""
    """Field whose equal values make one document of several records, such as repo_name, wherever they stand."""

    part_order: Annotated[str, Decides("documents")] = "path"
    """Field that the records of a group, or the files of "files[].content", are sorted by. Empty: as they stand."""

    part_header: Annotated[str, Decides("documents")] = ""
    """Text before each of them, such as "<file_sep>{path}\n", in which {path} is that field of it."""

    where: Annotated[str, Decides("documents")] = ""
    """Only records for which this holds, such as "meta.source == 'books' and score >= 0.65" (docs/sources.md)."""

    messages_field: Annotated[str, Decides("documents")] = ""
    """Instead of text_field: the field that holds a conversation, a list of messages with role and content (usually
    "messages"), ShareGPT's from and value ("conversations"), or Alpaca's "instruction". The model's chat template makes
    the text, and only the assistant's responses have a loss."""

    messages_format: Annotated[Literal["auto", "openai", "sharegpt", "alpaca"], Decides("documents")] = "auto"
    """What messages_field holds: messages with role and content, with from and value, or an instruction that has input
    and output beside it. auto: what each record shows; the log says which."""

    on_bad_record: Annotated[Literal["stop", "skip"], Decides("documents")] = "stop"
    """What happens at a record of text that cannot be read (broken JSON, no such field, a conversation that the chat
    template refuses), or at the damaged rest of a file. stop: the run ends there. skip: it is left out and counted."""

    max_bad_share: Annotated[float, Range(min=0, below=1), Decides("nothing")] = 0.001
    """With on_bad_record = "skip": end with an error if more than this share of a source's records are bad, or of its
    bytes damaged."""

    hub_subset: Annotated[str, Decides("documents")] = ""
    """Configuration of a hub dataset, such as sample-10BT. Empty: its default."""

    hub_split: Annotated[str, Decides("documents")] = "train"
    """Split of a hub dataset."""

    hub_revision: Annotated[str, Decides("documents")] = "main"
    """Branch, tag or commit of a hub dataset. Only a commit can be relied on to stay the same."""

    max_documents: Annotated[int | None, Range(min=1), Decides("rows")] = None
    """Use only the first max_documents documents. Of a hub dataset, no others are downloaded."""

    min_length: Annotated[int, Range(min=0), Decides("rows")] = 0
    """Leave out documents of fewer tokens."""

    max_length: Annotated[int | None, Range(min=1), Decides("rows")] = None
    """Leave out documents of more tokens."""

    chunk_length: Annotated[int | None, Range(min=1), Decides("rows")] = None
    """Longest piece of a document, in tokens, if it should be shorter than a row. Pieces do not see each other."""

    long_document: Annotated[Literal["split", "truncate", "drop"] | None, Decides("rows")] = None
    """What happens to a document longer than a row (or chunk_length). split: it is cut into pieces, and every token is
    used. truncate: only its beginning is used. drop: it is left out. Unset: split, but refused if only some of its
    tokens have a loss."""

    upsample: Annotated[float | None, Range(min=1), Decides("rows")] = None
    """How many times as often documents of more than long_threshold tokens occur as shorter ones."""

    upsample_to: Annotated[float | None, Range(above=0, below=1), Decides("rows")] = None
    """Instead of upsample: the share of the source's tokens in such documents, if it is not that high already."""

    long_threshold: Annotated[int | None, Range(min=0), Decides("rows")] = None
    """Instead of data.long_threshold, for this source."""

    length_bins: Annotated[tuple[int, ...], Range(min=1), Decides("rows")] = ()
    """Instead of upsample: lengths in tokens that divide the documents. [8192, 65536] makes three bins: up to 8,192
    tokens, up to 65,536, and longer."""

    length_shares: Annotated[tuple[float, ...], Range(min=0, max=1), Decides("rows")] = ()
    """The share of the source's tokens in each bin of length_bins, one more than these; their sum is 1."""

    schedule: Annotated[tuple[Point, ...], Decides("rows")] = ()
    """weight or length_shares, or both, at some steps, each at two at least: [{step = 0, weight = 1.0}, {step = 1000,
    weight = 3.0}]. Linear between, constant before and after."""

    separator: Annotated[str, Decides("rows")] = ""
    """Text after each document, as ordinary tokens (UltraLong's "<s>"), beside or instead of BOS and EOS."""

    kind: Annotated[Literal["data", "synthetic"], Decides("documents")] = "data"
    """synthetic: the documents are made, with questions about distant parts of themselves (docs/synthetic.md); path,
    which may be left out, names the text in which facts are hidden. The keys that follow are of such a source."""

    tasks: Annotated[tuple[SyntheticTask, ...], Decides("documents")] = ()
    """What is asked for in the documents, one task in each."""

    task_shares: Annotated[tuple[float, ...], Range(above=0), Decides("documents")] = ()
    """Shares of the tasks in the source's tokens, relative to each other. Empty: equal."""

    make_tokens: Annotated[int | None, Range(min=1), Decides("documents")] = None
    """How many tokens to make."""

    lengths: Annotated[tuple[int, ...], Range(min=64), Decides("documents")] = ()
    """The shortest and the longest document in tokens, BOS and EOS included; lengths are log-uniform between them."""

    seed: Annotated[int, Range(min=0), Decides("documents")] = 0
    """Decides all that is drawn."""

    train_on: Annotated[Literal["all", "answer"], Decides("documents")] = "all"
    """Tokens that have a loss: all of a document, or its answer and the EOS behind it."""

    fim_rate: Annotated[float, Range(min=0, max=1), Decides("documents")] = 0.5
    """Share of the documents of the task fill_middle whose middle is moved to the end; the others are left as they
    are."""

    fim_spm_rate: Annotated[float, Range(min=0, max=1), Decides("documents")] = 0.5
    """Share of those that are suffix, prefix, middle; the others are prefix, suffix, middle."""

    fim_markers: Annotated[tuple[str, ...], Decides("documents")] = ()
    """Texts before prefix, suffix and middle, for a tokenizer without tokens for them."""

    max_epochs: Annotated[float | None, Range(above=0), Decides("nothing")] = None
    """Refuse a plan that reads the source more often than this. Unset: it is repeated in a new order, and the report
    says how often."""


@dataclass(frozen=True)
class Data:
    """What the stage reads."""

    sources: Annotated[tuple[Source, ...], Decides("rows")] = ()
    """The sources, each a [[data.sources]] table."""

    folder: Annotated[str, Decides("nothing")] = "."
    """Folder, or its URL, to which the paths of sources are relative: a part of each path, when paths are compared."""

    add_bos: Annotated[bool, Decides("documents")] = True
    """Begin every document with the tokenizer's BOS token."""

    add_eos: Annotated[bool, Decides("documents")] = True
    """End every document with the tokenizer's EOS token."""

    strategy: Annotated[
        Literal[
            "original",
            "cut_4k",
            "cut_128k",
            "per_source_upsampling",
            "global_upsampling",
            "domain_upsampling",
        ],
        Decides("rows"),
    ] = "original"
    """How lengths are mixed (Fu et al., arXiv 2402.10171). cut_4k, cut_128k: no piece is longer than that.
    per_source_upsampling: in every source, documents over long_threshold are raised to long_share of its tokens.
    global_upsampling: they are raised to long_share of all tokens, and sources with more of them gain weight.
    domain_upsampling: each of upsampled_sources gets upsampled_weight."""

    long_threshold: Annotated[int, Range(min=0), Decides("rows")] = 4096
    """Upsampling calls documents of more tokens long, in sources without a long_threshold of their own."""

    long_share: Annotated[float, Range(above=0, below=1), Decides("rows")] = 0.7
    """Share of tokens in long documents under per_source_upsampling and global_upsampling."""

    upsampled_sources: Annotated[tuple[str, ...], Decides("rows")] = ()
    """Names of the sources that domain_upsampling raises."""

    upsampled_weight: Annotated[float, Range(above=0), Decides("rows")] = 0.6
    """The weight of each of them. The other sources keep theirs, and all are then scaled to a sum of 1."""

    drop_duplicates: Annotated[bool, Decides("rows")] = False
    """Leave out documents with the same tokens as one before them, in their source or in a source above it."""

    decontaminate: Annotated[tuple[str, ...], Decides("nothing")] = ()
    """Files of text or tokens, relative to data.folder, and "evaluation", which stands for evaluation.texts and
    evaluation.qa_files: documents that share a run of decontaminate_tokens tokens with them are left out."""

    decontaminate_tokens: Annotated[int, Range(min=8), Decides("nothing")] = 32
    """How long a run of tokens must be that gives such a document away."""

    packing: Annotated[Literal["best_fit", "concat", "single"], Decides("rows")] = "best_fit"
    """best_fit: whole pieces, the longest first, each into the row that it fills best. concat: documents laid end to
    end and cut every seq_len tokens. single: one piece per row. Padding fills the rest of a row, masked."""

    cross_document_attention: Annotated[bool, Decides("rows")] = False
    """Let the documents of a row attend to each other, but not to padding."""

    anchor_attention: Annotated[bool, Decides("rows")] = False
    """Documents also see the first token of their row (AnchorAttention, arXiv 2411.13476). Use it with positions =
    "continue"."""

    positions: Annotated[Literal["reset", "continue", "pose", "longrecipe", "cream", "random"], Decides("rows")] = (
        "reset"
    )
    """The positions that RoPE is given. reset: from 0 in each document. continue: from 0 in each row. The others train
    short rows for a longer context: positions below target_seq_len, drawn anew for each row (PoSE, LongRecipe, CREAM,
    RPES)."""

    target_seq_len: Annotated[int | None, Range(min=1), Decides("rows")] = None
    """The length that pose, longrecipe, cream and random train for."""

    changed_at_step: Annotated[int, Range(min=0), Decides("rows")] = 0
    """The other keys of [data] hold from this step of the stage on: the checkpoint of exactly this step is resumed with
    them, and what had been read until then is not read again in its epoch. 0: they hold for the whole stage."""

    cache_folder: Annotated[str, Decides("nothing")] = "./data_cache"
    """Folder for tokenized text and plans, named by content and tokenizer."""

    num_workers: Annotated[int, Range(min=0, max=1024), Decides("nothing")] = 1
    """Loader processes per rank. 0: the training process builds the batches itself."""
