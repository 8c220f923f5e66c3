"""Compares exports with our logits in transformers 4, in a virtual environment made for it, and in the one that runs.

    python -m tests.unit.extensions.convert.check_transformers4 ./transformers4 --version "4.57.*"

A tiny random model for every RoPE and architecture is saved, exported and run at the original length, at the trained
length and beyond. The folder keeps the environment (about 1.5 GB), so a second run is fast. Prints the table of
docs/servers.md; exit code 1 if a difference is above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

LIMIT = 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the environment and the exports")
    parser.add_argument("--version", default="4.57.*", help="of transformers")
    parser.add_argument("--compare-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    models = options.folder / "models"
    if options.compare_only:
        print(json.dumps(compare(models)))
        return 0
    start = time.monotonic()
    python = make_environment(options.folder / "environment", options.version)
    print(f"environment: {time.monotonic() - start:.0f} s", file=sys.stderr)
    export_all(models)
    results = []
    for interpreter in (sys.executable, python):
        command = [interpreter, __file__, str(options.folder), "--compare-only"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    versions = [result.pop("version") for result in results]
    print(f"| model | exported as | transformers {versions[0]} | transformers {versions[1]} |\n|---|---|---|---|")
    for name, row in results[0].items():
        values = " | ".join(result[name].get("refused") or f"{result[name]['difference']:.1e}" for result in results)
        print(f"| {name} | {row['form']} | {values} |")
    return int(any(row.get("difference", 0) > LIMIT for result in results for row in result.values()))


def make_environment(folder: Path, version: str) -> Path:
    """Its Python; torch is of the version that runs here."""
    from importlib.metadata import version as installed

    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch = installed("torch").split("+")[0]
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, f"transformers=={version}", f"torch=={torch}"], check=True)
    return python


def export_all(folder: Path) -> None:
    """For each model a Hugging Face folder, and our logits beside it."""
    from safetensors.torch import save_file

    from tests.unit.extensions.convert.models import (
        ARCHITECTURES,
        ORIGINAL,
        SCALINGS,
        TRAINED,
        export,
        our_logits,
        random_weights,
        save,
        some_tokens,
        with_rope,
    )

    shutil.rmtree(folder, ignore_errors=True)
    cases = {name: with_rope(scaling) for name, scaling in SCALINGS.items()}
    cases |= {f"{name}, yarn": with_rope(SCALINGS["yarn"], args) for name, args in ARCHITECTURES.items()}
    others = (("olmo2", "linear"), ("olmo3", "linear"), ("olmo3", "llama3"), ("olmo3", "longrope"))
    cases |= {f"{model}, {name}": with_rope(SCALINGS[name], ARCHITECTURES[model]) for model, name in others}
    cases["yarn, magnitude 0.5"] = with_rope(replace(SCALINGS["yarn"], attention_factor=0.5))  # a negative mscale
    for name, args in cases.items():
        export(save(args, folder / f"{name} checkpoint"), folder / name, None)
        lengths = (ORIGINAL, TRAINED, TRAINED + 50)
        cases_of = {str(n): our_logits(random_weights(args), some_tokens(n)) for n in lengths}
        cases_of |= {f"tokens {n}": some_tokens(n) for n in lengths}
        save_file(cases_of, folder / name / "expected.st")


def compare(folder: Path) -> dict:
    """{model: {form, difference}} in the transformers that this Python has; neither torchtitan nor tests are used."""
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result: dict = {"version": transformers.__version__}
    for path in sorted(folder.glob("*/expected.st"), key=lambda p: p.stat().st_mtime_ns):
        expected = load_file(path)
        config = json.loads((path.parent / "config.json").read_text())
        form = f"{config['model_type']}, {config.get('rope_scaling', {}).get('type', 'default')}"
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, attn_implementation="eager")
        except ValueError as error:  # a version that does not know the scaling in this architecture says so on loading
            result[path.parent.name] = {"form": form, "refused": f"refused: {str(error).split(',')[0]}"}
            continue
        assert model.dtype == torch.float32
        worst = 0.0
        for length in [key for key in expected if key.isdigit()]:
            with torch.no_grad():
                logits = model(expected[f"tokens {length}"][None]).logits[0]
            worst = max(worst, (logits - expected[length]).abs().max().item())
        result[path.parent.name] = {"form": form, "difference": worst}
    return result


if __name__ == "__main__":
    sys.exit(main())
