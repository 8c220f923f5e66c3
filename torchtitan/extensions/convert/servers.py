"""What servers do not read of an exported config.json, and how to serve the model with them nevertheless.

LIMITS is the table, in docs/servers.md with what was measured; a correction is a change of its row. A limit whose way
out is empty has none: that server computes something else than was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torchtitan.models.rope_method import ORIGINAL

# an option of a command line, and its value, which has a digit
_OPTION = r"(?<=\s)(--[a-z-]+) ([\w.=:-]*\d[\w.=:-]*\w|\d)"


class Exported(NamedTuple):
    """What a config.json that this package has written says, as far as servers differ about it."""

    kind: str
    """model_type."""
    layers: frozenset[str]
    """Which of full_attention and sliding_attention there are."""
    rope: dict[str, Any]
    """rope_parameters of the layers without a window."""
    type: str
    """rope_type."""
    original: int
    """Tokens; the longest context if the RoPE has no original length."""
    trained: int
    """Tokens."""
    longest: int
    """max_position_embeddings."""
    magnitude: float
    """What cos and sin are multiplied by."""
    relative: float
    """That, against what YaRN or LongRoPE make it if the file does not say."""
    window: int
    """Tokens; of the layers that slide."""
    two_lists: bool
    """LongRoPE with another list for short texts than for long ones."""
    gguf: str
    """What llama.cpp calls the model."""


def exported(config: dict[str, Any]) -> Exported:
    """config: a config.json as config_out.py writes it."""
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    name, factor, longest = rope["rope_type"], rope.get("factor", 1.0), config["max_position_embeddings"]
    kind, original = config["model_type"], rope.get(ORIGINAL, longest)
    magnitude, usual = rope.get("attention_factor", 1.0), 1.0
    if name == "yarn" and factor > 1:
        usual = 0.1 * math.log(factor) + 1
    elif name == "longrope" and longest > original:
        usual = math.sqrt(1 + math.log(longest / original) / math.log(original))
    layers = config.get("layer_types") or ["full_attention"]
    if kind == "mistral" and config["sliding_window"]:
        layers = ["sliding_attention"]
    return Exported(
        kind=kind,
        layers=frozenset(layers),
        rope=rope,
        type=name,
        original=original,
        trained=config.get("trained_length", longest),
        longest=longest,
        magnitude=magnitude,
        relative=magnitude / usual,
        window=config.get("sliding_window") or longest,
        two_lists=name == "longrope" and rope["short_factor"] != rope["long_factor"],
        gguf={"mistral": "llama", "olmo3": "olmo2"}.get(kind, kind),
    )


class Limit(NamedTuple):
    """A row: where `applies`, `server` does `what`; `way` out. Both name fields of Exported in braces."""

    server: str
    applies: Callable[[Exported], bool]
    what: str
    way: str = ""
    until: tuple[int, int] | None = None
    """The last version that does it, if one does not."""
    in_one_answer: bool = True
    """Whether the answer to a single prompt shows it."""

    def said(self, facts: Exported) -> str:
        """The sentence of a note, with the model's numbers."""
        text = f"{self.server} {self.what}: {self.way or 'do not serve the model with it'}."
        return text.format(**facts._asdict())


def _yarn(e: Exported, **usual: Any) -> bool:
    """Whether it is a YaRN with another value of a key than the usual one."""
    return e.type == "yarn" and any(e.rope.get(key, value) != value for key, value in usual.items())


def _scaled_otherwise(e: Exported, kind: str) -> bool:
    return e.type == kind and abs(e.relative - 1) > 1e-4


def _slides(e: Exported) -> bool:
    """Whether a text of the trained length is longer than a window."""
    return "sliding_attention" in e.layers and e.window < e.trained


LIMITS = (
    Limit(
        "vLLM",
        lambda e: e.type == "longrope" and e.trained > e.original,
        "takes LongRoPE's original length as its longest context",
        "serve with --max-model-len {trained}",
    ),
    Limit(
        "vLLM",
        lambda e: e.two_lists and e.trained > e.original,
        "uses LongRoPE's long list for short texts too, if its longest context is above the original length",
        "serve short texts with --max-model-len {original}",
    ),
    Limit(
        "vLLM",
        lambda e: _scaled_otherwise(e, "yarn"),
        "up to 0.25 ignores YaRN's attention_factor",
        "serve with a version that reads it, as 0.32 does",
        until=(0, 25),
    ),
    Limit(
        "vLLM",
        lambda e: e.type == "yarn" and e.trained > e.longest,
        "has no angles beyond YaRN's factor times the original length, and the model was trained for {trained}",
        "serve texts of up to {longest} tokens only",
    ),
    Limit(
        "vLLM",
        lambda e: e.type == "dynamic",
        "has no angles beyond max_position_embeddings with a dynamic RoPE",
        "serve texts of up to {longest} tokens only",
    ),
    Limit(
        "vLLM",
        lambda e: e.kind in ("qwen2", "qwen3") and len(e.layers) > 1,
        "refuses Qwen with a sliding window in some of its layers",
    ),
    Limit(
        "transformers",
        lambda e: e.two_lists,
        "does not rotate cached keys again when a generation crosses LongRoPE's original length",
        "keep a prompt and its response together on one side of {original} tokens",
        in_one_answer=False,
    ),
    Limit(
        "transformers 4",
        lambda e: e.kind == "olmo2" and e.type not in ("default", "linear", "dynamic"),
        "refuses Olmo 2 with this RoPE",
        "serve with transformers 5",
    ),
    Limit("llama.cpp", lambda e: e.type == "longrope", "leaves LongRoPE's lists out when it converts this model"),
    Limit(
        "llama.cpp",
        lambda e: e.type == "dynamic",
        "leaves a dynamic RoPE out",
        "serve texts of up to {longest} tokens only",
    ),
    *(
        Limit(
            server,
            lambda e: e.type == "dynamic",
            "does not rotate cached keys again when a dynamic RoPE's base grows with the text",
            "serve texts of up to {longest} tokens only",
            in_one_answer=server == "mlx-lm",  # which caches all of a prompt but its last token first
        )
        for server in ("transformers", "mlx-lm")
    ),
    Limit(
        "llama.cpp",
        lambda e: e.type == "llama3" and e.gguf != "llama",
        "leaves the llama3 RoPE out when it converts any model but Llama and Mistral",
    ),
    Limit(
        "llama.cpp",
        lambda e: _yarn(e, beta_fast=32, beta_slow=1),
        "does not read YaRN's betas from the model",
        "serve with --yarn-beta-fast {rope[beta_fast]:g} --yarn-beta-slow {rope[beta_slow]:g}",
    ),
    Limit(
        "llama.cpp",
        lambda e: _scaled_otherwise(e, "yarn"),
        "ignores YaRN's attention_factor",
        "serve with --override-kv {gguf}.rope.scaling.attn_factor=float:{relative:.6g}",
    ),
    Limit(
        "llama.cpp",
        lambda e: e.trained > e.longest and e.type != "dynamic",
        "reads no more than max_position_embeddings, {longest}, and the model was trained for {trained}",
        "serve with --override-kv {gguf}.context_length=int:{trained}",
    ),
    Limit(
        "mlx-lm",
        lambda e: e.two_lists,
        "uses LongRoPE's long list for texts of every length",
        "serve texts of more than {original} tokens only",
    ),
    Limit(
        "mlx-lm",
        lambda e: _scaled_otherwise(e, "longrope"),
        "computes LongRoPE's attention factor from the lengths and does not read it",
    ),
    *(
        Limit(server, lambda e: _yarn(e, truncate=True), "truncates the ramp of every YaRN")
        for server in ("llama.cpp", "mlx-lm", "TGI")
    ),
    *(
        Limit(
            server,
            lambda e: _scaled_otherwise(e, "yarn") and "mscale" not in e.rope,
            "has no attention factor for a YaRN whose factor is 1",
        )
        for server in ("mlx-lm", "SGLang")
    ),
    *(
        Limit(
            server,
            lambda e: _slides(e) and e.kind != "olmo3",
            "lets each token see all before it, whatever the sliding window of this model",
            "serve texts of up to {window} tokens only",
        )
        for server in ("llama.cpp", "mlx-lm", "SGLang")
    ),
    *(
        Limit(
            server, lambda e: e.kind == "olmo3" and len(e.layers) == 1, "cannot load an Olmo 3 whose layers are alike"
        )
        for server in ("mlx-lm", "llama.cpp")
    ),
    Limit(
        "SGLang",
        lambda e: e.two_lists,
        "chooses LongRoPE's list by the longest text of a batch, and anew for each token that it generates",
        "keep all texts that it reads at a time on one side of {original} tokens",
    ),
    Limit("TGI", lambda e: e.type == "linear", "leaves linear scaling out"),
    Limit(
        "TGI",
        lambda e: e.two_lists,
        "rotates what is beyond LongRoPE's original length by another list than what is before it",
    ),
    Limit(
        "TGI",
        lambda e: e.type == "longrope" and e.magnitude != 1,
        "multiplies LongRoPE's frequencies by its attention factor",
    ),
    Limit("TGI", lambda e: _yarn(e, beta_fast=32, beta_slow=1), "does not read YaRN's betas"),
    Limit(
        "Every server",
        lambda e: e.longest > e.trained,
        "takes {longest} tokens as the longest context, and the model was trained for {trained}",
        "serve with that (vLLM: --max-model-len, llama.cpp: -c)",
    ),
)


def serving_notes(config: dict[str, Any]) -> list[str]:
    """One sentence for each way in which a server reads this config.json, which we have exported, otherwise."""
    facts = exported(config)
    return [limit.said(facts) for limit in LIMITS if limit.applies(facts)]


def notes_on_answers(config: dict[str, Any], server: str, version: str) -> list[tuple[str, dict[str, str]]]:
    """Of those notes, the ones that say why this version of this server may answer a prompt otherwise than our model:
    the sentence, and the options of its command line that it names ("--max-model-len": "256")."""
    facts = exported(config)
    installed = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    return [
        (text, dict(re.findall(_OPTION, text)))
        for limit in LIMITS
        if limit.server in (server, f"{server} {version.split('.')[0]}")
        and limit.in_one_answer
        and limit.applies(facts)
        if limit.until is None or installed <= limit.until
        for text in [limit.said(facts)]
    ]
