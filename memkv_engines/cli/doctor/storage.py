"""The tier's directory: file system, room, alignment and raw rate."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from memkv_engines.cli.doctor.finding import NOTE, OK, PROBLEM, Finding, Host

AREA = "tier"
CHUNK_BYTES = 4 << 20
THREADS = 4
CHUNKS_PER_THREAD = 16
RATE_SECONDS_MAX = 3.0
LOW_FREE_BYTES = 10 << 30
# 1,000 tokens, 32 layers, keys and values, 8 KV heads of 128, 2 bytes.
KV_BYTES_8B = 1000 * 32 * 2 * 8 * 128 * 2
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "fuse", "9p", "glusterfs", "beegfs", "wekafs")
MEMORY = ("tmpfs", "ramfs")
_AT_FDCWD, _STATX_DIOALIGN, _STATX_BYTES = -100, 0x2000, 256
_DIO_MEM_ALIGN_AT = 152


def check(host: Host, path: str) -> Iterator[Finding]:
    """The directory of the tier."""
    if not path:
        yield Finding(AREA, "path", NOTE, "not given", next="memkv-engines doctor /nvme/memkv")
        return
    folder = Path(path).absolute()
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            AREA, "path", PROBLEM, f"{folder} is no directory that can be written", next="make it, or fix its owner"
        )
        return
    mode = folder.stat().st_mode & 0o777
    why = "" if not mode & 0o077 else "others can look into it; chunks themselves are 0600"
    yield Finding(
        AREA, "path", NOTE if why else OK, f"{folder} (mode {mode:o})", why, f"chmod 700 {folder}" if why else ""
    )
    yield _file_system(host, folder)
    yield _room(folder)
    direct = _direct_io(folder)
    yield direct
    yield from _rates(folder, direct=direct.verdict == OK)


def _file_system(host: Host, folder: Path) -> Finding:
    kind, mount, device = mount_of(host, folder)
    value = f"{kind} on {mount} ({device})"
    if kind in MEMORY:
        why = "memory, which does not survive a restart of the machine"
        return Finding(AREA, "file system", NOTE, value, why, "take a directory on a drive, unless that is wanted")
    if kind.startswith(NETWORK):
        why = "a network file system: several hosts can share the tier"
        return Finding(AREA, "file system", NOTE, value, why, "give each host that shares it the same path and keys")
    return Finding(AREA, "file system", OK, value)


def mount_of(host: Host, folder: Path) -> tuple[str, str, str]:
    """Kind, mount point and device of the file system that a folder is on."""
    best = ("unknown", "", "")
    resolved = folder.resolve()
    for line in host.text("proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, what = before.split(), after.split()
        if len(fields) < 5 or len(what) < 2:
            continue
        mount = Path(fields[4].replace("\\040", " "))
        kind, device = what[:2]
        # Later lines cover earlier ones.
        if (resolved == mount or mount in resolved.parents) and len(str(mount)) >= len(best[1]):
            best = (kind, str(mount), device)
    return best


def _room(folder: Path) -> Finding:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    value = f"{free / 2**30:.1f} GiB of {stat.f_blocks * stat.f_frsize / 2**30:.1f} GiB free"
    if free < LOW_FREE_BYTES:
        return Finding(
            AREA, "room", NOTE, value, "stores stop when it is full", "set capacity_bytes to less than what is free"
        )
    return Finding(AREA, "room", OK, value)


def _direct_io(folder: Path) -> Finding:
    try:
        with _scratch(folder, os.O_DIRECT) as (fd, path):
            align = _dio_align(path)
            with contextlib.closing(mmap.mmap(-1, mmap.PAGESIZE)) as page:
                os.pwritev(fd, [page], 0)
    except OSError as error:
        why = "buffered I/O works, and costs CPU time and page cache"
        todo = "take a directory on ext4 or xfs, if one is at hand"
        return Finding(AREA, "direct I/O", NOTE, f"refused: {error.strerror}", why, todo)
    told = (
        f"alignment {align[0]} B in memory, {align[1]} B in files"
        if any(align)
        else "alignment not told (we use 4096 B)"
    )
    if max(align) > 4096:
        return Finding(AREA, "direct I/O", PROBLEM, told, "chunks are aligned to 4096 B", "set direct_io=off")
    return Finding(AREA, "direct I/O", OK, told)


def _dio_align(path: Path) -> tuple[int, int]:
    """What ``statx`` says of direct I/O: alignment of memory and of offsets; zeros where the kernel does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if not hasattr(libc, "statx") or libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, buffer):
        return (0, 0)
    if not struct.unpack_from("<I", buffer.raw, 0)[0] & _STATX_DIOALIGN:
        return (0, 0)
    memory, offset = struct.unpack_from("<II", buffer.raw, _DIO_MEM_ALIGN_AT)
    return (memory, offset)


@contextlib.contextmanager
def _scratch(folder: Path, flags: int = 0) -> Iterator[tuple[int, Path]]:
    # The tier's own names for what is half done, so that a leftover is collected.
    path = folder / f".tmp-doctor-{secrets.token_hex(8)}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        yield fd, path
    finally:
        os.close(fd)
        path.unlink()


def _rates(folder: Path, *, direct: bool) -> Iterator[Finding]:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_scratch(folder, os.O_DIRECT if direct else 0))[0] for _ in range(THREADS)]
        written, write_s = _timed(files, os.pwritev)
        for fd in files:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        read, read_s = _timed(files, os.preadv, limit=written // THREADS // CHUNK_BYTES)
    how = f"{THREADS} threads, 4 MiB, {'direct' if direct else 'buffered'}"
    for name, done, seconds in (("write rate", written, write_s), ("read rate", read, read_s)):
        rate = done / seconds / 1e9 if seconds else 0.0
        why = f"{KV_BYTES_8B / rate / 1e6:.0f} ms for 1,000 tokens of an 8B model in 16 bits" if rate else ""
        todo = "" if rate > 1 else "take a faster drive, or several (path); leave cost_gate=on"
        yield Finding(AREA, name, NOTE if todo else OK, f"{rate:.2f} GB/s ({how})", why, todo)


def _timed(files: list[int], move: object, limit: int = CHUNKS_PER_THREAD) -> tuple[int, float]:
    """Move chunks in all files at once, for a bounded time; bytes and seconds."""
    counts = [0] * len(files)
    stop = time.monotonic() + RATE_SECONDS_MAX

    def work(index: int) -> None:
        with contextlib.closing(mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE)) as buffer:
            with contextlib.suppress(OSError):
                buffer.madvise(mmap.MADV_HUGEPAGE)
            buffer.write(secrets.token_bytes(4096) * (CHUNK_BYTES // 4096))
            for chunk in range(limit):
                if time.monotonic() > stop:
                    return
                counts[index] += move(files[index], [buffer], chunk * CHUNK_BYTES)  # type: ignore[operator]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(files))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), time.perf_counter() - start
