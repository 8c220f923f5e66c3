"""What the RoPE of a stage means for weights that were trained with another one: how far it takes them, which pairs it
makes faster, and which rescalings multiply.

A pair that has not turned once within the length that the weights were trained to reaches angles beyond it that they
have never seen. How much it must be slowed for rows that are s times as long is what the NTK-aware rule slows it by,
s^(j / (D/2 - 1)) for pair j: the least of the published rules, which gives the slowest pair the whole factor. Pairs
that have turned have seen all angles, and may stay.

RopeArgs.max_position_embeddings of `old` is the length that the weights were trained to. windows: the windows of the
kinds of layer that a model has, None for full attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from torchtitan.config.schema import Rope
from torchtitan.models.rope import RopeArgs, inverse_frequencies
from torchtitan.models.rope_scaling import GeneScaling, HarpeScaling, LongRopeScaling, YarnScaling
from torchtitan.tools.errors import UserError

Windows = tuple[int | None, ...]

ROUNDING = 0.01
"""A pair is faster than before from this share on: published bases are rounded numbers."""

SHORT_BY = 0.02
"""A rescaling may cover this much less than the rows reach, for the same reason (Qwen2.5-1M's 1e7 covers 259,300 of
262,144); one that is not there may not."""


MUCH = 1.5
"""A raised base and a method together may slow the slowest pair by so many times what the rows need, unsaid."""


def lengths_covered(old: RopeArgs) -> int | None:
    """The length in tokens that weights know: what they were trained to, or what their own rescaling covers by its
    keys (a YaRN in config.json that was switched on after training; GeNE, which trains short rows for its factor).
    None: not known."""
    scaling, trained = old.scaling, old.max_position_embeddings
    if isinstance(scaling, YarnScaling | GeneScaling | LongRopeScaling) and scaling.factor:
        covered = round(scaling.factor * scaling.original_max_position_embeddings)
        return max(trained or 0, min(covered, 2**62))  # more is no int64
    return trained


def coverage(old: RopeArgs, new: RopeArgs, head_dim: int, windows: Windows = (None,), reach: int = 0) -> float:
    """The longest position in tokens to which `new` takes weights that were trained with `old` (see above): the least
    over pairs, heads and kinds of layer. reach: positions of the stage; what no layer can see of them does not count.
    """
    known = lengths_covered(old)
    assert known is not None
    covered = math.inf
    for was, now, window in _kinds_of_layer(old, new, windows):
        f_old, f_new = _frequencies(was, head_dim)[-1:], _frequencies(_least_drawn(now, reach), head_dim)
        farthest = [math.inf if window is None else window] * len(f_new)  # no distance is longer than the window
        if isinstance(now.scaling, LongRopeScaling):  # its short list is for rows up to L0
            farthest[0] = min(farthest[0], now.scaling.original_max_position_embeddings)
        for frequencies, distance in zip(f_new, farthest):
            share = torch.arange(1, head_dim // 2, dtype=torch.float64) / max(head_dim // 2 - 1, 1)
            counts = f_old * known < 2 * math.pi
            counts[..., -1] = True
            growth = (f_old / frequencies)[..., 1:] ** (1 / share)
            at = known * float(growth.where(counts[..., 1:], math.inf).min()) if head_dim > 2 else math.inf
            if distance > at * (1 + SHORT_BY):
                covered = min(covered, at)
    return covered


def beyond_trained(
    old: RopeArgs, new: RopeArgs, head_dim: int, reach: int, windows: Windows = (None,)
) -> tuple[str, str] | None:
    """How rows whose positions go up to `reach` go beyond what `new` covers of these weights, if they do: a sentence
    that says it, and the arithmetic. None also if it is not known what the weights were trained to."""
    known = lengths_covered(old)
    if known is None or reach <= known:
        return None
    covered = coverage(old, new, head_dim, windows, reach)
    kinds = [(was, now) for was, now, window in _kinds_of_layer(old, new, windows) if (window or reach) > known]
    same = any(_same(was, now, head_dim) for was, now in kinds)
    if covered == math.inf or (covered * (1 + SHORT_BY) >= reach and not same):
        return None
    own = "" if known == old.max_position_embeddings else " by their factor"
    f_old, f_new = (_frequencies(rope, head_dim)[-1].amax(0) for rope in (old, _least_drawn(new, reach)))
    never = int((f_old * known < 2 * math.pi).sum())
    slower = f"{float(f_old[-1] / f_new[-1]):.3g}"
    slower = "" if slower == "1" else f", {slower} times as slowly as in the weights' own RoPE"
    how = "the same frequencies as the weights" if same else f"frequencies that are enough for {covered:,.0f}"
    how = "pairs that turn faster, and is not enough even for those" if covered < known * (1 - SHORT_BY) else how
    have = "pair of {} has" if never == 1 else "pairs of {} have"
    return (
        f"The weights were trained to {known:,} tokens{own}, and rows reach position {reach:,}, {reach / known:.3g} "
        f"times as far, but this stage's RoPE has {how}.",
        f"{never} {have.format(head_dim // 2)} not turned once within {known:,} tokens, so beyond it they reach "
        f"angles that the weights have never seen; the slowest turns once in {2 * math.pi / float(f_new[-1]):,.0f} "
        f"tokens{slower}.",
    )


def lost_rope(old: RopeArgs, new: RopeArgs, head_dim: int, reach: int = 0, windows: Windows = (None,)) -> str | None:
    """Which pairs would turn faster with `new` than the weights were trained with, if any do, in words with the
    numbers. And the original length of a method must not grow: its factor is against the length before any rescaling.

    LongRoPE's two lists are compared each with the list for the same rows, HARPE's bases head by head, GeNE at its
    factor, or, after another method, at the least that a micro-batch of `reach` tokens draws.
    """
    least = new if isinstance(old.scaling, GeneScaling) else _least_drawn(new, reach)
    for was, now, window in _kinds_of_layer(old, least, windows):
        f_old, f_new = torch.broadcast_tensors(_frequencies(was, head_dim), _frequencies(now, head_dim))
        ratio = f_new / f_old
        by_pair = ratio.amax((0, 1))
        faster = int((by_pair > 1 + ROUNDING).sum())
        if not faster:
            continue
        worst = int((by_pair >= by_pair.max() * (1 - ROUNDING)).nonzero()[-1])
        at = ratio[..., worst].flatten().argmax()
        turns = [2 * math.pi / float(f[..., worst].flatten()[at]) for f in (f_old, f_new)]
        which = "the slowest pair" if worst == head_dim // 2 - 1 else f"pair {worst}"
        layers = ", in layers with a sliding window" if window is not None and len(windows) > 1 else ""
        return (
            f"{faster} of {head_dim // 2} pairs would turn faster{layers} than the weights were trained with; {which} "
            f"turned once in {turns[0]:,.0f} tokens and would in {turns[1]:,.0f}{_list(was, now, ratio, worst)}."
            f"{_counts_from_more(old, new)}"
        )
    same = old.scaling and new.scaling and old.scaling.rope_type == new.scaling.rope_type
    return _counts_from_more(old, new).strip() or None if same else None


def _list(old: RopeArgs, new: RopeArgs, ratio: torch.Tensor, pair: int) -> str:
    """Which number of LongRoPE's lists makes the pair faster, in brackets. ratio: [2, heads, D / 2]."""
    if not isinstance(new.scaling, LongRopeScaling):
        return ""
    long = int(ratio[:, 0, pair].argmax())
    name = ("short_factor", "long_factor")[long]
    now, was = (getattr(r.scaling, name)[pair] if isinstance(r.scaling, LongRopeScaling) else None for r in (new, old))
    rows = "rows longer than" if long else "rows up to"
    before = "is" if was is None else f"was {was:g} and is"
    return (
        f" (in {rows} the original length: number {pair + 1} of {name} {before} {now:g}"
        f"{'' if new.theta == old.theta else f'; theta {old.theta:g} -> {new.theta:g}'})"
    )


def _counts_from_more(old: RopeArgs, new: RopeArgs) -> str:
    """That a factor is against the length of the previous stage, if it is; the cause of faster pairs."""
    a, b = (getattr(r.scaling, "original_max_position_embeddings", None) for r in (old, new))
    if not a or not b or b <= a:
        return ""
    return (
        f" original_max_position_embeddings {a} -> {b}: a factor is always against the length before any rescaling, "
        f"{a} in every stage."
    )


def piled_up(old: RopeArgs, new: RopeArgs, head_dim: int, reach: int) -> str | None:
    """What becomes of the frequencies if a stage raises the base of its weights and rescales too, in sentences with the
    numbers. None if together they slow the slowest pair by no more than MUCH times what rows of `reach` need.

    old: of the weights; if they are random, of the architecture."""
    if new.scaling is None or isinstance(new.scaling, HarpeScaling) or new.theta <= old.theta * (1 + ROUNDING):
        return None
    ropes = RopeArgs(old.theta), RopeArgs(new.theta), RopeArgs(old.theta, new.scaling), old, new
    plain, raised, rescaled, own, both = (_slowest(rope, head_dim) for rope in ropes)
    known = lengths_covered(old)
    if known and own / both <= MUCH * max(reach / known, 1):
        return None
    rows = f"; rows are {reach / known:.3g} times as long as the {known:,} tokens that they know" if known else ""
    no_method = "" if old.scaling else ', or rope.type = "none"'
    return (
        f"Two rescalings multiply: theta {new.theta:g} in place of the weights' {old.theta:g} slows the slowest pair "
        f"{plain / raised:.3g} times, {new.scaling.rope_type} {plain / rescaled:.3g} times. It turns once in "
        f"{2 * math.pi / both:,.0f} tokens, {own / both:.3g} times as slowly as in the weights' own RoPE{rows}. If "
        f"only one is meant, set rope.theta = {old.theta:g}{no_method}."
    )


def counts_from_less(old: RopeArgs, new: RopeArgs) -> str | None:
    """That a method's factor is against fewer tokens than the weights know without any rescaling, in a sentence: their
    base has been raised already, in an earlier stage or before the file that they come from."""
    original, trained = getattr(new.scaling, "original_max_position_embeddings", None), old.max_position_embeddings
    if old.scaling or not original or not trained or trained <= original * (1 + SHORT_BY):
        return None
    if new.theta < old.theta * (1 - ROUNDING):  # the raised base is not kept, which lost_rope() says
        return None
    return (
        f"Two rescalings multiply: original_max_position_embeddings = {original:,}, but the weights know {trained:,} "
        f"tokens with theta {old.theta:g} alone, and {new.scaling.rope_type} counts from {original:,} as if that had "  # type: ignore[union-attr]
        f"not been trained: {trained:,} is their original length, and the factor is against it."
    )


def changed_magnitude(old: RopeArgs, new: RopeArgs) -> str | None:
    """That cos and sin are multiplied by another number than before, if they are."""
    was, now = (rope.scaling.magnitude() if rope.scaling else 1.0 for rope in (old, new))
    if math.isclose(was, now, rel_tol=1e-3):
        return None
    return (
        f"cos and sin are multiplied by {now:.4g}, and were by {was:.4g}: attention's logits become "
        f"{(now / was) ** 2:.3g} times as large"
    )


def ways_out(
    table: Rope, build: Callable[[Rope], RopeArgs], old: RopeArgs, head_dim: int, reach: int, windows: Windows
) -> list[str]:
    """Values of [rope] under which nothing would be refused, each tried: 'rope.theta = "auto" (which is 8.35994e+06)'.

    build: what makes RopeArgs of a table for this stage. LongRoPE's long list is slowed by the NTK-aware rule."""

    def tried(changes: dict[str, Any]) -> str | None:
        """The changes in words, if they do."""
        try:
            new = build(replace(table, **changes))
        except UserError:
            return None
        if beyond_trained(old, new, head_dim, reach, windows) or lost_rope(old, new, head_dim, reach, windows):
            return None
        number = f" (which is {new.theta:g})" if changes.get("theta") == "auto" else ""
        return f"rope.{', '.join(f'{k} = {_toml(v)}' for k, v in changes.items())}{number}"

    known = lengths_covered(old)
    assert known is not None
    growth, rope = reach / known, build(table)
    tries: list[dict[str, Any]] = []
    # without the base of the weights no sensible factor would do
    base: dict[str, Any] = {"theta": old.theta} if old.theta != rope.theta else {}
    if isinstance(rope.scaling, LongRopeScaling) and table.long_factor:
        short = max(reach / coverage(old, build(replace(table, **base)), head_dim, windows, reach), 1.0)
        last = len(table.long_factor) - 1
        longer = [_rounded_up(v * short ** (j / last)) for j, v in enumerate(table.long_factor)]
        lists = {"long_factor": tuple(longer)}
        if isinstance(old.scaling, LongRopeScaling):  # no number becomes less than it was
            lists["long_factor"] = tuple(map(max, longer, old.scaling.long_factor))
            shorter = tuple(map(max, rope.scaling.short_factor, old.scaling.short_factor))
            if table.mixed_window and shorter != rope.scaling.short_factor:
                lists["short_factor"] = shorter
        tries += [{**lists, **base}, {"theta": "auto"}]
    elif table.factor:
        short = reach / coverage(old, build(replace(table, **base)), head_dim, windows, reach)
        factor = max(table.factor * short, reach / _original(rope, reach))
        usual = max(growth * (getattr(old.scaling, "factor", None) or 1), reach / _original(rope, reach))
        tries += [{"factor": _rounded_up(factor), **base}] if factor <= 2 * usual else []
    elif isinstance(old.scaling, HarpeScaling) and table.type == "harpe":
        power = growth ** (head_dim / (head_dim - 2))
        tries += [{"bases": tuple(float(f"{base * power:.4g}") for base in old.scaling.bases)}]
    elif table.type in ("model", "none"):
        tries += [{"theta": "auto"}]
    values: dict[str, Any] = {"type": "yarn", "factor": growth, "original_max_position_embeddings": known}
    if own := old.scaling:
        keys = vars(own).items()
        values = {k: v for k, v in keys if k not in ("rope_type", "attention_factor", "length") and v is not None}
        factor = max((values.get("factor") or 1) * growth, reach / _original(old, reach))
        values = {"type": own.rope_type, **values, "factor": factor}
    if len(windows) > 1 and (old.scaling is None or old.layers == "full_attention"):
        values["layers"] = "full_attention"
    values["factor"] = _rounded_up(values["factor"])
    if old.theta != rope.theta:
        values["theta"] = old.theta
    by_method = {k: v for k, v in values.items() if getattr(table, k, v) != v or k == "type"}
    found = [tried(changes) for changes in tries]
    if table.type in ("model", "none") or not any(found):
        found.append(tried(by_method))
    return [text for text in found if text]


def _original(rope: RopeArgs, default: int) -> int:
    return getattr(rope.scaling, "original_max_position_embeddings", default)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else f'"{value}"' if isinstance(value, str) else str(value)


def _rounded_up(value: float) -> float:
    return math.ceil(value * 100 - 1e-9) / 100


def _slowest(rope: RopeArgs, head_dim: int) -> float:
    return float(_frequencies(rope, head_dim)[-1].amin(-1).max())


def _same(a: RopeArgs, b: RopeArgs, head_dim: int) -> bool:
    ours, theirs = torch.broadcast_tensors(_frequencies(a, head_dim)[-1:], _frequencies(b, head_dim)[-1:])
    return torch.allclose(ours, theirs, rtol=1e-9, atol=0)


def _frequencies(rope: RopeArgs, head_dim: int) -> torch.Tensor:
    """[1 or 2, 1 or Hkv, D / 2]: of short and long rows if they differ, of each key-value head if these differ."""
    frequencies = inverse_frequencies(rope, head_dim)
    if rope.scaling:
        frequencies = rope.scaling.of_tokens(frequencies, torch.tensor([False, True]), slice(None))
    return frequencies.reshape((1,) * (3 - frequencies.dim()) + tuple(frequencies.shape))


def _kinds_of_layer(old: RopeArgs, new: RopeArgs, windows: Windows) -> Iterator[tuple[RopeArgs, RopeArgs, int | None]]:
    """(old, new, window) of the layers with that window: some are not rescaled (rope.layers)."""
    for window in windows:
        was, now = (
            replace(rope, scaling=None) if window is not None and rope.layers == "full_attention" else rope
            for rope in (old, new)
        )
        yield was, now, window


def _least_drawn(rope: RopeArgs, reach: int) -> RopeArgs:
    """GeNE with the least factor that a micro-batch draws, or that it is read with."""
    if not isinstance(rope.scaling, GeneScaling):
        return rope
    least = min(math.ceil(reach / rope.scaling.original_max_position_embeddings) or 1, rope.scaling.factor)
    return replace(rope, scaling=replace(rope.scaling, factor=float(least)))
