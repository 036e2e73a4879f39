"""The tier contract over NIXL, and over kvikio's compatibility path."""

from __future__ import annotations

from pathlib import Path

import pytest

from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.posix import BUFFERED, DIRECT
from memkv_engines.transports.select import Decision, Policy, TransportPlan
from tests.fast.samples import make_name, noise
from tests.fast.test_tiers import PAGE, TierContract, get, put
from tests.fast.tier_samples import fix_mode


class OtherTransport(TierContract):
    mode: str
    kind: str
    name: str

    @pytest.fixture(autouse=True)
    def _mode(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        fix_mode(monkeypatch, tmp_path, self.mode)

    def make(self, tmp_path: Path, capacity_bytes: int = 0) -> DirectoryTier:
        plan = TransportPlan(Policy(), Decision(self.kind, "host", "as the test wants"), threads=4)
        return DirectoryTier(tmp_path / "kv", capacity_bytes=capacity_bytes, transport=plan)

    def test_its_name_is_that_of_what_was_taken(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path)
        assert tier.name == f"directory({self.name})"
        assert "as the test wants" in tier.mode_report.reason
        tier.close()

    def test_a_damaged_and_a_truncated_file_are_what_they_are(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path)
        put(tier, make_name(), noise(3 * PAGE))
        path = next((tmp_path / "kv").rglob("*.kv"))
        data = bytearray(path.read_bytes())
        data[PAGE + 7] ^= 1
        path.write_bytes(data)
        assert get(tier, make_name()) == data, "damage is for the digests to find, and must not be hidden by a cache"
        path.write_bytes(data[: 2 * PAGE])
        assert get(tier, make_name()) == data[: 2 * PAGE]
        tier.close()


class TestNixlDirect(OtherTransport):
    mode, kind, name = DIRECT, "nixl", "nixl/posix-uring/direct"


class TestNixlBuffered(OtherTransport):
    mode, kind, name = BUFFERED, "nixl", "nixl/posix-uring/buffered"


class TestKvikio(OtherTransport):
    mode, kind, name = DIRECT, "gds/compat", "gds/compat"

    def test_memory_is_registered_with_its_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tier, seen = self.make(tmp_path), list[tuple[int, int, int | None]]()
        monkeypatch.setattr(
            tier._transport, "register", lambda address, length, *, device: seen.append((address, length, device))
        )
        tier.register_memory(1 << 21, PAGE, device=3)
        tier.register_memory(1 << 22, PAGE)
        assert seen == [(1 << 21, PAGE, 3), (1 << 22, PAGE, None)]
        tier.close()
