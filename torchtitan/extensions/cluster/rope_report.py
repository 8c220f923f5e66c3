"""The RoPE that a stage will really have, and what training would say of it, before it is paid for.

    python -m torchtitan.extensions.cluster.rope_report <arguments of torchtitan.train>

prints it for every stage up to the one that the arguments name, as multinode/submit.sh --dry-run does, and where its
data go on; the exit code is 2 if one of them would be refused. A stage goes on from its own or the previous stage's
checkpoint, if there is one; if not, from what the previous stage's TOML leads to. PyTorch, which computes the
frequencies, is imported when it is asked for; a login node without it is told so.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.config.manager import previous_stage
from torchtitan.config.schema import JobConfig
from torchtitan.extensions.cluster.stages import chain, without_flags
from torchtitan.tools.errors import FAILED, UserError

REFUSED = 2
"""Exit code of what prints a report in which a stage would be refused; 1 is for a mistake that leaves no report."""
MARK = "WOULD BE REFUSED: "


def rope_report(config: JobConfig, earlier: Sequence[JobConfig] = ()) -> list[str]:
    """Lines on the RoPE of a stage: what it is, warnings, and what training would refuse.

    earlier: the stages before it, the first one first; without them, as their files say.
    """
    if importlib.util.find_spec("torch") is None:
        return ["RoPE: not computed and not checked, because PyTorch is not installed here; training checks it"]
    from torchtitan.components.setup import model_args
    from torchtitan.components.stage_rope import not_allowed, stage_rope

    try:
        weights, note = _weights(config, earlier)
        args = model_args(config, weights.rope if weights else None)
        if weights and replace(weights, rope=args.rope) != args:
            raise UserError(f"the weights{note} are of another architecture than model.flavor = {config.model.flavor}.")
        found = stage_rope(config, args, weights.rope if weights else None)
    except UserError as error:
        return [f"RoPE: not computed: {error}"]
    lines = [f"RoPE: {found.line}{note}", *(f"WARNING: {warning}" for warning in found.warnings)]
    if _resumed(config):
        return [
            *lines,
            *(f"WARNING: {text} (The stage is resumed, so that is not refused.)" for text in found.refused.values()),
        ]
    lines += [f"allowed: {text}" for check, text in found.refused.items() if check in config.rope.allow]
    refused = not_allowed(config, found)
    return [*lines, f"{MARK}{refused}"] if refused else lines


def is_refused(lines: Sequence[str]) -> bool:
    """Whether rope_report() says that training would refuse the stage."""
    return any(line.startswith(MARK) for line in lines)


def _resumed(config: JobConfig) -> dict[str, Any] | None:
    """The manifest of the stage's own newest checkpoint, from which it goes on."""
    from torchtitan.components.manifest import newest_manifest

    return newest_manifest(config)[1] if config.checkpoint.enable else None


def _weights(config: JobConfig, earlier: Sequence[JobConfig]) -> tuple[Any, str]:
    """(TransformerArgs of the weights that the stage starts, or started, from, with the length that they were trained
    to; what to say of where it was read). None: they are random."""
    from torchtitan.components.lineage import lineage
    from torchtitan.components.reach import longest_trained
    from torchtitan.components.setup import model_args
    from torchtitan.components.stage_rope import rope_of_weights
    from torchtitan.components.start import find_start
    from torchtitan.models.architecture import args_from_manifest
    from torchtitan.models.flavor import architecture
    from torchtitan.models.hf.config_in import read_config

    model = architecture(config.model)
    if resumed := _resumed(config):
        rope = rope_of_weights(config, resumed, resumed.get("stages_before", []), None)
        return rope and replace(args_from_manifest(resumed["architecture"]), rope=rope), ""
    if config.checkpoint.initial_load_in_hf:
        assets = Path(config.model.hf_assets_path)
        if (assets / "config.json").is_file():
            return read_config(assets), ""
        return model, f" (there is no {assets}/config.json: as the flavor has it)"
    try:
        start = find_start(config)
    except UserError:
        if not config.stage.after:
            path = Path(config.checkpoint.initial_load_path or "").expanduser()
            if path.exists():
                raise
            return model, f" (there are no weights in {path} yet: as the flavor has them)"
        previous = earlier[-1] if earlier else previous_stage(config)
        before, _ = _weights(previous, earlier[:-1])
        args = model_args(previous, before.rope if before else None)
        length = longest_trained(previous, before.rope.max_position_embeddings if before else None)
        note = f" (by {config.stage.after}, which has no finished checkpoint)"
        return replace(args, rope=replace(args.rope, max_position_embeddings=length)), note
    rope = rope_of_weights(config, None, lineage(start.manifest if start else None), start)
    return rope and replace((start and start.args) or model, rope=rope), ""


def data_line(config: JobConfig) -> list[str]:
    """Where the data of a stage that starts from another one go on: at most one line. Opens no corpus."""
    if not (config.stage.after and config.stage.continue_data) or importlib.util.find_spec("torch") is None:
        return []
    from torchtitan.components.data_start import data_start
    from torchtitan.components.start import find_start

    try:
        resumed = _resumed(config)
        begin = data_start(config, resumed, None if resumed else find_start(config))
    except UserError:
        return [
            f"data: every source goes on where {config.stage.after} will stop, which has no finished checkpoint; "
            "scripts/plan.py computes how far that is, by its plan"
        ]
    read = ", ".join(f"{corpus.name} {corpus.epochs:.2f}" for corpus in begin.read.corpora.values())
    return [f"data: {begin.note or f'epochs so far at its beginning: {read}'}"]


def main(args: list[str]) -> int:
    """Print the report of each stage; exit code 1 for a mistake, 2 if a stage would be refused."""
    code = 0
    args = without_flags(args, "stage.run_chain")
    try:
        stages = [stage.config for stage in chain(args)]
        for number, config in enumerate(stages):
            lines = [*rope_report(config, stages[:number]), *data_line(config)]
            print("\n".join(f"stage {config.stage.name}: {line}" for line in lines))
            code = REFUSED if is_refused(lines) else code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
