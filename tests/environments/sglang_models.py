"""Builds the small models of the SGLang tests; runs inside the sglang environment.

    python -m tests.environments.sglang_models tiny-sg-llama ...    # into .models/<kind>; `all` builds every kind

One model for each way in which SGLang keeps KV: `tiny-sg-llama` (keys and values of every layer), `tiny-sg-deepseek`
(MLA: one latent vector for each token) and `tiny-sg-mellum` (every other layer has a sliding window, and a pool of its
own). Their weights are random, and so wide that the next token depends on every part of the prompt. A kind is built
once and again only when this file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.environments import models

COMMON = {
    "vocab_size": models.VOCABULARY_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EMBEDDING_WIDTH = 0.35
# For each matrix, times the root of its inputs' number: half as wide again as what keeps a signal's size.
MATRIX_WIDTH = 1.5


def save_wide_model(config: Any, out_dir: Path) -> None:
    """Writes a model with wide random weights, in bf16, and the byte tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                width = EMBEDDING_WIDTH if "embed" in name else MATRIX_WIDTH / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    model.to(torch.bfloat16).save_pretrained(out_dir)
    models.byte_tokenizer().save_pretrained(out_dir)


def build_llama(out_dir: Path) -> None:
    """Writes a four-layer Llama whose heads share keys and values two by two."""
    from transformers import LlamaConfig

    save_wide_model(LlamaConfig(**COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=64), out_dir)


def build_deepseek(out_dir: Path) -> None:
    """Writes a three-layer DeepSeek-V2 without experts: MLA, and a latent of 64 + 32 numbers."""
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        **COMMON,
        num_hidden_layers=3,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=3,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_shared_experts=1,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    )
    save_wide_model(config, out_dir)
    # SGLang reads three fields that transformers does not write.
    path = out_dir / "config.json"
    written = json.loads(path.read_text())
    written |= {"moe_layer_freq": 1, "scoring_func": "softmax", "rope_theta": 10000.0}
    path.write_text(json.dumps(written, indent=2) + "\n")


def build_mellum(out_dir: Path) -> None:
    """Writes a four-layer Mellum without experts, whose first and third layer see 64 tokens back."""
    from transformers import MellumConfig

    config = MellumConfig(
        **COMMON,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        mlp_layer_types=["dense"] * 4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
    )
    save_wide_model(config, out_dir)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "tiny-sg-llama": build_llama,
    "tiny-sg-deepseek": build_deepseek,
    "tiny-sg-mellum": build_mellum,
}
KINDS = tuple(BUILDERS)


def stamp_of(kind: str) -> str:
    """Returns what a finished build of this kind carries: a digest of this file and the kind."""
    return hashlib.sha256(Path(__file__).read_bytes() + kind.encode()).hexdigest()


def is_current(kind: str) -> bool:
    """Tells whether a finished build of this kind is there."""
    try:
        return bool(json.loads((models.MODELS / kind / models.STAMP_NAME).read_text()) == stamp_of(kind))
    except (OSError, ValueError):
        return False


def build_model(kind: str) -> None:
    """Builds a model unless a finished build is there; imports torch and transformers into this process."""
    with models.models_lock(models.MODELS):
        if is_current(kind):
            return
        started = time.monotonic()
        print(f"building model {kind} ...", end=" ", flush=True)
        out_dir = models.MODELS / kind
        scratch = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=models.MODELS))
        try:
            BUILDERS[kind](scratch)
            (scratch / models.STAMP_NAME).write_text(json.dumps(stamp_of(kind)))
            shutil.rmtree(out_dir, ignore_errors=True)
            scratch.chmod(0o755)
            scratch.rename(out_dir)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        print(f"{time.monotonic() - started:.1f} s", flush=True)


def ensure_model(kind: str) -> Path:
    """Returns the folder of a model under `.models`, one of this module or of `models`, building it where missing."""
    if kind not in KINDS:
        return models.ensure_model(kind)
    if not is_current(kind):
        subprocess.run([sys.executable, "-m", "tests.environments.sglang_models", kind], check=True, cwd=models.ROOT)
    return models.MODELS / kind


def main() -> None:
    """Builds the kinds named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=[*KINDS, "all"], metavar="KIND", help=f"{', '.join(KINDS)} or all")
    kinds = parser.parse_args().kinds
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    for kind in KINDS if "all" in kinds else kinds:
        build_model(kind)


if __name__ == "__main__":
    main()
