"""The structs that the kernels take, as kernels/README.md gives them. Written down a second time on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_INLINE_IDS = 448
LEAF_BYTES = 16384
ID_OUT_OF_RANGE, CHUNK_OVERFLOW, UNFIT = 1, 2, 4

TILE = np.dtype(
    [
        ("base", "<u8"),
        ("block_stride_bytes", "<i8"),
        ("chunk_offset_bytes", "<u8"),
        ("chunk_stride_bytes", "<i8"),
        ("length_bytes", "<u4"),
        ("log2_access", "<u4"),
        ("reserved", "<u8"),
    ]
)
COPY_ARGS = np.dtype(
    [
        ("tiles", "<u8"),
        ("chunk", "<u8"),
        ("chunk_bytes", "<u8"),
        ("external_ids", "<u8"),
        ("error", "<u8"),
        ("tile_count", "<u4"),
        ("block_count", "<u4"),
        ("num_blocks", "<u4"),
        ("first_index", "<u4"),
        ("ids", "<i4", (MAX_INLINE_IDS,)),
    ]
)
DIGEST_ARGS = np.dtype(
    [
        ("first_block", "<u8"),
        ("leaves", "<u8"),
        ("chunk_bytes", "<u8"),
        ("block_bytes", "<u8"),
        ("block_stride_bytes", "<u8"),
        ("error", "<u8"),
        ("block_count", "<u4"),
        ("reserved", "<u4"),
    ]
)
assert (TILE.itemsize, COPY_ARGS.itemsize, DIGEST_ARGS.itemsize) == (48, 1848, 56)


def address(array: npt.NDArray[Any]) -> int:
    """Where an array's bytes are."""
    return int(array.ctypes.data)


class CopyCall:
    """Arguments of a gather or scatter, with everything they point to kept alive.

    Attributes:
        arguments: The struct.
        error: The error word.
        tables: Address and length of what the kernel reads beside the data.
    """

    def __init__(
        self,
        tiles: npt.NDArray[Any],
        ids: Sequence[int],
        *,
        chunk: int,
        chunk_bytes: int,
        num_blocks: int,
        first_index: int = 0,
        external: bool = False,
    ) -> None:
        self.tiles = tiles
        self.error = np.zeros(1, np.uint32)
        self.arguments = np.zeros((), COPY_ARGS)
        values = np.asarray(ids, dtype=np.int64)
        fields = self.arguments
        fields["tiles"], fields["tile_count"] = address(tiles), len(tiles)
        fields["chunk"], fields["chunk_bytes"] = chunk, chunk_bytes
        fields["error"], fields["num_blocks"] = address(self.error), num_blocks
        fields["block_count"], fields["first_index"] = len(values), first_index
        self.tables = [(address(tiles), tiles.nbytes)]
        # What lies behind the ids in use must not be used: it is in range, so that using it moves something.
        fields["ids"] = 0
        if external or len(values) > MAX_INLINE_IDS:
            self.external = values
            fields["external_ids"] = address(values)
            self.tables.append((address(values), values.nbytes))
        else:
            fields["ids"][: len(values)] = values
