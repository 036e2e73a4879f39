"""`MemKVCacheLinker` on device pools that count as memory of a GPU, see `tests/engines/fake_gpu.py`.

Behind SGLang's real radix cache. Nothing here was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from memkv_engines.errors import ConfigError
from tests.engines.sglang import radix_caches
from tests.engines.sglang.radix_caches import Bench, same, sequence

pytest.importorskip("cuda.bindings.driver", reason="the environment lacks cuda-bindings: build it again")

from tests.engines.fake_gpu import FakeGpu

WHERE = "memkv_engines.sglang.device_pools.device_pages"


@pytest.fixture(scope="module")
def gpu() -> FakeGpu:
    return FakeGpu(kernels=True)


@pytest.fixture
def on_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Every linker's pools lie on the fake GPU; it must have worked, and must not have seen anything wrong."""
    monkeypatch.setattr(WHERE, lambda pools, _stream: gpu.adopt(b for pool in pools for b in pool.buffers))
    before = gpu.report()["launches"]
    yield gpu
    report = gpu.report()
    assert report["violations"] == []
    assert report["launches"] > before


@pytest.mark.parametrize("kind", ["full", "swa", "mla"])
def test_another_side_gets_every_byte_back(kind: str, on_gpu: FakeGpu, tmp_path: Path) -> None:
    tokens = sequence(9)
    with Bench(kind) as bench:
        stored = bench.linked(tmp_path, 1).store(tokens)
        loaded = bench.linked(tmp_path, 99).load(tokens)
    assert loaded is not None
    assert same(stored, loaded)


@pytest.mark.parametrize("reader_on_gpu", [True, False])
def test_host_and_device_write_the_same_chunks(
    reader_on_gpu: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens = sequence(9)
    on_host, on_gpu = (
        lambda *_: None,
        lambda pools, _stream: gpu.adopt(b for pool in pools for b in pool.buffers),
    )
    with Bench() as bench:
        monkeypatch.setattr(WHERE, on_host if reader_on_gpu else on_gpu)
        stored = bench.linked(tmp_path, 1).store(tokens)
        monkeypatch.setattr(WHERE, on_gpu if reader_on_gpu else on_host)
        loaded = bench.linked(tmp_path, 99).load(tokens)
    assert loaded is not None
    assert same(stored, loaded)


def test_a_flipped_bit_is_a_recompute(on_gpu: FakeGpu, tmp_path: Path) -> None:
    tokens = sequence(9)
    with Bench() as bench:
        bench.linked(tmp_path, 1).store(tokens)
        for chunk in tmp_path.rglob("*.kv"):
            data = bytearray(chunk.read_bytes())
            data[-1000] ^= 1
            chunk.write_bytes(data)
        reader = bench.linked(tmp_path, 99)
        free = reader.free_tokens()
        assert reader.load(tokens) is None
        assert reader.free_tokens() == free


def test_pages_that_sglang_would_unmap_under_an_offload_are_refused(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`release_memory_occupation` unmaps the KV cache without asking a linker; host memory stays where it is."""
    saving = partial(radix_caches.ServerArgs, enable_memory_saver=True)
    monkeypatch.setattr(radix_caches, "ServerArgs", saving)
    with Bench() as bench:
        bench.linked(tmp_path, 1)
        monkeypatch.setattr(WHERE, lambda pools, _stream: gpu.adopt(b for pool in pools for b in pool.buffers))
        with pytest.raises(ConfigError, match=r"enable_memory_saver=True: SGLang unmaps.*--enable-memory-saver"):
            bench.linked(tmp_path, 2)
