"""Documents that have a loss on some of their tokens only: cut in two, the second part would answer what it does not
see. Those that come with a mask are known only when their corpora are open."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torchtitan.config.data_schema import Data
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.eligible import apply_filters, piece_limit
from torchtitan.datasets.mixture import sources_read
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)


def check_masked(data: Data, corpora: Sequence[Corpus], seq_len: int) -> None:
    """UserError if documents with roles would be cut and no source says that they should be; a warning if it does."""
    concat = data.packing == "concat"
    for source, corpus, is_read in zip(data.sources, corpora, sources_read(data), strict=True):
        if not is_read or not corpus.has_roles:
            continue
        limit = min(piece_limit(source, data, seq_len) or seq_len, seq_len)
        # those that "drop" would leave out
        whole = apply_filters(replace(source, long_document="drop"), data, corpus.lengths, 0, seq_len, corpus.excluded)
        count = whole.left_out.dropped[0]
        if not concat and (not count or source.long_document in ("truncate", "drop")):
            continue
        what = f"Data source {source.name!r} has labels, a mask or roles, so that only some tokens have a loss"
        meant = 'If the rows are no conversations and may be cut, say so with long_document = "split".'
        if source.long_document == "split":
            cut = "where rows end" if concat else f"every {limit} tokens: {count} of {len(corpus)} are longer"
            logger.warning(
                "%s; its documents are cut %s (long_document = split): a part may answer what it does not see",
                what,
                cut,
            )
        elif concat:
            raise UserError(
                f'{what}, and data.packing = "concat" would cut its documents wherever a row ends: a second part would '
                f'answer what it does not see. Use "best_fit", which leaves them whole. {meant}'
            )
        else:
            raise UserError(
                f"{what}, and {count} of its {len(corpus)} documents are longer than {limit} tokens, the longest piece "
                "(a row, or chunk_length): cut, their second part would answer what it does not see. Set "
                'long_document = "drop" (left out, and counted in the report) or "truncate" (their end is cut off). '
                f"{meant}"
            )
