"""A model for prompts that SmolLM2 is too short for: a Qwen3 of 335 million random weights, made in a minute.

What it answers means nothing; what its prompts cost does. 48 KiB of KV a token in bfloat16.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.compare.plan import RANDOM_335M
from tests.environments import models

MAX_POSITIONS = 32_768
SEED = 1


def ensure_long_model() -> Path:
    """Returns the model's folder; makes it where it is not there."""
    folder = models.MODELS / RANDOM_335M
    with models.models_lock(models.MODELS):
        if folder.exists():
            return folder
        from transformers import Qwen3Config

        config = Qwen3Config(
            vocab_size=models.VOCABULARY_SIZE,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
        made = Path(tempfile.mkdtemp(prefix=f".{RANDOM_335M}-", dir=models.MODELS))
        try:
            models.save_random_model(config, {}, SEED, made)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder
