"""Cutting a long text where its pieces have exactly the tokens of the whole, so that it is encoded in little memory.

A tokenizer finds its added tokens in a text, normalizes what is between them, divides that into words by patterns, and
encodes each word by itself. A cut changes nothing if no added token, no word and no normalization reaches over it, and
if the patterns decide nothing by what is behind it. `find_cuts` proves this from tokenizer.json, for these places:

- Before a blank that follows a letter, a digit or a sign and comes before another. None of the alternatives in SAFE
  matches a sign and a blank after it, all of them begin anew at the blank, and none looks further ahead than one
  character behind white space. Canonical forms (NFC and others) compose nothing with a blank.
- Between a letter or digit of ASCII, kana, Han or Hangul and a line break, or punctuation, which no word has behind a
  letter. Not where marks may become characters of their own (NFD), nor where a blank is put before a text.
- Without words (Llama 2, Mistral: a blank becomes "▁", and BPE merges what it can): before a blank as above, if no
  merge makes a token with "▁" behind another character, so that nothing is ever merged over the cut. If "▁" is put
  before every text, it stands for the blank, which is then left out of the piece.

Any other tokenizer gets a text whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

LONG = 1 << 20
"""A text of more characters is encoded in pieces ..."""
PIECE = 1 << 18
"""... of about as many."""

BLANK = r"(?<=[\w!-~])(?= [\w!-~])"
BEHIND_A_LETTER = r"(?<=[0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[\n\r,.;:!?。，、！？；：])"

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
WORDS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)"),
    *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
    *(_CASED + tuple(f"{cased}{CONTRACTIONS}?" for cased in _CASED)),
}
NUMBERS = {r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}", r"\p{N}+", r" ?\p{N}+"}
SIGNS = {
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
}
SPACES = {r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"}
SAFE = WORDS | NUMBERS | SIGNS | SPACES
"""The alternatives of the patterns of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen, OLMo 2 and Mistral's Tekken."""


@dataclass(frozen=True)
class Cuts:
    """Where a text may be cut: at the matches of `places`, which are empty. without_blank: the next piece begins behind
    the blank that follows."""

    places: re.Pattern[str]
    without_blank: bool = False

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """The text that the chunks are laid end to end, in pieces of PIECE characters or more."""
        held, enough = "", PIECE
        for chunk in chunks:
            held += chunk
            while len(held) > enough:
                if (cut := self._last(held)) is None:
                    enough = 2 * len(held)  # nowhere yet: do not look at every chunk anew
                    break
                yield held[:cut]
                held, enough = held[cut + self.without_blank :], PIECE
        if held:
            yield held

    def _last(self, text: str) -> int | None:
        """The last place, or one near the end."""
        for start in (len(text) - 4096, 1):
            places = [match.start() for match in self.places.finditer(text, max(1, start))]
            if places:
                return places[-1]
        return None


class LongText:
    """A long text that stays UTF-8 in memory, where some characters would cost 4 bytes for each as a str.

    Iterating decodes it, PIECE bytes at a time. UnicodeDecodeError, with the place in all of it, if it is not UTF-8.
    """

    def __init__(self, content: Any) -> None:
        self._content = memoryview(content)
        at = 0
        try:
            for at, _ in self._decoded():  # noqa: B007
                pass
        except UnicodeDecodeError as error:
            offset = at - (len(error.object) - min(PIECE, len(self._content) - at))
            start, stop = offset + error.start, offset + error.end
            raise UnicodeDecodeError(error.encoding, b"", start, stop, error.reason) from error

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._decoded())

    def isspace(self) -> bool:
        """As of a str."""
        return all(text.isspace() for text in self if text)

    def _decoded(self) -> Iterator[tuple[int, str]]:
        """(where the next bytes begin, the text before)."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        size = len(self._content)
        for start in range(0, size, PIECE):
            yield min(size, start + PIECE), decoder.decode(self._content[start : start + PIECE], start + PIECE >= size)


def chunks_of(text: str | LongText) -> Iterable[str]:
    """A text in parts, anywhere."""
    if isinstance(text, LongText):
        return text
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def find_cuts(description: dict[str, Any]) -> Cuts | None:
    """The cuts that are proved for a tokenizer.json, as the tokenizers library writes it out; None if none are.

    Special tokens must not be looked for in the text (encode_special_tokens).
    """
    model = description["model"]
    added = [token for token in description.get("added_tokens", []) if not token["special"]]
    if model["type"] != "BPE" or model.get("dropout") or any(token["rstrip"] for token in added):
        return None
    normalizers = _steps(description.get("normalizer"), "normalizers")
    splits = _steps(description.get("pre_tokenizer"), "pretokenizers")
    forms = {step["type"] for step in normalizers} & {"NFC", "NFKC", "NFD", "NFKD"}
    others = [step for step in normalizers if step["type"] not in forms]
    cuts: Cuts | None
    if not others and _divides(splits):
        bare = not any(step.get("add_prefix_space") for step in splits)
        letters = bare and not forms & {"NFD", "NFKD"}
        cuts = Cuts(re.compile(f"{BLANK}|{BEHIND_A_LETTER}" if letters else BLANK))
    else:
        cuts = _without_words(model, others, splits, bool(added))
    spelled = [token["content"] for token in description["added_tokens"]] if added else []
    return cuts if cuts and not any(cuts.places.search(text) for text in spelled) else None


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[name] for step in _steps(inner, name)]
    return [part]


def _divides(splits: list[dict[str, Any]]) -> bool:
    """Whether the steps are known ones, and the words that they make reach over no cut."""
    complete = False
    for step in splits:
        if step["type"] == "ByteLevel":
            complete |= step.get("use_regex", True)  # GPT-2's pattern
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            kept = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
            alternatives = set(_alternatives(step["pattern"]["Regex"]))
            if not kept or not alternatives <= SAFE:
                return False
            # every character is in some word, so that a word ends at a cut
            covers = all(alternatives & kind for kind in (WORDS, NUMBERS, SIGNS, {r"\s+"}))
            if step["behavior"] == "Removed" and not covers:
                return False
            complete |= covers
        elif step["type"] != "Digits":
            return False
    return complete


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a pattern outside its brackets."""
    found, depth, in_class, at = [""], 0, False, 0
    while at < len(pattern):
        sign = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(sign)
        in_class = sign == "[" if not in_class else sign != "]"
        depth += 0 if in_class else (sign == "(") - (sign == ")")
        if sign == "|" and not depth and not in_class:
            found.append("")
        else:
            found[-1] += sign
    return found


def _without_words(
    model: dict[str, Any], normalizers: list[dict[str, Any]], splits: list[dict[str, Any]], added: bool
) -> Cuts | None:
    """The cuts of a tokenizer that makes "▁" of a blank and has no words, or those of Metaspace."""
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = {"type": "Prepend", "prepend": "▁"}
    by_replacing = to_mark in normalizers and not splits and all(step in (to_mark, before) for step in normalizers)
    by_metaspace = not normalizers and [(s["type"], s.get("replacement")) for s in splits] == [("Metaspace", "▁")]
    prepends = before in normalizers
    if not (by_replacing or by_metaspace) or (prepends and added):
        return None
    plain = not any(model.get(k) for k in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    if not plain or "▁" not in model["vocab"] or any(re.search("[^▁]▁", "".join(pair)) for pair in pairs):
        return None
    return Cuts(re.compile(BLANK), without_blank=prepends)
