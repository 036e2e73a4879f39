"""The kernels' machine code: the prebuilt fatbin, else NVRTC over the source that is shipped beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memkv_engines.errors import GpuError, GpuLost, GpuUnavailable
from memkv_engines.gpu.driver import Driver
from memkv_engines.log import get_logger

_log = get_logger(__name__)

_PACKAGE = Path(__file__).resolve().parent
FATBIN = _PACKAGE / "memkv_kernels.fatbin"
# In a wheel the source lies beside the fatbin, in a checkout in its own folder.
SOURCES = (_PACKAGE / "memkv_kernels.cu", _PACKAGE.parent.parent / "kernels" / "memkv_kernels.cu")


def load_kernels(driver: Driver, fatbin: Path = FATBIN, sources: tuple[Path, ...] = SOURCES) -> tuple[int, str]:
    """Load the kernels into the current context. Blocking: milliseconds, or about half a second with NVRTC.

    Returns:
        The module, and where it came from: ``fatbin`` or ``nvrtc (why)``.

    Raises:
        GpuUnavailable: neither way works; the message has both reasons.
        GpuLost: the context is broken.
    """
    try:
        return driver.load_module(fatbin.read_bytes()), "fatbin"
    except GpuLost:
        raise
    except (OSError, GpuError) as error:
        reason = f"prebuilt kernels not usable: {error}"
    try:
        module = driver.load_module(compile_source(_read_source(sources), driver.capability))
    except GpuLost:
        raise
    except GpuError as error:
        raise GpuUnavailable(f"{reason}; and {error}") from error
    _log.warning("kernels compiled with NVRTC: %s", reason)
    return module, f"nvrtc ({reason})"


def compile_source(source: bytes, capability: tuple[int, int]) -> bytes:
    """Compile for one device, without its driver or standard headers.

    Raises:
        GpuUnavailable: NVRTC is missing or refuses; the message has its log.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise GpuUnavailable(f"NVRTC is not usable: {error}") from error
    try:
        return _compile(nvrtc, source, capability)
    except RuntimeError as error:
        # cuda-bindings raises this where it finds no libnvrtc.
        raise GpuUnavailable(f"NVRTC is not usable: {error}; install nvidia-cuda-nvrtc") from error


def _compile(nvrtc: Any, source: bytes, capability: tuple[int, int]) -> bytes:
    options = [b"--std=c++17", b"--gpu-architecture=sm_%d%d" % capability]
    code, program = nvrtc.nvrtcCreateProgram(source, b"memkv_kernels.cu", 0, [], [])
    if int(code):
        raise GpuUnavailable(f"NVRTC: {code}")
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(code):
            raise GpuUnavailable(
                f"NVRTC refuses the kernels for sm_{capability[0]}{capability[1]}: {_text(nvrtc, program)}"
            )
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        image = bytes(size)
        (code,) = nvrtc.nvrtcGetCUBIN(program, image)
        if int(code):
            raise GpuUnavailable(f"NVRTC: {code}")
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    text = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.rstrip(b"\0").decode(errors="replace").strip()[-2000:]


def _read_source(sources: tuple[Path, ...]) -> bytes:
    for path in sources:
        if path.is_file():
            return path.read_bytes()
    raise GpuUnavailable(f"no kernel source at {' or '.join(map(str, sources))}")
