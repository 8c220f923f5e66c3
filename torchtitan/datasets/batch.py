"""PackedBatch: one micro-batch, as the model, masks, layouts and reports know it (docs/architecture.md, contract 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.tools.movable import Movable

PADDING_SOURCE = -1


@dataclass(frozen=True)
class PackedBatch(Movable):
    """One micro-batch of T tokens in S segments and D documents."""

    tokens: torch.Tensor
    """int64[T]; 0 for padding."""

    labels: torch.Tensor
    """int64[T]: the next token of the same document; -100 at its end, also if a row's end cuts it (its next token is
    never trained on: the piece that begins there has nothing before it), for padding, and in conversations if the next
    token is not the assistant's."""

    positions: torch.Tensor
    """int64[T]: what RoPE is given (data.positions). They say nothing about where documents or segments end."""

    cu_seqlens: torch.Tensor
    """int32[S + 1]: 0, then the end of each segment, the last one T. Tokens attend within segments: a document or, with
    data.cross_document_attention, all documents of a row. Segments do not cross rows."""

    cu_documents: torch.Tensor
    """int32[D + 1]: 0, then the end of each document (a piece of one, or a run of padding), the last one T."""

    source: torch.Tensor
    """int16[D]: the source of each document, -1 for padding."""

    long: torch.Tensor | None = None
    """bool[T], if rows of short and of long documents are told apart (rope.mixed_window): whether a token's row holds
    long documents, which LongRoPE's long list is for. None: rows are not told apart."""
    anchor: torch.Tensor | None = None
    """int32[S], with data.anchor_attention: the first token of the row, which all of a segment see beside their own
    segment; -1 for padding, which sees none. None: there are no anchors."""

    @property
    def num_valid(self) -> int:
        """Labels that are trained on."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def num_padding(self) -> int:
        """Tokens that only fill up rows."""
        return int(self.cu_documents.diff()[self.source == PADDING_SOURCE].sum())

    @property
    def token_sources(self) -> torch.Tensor:
        """int64[T], the source of each token; -1 for padding."""
        return torch.repeat_interleave(self.source.long(), self.cu_documents.diff().long())
