"""Bad input and missing things: a clear error before anything is queued."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.chunk.layout import KVLayout, Tile
from memkv_engines.errors import GpuError, GpuLost, GpuUnavailable, LayoutError
from memkv_engines.gpu import image
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.kernels import DeviceTiles, Kernels, check_ids
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.gpu.tickets import DigestTicket, Work
from memkv_engines.limits import GPU_MAX_CTAS, GPU_MAX_SLOTS, GPU_MAX_TICKETS
from tests.fake_cuda.control import FakeCuda
from tests.kernels.driver.rig import FUSED, LAYOUTS, Engine, Pool

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def pool(engine: Engine) -> Pool:
    return engine.pool(FUSED, 4)


@pytest.fixture
def mover(engine: Engine, pool: Pool) -> Any:
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    queued = engine.fake.report().executed + engine.fake.report().pending
    yield mover
    report = engine.fake.report()
    assert report.executed + report.pending == queued, "something was queued before the refusal"
    mover.close()


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "1 to"),
        ([[1, 2]], "shape"),
        ([4], "outside 0..3"),
        ([-1], "outside"),
        ([0, 2**31 - 1], "outside"),
        ([0, 2**40], "outside"),
        (list(range(4)) * 2000, "1 to 4096"),
        ([2**70], "no numbers of blocks"),
        (["two"], "no numbers of blocks"),
    ],
)
def test_block_ids(mover: DeviceMover, engine: Engine, ids: Any, text: str) -> None:
    for call in (
        lambda: mover.gather(0, ids, engine.region_address, after_stream=engine.stream),
        lambda: mover.scatter(0, engine.region_address, ids, after_stream=engine.stream),
    ):
        with pytest.raises(GpuError, match=text):
            call()


def test_a_scatter_refuses_a_block_that_stands_twice(mover: DeviceMover, engine: Engine) -> None:
    with pytest.raises(GpuError, match="twice"):
        mover.scatter(0, engine.region_address, [1, 2, 1], after_stream=engine.stream)


def test_groups(mover: DeviceMover, engine: Engine, pool: Pool) -> None:
    with pytest.raises(GpuError, match="group 3 is unknown; known are \\[0\\]"):
        mover.gather(3, [0], engine.region_address, after_stream=engine.stream)
    with pytest.raises(GpuError, match="known already"):
        mover.add_group(0, pool.layout)
    big = KVLayout.plan(1, [Tile(pool.addresses[0], 1 << 20, 1 << 20)])
    with pytest.raises(GpuError, match="larger than a slot"):
        mover.add_group(1, big)
    host = KVLayout.plan(1, [Tile(engine.region_address, 4096, 4096)])
    with pytest.raises(GpuError, match="not memory of a CUDA device"):
        mover.add_group(1, host)
    beyond = KVLayout.plan(1 << 28, [Tile(pool.addresses[0], 4096, 4096)])
    with pytest.raises(GpuError, match="not memory of a CUDA device"):
        mover.add_group(1, beyond)


def test_host_slots(mover: DeviceMover, engine: Engine) -> None:
    end = engine.region_address + engine.region_bytes
    for address in (engine.region_address + 16, engine.region_address - 4096, end, end - 4096, 0, -4096):
        with pytest.raises(GpuError, match="registered"):
            mover.gather(0, [0, 1], address, after_stream=engine.stream)
        with pytest.raises(GpuError, match="registered"):
            mover.scatter(0, address, [0, 1], after_stream=engine.stream)
    with pytest.raises(GpuError, match="already"):
        mover.register_host(engine.region_address, 4096)
    with pytest.raises(GpuError, match="holes=-1"):
        mover.gather(0, [0], engine.region_address, after_stream=engine.stream, holes=-1)
    with pytest.raises(GpuError, match="do not fit in a device slot"):
        mover.gather(0, [0], engine.region_address, after_stream=engine.stream, holes=30)


def test_without_a_host_region(engine: Engine, pool: Pool) -> None:
    mover = DeviceMover(0, slot_bytes=512 * 1024)
    mover.add_group(0, pool.layout)
    with pytest.raises(GpuError, match="no host region"):
        mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    with pytest.raises(GpuError, match="multiple of 4096"):
        mover.register_host(engine.region_address + 8, 4096)
    with pytest.raises(GpuError, match="cuMemHostRegister"):
        mover.register_host(engine.alloc(1 << 16) - 512, 1 << 15)
    mover.close()


def test_device_slots(mover: DeviceMover, engine: Engine) -> None:
    slot = mover.acquire_slot()
    assert slot is not None
    calls: list[Callable[[int], Any]] = [
        lambda offset: mover.gather_to_device(0, [0], slot, offset, after_stream=engine.stream),
        lambda offset: mover.scatter_from_device(0, slot, offset, [0], after_stream=engine.stream),
        lambda offset: mover.leaf_digests(0, slot, offset, 1, loading=True),
    ]
    for call in calls:
        for offset in (8, -4096, slot.size_bytes):
            with pytest.raises(GpuError, match="must start at a multiple"):
                call(offset)
    with pytest.raises(GpuError, match="holes=-1"):
        mover.gather_to_device(0, [0], slot, 0, after_stream=engine.stream, holes=-1)
    with pytest.raises(GpuError, match="block_count=0"):
        mover.leaf_digests(0, slot, 0, 0, loading=True)
    mover.release_slot(slot)
    with pytest.raises(GpuError, match="released twice"):
        mover.release_slot(slot)
    for call in calls:
        with pytest.raises(GpuError, match="not held"):
            call(0)


def test_a_stream_that_is_being_captured(mover: DeviceMover, engine: Engine) -> None:
    engine.ok("cuStreamBeginCapture", engine.stream, engine.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    with pytest.raises(GpuError, match="CUDA graph"):
        mover.gather(0, [0], engine.region_address, after_stream=engine.stream)
    with pytest.raises(GpuError, match="CUDA graph"):
        mover.scatter(0, engine.region_address, [0], after_stream=engine.stream)
    engine.ok("cuStreamEndCapture", engine.stream)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"slots": 0}, "slots=0"),
        ({"slots": GPU_MAX_SLOTS + 1}, "slots="),
        ({"slot_bytes": 100}, "slot_bytes=100"),
        ({"slot_bytes": 1 << 40}, "slot_bytes="),
        ({"copy_ctas": 0}, "copy_ctas=0"),
        ({"copy_ctas": GPU_MAX_CTAS + 1}, "copy_ctas="),
        ({"device": 1}, "no usable CUDA device 1"),
    ],
)
def test_settings(engine: Engine, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(GpuError, match=text):
        DeviceMover(**{"device": 0, "slot_bytes": 1 << 20, **settings})


def test_after_the_end(engine: Engine, pool: Pool) -> None:
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    mover.close()
    mover.close()
    for call in (mover.poll, mover.resume, mover.acquire_slot):
        with pytest.raises(GpuError, match="closed"):
            call()
    with pytest.raises(GpuError, match="closed"):
        mover.gather(0, [0], engine.region_address, after_stream=engine.stream)


# -------------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"chunk": 8}, "chunk=0x8"),
        ({"chunk": 0}, "chunk=0x0"),
        ({"error": 2}, "error=0x2"),
        ({"first_index": -1}, "from index -1"),
        ({"first_index": 4}, "the chunk has"),
        ({"chunk_bytes": 4095}, "the chunk has 4095 B"),
    ],
)
def test_a_launch_checks_its_addresses(engine: Engine, change: dict[str, int], text: str) -> None:
    driver = Driver(0)
    with driver.current():
        kernels = Kernels(driver)
        tiles = DeviceTiles(4096, 1, 4, 4096, 4096, True)
        arguments = {"chunk": 4096, "chunk_bytes": 4096, "first_index": 0, "error": 4, "stream": 0, **change}
        ids = check_ids([0], 4, distinct=True)
        for launch in (kernels.gather, kernels.scatter):
            with pytest.raises(GpuError, match=text):
                launch(tiles, ids, **arguments)
        with pytest.raises(GpuError, match="chunk stride"):
            kernels.gather(DeviceTiles(4096, 1, 4, 4096, 4100, True), ids, 4096, 4096, 0, 4, 0)
        with pytest.raises(GpuError, match="tiles=0x8"):
            kernels.gather(DeviceTiles(8, 1, 4, 4096, 4096, True), ids, 4096, 4096, 0, 4, 0)
        kernels.close()
    driver.close()
    assert engine.fake.report().launches == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"first_block": 8}, "first_block=0x8"),
        ({"leaves": 4}, "leaves=0x4"),
        ({"error": 1}, "error=0x1"),
        ({"block_count": 0}, "impossible digests"),
        ({"block_bytes": 0}, "impossible digests"),
        ({"stride_bytes": 4000}, "impossible digests"),
        ({"stride_bytes": 4104}, "impossible digests"),
        ({"readable_bytes": 4095}, "read beyond"),
    ],
)
def test_a_digest_checks_its_addresses(engine: Engine, change: dict[str, int], text: str) -> None:
    driver = Driver(0)
    with driver.current():
        kernels = Kernels(driver)
        arguments = {
            "first_block": 4096, "block_count": 1, "block_bytes": 4096, "stride_bytes": 4096, "readable_bytes": 4096,
            "leaves": 8, "error": 4, "stream": 0,
        }  # fmt: skip
        with pytest.raises(GpuError, match=text):
            kernels.leaf_digests(**{**arguments, **change})
        kernels.close()
    driver.close()


def test_a_tile_table_of_another_type() -> None:
    import numpy as np

    with pytest.raises(GpuError, match="dtype TILE"):
        DeviceTiles.of(np.zeros(3), 4096, 1, 1, 4096)


def test_digests_before_they_are_there() -> None:
    ticket = DigestTicket("digests", 1, Work(), lambda _: False, lambda *_: None)
    with pytest.raises(GpuError, match="not there yet"):
        ticket.leaf_bytes(0)


def test_more_copies_than_tickets(engine: Engine) -> None:
    """Copies that need no device slot are bounded too: None, and not an error."""
    pool = engine.pool(LAYOUTS["large-padded"], 2)
    mover = engine.mover()
    mover.add_group(0, pool.layout)
    copy_stream = mover._resources.streams["gather"]
    engine.fake.stall(copy_stream)
    for _ in range(GPU_MAX_TICKETS):
        assert mover.gather(0, [0], engine.region_address, after_stream=engine.stream) is not None
    assert mover.gather(0, [0], engine.region_address, after_stream=engine.stream) is None
    assert mover.scatter(0, engine.region_address, [0], after_stream=engine.stream) is None
    assert mover.acquire_slot() is None
    engine.fake.unstall(copy_stream)
    engine.settle()
    assert mover.gather(0, [0], engine.region_address, after_stream=engine.stream) is not None
    mover.close()


# ------------------------------------------------------------------------------------------- driver and kernel image


def test_an_old_driver(engine: Engine, fake: FakeCuda) -> None:
    fake.set_driver_version(11080)
    with pytest.raises(GpuUnavailable, match=r"driver 11\.8; 12\.0 or later"):
        DeviceMover(0, slot_bytes=1 << 20)


def test_a_driver_without_batch_copies_says_so(engine: Engine, fake: FakeCuda) -> None:
    fake.set_driver_version(12040)
    driver = Driver(0)
    assert not driver.batch_copies
    assert "12.4 has no batch copies, 12.8 has" in driver.reason_no_batch
    driver.close()


def test_a_driver_that_does_not_offer_what_it_should(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fake: FakeCuda
) -> None:
    monkeypatch.setattr(engine.api, "cuGetProcAddress", lambda *_: (500, 0, 1))
    driver = Driver(0)
    assert driver.reason_no_batch == "the driver does not offer cuMemcpyBatchAsync"
    driver.close()


def test_old_bindings_cannot_tell_the_size_of_arguments(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(engine.api, "cuFuncGetParamInfo")
    DeviceMover(0, slot_bytes=1 << 20).close()


def test_an_old_driver_cannot_tell_the_size_of_arguments(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise RuntimeError("function cuFuncGetParamInfo is not found")

    monkeypatch.setattr(engine.api, "cuFuncGetParamInfo", ask)
    DeviceMover(0, slot_bytes=1 << 20).close()


def test_bindings_that_are_newer_than_the_driver() -> None:
    """In a process of its own: cuda-bindings looks for the driver's functions once."""
    code = """
from tests.fake_cuda.control import load
from tests.kernels.routes import build_route
fake = load()
fake.set_kernels(build_route("sm_90"))
fake.reset(0)
fake.set_driver_version(12000)
from memkv_engines.gpu.mover import DeviceMover
DeviceMover(0, slot_bytes=1 << 20, bulk=True).close()
print(fake.report().violations)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_no_driver() -> None:
    """In a process without the fake: this machine has no libcuda, or the test has nothing to say."""
    code = """
import ctypes, sys
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    pass
else:
    sys.exit("a real driver")
from memkv_engines.errors import GpuUnavailable
from memkv_engines.gpu.mover import DeviceMover
try:
    DeviceMover(0, slot_bytes=1 << 20)
except GpuUnavailable as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA driver" in done.stderr or "a real driver" in done.stderr


def test_no_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GpuUnavailable, match="cuda-bindings is not installed"):
        Driver(0)
    with pytest.raises(GpuUnavailable, match="NVRTC is not usable"):
        image.compile_source(b"", (9, 0))


@pytest.fixture
def driver(engine: Engine) -> Any:
    driver = Driver(0)
    with driver.current():
        yield driver
    driver.close()


def test_the_prebuilt_kernels_come_first(driver: Driver) -> None:
    module, origin = image.load_kernels(driver)
    assert origin == "fatbin"
    driver.unload_module(module)


def test_kernels_that_do_not_load_are_compiled(
    driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.fatbin"
    broken.write_bytes(b"\0" * 64)
    module, origin = image.load_kernels(driver, broken)
    assert "nvrtc" in origin
    assert "CUDA_ERROR_INVALID_IMAGE" in origin
    assert "prebuilt kernels not usable" in caplog.text
    driver.unload_module(module)


def test_neither_image_nor_source(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(GpuUnavailable, match=r"prebuilt kernels not usable.*and no kernel source at"):
        image.load_kernels(driver, tmp_path / "none.fatbin", (tmp_path / "none.cu",))


def test_a_source_that_does_not_compile(driver: Driver, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("this is no CUDA")
    with pytest.raises(GpuUnavailable, match="NVRTC refuses the kernels for sm_90"):
        image.load_kernels(driver, tmp_path / "none.fatbin", (source,))


def test_a_device_that_nvrtc_does_not_know() -> None:
    with pytest.raises(GpuUnavailable, match="sm_11"):
        image.compile_source(b"", (1, 1))


@pytest.mark.parametrize("broken", [False, True], ids=["fatbin", "nvrtc"])
def test_a_context_that_breaks_while_kernels_load(driver: Driver, fake: FakeCuda, tmp_path: Path, broken: bool) -> None:
    image_file = tmp_path / "image"
    image_file.write_bytes(b"\0" * 64)
    fake.fail("cuModuleLoadData", 719, nth=2 if broken else 1)
    with pytest.raises(GpuLost, match="cuModuleLoadData"):
        image.load_kernels(driver, image_file)


@pytest.mark.parametrize(
    ("name", "answer", "text"),
    [
        ("nvrtcCreateProgram", None, "install nvidia-cuda-nvrtc"),
        ("nvrtcCreateProgram", (1, None), "NVRTC: 1"),
        ("nvrtcGetCUBIN", (2,), "NVRTC: 2"),
    ],
)
def test_nvrtc_that_fails(monkeypatch: pytest.MonkeyPatch, name: str, answer: Any, text: str) -> None:
    from cuda.bindings import nvrtc

    def call(*_: Any) -> Any:
        if answer is None:
            raise RuntimeError("no libnvrtc")
        return answer

    monkeypatch.setattr(nvrtc, name, call)
    with pytest.raises(GpuUnavailable, match=text):
        image.compile_source(b"__global__ void f() {}", (9, 0))


def test_kernels_of_another_abi(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "argument_bytes", lambda self, function: 1000)
    with pytest.raises(GpuUnavailable, match="takes 1000 B of arguments, this build packs 1848 B"):
        DeviceMover(0, slot_bytes=1 << 20)


def test_a_stride_that_does_not_hold_a_block() -> None:
    from memkv_engines.gpu.tiles import plan_tiles

    layout = KVLayout.plan(1, [Tile(4096, 8192, 8192)])
    for stride in (4096, 8200):
        with pytest.raises(LayoutError, match="chunk_stride_bytes"):
            plan_tiles(layout, stride)
