"""Asks one server for the next token's log-probabilities; run in the server's own Python, by its path.

    /envs/vllm/bin/python torchtitan/extensions/convert/ask_server.py vllm WORK

WORK/request.json says what is asked; WORK/report.json and one file of float32 numbers per model are the answer. Imports
nothing of torchtitan, which the server's Python does not have. Every server computes in float32 and reads a prompt of
token ids as it would read a user's, with its cache, from which it then writes one token. A model of the request can
have options of the server's command line ("--max-model-len": "256"): what they set is set through Python.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any], dict[str, Any], list[str]], Iterator["array[float]"]]
"""(request, model, remarks to add to) -> log-probabilities of the vocabulary, for each prompt in turn."""


def main(name: str, work: Path) -> None:
    """Writes the report anew after each model: a server that dies leaves what it has answered."""
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent]
    request = json.loads((work / "request.json").read_text())
    module, packages, answer = SERVERS[name]
    report: dict[str, Any] = {"versions": {}, "models": []}
    if importlib.util.find_spec(module) is None:
        report["missing"] = f"{sys.executable} has no {module}"
    elif name == "llama.cpp" and not request["gguf_converter"]:
        report["missing"] = "--gguf-converter, which makes its files, is not given"
    else:
        report["versions"] = {p: v for p in packages if (v := version_of(p))}
        for i, model in enumerate(request["models"]):
            said: list[str] = []
            entry: dict[str, Any] = {"remarks": said}
            try:
                with (work / f"{i}.f32").open("wb") as f:
                    for row in answer(request, model, said):
                        row.tofile(f)
            except Exception as error:  # whatever a server does with a folder that it cannot read
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:600] or f"{Path(where.filename).name}, line {where.lineno}"
                entry["error"] = f"{type(error).__name__}: {text}"
            report["models"].append(entry)
            (work / "report.json").write_text(json.dumps(report))
            gc.collect()
    (work / "report.json").write_text(json.dumps(report))


def version_of(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def transformers(request: dict[str, Any], model: dict[str, Any], said: list[str]) -> Iterator[array[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model["folder"], dtype=torch.float32)
    for prompt in model["prompts"]:
        with torch.no_grad():
            logits = loaded(torch.tensor([prompt])).logits[0, -1]
        yield array("f", logits.log_softmax(-1).tolist())


def vllm(request: dict[str, Any], model: dict[str, Any], said: list[str]) -> Iterator[array[float]]:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: it ends with it
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on a GPU
    from vllm import LLM, SamplingParams

    options = model["options"]
    server = LLM(
        model=model["folder"],
        dtype="float32",
        max_model_len=int(options["--max-model-len"]) if "--max-model-len" in options else None,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_logprobs=-1,
        max_num_seqs=1,
    )
    try:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False, ignore_eos=True)
        for prompt in model["prompts"]:
            [output] = server.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            yield by_id({i: p.logprob for i, p in output.outputs[0].logprobs[0].items()}, model["vocab_size"])
    finally:
        server.llm_engine.engine_core.shutdown()


def mlx_lm(request: dict[str, Any], model: dict[str, Any], said: list[str]) -> Iterator[array[float]]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model["folder"]))
    loaded.set_dtype(mx.float32)
    for prompt in model["prompts"]:
        _, log_probs = next(generate_step(mx.array(prompt), loaded, max_tokens=1))
        yield array("f", log_probs.tolist())


def llama_cpp(request: dict[str, Any], model: dict[str, Any], said: list[str]) -> Iterator[array[float]]:
    import xllamacpp

    options = model["options"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        make_gguf(Path(request["gguf_converter"]), model["folder"], file, options.get("--override-kv"), said)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = max(map(len, model["prompts"])) + 1
        parameters.yarn_beta_fast = float(options.get("--yarn-beta-fast", parameters.yarn_beta_fast))
        parameters.yarn_beta_slow = float(options.get("--yarn-beta-slow", parameters.yarn_beta_slow))
        parameters.n_parallel, parameters.warmup = 1, False
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(parameters)
        # it gives no probabilities beside a token that has no text: it writes an "a", whatever is likely
        how = {"max_tokens": 1, "logprobs": model["vocab_size"], "cache_prompt": False, "logit_bias": [["a", 1000.0]]}
        for prompt in model["prompts"]:
            answer = server.handle_completions({**how, "prompt": prompt})
            answer = json.loads(answer) if isinstance(answer, str) else answer
            if "choices" not in answer:
                raise RuntimeError(f"no answer to a prompt of {len(prompt)} tokens: {answer}")
            likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            yield by_id({entry["id"]: entry["logprob"] for entry in likeliest}, model["vocab_size"])
        del server


def make_gguf(converter: Path, folder: str, file: Path, override: str | None, said: list[str]) -> None:
    """The folder as a float32 GGUF file, by llama.cpp's own converter in this process.

    It refuses a tokenizer that it does not know. Prompts are ids here, so that does not matter: it is said, and another
    name written. override: key=type:value,... is what --override-kv does when the file is read.
    """
    sys.path[:0] = [str(p) for p in (converter.parent, converter.parent / "gguf-py") if str(p) not in sys.path]
    import convert_hf_to_gguf
    import gguf
    from conversion.base import TextModel

    known, prepare = TextModel.get_vocab_base_pre, TextModel.prepare_metadata

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            said.append("its converter does not know this tokenizer, and refuses it: asked with ids only")
            return "gpt-2"

    def prepared(self: Any, vocab_only: bool) -> None:
        prepare(self, vocab_only=vocab_only)
        types = {"float": (float, gguf.GGUFValueType.FLOAT32), "int": (int, gguf.GGUFValueType.UINT32)}
        for one in override.split(",") if override else ():
            key, _, typed = one.partition("=")
            kind, _, value = typed.partition(":")
            read, gguf_type = types[kind]
            self.gguf_writer.kv_data[0][key] = gguf.GGUFValue(read(value), gguf_type)

    arguments = sys.argv
    try:
        TextModel.get_vocab_base_pre, TextModel.prepare_metadata = pre_tokenizer, prepared
        sys.argv = [str(converter), folder, "--outfile", str(file), "--outtype", "f32"]
        convert_hf_to_gguf.main()
    finally:
        TextModel.get_vocab_base_pre, TextModel.prepare_metadata = known, prepare
        sys.argv = arguments


def by_id(log_probs: dict[int, float], vocab_size: int) -> array[float]:
    """One number for each id of the vocabulary; -inf where there is none."""
    return array("f", [log_probs.get(i, float("-inf")) for i in range(vocab_size)])


SERVERS: dict[str, tuple[str, tuple[str, ...], Answer]] = {
    "transformers": ("transformers", ("transformers", "torch"), transformers),
    "vllm": ("vllm", ("vllm", "vllm-cpu", "torch", "transformers"), vllm),
    "mlx-lm": ("mlx_lm", ("mlx-lm", "mlx"), mlx_lm),
    "llama.cpp": ("xllamacpp", ("xllamacpp",), llama_cpp),
}
"""By name: the module that must be there, the packages whose versions are reported, and how it is asked."""


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
