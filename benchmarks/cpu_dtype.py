"""In which dtype a model is worth running on this CPU.

A CPU that does not multiply bfloat16 itself converts every element: measured with torch 2.13 on one with AVX2 only,
1.2 GFLOP/s against 125 in float32.
"""

from __future__ import annotations

from pathlib import Path

BFLOAT16, FLOAT32 = "bfloat16", "float32"
DTYPES = (BFLOAT16, "float16", FLOAT32)
# As Linux names them, on x86 and on Arm.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def native_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns bfloat16 where the CPU multiplies it, else float32."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return FLOAT32
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return BFLOAT16 if _BFLOAT16_FLAGS & set(flags) else FLOAT32


def kv_bytes(bytes_in_bfloat16: int, dtype: str) -> int:
    """Returns the size of a KV pool that holds as many tokens in another dtype."""
    return bytes_in_bfloat16 * (2 if dtype == FLOAT32 else 1)
