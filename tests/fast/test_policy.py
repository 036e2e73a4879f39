"""Pins, priorities, times to live, and quotas of tenants: what a keeper removes, and what stores may write."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.errors import ConfigError, TierFull
from memkv_engines.keys import ChunkName, Namespace
from memkv_engines.limits import ALIGN_BYTES, CLOCK_SLACK_S, MAX_POLICY_BYTES, MAX_PRIORITY, MAX_TTL_S, UPKEEP_EVERY_S
from memkv_engines.offload.keeping import Keeper
from memkv_engines.tier import policy as policies
from memkv_engines.tier import quotas as quota_module
from memkv_engines.tier import upkeep
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.eviction import LRU, OFF, SEGMENTED_LRU, Chooser, StoredChunk
from memkv_engines.tier.policy import NamespacePolicy, Quotas, load_policy, load_quotas, save_policy, save_quotas
from memkv_engines.tier.quotas import tenant_of, usage_name
from memkv_engines.tier.upkeep import is_expired
from tests.fast.samples import aligned, make_name, noise

SIZE = ALIGN_BYTES
CAPACITY = 100 * SIZE
LOW, HIGH, OTHER = (
    Namespace({"model": model, "tenant": tenant}) for model, tenant in (("low", "t"), ("high", "t"), ("x", "u"))
)
HOUR_NS = 3600 * 10**9


def number_name(number: int) -> ChunkName:
    return make_name(4, f"chunk {number}")


def fill(tier: DirectoryTier, namespace: Namespace, count: int, first: int = 0, age_ns: int = 0) -> None:
    for number in range(first, first + count):
        tier.put(namespace.folder, number_name(number), [aligned(noise(SIZE, number))])
        path = tier.root / namespace.folder / number_name(number).bucket / number_name(number).text
        when = time.time_ns() - HOUR_NS // 2 - age_ns + number
        os.utime(path, ns=(when, when))


def held(tier: DirectoryTier, namespace: Namespace) -> int:
    return sum(1 for _ in tier.names(namespace.folder))


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "kv").mkdir()
    fd = os.open(tmp_path / "kv", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def tier(tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[DirectoryTier]:
    monkeypatch.setattr(quota_module, "POLICY_REFRESH_S", 0.0)
    made = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=CAPACITY)
    for namespace in (LOW, HIGH, OTHER):
        made.write_manifest(namespace)
    made.scan()
    made.wait_for_pressure(0)
    yield made
    made.close()


# ----------------------------------------------------------------------------------------------------------- the files


def test_what_is_saved_is_read_again_and_canonical(root_fd: int, tmp_path: Path) -> None:
    (tmp_path / "kv" / LOW.folder).mkdir()
    assert load_policy(root_fd, LOW.folder) == NamespacePolicy()
    save_policy(root_fd, LOW.folder, NamespacePolicy(True, -3, 60))
    assert load_policy(root_fd, LOW.folder) == NamespacePolicy(True, -3, 60)
    path = tmp_path / "kv" / LOW.folder / "policy.json"
    assert path.read_text() == '{"pinned":true,"priority":-3,"ttl_s":60,"version":1}'
    assert path.stat().st_mode & 0o777 == 0o600
    save_quotas(root_fd, Quotas({"t": 5, "a": 7}))
    assert (tmp_path / "kv" / "quotas.json").read_text() == '{"tenants":{"a":7,"t":5},"version":1}'
    assert load_quotas(root_fd).tenants == {"a": 7, "t": 5}
    assert not list((tmp_path / "kv").rglob(".tmp-*"))


@pytest.mark.parametrize(
    "policy",
    [NamespacePolicy(priority=MAX_PRIORITY + 1), NamespacePolicy(ttl_s=-1), NamespacePolicy(ttl_s=MAX_TTL_S + 1)],
)
def test_a_policy_out_of_bounds_is_refused(root_fd: int, tmp_path: Path, policy: NamespacePolicy) -> None:
    (tmp_path / "kv" / LOW.folder).mkdir()
    with pytest.raises(ConfigError, match="cannot be kept"):
        save_policy(root_fd, LOW.folder, policy)
    assert not list((tmp_path / "kv" / LOW.folder).iterdir())
    with pytest.raises(ConfigError, match="no namespace"):
        save_policy(root_fd, HIGH.folder, NamespacePolicy())


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"pinned": 1}',
    b'{"pinned": true, "version": 2}',
    b'{"priority": 101}',
    b'{"ttl_s": -1}',
    b'{"ttl_s": 1e400}',
    b"[" * 5000,
    b"\xff\xfe",
    b" " * (MAX_POLICY_BYTES + 1),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_policy_is_ignored_with_a_warning(
    root_fd: int, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "_lines", policies.Throttle())
    (tmp_path / "kv" / LOW.folder).mkdir()
    (tmp_path / "kv" / LOW.folder / "policy.json").write_bytes(content)
    with pytest.raises(ConfigError, match="json cannot be used"):
        load_policy(root_fd, LOW.folder)
    with caplog.at_level(logging.WARNING, "memkv_engines"):
        assert policies.policy_of(root_fd, LOW.folder) == NamespacePolicy()
        assert policies.policy_of(root_fd, LOW.folder) == NamespacePolicy()
    assert len(caplog.records) == 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.text(alphabet='{}[]":,0129truefalsnpidy_', max_size=40).map(str.encode))
def test_whatever_is_in_the_files_they_are_read_or_refused(content: bytes) -> None:
    for kind in (NamespacePolicy, Quotas):
        try:
            record = policies._decode(content, kind)
        except ValueError:
            continue
        assert isinstance(record, kind)


@pytest.mark.parametrize("plant", ["link", "fifo", "folder"])
@pytest.mark.timeout(20)
def test_what_is_planted_instead_of_a_policy_is_not_followed(root_fd: int, tmp_path: Path, plant: str) -> None:
    folder = tmp_path / "kv" / LOW.folder
    folder.mkdir()
    (tmp_path / "else").write_bytes(b'{"pinned":true,"version":1}')
    path = folder / "policy.json"
    if plant == "link":
        path.symlink_to(tmp_path / "else")
    elif plant == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert policies.policy_of(root_fd, LOW.folder) == NamespacePolicy()
    if plant != "folder":
        save_policy(root_fd, LOW.folder, NamespacePolicy(priority=1))
        assert load_policy(root_fd, LOW.folder).priority == 1
        assert (tmp_path / "else").read_bytes() == b'{"pinned":true,"version":1}'


def test_a_tenant_is_what_the_manifest_says_unless_it_was_changed(tier: DirectoryTier, root_fd: int) -> None:
    assert [tenant_of(root_fd, n.folder) for n in (LOW, HIGH, OTHER)] == ["t", "t", "u"]
    path = tier.root / LOW.folder / "manifest.json"
    path.write_bytes(LOW.canonical_json.replace(b'"tenant":"t"', b'"tenant":"u"'))
    assert tenant_of(root_fd, LOW.folder) is None
    path.unlink()
    assert tenant_of(root_fd, LOW.folder) is None


# ------------------------------------------------------------------------------------------- pins, priorities, expiry


def test_a_lower_priority_goes_first_whatever_was_used(tier: DirectoryTier, root_fd: int) -> None:
    fill(tier, HIGH, 50, age_ns=HOUR_NS)
    fill(tier, LOW, 46)
    save_policy(root_fd, HIGH.folder, NamespacePolicy(priority=1))
    for number in range(46):  # All of the lower priority were loaded, none of the higher.
        tier.open(LOW.folder, number_name(number)).close()
    assert tier.evict() == 6 * SIZE
    assert (held(tier, HIGH), held(tier, LOW)) == (50, 40)
    save_policy(root_fd, LOW.folder, NamespacePolicy(priority=2))
    fill(tier, LOW, 6, first=46)
    assert tier.evict() == 6 * SIZE
    assert (held(tier, HIGH), held(tier, LOW)) == (44, 46)


def test_a_priority_that_is_used_up_goes_on_with_the_next(tier: DirectoryTier, root_fd: int) -> None:
    fill(tier, HIGH, 93)
    fill(tier, LOW, 3)
    save_policy(root_fd, HIGH.folder, NamespacePolicy(priority=100))
    assert tier.evict() == 6 * SIZE
    assert (held(tier, HIGH), held(tier, LOW)) == (90, 0)


def test_pinned_chunks_stay_and_where_all_are_pinned_stores_are_shed(tier: DirectoryTier, root_fd: int) -> None:
    fill(tier, HIGH, 97, age_ns=HOUR_NS)
    fill(tier, LOW, 3)
    save_policy(root_fd, HIGH.folder, NamespacePolicy(pinned=True, priority=-1))
    assert tier.evict() == 3 * SIZE
    assert (held(tier, HIGH), held(tier, LOW)) == (97, 0)
    assert tier.evict() == 0
    fill(tier, LOW, 3)
    save_policy(root_fd, LOW.folder, NamespacePolicy(pinned=True))
    assert tier.evict() == 0
    with pytest.raises(TierFull, match="capacity_bytes"):
        fill(tier, LOW, 1, first=3)
    assert tier.used_bytes() == CAPACITY
    save_policy(root_fd, LOW.folder, NamespacePolicy())
    assert tier.evict() == 3 * SIZE
    fill(tier, LOW, 1, first=3)


def test_expired_chunks_go_without_any_pressure_and_though_they_are_pinned(tier: DirectoryTier, root_fd: int) -> None:
    fill(tier, LOW, 5, age_ns=HOUR_NS)
    fill(tier, LOW, 5, first=5)
    fill(tier, HIGH, 5, age_ns=HOUR_NS)
    assert tier.evict() == 0
    save_policy(root_fd, LOW.folder, NamespacePolicy(pinned=True, ttl_s=3600))
    assert tier.evict() == 5 * SIZE
    assert {name.text for name in tier.names(LOW.folder)} == {number_name(n).text for n in range(5, 10)}
    assert held(tier, HIGH) == 5
    assert tier.used_bytes() == 10 * SIZE


def test_expired_chunks_go_before_any_other(tier: DirectoryTier, root_fd: int) -> None:
    fill(tier, HIGH, 20, age_ns=HOUR_NS)
    fill(tier, LOW, 76)
    save_policy(root_fd, HIGH.folder, NamespacePolicy(ttl_s=3600, priority=100))
    tier.evict()
    assert (held(tier, HIGH), held(tier, LOW)) == (0, 76)


def test_they_expire_where_nothing_is_evicted_and_where_nothing_is_bounded(tmp_path: Path) -> None:
    for options in ({"capacity_bytes": CAPACITY, "eviction": OFF}, {}):
        tier = DirectoryTier(tmp_path / f"kv{len(options)}", direct_io="off", **options)  # type: ignore[arg-type]
        fill(tier, LOW, 4, age_ns=HOUR_NS)
        fd = os.open(tier.root, os.O_RDONLY)
        save_policy(fd, LOW.folder, NamespacePolicy(ttl_s=60))
        os.close(fd)
        assert tier.evict() == 4 * SIZE
        tier.close()


@pytest.mark.parametrize(
    ("age_s", "ttl_s", "expired"),
    [
        (59, 60, False),
        (60, 60, True),
        (10**9, 0, False),
        (-60, 60, False),
        (-CLOCK_SLACK_S - 1, 60, True),
        (-CLOCK_SLACK_S - 1, 0, False),
    ],
)
def test_when_a_chunk_expires(age_s: float, ttl_s: int, expired: bool) -> None:
    now = 10**18
    assert is_expired(now - int(age_s * 1e9), ttl_s, now) is expired


def test_the_keeper_expires(tier: DirectoryTier, root_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_engines.offload.keeping.UPKEEP_EVERY_S", 0.02)
    monkeypatch.setattr(upkeep, "UPKEEP_EVERY_S", 0.02)
    monkeypatch.setattr("memkv_engines.offload.keeping.EVICT_PAUSE_S", 0.02)
    fill(tier, LOW, 4, age_ns=HOUR_NS)
    keeper = Keeper(tier)
    save_policy(root_fd, LOW.folder, NamespacePolicy(ttl_s=60))
    deadline = time.monotonic() + 20
    while held(tier, LOW):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    keeper.stop()


chunks = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(-2, 2)), max_size=50
).map(lambda rows: [StoredChunk(f"chunk {i}", *row) for i, row in enumerate(rows)])


@settings(max_examples=200, deadline=None)
@given(chunks, st.integers(1, 1500), st.sampled_from([SEGMENTED_LRU, LRU]), st.integers(0, 700))
def test_no_chunk_goes_while_one_of_a_lower_priority_stays(
    all_chunks: list[StoredChunk], wanted: int, policy: str, asked: int
) -> None:
    chooser = Chooser(wanted, policy)
    for chunk in all_chunks:
        chooser.offer(chunk)
    victims = chooser.victims(min(asked, wanted))
    kept = [chunk.priority for chunk in all_chunks if chunk not in victims]
    assert not victims or not kept or max(v.priority for v in victims) <= min(kept)
    assert sum(v.size_bytes for v in victims) >= min(asked, wanted, sum(c.size_bytes for c in all_chunks))


def test_a_chooser_holds_a_bounded_number() -> None:
    chooser = Chooser(10**9, most=10)
    for number in range(1000):
        chooser.offer(StoredChunk(f"{number}", 1, number, 0))
    assert [victim.path for victim in chooser.victims(10**9)] == [str(n) for n in range(10)]


def test_chunks_from_the_future_are_not_the_newest() -> None:
    now = 10**18
    chooser = Chooser(100, LRU, now)
    for name, written in (("future", now + 10 * HOUR_NS), ("old", now - HOUR_NS), ("soon", now + HOUR_NS // 2)):
        chooser.offer(StoredChunk(name, 1, written, 0))
    assert [victim.path for victim in chooser.victims(3)] == ["future", "old", "soon"]


# --------------------------------------------------------------------------------------------------------------- quotas


def test_a_quota_bounds_a_tenant_over_its_namespaces_and_no_other(tier: DirectoryTier, root_fd: int) -> None:
    save_quotas(root_fd, Quotas({"t": 10 * SIZE}))
    fill(tier, LOW, 5)
    fill(tier, HIGH, 5)
    for namespace in (LOW, HIGH):
        with pytest.raises(TierFull, match="quota of tenant 't'=40960 reached"):
            fill(tier, namespace, 1, first=5)
    fill(tier, OTHER, 20)
    assert tier.wait_for_pressure(0)
    assert tier.evict() == SIZE
    assert (held(tier, LOW), held(tier, HIGH), held(tier, OTHER)) == (4, 5, 20), "from the tenant itself"
    fill(tier, HIGH, 1, first=5)
    assert tier.used_bytes() == 30 * SIZE


def test_what_is_shed_for_the_directory_is_not_counted_for_the_tenant(tier: DirectoryTier, root_fd: int) -> None:
    save_quotas(root_fd, Quotas({"t": 50 * SIZE}))
    fill(tier, OTHER, 99)
    fill(tier, LOW, 1)
    with pytest.raises(TierFull, match="capacity"):
        fill(tier, LOW, 1, first=1)
    account = tier._accounts.of(LOW.folder)
    assert account is not None and account.usage.count().used_bytes == SIZE
    tier.remove(LOW.folder, number_name(0))
    assert account.usage.count().used_bytes == 0
    assert tier._accounts.of(OTHER.folder) is None


def test_a_quota_that_comes_later_counts_what_is_there(tier: DirectoryTier, root_fd: int) -> None:
    fill(tier, LOW, 20)
    save_quotas(root_fd, Quotas({"t": 10 * SIZE, "u": SIZE}))
    fill(tier, LOW, 1, first=20)
    assert tier.wait_for_pressure(0), "not counted yet, so the keeper is called"
    tier.evict()  # Counts; it may know too late how much has to go.
    tier.evict()
    assert held(tier, LOW) == 9
    with pytest.raises(TierFull):
        fill(tier, LOW, 2, first=30)


def test_a_quota_holds_without_a_capacity_and_over_handles(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_module, "POLICY_REFRESH_S", 0.0)
    save_quotas(root_fd, Quotas({"t": 10 * SIZE}))
    tiers = [DirectoryTier(tmp_path / "kv", direct_io="off") for _ in range(2)]
    tiers[0].write_manifest(LOW)
    stored = 0
    for number in range(20):
        try:
            fill(tiers[number % 2], LOW, 1, first=number)
            stored += 1
        except TierFull:
            pass
    assert stored == 10 == held(tiers[1], LOW)
    for tier in tiers:
        tier.close()


def test_a_quota_that_is_lifted_no_longer_bounds(tier: DirectoryTier, root_fd: int) -> None:
    save_quotas(root_fd, Quotas({"t": 2 * SIZE}))
    fill(tier, LOW, 2)
    with pytest.raises(TierFull):
        fill(tier, LOW, 1, first=2)
    assert (tier.root / usage_name("t")).exists()
    save_quotas(root_fd, Quotas({"u": SIZE}))
    fill(tier, LOW, 5, first=2)
    assert not (tier.root / usage_name("t")).exists()


def test_pinned_chunks_of_a_tenant_at_its_quota_stay(tier: DirectoryTier, root_fd: int) -> None:
    save_quotas(root_fd, Quotas({"t": 10 * SIZE}))
    save_policy(root_fd, LOW.folder, NamespacePolicy(pinned=True))
    fill(tier, LOW, 10)
    assert tier.evict(recount=True) == 0
    with pytest.raises(TierFull):
        fill(tier, HIGH, 1)


def test_of_many_processes_one_makes_a_round(
    tier: DirectoryTier, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_quotas(root_fd, Quotas({"t": 50 * SIZE}))
    fill(tier, LOW, 5)
    tier.evict(recount=True)
    account = tier._accounts.of(LOW.folder)
    assert account is not None
    first = account.usage.count().corrections
    other = DirectoryTier(tier.root, direct_io="off", capacity_bytes=CAPACITY)
    assert other.evict(recount=True) == tier.evict(recount=True) == 0
    assert account.usage.count().corrections == first > 0
    now = time.time()
    for jump_s in (UPKEEP_EVERY_S, -2 * UPKEEP_EVERY_S):
        monkeypatch.setattr(upkeep.time, "time", lambda jump_s=jump_s: now + jump_s)
        before = account.usage.count().corrections
        other.evict(recount=True)
        assert account.usage.count().corrections == before + 1
    other.close()


def test_changed_quotas_are_seen_in_time_and_cost_nothing_meanwhile(
    tier: DirectoryTier, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_module, "POLICY_REFRESH_S", 1000.0)
    fill(tier, LOW, 1)
    looked = []
    monkeypatch.setattr(quota_module, "signature", lambda fd: looked.append(fd))
    fill(tier, LOW, 3, first=1)
    assert not looked
    monkeypatch.undo()
    save_quotas(root_fd, Quotas({"t": SIZE}))
    fill(tier, LOW, 1, first=5)
    now = time.monotonic()
    monkeypatch.setattr(quota_module.time, "monotonic", lambda: now + 1001)
    with pytest.raises(TierFull):
        fill(tier, LOW, 2, first=6)
