"""The directory tier when others reach into its directory: people, crashes, other processes, full disks."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memkv_engines.errors import (
    ChunkError,
    ChunkForeign,
    ChunkMissing,
    ChunkTruncated,
    TierFull,
    TierUnavailable,
)
from memkv_engines.keys import ChunkName
from memkv_engines.limits import ALIGN_BYTES, GIB, MAX_CHUNK_BYTES, MIB, TEMPORARY_MAX_AGE_S
from memkv_engines.tier import directory
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.posix import BUFFERED, DIRECT
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain_hash, make_name, noise
from tests.fast.test_tiers import get, put, variant
from tests.fast.tier_samples import fix_mode

FOLDER = NAMESPACE.folder
PAGE = ALIGN_BYTES
NAME = make_name()
DATA = noise(4 * PAGE)
AGES_AGO = time.time() - 10 * TEMPORARY_MAX_AGE_S


@pytest.fixture(params=[DIRECT, BUFFERED])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DirectoryTier]:
    fix_mode(monkeypatch, tmp_path, request.param)
    tier = DirectoryTier(tmp_path / "kv")
    yield tier
    tier.close()


def path_of(tier: DirectoryTier, name: ChunkName = NAME) -> Path:
    return tier.root / FOLDER / name.bucket / name.text


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if not p.is_dir())


# -------------------------------------------------------------------------------------------- what it makes on disk


def test_folders_are_0700_and_files_0600_whatever_the_umask(tier: DirectoryTier) -> None:
    old = os.umask(0)
    try:
        put(tier, NAME, DATA)
        tier.write_manifest(NAMESPACE)
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tier.root, *tier.root.rglob("*"))}
    assert modes == {"kv": 0o700, FOLDER: 0o700, NAME.bucket: 0o700, NAME.text: 0o600, "manifest.json": 0o600}


def test_missing_parents_are_made(tmp_path: Path) -> None:
    DirectoryTier(tmp_path / "a" / "b" / "c", direct_io="off").close()
    assert stat.S_IMODE((tmp_path / "a" / "b" / "c").stat().st_mode) == 0o700


def test_the_manifest_is_the_canonical_text(tier: DirectoryTier) -> None:
    tier.write_manifest(NAMESPACE)
    assert (tier.root / FOLDER / "manifest.json").read_bytes() == NAMESPACE.canonical_json
    assert files_in(tier.root) == ["manifest.json"]


@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_a_real_probe_chooses_a_mode_and_leaves_nothing(tmp_path: Path, direct_io: str) -> None:
    with_probe = DirectoryTier(tmp_path, direct_io=direct_io)
    assert with_probe.mode_report.mode in with_probe.name
    assert with_probe.mode_report.reason
    assert files_in(tmp_path) == []
    with_probe.close()


def test_descriptors_are_released(tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_OPEN_BUCKETS", 3)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(20):
        put(tier, make_name(4, str(index)), DATA)
        list(tier.names(FOLDER))
        tier.scan()
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    next(tier.names(FOLDER))
    tier.close()
    assert len(os.listdir("/proc/self/fd")) < before


# ---------------------------------------------------------------------------------- places that cannot be a tier


def test_a_path_below_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TierUnavailable, match=r"path='.*file.*' cannot be used .*: .*Give a directory"):
            DirectoryTier(path)


def test_a_directory_that_takes_no_files_is_an_error() -> None:
    with pytest.raises(TierUnavailable):
        DirectoryTier("/proc/self", direct_io="off")


def test_a_missing_directory_is_not_made_for_a_reader(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match="No such file"):
        DirectoryTier(tmp_path / "kv", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_tier_reads_and_never_writes(tier: DirectoryTier) -> None:
    put(tier, NAME, DATA)
    (tier.root / ".tmp-old").touch()
    os.utime(tier.root / ".tmp-old", (AGES_AGO, AGES_AGO))
    before = files_in(tier.root)
    reader = DirectoryTier(tier.root, read_only=True, direct_io="off")
    assert get(reader, NAME) == DATA
    assert reader.scan() == len(DATA)
    reader.write_manifest(NAMESPACE)
    with pytest.raises(TierUnavailable, match="read-only"):
        put(reader, make_name(5), DATA)
    assert reader.remove(FOLDER, NAME) is False
    assert files_in(tier.root) == before
    reader.close()


def test_a_bucket_that_is_a_file_fails_softly(tier: DirectoryTier) -> None:
    (tier.root / FOLDER).mkdir()
    (tier.root / FOLDER / NAME.bucket).touch()
    with pytest.raises(TierUnavailable):
        put(tier, NAME, DATA)
    with pytest.raises(ChunkError):
        tier.open(FOLDER, NAME)
    assert tier.exists(FOLDER, [NAME]) == [False]
    assert tier.variants(FOLDER, NAME.first, 0, SHARD.text) == []
    assert tier.remove(FOLDER, make_name(4, "b")) is False


def test_a_bucket_behind_a_link_is_not_followed(tier: DirectoryTier, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tier.root / FOLDER).mkdir()
    (tier.root / FOLDER / NAME.bucket).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TierUnavailable):
        put(tier, NAME, DATA)
    (tmp_path / "elsewhere" / NAME.text).write_bytes(DATA)
    with pytest.raises(ChunkForeign):
        tier.open(FOLDER, NAME)
    assert list(tier.names(FOLDER)) == []
    assert files_in(tmp_path / "elsewhere") == [NAME.text]


# ------------------------------------------------------------------------------------- chunks that are not chunks


def plant_link(path: Path) -> None:
    target = path.parent / "target"
    target.write_bytes(DATA)
    path.symlink_to(target)


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_directory(path: Path) -> None:
    path.mkdir()


def plant_socket(path: Path) -> None:
    # Names of sockets are short: bind by a descriptor of the folder.
    fd = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{fd}/s")
    os.close(fd)
    (path.parent / "s").rename(path)


def plant_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_CHUNK_BYTES + 1)


def plant_foreign_owner(path: Path) -> None:
    path.write_bytes(DATA)
    try:
        os.chown(path, 65_534, 65_534)
    except PermissionError:
        pytest.skip("only root can give files away")


PLANTS = [plant_link, plant_fifo, plant_directory, plant_socket, plant_huge, plant_foreign_owner]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_under_a_name_is_foreign_and_never_hangs(
    tier: DirectoryTier, plant: Callable[[Path], None]
) -> None:
    put(tier, NAME, DATA)
    path_of(tier).unlink()
    plant(path_of(tier))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ChunkForeign):
            tier.open(FOLDER, NAME)
    assert len(os.listdir("/proc/self/fd")) == before
    regular = plant in (plant_huge, plant_foreign_owner)
    assert tier.exists(FOLDER, [NAME]) == [regular]
    assert list(tier.names(FOLDER)) == [NAME] * regular
    assert tier.variants(FOLDER, NAME.first, 0, SHARD.text) == [NAME] * regular
    if plant is plant_directory:
        with pytest.raises(TierUnavailable):
            put(tier, NAME, DATA, replace=True)
        assert files_in(tier.root) == []
    else:
        assert put(tier, NAME, DATA, replace=True)
        assert get(tier, NAME) == DATA


@pytest.mark.parametrize("length", [0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, len(DATA) - 1])
def test_a_cut_file_is_truncated(tier: DirectoryTier, length: int) -> None:
    put(tier, NAME, DATA)
    os.truncate(path_of(tier), length)
    with tier.open(FOLDER, NAME) as reader:
        assert reader.object_bytes == length
        with pytest.raises(ChunkTruncated):
            reader.read([aligned(bytes(len(DATA)))], 0)
        for page in range(length // PAGE):
            reader.read([aligned(bytes(PAGE))], page * PAGE)


def test_a_file_cut_while_it_is_open_is_truncated(tier: DirectoryTier) -> None:
    put(tier, NAME, DATA)
    with tier.open(FOLDER, NAME) as reader:
        os.truncate(path_of(tier), PAGE)
        with pytest.raises(ChunkTruncated):
            reader.read([aligned(bytes(len(DATA)))], 0)


def test_a_huge_sparse_file_of_legal_size_is_read_as_asked_for(tier: DirectoryTier) -> None:
    put(tier, NAME, DATA)
    os.truncate(path_of(tier), 1 * GIB)
    view = aligned(bytes(len(DATA)))
    with tier.open(FOLDER, NAME) as reader:
        reader.read([view], 0)
    assert view == DATA


def test_junk_is_passed_over(tier: DirectoryTier) -> None:
    put(tier, NAME, DATA)
    bucket = path_of(tier).parent
    junk = [
        "x", ".kv", "lost+found", NAME.text + "~", NAME.text[:-1], NAME.text.upper(), f"{NAME.first.hex()}-junk.kv",
        NAME.text.replace("-b4-", "-b04-"), "a" * 255,
    ]  # fmt: skip
    for folder in (tier.root, tier.root / FOLDER, bucket):
        for text in junk:
            (folder / text).touch()
        (folder / os.fsdecode(b"\xff\xfe.kv")).touch()
    (tier.root / FOLDER / NAME.text).write_bytes(DATA)  # a chunk, but not in its bucket
    assert list(tier.names(FOLDER)) == [NAME]
    assert tier.variants(FOLDER, NAME.first, 0, SHARD.text) == [NAME]
    tier.scan()
    assert get(tier, NAME) == DATA


# ------------------------------------------------------------------------------------------ while it is being used


@pytest.mark.parametrize("what", ["namespace", "bucket", "moved"])
def test_a_folder_that_vanishes_is_made_again(tier: DirectoryTier, tmp_path: Path, what: str) -> None:
    put(tier, NAME, DATA)
    with tier.open(FOLDER, NAME) as reader:
        if what == "moved":
            (tier.root / FOLDER).rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(tier.root / FOLDER if what == "namespace" else path_of(tier).parent)
        view = aligned(bytes(len(DATA)))
        reader.read([view], 0)
        assert view == DATA
    if what != "moved":  # a moved folder is the same folder as long as nothing is missed in it
        assert tier.exists(FOLDER, [NAME]) == [False]
        with pytest.raises(ChunkMissing):
            tier.open(FOLDER, NAME)
        assert put(tier, NAME, DATA)
        assert get(tier, NAME) == DATA
        assert path_of(tier).exists()


@pytest.mark.parametrize("how", ["exists", "open", "variants", "remove"])
@pytest.mark.parametrize("move", [False, True])
def test_a_folder_that_another_process_made_anew_is_seen(
    tier: DirectoryTier, tmp_path: Path, how: str, move: bool
) -> None:
    put(tier, make_name(5), DATA)
    if move:
        (tier.root / FOLDER).rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / NAME.bucket / make_name(5).text).unlink()
    else:
        shutil.rmtree(tier.root / FOLDER)
    other = DirectoryTier(tier.root)
    put(other, NAME, DATA)
    other.close()
    if how == "exists":
        assert tier.exists(FOLDER, [NAME]) == [True]
    elif how == "open":
        assert get(tier, NAME) == DATA
    elif how == "variants":
        assert tier.variants(FOLDER, NAME.first, 0, SHARD.text) == [NAME]
    else:
        assert tier.remove(FOLDER, NAME) is True


def test_threads_go_on_while_folders_vanish_and_descriptors_are_dropped(
    tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MAX_OPEN_BUCKETS", 1)
    names = [make_name(4, str(i)) for i in range(8)]
    deadline = time.monotonic() + 1.0

    def work(seed: int) -> int:
        done = 0
        while time.monotonic() < deadline:
            index = (seed + done) % len(names)
            done += 1
            try:
                put(tier, names[index], noise(PAGE, index), replace=done % 2 == 0)
                assert get(tier, names[index]) == noise(PAGE, index)
            except (ChunkMissing, TierUnavailable):
                pass  # its folder was removed between two steps
        return done

    with ThreadPoolExecutor(4) as threads:
        workers = [threads.submit(work, seed) for seed in range(4)]
        while time.monotonic() < deadline:
            shutil.rmtree(tier.root / FOLDER, ignore_errors=True)
            time.sleep(0.01)
        assert all(worker.result() > 0 for worker in workers)
    for name in tier.names(FOLDER):
        assert get(tier, name) == noise(PAGE, names.index(name))


def test_newest_variants_come_first(tier: DirectoryTier) -> None:
    order = [3, 1, 4, 2]
    for age, count in enumerate(order):
        put(tier, variant(count), DATA)
        os.utime(path_of(tier, variant(count)), (AGES_AGO - age, AGES_AGO - age))
    assert tier.variants(FOLDER, chain_hash(0)[:16], 0, SHARD.text) == [variant(count) for count in order]


def test_old_leftovers_are_collected_wherever_they_lie(tier: DirectoryTier) -> None:
    put(tier, NAME, DATA)
    folders = (tier.root, tier.root / FOLDER, path_of(tier).parent)
    for folder in folders:
        for text, when in ((".tmp-1-old", AGES_AGO), (".tmp-1-young", time.time()), (".keep", AGES_AGO)):
            (folder / text).write_bytes(b"x" * 100)
            os.utime(folder / text, (when, when))
    os.utime(path_of(tier), (AGES_AGO, AGES_AGO))
    assert tier.scan() == len(DATA)
    for folder in folders:
        assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == {".tmp-1-young", ".keep"}
    assert get(tier, NAME) == DATA


def test_a_scan_counts_what_others_wrote(tier: DirectoryTier) -> None:
    other = DirectoryTier(tier.root)
    put(other, NAME, DATA)
    assert tier.scan() == len(DATA) == tier.used_bytes()
    put(tier, make_name(5), DATA)
    assert tier.used_bytes() == 2 * len(DATA) == tier.scan() == other.scan()
    other.close()


# --------------------------------------------------------------------------------------------------- no room left


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def pwritev(fd: int, *_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(directory.os, "pwritev", pwritev)


def test_a_full_device_sheds_stores_and_leaves_nothing(tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tier, make_name(5), DATA)
    tier.scan()
    with monkeypatch.context() as full:
        fail_writes(full, errno.ENOSPC)
        with pytest.raises(TierFull, match="No space left"):
            put(tier, NAME, DATA)
    with pytest.raises(TierFull, match="a moment ago"):
        put(tier, NAME, DATA)
    assert files_in(tier.root) == [make_name(5).text]
    assert tier.used_bytes() == len(DATA)
    assert get(tier, make_name(5)) == DATA
    monkeypatch.setattr(directory.time, "monotonic", lambda: 1e12)
    assert put(tier, NAME, DATA)


def test_a_failing_device_leaves_nothing(tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        fail_writes(broken, errno.EIO)
        with pytest.raises(Exception, match="Input/output error"):
            put(tier, NAME, DATA)
    assert files_in(tier.root) == []
    assert put(tier, NAME, DATA), "the next may succeed"


def test_a_short_write_is_not_published(tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.os, "pwritev", lambda *_: PAGE)
    with pytest.raises(TierFull, match="short write"):
        put(tier, NAME, DATA)
    assert files_in(tier.root) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "memkv-test", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_a_really_full_disk(small_disk: Path, direct_io: str) -> None:
    tier = DirectoryTier(small_disk / "kv", direct_io=direct_io)
    stored = 0
    with pytest.raises(TierFull):
        while stored < 2 * MIB:
            put(tier, make_name(4, str(stored)), noise(16 * PAGE))
            stored += 16 * PAGE
    assert 0 < stored <= MIB
    assert not [text for text in files_in(small_disk) if text.startswith(".tmp")]
    assert get(tier, make_name(4, "0")) == noise(16 * PAGE)
    assert tier.scan() == stored
    tier.close()
    full = DirectoryTier(small_disk / "kv", direct_io=direct_io)
    assert "full" in full.mode_report.reason or full.mode_report.write_gb_per_s
    full.close()
