"""What a source with kind = "synthetic" can be wrong about by itself, and keys that only such a source reads.

Pure arithmetic on the configuration; extensions/ingest/synthetic makes the documents.
"""

from __future__ import annotations

from torchtitan.config.data_schema import Source
from torchtitan.config.keys import keys_of
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.eligible import piece_limit
from torchtitan.tools.errors import UserError

OWN_KEYS = (
    *("tasks", "task_shares", "make_tokens", "lengths", "seed", "train_on"),
    *("fim_rate", "fim_spm_rate", "fim_markers"),
)
READ_KEYS = ("kind", "path", "text_field", "where", *OWN_KEYS)
"""Of the keys that decide the documents."""
OF_ONE_TEXT = ("chunk_order", "paragraph_order", "fill_middle")
"""Tasks that need texts with an order of their own, each document one of them."""
WITHOUT_TEXT = ("key_value", "common_words")


def check_synthetic(source: Source, where: str) -> None:
    """UserError for a key that contradicts another one or has no effect. where: how the source is called."""
    default = Source()
    if source.kind != "synthetic":
        for key in OWN_KEYS:
            if getattr(source, key) != getattr(default, key):
                raise UserError(
                    f'{where} has {key} = {getattr(source, key)!r}, which only a source with kind = "synthetic" reads: '
                    "leave it out, or set kind."
                )
        return
    others = [key for key, about in keys_of(Source).items() if about.decides == "documents" and key not in READ_KEYS]
    unread = [(key, "which says how data that exist are read") for key in others]
    if not source.path:
        unread += [(key, "but no path with text") for key in ("text_field", "where")]
    if "fill_middle" not in source.tasks:
        unread += [(key, "which only the task fill_middle reads") for key in OWN_KEYS[-3:]]
    for key, why in unread:
        if getattr(source, key) != getattr(default, key):
            raise UserError(
                f'{where} with kind = "synthetic" has {key} = {getattr(source, key)!r}, {why}: leave it out.'
            )
    if source.path.startswith("hub:"):
        raise UserError(f'{where}: a synthetic source takes text from files, and path = "{source.path}" names the hub.')
    if not source.tasks or len(set(source.tasks)) < len(source.tasks):
        raise UserError(
            f'{where} needs tasks, each once, such as tasks = ["needle", "occurrences"] (docs/synthetic.md).'
        )
    if source.task_shares and len(source.task_shares) != len(source.tasks):
        raise UserError(
            f"{where} has {len(source.tasks)} tasks and {len(source.task_shares)} task_shares: give one for each task, "
            "or none for equal shares."
        )
    if source.make_tokens is None or not 1 <= len(source.lengths) <= 2 or source.lengths[0] > source.lengths[-1]:
        raise UserError(
            f"{where} needs make_tokens, how many tokens to make, and lengths, the shortest and the longest document "
            "in tokens, such as make_tokens = 100_000_000, lengths = [4096, 65536]."
        )
    of_one = [task for task in source.tasks if task in OF_ONE_TEXT]
    if of_one and not source.path:
        raise UserError(f"{where}: the task {of_one[0]} needs text that people wrote: give its files with path.")
    if source.path and all(task in WITHOUT_TEXT for task in source.tasks):
        raise UserError(f"{where}: no text is read for {' and '.join(source.tasks)}: leave path out.")
    if len(source.fim_markers) not in (0, 3) or not all(source.fim_markers):
        raise UserError(f"{where}: fim_markers are three texts: before the prefix, the suffix and the middle.")
    if "fill_middle" in source.tasks and source.train_on == "answer" and source.fim_rate < 1:
        raise UserError(
            f'{where}: with train_on = "answer" a text of which no middle is taken out would have no loss: set '
            "fim_rate = 1."
        )


def check_in_stage(source: Source, where: str, config: JobConfig) -> None:
    """UserError if rows would cut questions from the text that they ask about."""
    if source.kind != "synthetic":
        return
    limit = piece_limit(source, config.data, config.training.seq_len)
    if config.data.packing == "concat":
        raise UserError(
            f'{where}: data.packing = "concat" would cut synthetic documents from their questions where rows end: '
            'use "best_fit", which leaves them whole.'
        )
    if limit is not None and max(source.lengths) > limit:
        raise UserError(
            f"{where}: lengths go to {max(source.lengths)} tokens, but a piece has at most {limit} "
            "(training.seq_len, data.strategy): a question would be cut from its text. Make lengths shorter."
        )
