"""Steps that take something out of our own code, in the engine's process, to show what it is for or how it copes."""

from __future__ import annotations

import random


class Sabotage:
    """What is taken out stays out: each scenario has an engine process of its own."""

    def unfence(self) -> None:
        """From now on no step waits for pages that are being copied out: the control that shows what it is for."""
        from memkv_engines.offload.client import IoClient

        IoClient.fence = lambda _: True

    def scarce(self, share: float) -> None:
        """From now on such a share of gathers finds no staging; only with threads of the engine for I/O."""
        from memkv_engines.offload.staging import StagingPool

        acquire, chance = StagingPool.try_acquire, random.Random(1)
        # Loads wait for a slot (`acquire`); only stores try.
        StagingPool.try_acquire = lambda pool: None if chance.random() < share else acquire(pool)

    def believe_everything(self) -> None:
        """Switch verification off (threads of this process only): the control that shows what it is for."""
        from memkv_engines.offload import host_loads

        host_loads.verify_blocks = lambda *_: None
