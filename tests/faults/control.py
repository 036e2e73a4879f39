"""The tests' end of the fault injector (`inject.cpp`): builds it, says what goes wrong, and counts what did.

with Injector(tier) as injector:
    os.environ.update(injector.environment())    # of what starts the process
    injector.arm(FAULTS["bit flip in a read"], seed=7, per_1024=200)
    ...
    assert injector.disarm() > 0                 # injections since it was armed
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("inject.cpp")
UNVERIFIED = Path(__file__).with_name("unverified")
VARIABLE = "MEMKV_FAULTS_CONTROL"

OPEN, CREATE, STAT, READ, WRITE, RENAME, UNLINK = (1 << i for i in range(7))
ANYTHING = OPEN | CREATE | STAT | READ | WRITE | RENAME | UNLINK
NOTHING, FAIL, SHORT, FLIP, MISDIRECT, STALE, ZERO, LOST, DELAY, KILL, THROTTLE = range(11)

_ALWAYS = 1024
_FOR_EVER_MS = 3_600_000
_NO_END = 1 << 40
_FIELDS = {
    name: struct.Struct(kind)
    for name, kind in {
        "action": "<I",
        "operations": "<I",
        "per_1024": "<I",
        "error": "<i",
        "delay_ms": "<I",
        "service_only": "<I",
        "seed": "<Q",
        "skip": "<q",
        "budget": "<q",
        "round": "<Q",
        "calls": "<Q",
        "injected": "<Q",
        "everything": "<I",
        "root": "<1020s",
        "bytes_per_s": "<Q",
        "busy_until": "<Q",
    }.items()
}
_OFFSETS: dict[str, int] = {}
_SIZE = 0
for _name, _field in _FIELDS.items():
    _OFFSETS[_name] = _SIZE
    _SIZE += _field.size


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong below a tier.

    Attributes:
        name: what it is called in tables.
        action: what happens to a call.
        operations: the calls it can happen to.
        error: the `errno` of calls that fail.
        delay_ms: how long a call takes longer.
        bytes_per_s: bandwidth that is left to all calls together.
        everything: it happens to anything below the tier's directory, not to chunks alone.
        spoils: what is stored meanwhile may be damaged for good, without anyone having been told.
        ends_service: the I/O process does not survive it.
    """

    name: str
    action: int
    operations: int
    error: int = 0
    delay_ms: int = 0
    bytes_per_s: int = 0
    everything: bool = False
    spoils: bool = False
    ends_service: bool = False

    @property
    def hits_loads(self) -> bool:
        """Whether loading what was stored before can meet it."""
        return bool(self.operations & (OPEN | READ))

    @property
    def looks_full(self) -> bool:
        """Whether a process that met it holds its stores off for a while, as if the device were full."""
        no_room = self.error in (errno.ENOSPC, errno.EDQUOT)
        return no_room or (self.action == SHORT and bool(self.operations & WRITE))

    @property
    def hits_stores(self) -> bool:
        """Whether storing can meet it."""
        return bool(self.operations & (CREATE | WRITE | RENAME))


_ALL = (
    Fault("EIO in a read", FAIL, READ, errno.EIO),
    Fault("EIO in an open", FAIL, OPEN, errno.EIO),
    Fault("EIO in a write", FAIL, WRITE, errno.EIO),
    Fault("EIO in a rename", FAIL, RENAME, errno.EIO),
    Fault("EIO in everything", FAIL, ANYTHING, errno.EIO, everything=True),
    Fault("ENOSPC in a write", FAIL, WRITE, errno.ENOSPC),
    Fault("ENOSPC in an open", FAIL, CREATE, errno.ENOSPC),
    Fault("EDQUOT in a write", FAIL, WRITE, errno.EDQUOT),
    Fault("EROFS in all that writes", FAIL, CREATE | WRITE | RENAME | UNLINK, errno.EROFS, everything=True),
    Fault("EMFILE in an open", FAIL, OPEN | CREATE, errno.EMFILE),
    Fault("ENOENT in an open", FAIL, OPEN, errno.ENOENT),
    Fault("ESTALE in an open", FAIL, OPEN, errno.ESTALE),
    Fault("ESTALE in a read", FAIL, READ, errno.ESTALE),
    Fault("ESTALE in everything", FAIL, ANYTHING, errno.ESTALE, everything=True),
    Fault("short read", SHORT, READ),
    Fault("short write", SHORT, WRITE),
    Fault("bit flip in a read", FLIP, READ),
    Fault("bit flip in a write", FLIP, WRITE, spoils=True),
    Fault("misdirected read", MISDIRECT, READ),
    Fault("misdirected write", MISDIRECT, WRITE, spoils=True),
    Fault("stale read", STALE, READ),
    Fault("zeros read", ZERO, READ),
    Fault("torn write", ZERO, WRITE, spoils=True),
    Fault("lost write", LOST, WRITE, spoils=True),
    Fault("lost rename", LOST, RENAME, spoils=True),
    Fault("slow reads", DELAY, OPEN | READ, delay_ms=50),
    Fault("slow writes", DELAY, WRITE | RENAME, delay_ms=50),
    Fault("hang in a read", DELAY, READ, delay_ms=_FOR_EVER_MS, ends_service=True),
    Fault("hang in a write", DELAY, WRITE, delay_ms=_FOR_EVER_MS, ends_service=True),
    Fault("hang in everything", DELAY, ANYTHING, delay_ms=_FOR_EVER_MS, everything=True, ends_service=True),
    Fault("kill in a read", KILL, READ, ends_service=True),
    Fault("kill in a write", KILL, WRITE, spoils=True, ends_service=True),
    Fault("kill in a rename", KILL, RENAME, ends_service=True),
)
FAULTS = {fault.name: fault for fault in _ALL}


def throttle(mb_per_s: float) -> Fault:
    """A device that reads and writes no faster than that; nothing is wrong with what it reads and writes."""
    return Fault(f"{mb_per_s:g} MB/s", THROTTLE, READ | WRITE, bytes_per_s=int(mb_per_s * 1e6))


def built() -> Path:
    """Build the library unless that was done; its path.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    source = SOURCE.read_bytes()
    library = ROOT / "build" / "faults" / f"inject-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        try:
            done = subprocess.run(
                ["g++", *flags, "-o", str(made), str(SOURCE), "-ldl"], capture_output=True, text=True, timeout=120
            )
        except OSError as error:
            raise RuntimeError(f"the fault injector needs g++ ({error}); Debian: apt-get install g++") from error
        if done.returncode:
            raise RuntimeError(f"g++ cannot build the fault injector:\n{done.stderr}")
        made.rename(library)
    return library


def _is_loaded() -> bool:
    try:
        return bool(ctypes.CDLL(None).memkv_faults_loaded())
    except AttributeError:
        return False


class Injector:
    """Faults below one directory, in every process that was started with `environment()`.

    Args:
        root: the tier's directory; it need not exist.
        service_only: leave alone what is not an engine's I/O process.
        control: a control file that is there already; its own by default.
    """

    def __init__(self, root: Path, *, service_only: bool = True, control: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="memkv-faults-")
        self._path = control or Path(self._folder.name) / "control"
        if control is None:
            self._path.write_bytes(bytes(mmap.PAGESIZE))
        with self._path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._set("service_only", int(service_only))
        self._before = 0
        self.armed: Fault | None = None
        self.aim(root)

    @classmethod
    def of_this_process(cls, root: Path) -> Injector:
        """The injector that this very process was started under.

        Raises:
            RuntimeError: it was not.
        """
        if VARIABLE not in os.environ or not _is_loaded():
            raise RuntimeError("this process was not started under the fault injector")
        return cls(root, service_only=False, control=Path(os.environ[VARIABLE]))

    def aim(self, root: Path) -> None:
        """From now on it is this directory that suffers."""
        self._set("root", os.fsencode(os.path.realpath(root)))

    @property
    def control(self) -> Path:
        """The file that controls it."""
        return self._path

    def environment(self, *, verified: bool = True) -> dict[str, str]:
        """Variables of a process that shall suffer; without verification it is the control of the suite."""
        variables = {"LD_PRELOAD": str(built()), VARIABLE: str(self._path)}
        return variables if verified else {**variables, "PYTHONPATH": f"{UNVERIFIED}{os.pathsep}{ROOT}"}

    def arm(
        self,
        fault: Fault,
        *,
        seed: int = 0,
        per_1024: int = _ALWAYS,
        skip: int = 0,
        budget: int = _NO_END,
        everywhere: bool = True,
    ) -> None:
        """From now on things go wrong.

        Args:
            fault: what.
            seed: of the choice of calls, bits and lengths.
            per_1024: the chance of each call.
            skip: calls to let through first.
            budget: how often at most.
            everywhere: false confines a fault of `everything` to chunks all the same.
        """
        self.disarm()
        for name, value in {
            "operations": fault.operations,
            "per_1024": per_1024,
            "error": fault.error,
            "delay_ms": fault.delay_ms,
            "bytes_per_s": fault.bytes_per_s,
            "seed": seed,
            "skip": skip,
            "budget": budget,
            "calls": 0,
            "busy_until": 0,
            "everything": int(fault.everything and everywhere),
        }.items():
            self._set(name, value)
        self._before = self.injected
        self.armed = fault
        self._set("action", fault.action)

    def disarm(self) -> int:
        """Everything is well again, and what hangs goes on. Returns how often something went wrong since `arm`."""
        self._set("action", NOTHING)
        self._set("round", self._get("round") + 1)
        self.armed = None
        return self.since_armed

    @property
    def since_armed(self) -> int:
        """How often something went wrong since `arm`."""
        return self.injected - self._before

    @property
    def injected(self) -> int:
        """How often something went wrong, in all."""
        return self._get("injected")

    def close(self) -> None:
        """Everything is well again."""
        self.disarm()
        self._map.close()
        self._folder.cleanup()

    def __enter__(self) -> Injector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _set(self, name: str, value: int | bytes) -> None:
        _FIELDS[name].pack_into(self._map, _OFFSETS[name], value)

    def _get(self, name: str) -> int:
        return int(_FIELDS[name].unpack_from(self._map, _OFFSETS[name])[0])
