"""The CUDA driver, as far as we use it: a thin, typed wrapper over ``cuda.bindings.driver``.

Every handle is an int. No call here waits for the device, except ``load_module`` and the allocations. Nothing ever
waits for all streams: that would stop the engine. The caller holds the context with ``current()``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from memkv_engines.errors import GpuError, GpuLost, GpuUnavailable
from memkv_engines.limits import GPU_BATCH_COPY_DRIVER, GPU_MIN_DRIVER

_SUCCESS, _NOT_READY = 0, 600
# Errors after which the context, and with it all device memory of the process, is gone.
_LOST = frozenset({4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
# CUmemcpySrcAccessOrder: the source may only be read when the stream gets there.
_SOURCE_IN_STREAM_ORDER = 1
_CAPTURE_RELAXED = 2
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_HOST_ALLOC_PORTABLE_MAPPED = 3
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_MAX_DYNAMIC_SHARED_BYTES = 8
_MEMORY_OF_DEVICE = 2

Addresses = npt.NDArray[np.uint64]


class _CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes_v1``: access order, hints for managed memory (two locations of type and id), flags."""

    _fields_ = (("source_order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


class Driver:
    """One device through its primary context, which torch uses as well.

    Not thread-safe by itself; any thread may call, one at a time.

    Attributes:
        device: ordinal among the visible devices.
        version: the driver's, such as 13000.
        capability: (major, minor) of the device.
        multiprocessors: how many the device has.
        batch_copies: whether one call can submit many copies.
        reason_no_batch: why not, empty if it can.
    """

    def __init__(self, device: int = 0) -> None:
        """Open the driver and retain the device's primary context.

        Raises:
            GpuUnavailable: cuda-bindings, the driver or the device is missing or too old.
        """
        self._api = _import_bindings()
        self.device = device
        self._context: Any = None
        try:
            self._call("cuInit", 0)
            self.version = int(self._call("cuDriverGetVersion"))
            if self.version < GPU_MIN_DRIVER:
                raise GpuUnavailable(
                    f"CUDA driver {_dotted(self.version)}; {_dotted(GPU_MIN_DRIVER)} or later is needed"
                )
            handle = self._call("cuDeviceGet", device)
            self.multiprocessors = self._attribute(_MULTIPROCESSORS, handle)
            self.capability = (
                self._attribute(_CAPABILITY_MAJOR, handle),
                self._attribute(_CAPABILITY_MINOR, handle),
            )
            self._handle = handle
            self._context = self._call("cuDevicePrimaryCtxRetain", handle)
        except GpuUnavailable:
            raise
        except GpuError as error:
            raise GpuUnavailable(f"no usable CUDA device {device}: {error}") from error
        except RuntimeError as error:
            # cuda-bindings raises this, and nothing more precise, where it finds no libcuda.so.1.
            raise GpuUnavailable(f"no CUDA driver: {error}") from error
        self._relaxed = self._api.CUstreamCaptureMode(_CAPTURE_RELAXED)
        self._batch, self.reason_no_batch = self._find_batch_copy()

    @property
    def batch_copies(self) -> bool:
        """Whether one call can submit many copies."""
        return self._batch is not None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context this thread's for a moment; whatever the engine had is current again afterwards.

        The thread's capture mode is relaxed meanwhile, so that a query of ours cannot spoil a CUDA graph that the
        engine is capturing on another stream.
        """
        self._call("cuCtxPushCurrent", self._context)
        code, before = self._api.cuThreadExchangeStreamCaptureMode(self._relaxed)
        try:
            yield
        finally:
            if int(code) == _SUCCESS:
                self._api.cuThreadExchangeStreamCaptureMode(before)
            self._api.cuCtxPopCurrent()

    def close(self) -> None:
        """Give the primary context back; the engine keeps its own hold on it."""
        if self._context is not None:
            self._context = None
            self._api.cuDevicePrimaryCtxRelease(self._handle)

    # ------------------------------------------------------------------------------------------------ memory

    def alloc(self, size_bytes: int) -> int:
        """Device memory; aligned to no more than 256 bytes."""
        return int(self._call("cuMemAlloc", size_bytes))

    def free(self, address: int) -> None:
        """Free device memory that nothing uses any more."""
        self._call("cuMemFree", address)

    def alloc_pinned(self, size_bytes: int) -> int:
        """Pinned host memory that kernels can reach at the same address, zeroed."""
        address = int(self._call("cuMemHostAlloc", size_bytes, _HOST_ALLOC_PORTABLE_MAPPED))
        ctypes.memset(address, 0, size_bytes)
        return address

    def free_pinned(self, address: int) -> None:
        """Free what ``alloc_pinned`` gave."""
        self._call("cuMemFreeHost", address)

    def register_host(self, address: int, size_bytes: int) -> None:
        """Pin host memory of this process, shared mappings included, for the copy engines."""
        self._call("cuMemHostRegister", address, size_bytes, _HOST_ALLOC_PORTABLE_MAPPED)

    def unregister_host(self, address: int) -> None:
        """Unpin it; nothing may be under way to or from it."""
        self._call("cuMemHostUnregister", address)

    def is_device_memory(self, address: int) -> bool:
        """Whether an address lies in memory of a CUDA device, whoever allocated it."""
        code, kind = self._api.cuPointerGetAttribute(
            self._api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address
        )
        return int(code) == _SUCCESS and int(kind) == _MEMORY_OF_DEVICE

    # ------------------------------------------------------------------------------------ streams and events

    def create_stream(self) -> int:
        """A stream of the highest priority that does not wait for the legacy default stream."""
        _, highest = self._call("cuCtxGetStreamPriorityRange")
        return int(self._call("cuStreamCreateWithPriority", _STREAM_NON_BLOCKING, highest))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; returns at once, submitted work still runs."""
        self._call("cuStreamDestroy", stream)

    def capturing(self, stream: int) -> bool:
        """Whether work on this stream would become part of a CUDA graph."""
        code, status = self._api.cuStreamIsCapturing(stream)
        # The legacy stream answers with an error while any other stream is being captured.
        return int(code) != _SUCCESS or int(status) != 0

    def create_event(self) -> int:
        """An event without a clock."""
        return int(self._call("cuEventCreate", _EVENT_DISABLE_TIMING))

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all that was submitted to the stream so far."""
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What is submitted to the stream from now on runs after the event as it was last recorded."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def reached(self, event: int) -> bool:
        """Whether what the event stands for has run; never blocks.

        Raises:
            GpuLost: something on the device failed; it may have been anyone's work.
        """
        (code,) = self._api.cuEventQuery(event)
        if int(code) == _NOT_READY:
            return False
        self._check("cuEventQuery", code)
        return True

    # ------------------------------------------------------------------------------------------------ copies

    def copy_to_host(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy from device memory to pinned host memory."""
        self._call("cuMemcpyDtoHAsync", to, source, size_bytes, stream)

    def copy_to_device(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy from pinned host memory to device memory."""
        self._call("cuMemcpyHtoDAsync", to, source, size_bytes, stream)

    def copy_many(self, to: Addresses, source: Addresses, sizes_bytes: Addresses, stream: int) -> None:
        """Queue copies in no particular order among themselves; in one call if the driver can.

        Args:
            to: addresses, uint64, contiguous.
            source: as many; no copy may read what another writes.
            sizes_bytes: as many, none zero.
            stream: not the legacy default stream.
        """
        if self._batch is None:
            for one in zip(to.tolist(), source.tolist(), sizes_bytes.tolist(), strict=True):
                self._call("cuMemcpyAsync", *one, stream)
            return
        attributes = _CopyAttributes(_SOURCE_IN_STREAM_ORDER)
        first = ctypes.c_size_t(0)
        failed = ctypes.c_size_t(0)
        code = self._batch(
            to.ctypes.data, source.ctypes.data, sizes_bytes.ctypes.data, to.size,
            ctypes.addressof(attributes), ctypes.addressof(first), 1, ctypes.addressof(failed), stream,
        )  # fmt: skip
        self._check("cuMemcpyBatchAsync", code)

    def zero_columns(self, address: int, pitch_bytes: int, width_bytes: int, rows: int, stream: int) -> None:
        """Queue the zeroing of ``width_bytes`` at the start of each of ``rows`` rows, ``pitch_bytes`` apart."""
        self._call("cuMemsetD2D8Async", address, pitch_bytes, 0, width_bytes, rows, stream)

    # ----------------------------------------------------------------------------------------------- kernels

    def load_module(self, image: bytes) -> int:
        """Load a fatbin, cubin or PTX."""
        return int(self._call("cuModuleLoadData", image))

    def unload_module(self, module: int) -> None:
        """Unload; none of its kernels may be under way."""
        self._call("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        """A kernel's handle; the kernel is loaded now, since a lazy load may wait for the whole device later."""
        function = int(self._call("cuModuleGetFunction", module, name.encode()))
        self._call("cuFuncGetAttribute", self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
        return function

    def argument_bytes(self, function: int) -> int | None:
        """Size of a kernel's first argument, None where driver or cuda-bindings cannot tell (before 12.4)."""
        ask = getattr(self._api, "cuFuncGetParamInfo", None)
        if ask is None:
            return None
        try:
            code, _, size = ask(function, 0)
        except RuntimeError:
            # What cuda-bindings raises for a function that it knows and the driver does not have.
            return None
        return int(size) if int(code) == _SUCCESS else None

    def allow_shared(self, function: int, size_bytes: int) -> None:
        """Let a kernel use more dynamic shared memory than the default 48 KiB."""
        attribute = self._api.CUfunction_attribute(_MAX_DYNAMIC_SHARED_BYTES)
        self._call("cuFuncSetAttribute", function, attribute, size_bytes)

    def launch(
        self, function: int, ctas: int, threads: int, shared_bytes: int, stream: int, args: npt.NDArray[Any]
    ) -> None:
        """Queue a kernel with one by-value argument, which is copied before this returns."""
        pointers = (ctypes.c_void_p * 1)(args.ctypes.data)
        self._call(
            "cuLaunchKernel", function, ctas, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
        )

    # ------------------------------------------------------------------------------------------------- inside

    def _find_batch_copy(self) -> tuple[Any, str]:
        """cuMemcpyBatchAsync as it was introduced, called through its address: four arrays and no object per copy."""
        if self.version < GPU_BATCH_COPY_DRIVER:
            return None, f"driver {_dotted(self.version)} has no batch copies, {_dotted(GPU_BATCH_COPY_DRIVER)} has"
        code, address, _ = self._api.cuGetProcAddress(b"cuMemcpyBatchAsync", GPU_BATCH_COPY_DRIVER, 0)
        if int(code) != _SUCCESS or not address:
            return None, "the driver does not offer cuMemcpyBatchAsync"
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer
        )
        return prototype(int(address)), ""

    def _attribute(self, number: int, device: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", self._api.CUdevice_attribute(number), device))

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._api, name)(*arguments)
        self._check(name, code)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, name: str, code: Any) -> None:
        number = int(code)
        if number == _SUCCESS:
            return
        meaning = getattr(code, "name", "")
        raise (GpuLost if number in _LOST else GpuError)(f"{name} failed: {meaning or 'error'} ({number})")


def _import_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GpuUnavailable(
            f"cuda-bindings is not installed ({error}); install the release of your CUDA, such as cuda-bindings==13.*"
        ) from error
    return driver


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
