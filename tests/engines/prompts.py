"""Prompts for small models."""

from __future__ import annotations

import random


def tokens_of(seed: int, length: int) -> list[int]:
    """Returns a random prompt."""
    choice = random.Random(seed)
    return [choice.randrange(4, 260) for _ in range(length)]
