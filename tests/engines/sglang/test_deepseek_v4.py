"""Both doors with SGLang's real DeepSeek V4 cache: the anchor pool holds no bytes, and the pools beside it decide.

The model itself needs a GPU and is not run here; caches, host pools, controllers and transfers are SGLang's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.errors import ConfigError, IdentityError
from memkv_engines.keys import ChunkName
from memkv_engines.sglang import compat
from memkv_engines.sglang.pools import GROUPS
from tests.engines.sglang.radix_caches import (
    V4_PAGE_TOKENS,
    Bench,
    PoolName,
    memkv_config,
    same,
    sequence,
)
from tests.engines.sglang.tier_of_engine import damage_file

FULL_POOLS = {"deepseek_v4_c4", "deepseek_v4_c4_indexer", "deepseek_v4_c128"}
WINDOW_POOLS = {"swa", "deepseek_v4_c4_state", "deepseek_v4_c4_indexer_state"}
LAYOUTS = [("direct", "layer_first"), ("direct", "page_first_direct"), ("kernel", "page_first")]
NAMES = {number: name for name, number in GROUPS.items()}
prompt = partial(sequence, page_tokens=V4_PAGE_TOKENS)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench("v4") as made:
        yield made


def chunks_of(tier: Path, pool: str) -> list[Path]:
    return [path for path in sorted(tier.rglob("*.kv")) if NAMES[ChunkName.parse(path.name).group] == pool]


def put_back(files: Mapping[Path, bytes]) -> None:
    """Damaged chunks are removed when they are noticed, with their folders."""
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_every_pool_that_sglang_names_has_a_group() -> None:
    assert set(GROUPS) == {str(name) for name in PoolName}


@pytest.mark.parametrize(("io", "layout"), LAYOUTS)
def test_another_side_gets_every_byte_back(io: str, layout: str, tier: Path) -> None:
    tokens = prompt(9)
    with Bench("v4", io, layout) as bench:
        stored = bench.side(memkv_config(tier), 1).store(tokens)
        assert {pool for pool in GROUPS if chunks_of(tier, pool)} == FULL_POOLS | WINDOW_POOLS
        other = bench.side(memkv_config(tier), 99)
        assert other.prefetch(tokens) == len(tokens)
        assert same(stored, other.load_back(tokens))
    assert all(sum(ChunkName.parse(p.name).block_count for p in chunks_of(tier, pool)) == 9 for pool in FULL_POOLS)


def test_damage_in_any_pool_is_never_loaded(bench: Bench, tier: Path) -> None:
    tokens = prompt(6)
    stored = bench.side(memkv_config(tier), 1).store(tokens)
    good = {path: path.read_bytes() for path in tier.rglob("*.kv")}
    reader = bench.side(memkv_config(tier), 99)
    free = reader.free_host_tokens()
    for pool in sorted(FULL_POOLS | WINDOW_POOLS):
        for path in chunks_of(tier, pool):
            damage_file(path)
        # SGLang drops the whole prefetch where a window's pools do not fit what came of the others.
        assert reader.prefetch(tokens) == 0, f"damage in {pool} was loaded"
        assert reader.free_host_tokens() == free, "host slots leak"
        put_back(good)
    assert all(thread.is_alive() for thread in reader.threads)
    assert reader.prefetch(tokens) == len(tokens)
    assert same(stored, reader.load_back(tokens))


def test_without_one_of_the_pools_nothing_is_a_hit(bench: Bench, tier: Path) -> None:
    tokens = prompt(6)
    bench.side(memkv_config(tier), 1).store(tokens)
    reader = bench.side(memkv_config(tier), 99)
    for pool in sorted(FULL_POOLS | WINDOW_POOLS):
        hidden = {path: path.rename(path.with_suffix(".hidden")) for path in chunks_of(tier, pool)}
        assert reader.prefetch(tokens) == 0, f"a hit without {pool}"
        for path, aside in hidden.items():
            aside.rename(path)
    assert reader.prefetch(tokens) == len(tokens)


def test_pages_without_bytes_are_no_hit_of_their_own(bench: Bench, tier: Path) -> None:
    backend = bench.side(memkv_config(tier), 1).backend
    keys = ["ab" * 32] * 2
    assert backend.batch_exists(keys) == 0
    assert backend.batch_exists_v2(keys).kv_hit_pages == 0
    assert not backend.exists(keys[0])


def test_a_failing_call_says_no_for_every_pool(bench: Bench, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang is not told of, it takes for loaded, and the anchor alone is always there."""
    tokens = prompt(6)
    bench.side(memkv_config(tier), 1).store(tokens)
    other = bench.side(memkv_config(tier), 99)
    get = other.backend._get

    def fails_beside_the_anchor(pool: str, *arguments: Any) -> list[bool]:
        if pool in FULL_POOLS:
            raise RuntimeError("injected")
        return get(pool, *arguments)

    monkeypatch.setattr(other.backend, "_get", fails_beside_the_anchor)
    assert other.prefetch(tokens) == 0


def test_flat_pages_are_refused(bench: Bench, tier: Path) -> None:
    with pytest.raises(ConfigError, match="interface_v1"):
        bench.side(memkv_config(tier, interface_v1=0), 1)


def test_layouts_of_rows_do_not_meet(bench: Bench, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(6)
    bench.side(memkv_config(tier), 1).store(tokens)
    told = compat.row_layout
    monkeypatch.setattr(compat, "row_layout", lambda pool: {**told(pool), "rows": "v41"})
    assert bench.side(memkv_config(tier), 99).prefetch(tokens) == 0


def test_a_cache_that_does_not_tell_its_rows_is_refused() -> None:
    with pytest.raises(IdentityError, match="layout of its rows"):
        compat.row_layout(object())


def test_the_linker_brings_every_byte_back(bench: Bench, tier: Path) -> None:
    tokens = prompt(9)
    stored = bench.linked(tier, 1).store(tokens)
    loaded = bench.linked(tier, 99).load(tokens)
    assert loaded is not None and same(stored, loaded)


def test_the_linker_recomputes_what_is_damaged(bench: Bench, tier: Path) -> None:
    tokens = prompt(6)
    stored = bench.linked(tier, 1).store(tokens)
    good = {path: path.read_bytes() for path in tier.rglob("*.kv")}
    reader = bench.linked(tier, 99)
    free = reader.free_tokens()
    for pool in sorted(FULL_POOLS | WINDOW_POOLS):
        for path in chunks_of(tier, pool):
            damage_file(path)
        assert reader.load(tokens) is None, f"damage in {pool} was loaded"
        assert reader.free_tokens() == free, "slots leak"
        put_back(good)
    loaded = reader.load(tokens)
    assert loaded is not None and same(stored, loaded)
