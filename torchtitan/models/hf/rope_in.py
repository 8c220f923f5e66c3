"""The RoPE of a Hugging Face config.json, as transformers 5.24 computes it.

What transformers drops with a warning (a factor without a type, a misspelt key) is an error here: the model would be
another than its file says. docs/rope.md says what is read.
"""

from __future__ import annotations

import math
from dataclasses import Field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from torchtitan.models import rope_scaling
from torchtitan.models.hf.config_keys import Key, default_of, shown, typed
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_config import check_angles
from torchtitan.models.rope_method import ORIGINAL, Scaling
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import warn_once

FULL: Literal["full_attention"] = "full_attention"
SLIDING = "sliding_attention"

OLD_NAMES = {"su": "longrope"}  # in Phi-3's first files

# Keys that transformers does not read in these types. What they say is compared with what is read, or named.
UNREAD = {
    "default": ("factor", ORIGINAL),
    "linear": (ORIGINAL,),
    "yarn": ("attn_factor", "finetuned"),
    "longrope": ("short_mscale", "long_mscale"),
}


def rope_from_hf(config: dict[str, Any], where: str, head_dim: int | None = None) -> RopeArgs:
    """The RoPE of all layers, or of those without a window if the others are not scaled.

    config: as JSON has it, or with its keys typed (config_keys.py). head_dim: how many pairs longrope's lists are for;
    None: not checked. `where` begins the message of a UserError.
    """
    config = {"model_type": "llama", **{key: value for key, value in config.items() if value is not None}}
    tables = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    tables = tables or {"rope_scaling": {}}
    found = [(name, _rope_of(config, name, table, where, head_dim)) for name, table in tables.items()]
    (name, rope), (other, again) = found[0], found[-1]
    if rope != again:
        raise UserError(
            f"{where}: {name} = {shown(tables[name])} and {other} = {shown(tables[other])} are two RoPEs. "
            f"transformers reads {name} alone: delete the one that is wrong."
        )
    if config["model_type"] == "olmo3":
        _warn_of_transformers5(config, rope, where)
    return rope


def _rope_of(config: dict[str, Any], name: str, table: Any, where: str, head_dim: int | None) -> RopeArgs:
    """The RoPE that one of the two tables says, with the keys beside it."""
    table = typed(table, Key("object"), name, where)
    olmo3 = config["model_type"] == "olmo3"
    if not any(table.get(kind) is not None for kind in (FULL, SLIDING)):
        flat = {key: value for key, value in table.items() if key not in (FULL, SLIDING)}
        rope = _rope(config, name, flat, where, head_dim)
        # Olmo 3's layers with a window are not scaled even if rope_scaling does not say so (transformers 4.57 and 5.24,
        # OLMo-core and vLLM agree; some versions of transformers in between scaled all layers)
        return replace(rope, layers=FULL) if olmo3 else rope
    if not olmo3:
        raise UserError(
            f"{where}: {name} has keys by kind of layer, which transformers reads in Olmo 3 only; this is "
            f"{config['model_type']}, with one RoPE for all layers: write its keys without {FULL}."
        )
    table = {key: value for key, value in table.items() if value is not None}
    for key in set(table) - {FULL, SLIDING}:
        raise UserError(f"{where}: {name}.{key} stands beside keys by kind of layer and would not be read: delete it.")
    both = {kind: _rope(config, f"{name}.{kind}", table.get(kind, {}), where, head_dim) for kind in (FULL, SLIDING)}
    rope, sliding = both[FULL], both[SLIDING]
    if sliding == rope and rope.scaling:
        return rope
    if sliding.scaling or sliding.theta != rope.theta:
        raise UserError(
            f"{where}: {name}.{SLIDING} = {shown(table.get(SLIDING))} is not supported; it must be the default RoPE "
            f"with the rope_theta of {FULL}, {rope.theta:g}."
        )
    return replace(rope, layers=FULL)


def _warn_of_transformers5(config: dict[str, Any], rope: RopeArgs, where: str) -> None:
    """Olmo 3's form in transformers 5 is by kind of layer; of the older forms it drops the type, or a theta."""
    by_kind, default = config.get("rope_parameters") or {}, default_of("rope_theta", "olmo3")
    full = {**(by_kind.get(FULL) or {"rope_type": "default"}), **(config.get("rope_scaling") or {})}
    loaded = full.get("rope_type") or full.get("type") or "default"
    sliding = by_kind.get(SLIDING) or {}
    thetas = [
        float(full.get("rope_theta") or config.get("rope_theta") or default),
        float(sliding.get("rope_theta") or default),
    ]
    kind = rope.scaling.rope_type if rope.scaling else "default"
    truncate = getattr(rope.scaling, "truncate", True)
    if loaded != kind or thetas != [rope.theta, rope.theta] or not truncate:
        warn_once(
            f"{where}: this RoPE is read as transformers 4 reads it: {kind} with theta {rope.theta:g}, and the same "
            f"theta in layers with a window. transformers 5 would load {loaded} with theta {thetas[0]:g}, "
            f"and {thetas[1]:g} there{'' if truncate else ', as if truncate were true'}. For the same in both, write "
            f"rope_type and rope_theta in rope_parameters.{FULL} and rope_parameters.{SLIDING}."
        )


def _rope(config: dict[str, Any], name: str, table: Any, where: str, head_dim: int | None) -> RopeArgs:
    """RopeArgs for all layers from a table without kinds of layers."""
    said = typed(table, Key("object"), name, where)
    table = {key: value for key, value in said.items() if value is not None}
    theta = _theta(config, name, table, where)
    kind = _kind(name, table, where)
    if kind == "yarn" and said.get("truncate", True) is None:
        raise UserError(
            f"{where}: {name}.truncate = null, with which transformers computes as if it were false, and as if it were "
            "true without the key: write true or false."
        )
    partial = table.get("partial_rotary_factor", 1)
    if partial != 1:
        raise UserError(f"{where}: {name}.partial_rotary_factor = {shown(partial)} is not supported: all pairs rotate.")
    methods = {method.rope_type: method for method in rope_scaling.methods() if method.in_hf}
    if kind not in ("default", *methods):
        *others, last = ["default", *methods]
        raise UserError(
            f'{where}: rope_type = "{kind}" is not supported; supported are {", ".join(others)} and {last}.'
        )
    known = {f.name: f for f in fields(methods[kind]) if f.init and f.name != "length"} if kind in methods else {}
    values = {}
    for key, value in table.items():
        if key in known:
            if value == 0 and key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                continue  # transformers has its default then
            values[key] = typed(value, _rule(known[key]), f"{name}.{key}", where)
        elif key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *UNREAD.get(kind, ())):
            meant = get_close_matches(key, known, 1, 0.75)
            raise UserError(
                f"{where}: {name}.{key} = {shown(value)} is not a key of the {kind} RoPE: "
                + (f"is {meant[0]} meant? " if meant else "")
                + f"Its keys are {', '.join(known) or 'rope_theta alone'}."
            )
    length = config.get("max_position_embeddings")
    scaling = None
    if kind != "default":
        values |= _original(config, name, table, kind, where)
        try:
            scaling = methods[kind].from_hf(values | ({"max_position_embeddings": length} if length else {}))
        except KeyError as e:
            raise UserError(f"{where}: the {kind} rope scaling lacks {e.args[0]}.") from None
        _check_numbers(scaling, name, where, head_dim)
    _check_unread(table, kind, scaling, name, where)
    trained = config.get("trained_length") or _trained_length(config, table, scaling, name, where)  # the former is ours
    rope = RopeArgs(theta, scaling, "all", trained)
    if head_dim:
        check_angles(rope, head_dim, f"{where}: {name}" if table else where)
    return rope


def _theta(config: dict[str, Any], name: str, table: dict[str, Any], where: str) -> float:
    inside, beside = (
        typed(keys["rope_theta"], Key("number"), key, where) if keys.get("rope_theta") is not None else None
        for keys, key in ((table, f"{name}.rope_theta"), (config, "rope_theta"))
    )
    if inside and beside and inside != beside:
        raise UserError(
            f"{where}: {name}.rope_theta = {inside:g}, but rope_theta = {beside:g}: transformers 5 reads the former, "
            "transformers 4 the latter. Delete the one that is wrong."
        )
    return float(inside or beside or default_of("rope_theta", config["model_type"]))


def _kind(name: str, table: dict[str, Any], where: str) -> str:
    """The rope_type that the table says."""
    said = [typed(table[key], Key("text"), f"{name}.{key}", where) for key in ("rope_type", "type") if key in table]
    kinds = {OLD_NAMES.get(kind, kind) for kind in said}
    if len(kinds) > 1:
        raise UserError(
            f'{where}: {name}.rope_type = "{said[0]}", but {name}.type = "{said[1]}": delete the wrong one.'
        )
    others = set(table) - {"rope_theta", "partial_rotary_factor", ORIGINAL}
    if not kinds and others:
        raise UserError(
            f"{where}: {name} = {shown(table)} has no rope_type: transformers would not rescale at all, and drop "
            f"{', '.join(sorted(others))}. Add the rope_type that is meant, or delete these keys."
        )
    return kinds.pop() if kinds else "default"


def _rule(field: Field[Any]) -> Key:
    """What the value of a method's field must be in JSON."""
    text = str(field.type)
    if "bool" in text or "tuple" in text:
        return Key("bool" if "bool" in text else "numbers", least=0)
    if "int" in text:
        return Key("int")
    return Key("number", least=-math.inf if field.name.startswith("mscale") else 0)


def _original(config: dict[str, Any], name: str, table: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """original_max_position_embeddings by transformers' rule: of the table, or beside it, else max_position_embeddings.

    UserError if two of them disagree, since transformers and servers differ in which one they read.
    """
    length = config.get("max_position_embeddings")
    places = {f"{name}.{ORIGINAL}": table.get(ORIGINAL), ORIGINAL: config.get(ORIGINAL)}
    # LongRoPE divides by its logarithm
    said = {
        place: typed(value, Key("int", least=2), place, where) for place, value in places.items() if value is not None
    }
    beside_alone = config["model_type"] == "olmo3" and list(said) == [ORIGINAL]
    if length and (kind == "dynamic" or beside_alone):
        said["max_position_embeddings"] = length  # what transformers reads
    if len(set(said.values())) > 1:
        what = " and ".join(f"{place} = {value}" for place, value in said.items())
        raise UserError(f"{where}: {what} contradict each other, and which one holds depends on the program: mend it.")
    if not said and kind == "llama3" and length:
        warn_once(
            f"{where}: {name} has no {ORIGINAL}, so max_position_embeddings = {length} is taken for it, as "
            "transformers does: with llama3's RoPE that is hardly what was trained."
        )
    if said:
        return {ORIGINAL: next(iter(said.values()))}
    if kind == "yarn" and table.get("factor") is None:
        raise UserError(f"{where}: the yarn rope scaling lacks factor and {ORIGINAL}: one of them is needed.")
    return {ORIGINAL: length} if length else {}


def _check_numbers(scaling: Scaling, name: str, where: str, head_dim: int | None) -> None:
    """UserError for numbers that are possible each, and impossible together."""
    of = vars(scaling)
    for high, low in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
        if high in of and of[high] <= of[low]:
            raise UserError(f"{where}: {name}.{high} = {of[high]:g} must be greater than {low} = {of[low]:g}.")
    for key in ("short_factor", "long_factor"):
        if head_dim and key in of and len(of[key]) != head_dim // 2:
            raise UserError(
                f"{where}: {name}.{key} has {len(of[key])} numbers, but heads of {head_dim} have {head_dim // 2} pairs."
            )
    if scaling.rope_type == "dynamic" and head_dim == 2:
        raise UserError(f"{where}: the dynamic RoPE is not defined for head_dim = 2.")


def _check_unread(table: dict[str, Any], kind: str, scaling: Scaling | None, name: str, where: str) -> None:
    """UserError, or a warning, for keys that transformers leaves out and that would change the angles."""
    if kind == "default" and table.get("factor", 1) != 1:
        raise UserError(
            f'{where}: {name}.factor = {shown(table["factor"])} has no effect with rope_type = "default": name '
            "the type that is meant, or delete the factor."
        )
    if scaling and (attn := table.get("attn_factor")) is not None:
        attn = typed(attn, Key("number", least=0), f"{name}.attn_factor", where)
        warn_once(
            f"{where}: {name}.attn_factor = {attn:g} is not read, as in transformers and vLLM 0.32: cos and sin are "
            f"multiplied by {scaling.magnitude():g}. Older vLLM multiplied that by attn_factor too: if this is meant, "
            f"write attention_factor = {scaling.magnitude() * attn:g} in its place."
        )
    for key in ("short_mscale", "long_mscale"):
        value = table.get(key)
        if scaling and value is not None:
            value = typed(value, Key("number", least=0), f"{name}.{key}", where)
            if abs(value - scaling.magnitude()) > 1e-5 * value:
                raise UserError(
                    f"{where}: {name}.{key} = {value:g}, which vLLM reads, but transformers multiplies cos and sin by "
                    f"{scaling.magnitude():g}: write attention_factor = {value:g} if that is what was trained."
                )


def _trained_length(
    config: dict[str, Any], table: dict[str, Any], scaling: Scaling | None, name: str, where: str
) -> int | None:
    """The length in tokens that the model was trained for: max_position_embeddings, times a linear factor unless the
    file's number counts it already. vLLM always multiplies, which is wrong for such files."""
    length = config.get("max_position_embeddings")
    if not isinstance(scaling, rope_scaling.LinearScaling) or not length:
        return length
    longer = max(round(length * scaling.factor), 1)
    original = table.get(ORIGINAL) or config.get(ORIGINAL)
    if original is not None:
        original = typed(original, Key("int"), f"{name}.{ORIGINAL}", where)
        return max(round(original * scaling.factor), 1)
    said = config.get("max_sequence_length")  # LMSYS writes it
    if said in (length, longer):
        return said
    # no model was pretrained on less than 2,048 tokens; Llama 1 and 2 on 2,048 and 4,096
    if length <= 4096 or length / scaling.factor < 2048 or longer <= length:
        return longer
    warn_once(
        f"{where}: max_position_embeddings = {length} with a linear factor of {scaling.factor:g} is taken for the "
        f"trained length, as in LLaMA-2-7B-32K. If the factor comes on top of it, add trained_length = {longer} to the "
        "file."
    )
    return length
