"""Our counters in vLLM's log lines and Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from memkv_engines.metrics import COUNTERS, Counters

_PREFIX = "vllm:memkv_engines_"


@dataclass
class MemKVStats(KVConnectorStats):
    """Counters since the last report."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Start again from zero."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another rank's or interval's counters."""
        total = Counters()
        total.merge(self.data)
        total.merge(other.data)
        return MemKVStats(data=total.as_dict())

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's periodic log line shows."""
        return {k: v for k, v in self.data.items() if v}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class MemKVPromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter per declared counter, per engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            metric = counter(name=_PREFIX + name, documentation=text, labelnames=labelnames)
            self._counters[name] = {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted since the last call."""
        for name, amount in transfer_stats_data.items():
            if name in self._counters and amount:
                self._counters[name][engine_idx].inc(amount)
