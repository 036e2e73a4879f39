"""What share of a trace's compute went to tokens computed before: pure arithmetic on what engines told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Served:
    """One request as an engine served it.

    Attributes:
        prompt_tokens: Length of the prompt.
        seen_tokens: Leading tokens that an earlier request had computed.
        local_tokens: Prompt tokens from the engine's own prefix cache, by its counters.
        external_tokens: Prompt tokens from the connector, by the engine's counters.
        ttft_s: Time to the first token.
    """

    prompt_tokens: int
    seen_tokens: int
    local_tokens: int
    external_tokens: int
    ttft_s: float

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return self.local_tokens + self.external_tokens

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def again_tokens(self) -> int:
        """Prompt tokens that were computed although they had been computed before."""
        return max(0, self.seen_tokens - self.cached_tokens)


@dataclass(frozen=True)
class Prefill:
    """Seconds of computing a prompt: `per_token` for each token, and `per_pair` for each two that attend.

    Tokens `a` to `b` behind a cached prefix of `a` cost `per_token * (b - a) + per_pair * (b * b - a * a)`.
    """

    per_token: float
    per_pair: float

    def seconds(self, first: int, last: int) -> float:
        """Returns the cost of computing tokens `first` to `last`."""
        return self.per_token * (last - first) + self.per_pair * (last * last - first * first)


def fit(served: Sequence[Served]) -> Prefill:
    """Returns the prefill cost that fits requests which loaded nothing, by least squares, neither term below zero.

    Raises:
        ValueError: No request computed anything without a load.
    """
    plain = [one for one in served if not one.external_tokens and one.computed_tokens]
    if not plain:
        raise ValueError("no request computed its prompt without a load: there is no prefill rate to measure")
    columns = np.array(
        [[one.computed_tokens, one.prompt_tokens**2 - one.cached_tokens**2] for one in plain], dtype=float
    )
    times = np.array([one.ttft_s for one in plain])
    (per_token, per_pair), *_ = np.linalg.lstsq(columns, times, rcond=None)
    if per_pair < 0:
        per_token, per_pair = float(columns[:, 0] @ times / (columns[:, 0] @ columns[:, 0])), 0.0
    if per_token < 0:
        per_token, per_pair = 0.0, float(columns[:, 1] @ times / (columns[:, 1] @ columns[:, 1]))
    return Prefill(float(per_token), float(per_pair))


def tax(served: Sequence[Served], cost: Prefill) -> dict[str, Any]:
    """Returns the share of prefill that went to tokens computed before, in tokens and in seconds.

    Seconds are what `cost` says of the tokens that the engine's counters name: measured waiting time would count
    queueing and loading in.
    """
    computed = sum(one.computed_tokens for one in served)
    again = sum(one.again_tokens for one in served)
    computed_s = sum(cost.seconds(one.cached_tokens, one.prompt_tokens) for one in served)
    again_s = sum(cost.seconds(one.cached_tokens, one.cached_tokens + one.again_tokens) for one in served)
    return {
        "requests": len(served),
        "prompt_tokens": sum(one.prompt_tokens for one in served),
        "seen_tokens": sum(one.seen_tokens for one in served),
        "local_hit_tokens": sum(one.local_tokens for one in served),
        "external_hit_tokens": sum(one.external_tokens for one in served),
        "computed_tokens": computed,
        "computed_again_tokens": again,
        "tax_tokens_share": again / computed if computed else 0.0,
        "prefill_s": computed_s,
        "prefill_again_s": again_s,
        "tax_seconds_share": again_s / computed_s if computed_s else 0.0,
        "ttft_s": [one.ttft_s for one in served],
        "served": [asdict(one) for one in served],
    }
