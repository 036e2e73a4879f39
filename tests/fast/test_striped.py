"""Several directories as one tier: where chunks lie, and what happens when a drive is lost or takes no stores."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memkv_engines.errors import ChunkMissing, TierFull, TierUnavailable, TransferOverdue
from memkv_engines.keys import ChunkName
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.offload.keeping import start_keepers
from memkv_engines.tier import striped
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import ID_FILE, StripedTier, drive_seed, open_directories
from memkv_engines.transports.posix import BUFFERED
from tests.fast.io_samples import BLOCKS_PER_CHUNK, load, make_run, make_store, setup_for, started, store
from tests.fast.samples import NAMESPACE, SHARD, chain, chain_hash, make_name, noise
from tests.fast.service_samples import POOL
from tests.fast.test_tiers import get, put, variant
from tests.fast.tier_samples import fix_mode

FOLDER = NAMESPACE.folder
PAGE = ALIGN_BYTES
COUNT = 120


def number_name(number: int) -> ChunkName:
    return make_name(4, f"chunk {number}")


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fix_mode(monkeypatch, tmp_path, BUFFERED)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    found = [tmp_path / f"nvme{number}" for number in range(3)]
    for path in found:
        path.mkdir()
    return [str(path) for path in found]


def fix_ids(paths: list[str]) -> None:
    """Always the same ids, so that chunks lie at the same places in every run."""
    for number, path in enumerate(paths):
        (Path(path) / ID_FILE).write_text(f"{number + 1:032x}")


Make = Callable[..., StripedTier]


@pytest.fixture
def make(paths: list[str]) -> Iterator[Make]:
    made = []
    fix_ids(paths)

    def call(*wanted: str, **options: object) -> StripedTier:
        tier = open_directories(wanted or paths, **options)  # type: ignore[arg-type]
        assert isinstance(tier, StripedTier)
        made.append(tier)
        return tier

    yield call
    for tier in made:
        tier.close()


def fill(tier: StripedTier, count: int = COUNT) -> None:
    for number in range(count):
        put(tier, number_name(number), noise(PAGE, number))


def where(paths: list[str]) -> dict[str, str]:
    """Chunk name -> the directory it lies in."""
    return {file.name: path for path in paths for file in Path(path).rglob("*.kv")}


def found(tier: StripedTier, count: int = COUNT) -> set[int]:
    """The numbers of the chunks that are found, each read and compared."""
    hits = set()
    for number in range(count):
        try:
            assert get(tier, number_name(number)) == noise(PAGE, number)
            hits.add(number)
        except ChunkMissing:
            assert tier.exists(FOLDER, [number_name(number)]) == [False]
    return hits


# ----------------------------------------------------------------------------------------------------------- placement


def test_one_directory_is_the_plain_tier(tmp_path: Path) -> None:
    tier = open_directories([str(tmp_path / "new" / "kv")])
    assert type(tier) is DirectoryTier
    assert not (tmp_path / "new" / "kv" / ID_FILE).exists()
    tier.close()


def test_chunks_are_spread_and_lie_once(make: Make, paths: list[str]) -> None:
    fill(make(), 600)
    counts = Counter(where(paths).values())
    assert sum(counts.values()) == 600
    # Three standard deviations of a fair share.
    assert all(abs(count - 200) < 3 * (600 * 1 / 3 * 2 / 3) ** 0.5 for count in counts.values()), counts


def test_variants_of_one_block_lie_together(make: Make, paths: list[str]) -> None:
    tier = make()
    for prompt in range(20):
        names = [variant(count, str(prompt)) for count in (2, 3, 5)]
        for name in names:
            put(tier, name, noise(PAGE))
        assert len({where(paths)[name.text] for name in names}) == 1
        assert set(tier.variants(FOLDER, chain_hash(0, str(prompt))[:16], 0, SHARD.text)) == set(names)


def test_neither_the_order_of_the_paths_nor_where_they_are_mounted_matters(
    make: Make, paths: list[str], tmp_path: Path
) -> None:
    fill(make())
    assert found(make(*paths[::-1])) == set(range(COUNT))
    moved = [str(tmp_path / f"other{number}") for number in (2, 0, 1)]
    for old, new in zip(paths, moved, strict=True):
        os.rename(old, new)
    tier = make(*moved)
    before = where(moved)
    assert found(tier) == set(range(COUNT))
    fill(tier)
    assert where(moved) == before, "nothing is stored twice"


def test_a_drive_more_moves_only_its_own_share(make: Make, paths: list[str]) -> None:
    fill(make(*paths[:2]))
    before = where(paths)
    tier = make()
    # What has the new drive as its home is found at the runner-up, which is where it was before.
    assert found(tier) == set(range(COUNT))
    for number in range(COUNT):
        put(tier, number_name(number), noise(PAGE, number), replace=True)
    after = {path.name: str(path.parents[2]) for path in Path(paths[2]).rglob("*.kv")}
    assert 0.2 * COUNT < len(after) < 0.5 * COUNT
    stay = {name: path for name, path in before.items() if name not in after}
    assert {name: path for name, path in where(paths).items() if name in stay} == stay


def test_ids_are_made_once_whoever_is_first(paths: list[str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        seeds = set(threads.map(lambda _: drive_seed(paths[0], may_write=True), range(16)))
    assert len(seeds) == 1
    assert [path.name for path in Path(paths[0]).iterdir()] == [ID_FILE]
    assert (Path(paths[0]) / ID_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"x" * 32, b"0" * 31, b"0" * 33, b"\xff" * 32])
def test_a_damaged_id_is_made_anew(paths: list[str], content: bytes) -> None:
    (Path(paths[0]) / ID_FILE).write_bytes(content)
    seed = drive_seed(paths[0], may_write=True)
    assert seed == drive_seed(paths[0], may_write=False)
    assert len((Path(paths[0]) / ID_FILE).read_bytes()) == 32
    assert not list(Path(paths[0]).glob(".tmp-*"))


def test_an_id_that_cannot_be_kept_is_the_path(paths: list[str]) -> None:
    assert drive_seed(paths[0], may_write=False) == drive_seed(paths[0] + "/.", may_write=False)
    assert drive_seed(paths[0], may_write=False) != drive_seed(paths[1], may_write=False)
    assert not list(Path(paths[0]).iterdir())


def test_one_drive_named_twice_is_refused(make: Make, paths: list[str], tmp_path: Path) -> None:
    make()
    with pytest.raises(TierUnavailable, match="one drive, or a copy"):
        open_directories([paths[0], paths[0]])
    shutil.copytree(paths[0], tmp_path / "copy")
    with pytest.raises(TierUnavailable, match="one drive, or a copy"):
        open_directories([paths[0], str(tmp_path / "copy")])


# ------------------------------------------------------------------------------------------------------ a drive is lost


def test_a_lost_drive_costs_its_share_and_no_other(make: Make, paths: list[str], tmp_path: Path) -> None:
    fill(make())
    lost = {number for number in range(COUNT) if where(paths)[number_name(number).text] == paths[1]}
    os.rename(paths[1], tmp_path / "gone")
    tier = make()
    assert "LOST" in tier.mode_report.reason and paths[1] in tier.mode_report.reason
    assert not Path(paths[1]).exists(), "nothing is written where a drive is not mounted"
    assert found(tier) == set(range(COUNT)) - lost
    fill(tier)
    assert found(tier) == set(range(COUNT))
    # It comes back: what it held is found, and what was stored meanwhile too.
    os.rename(tmp_path / "gone", paths[1])
    (tier_again := make()).scan()
    assert found(tier_again) == set(range(COUNT))


def test_all_drives_lost_is_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match=r"no directory can be used: .*first.*by hand.*second"):
        open_directories([str(tmp_path / "first"), str(tmp_path / "second")])


def break_stores(monkeypatch: pytest.MonkeyPatch, path: str, code: int) -> None:
    """A drive that is mounted read-only, or fails, under our feet."""
    real = DirectoryTier._publish

    def publish(self: DirectoryTier, *rest: object) -> int:
        if str(self.root) == path:
            raise TierUnavailable(os.strerror(code))
        return real(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectoryTier, "_publish", publish)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
def test_a_drive_that_takes_no_stores_is_read_and_others_take_its_share(
    make: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tier = make()
    fill(tier, COUNT // 2)
    with monkeypatch.context() as broken:
        break_stores(broken, paths[0], code)
        fill(tier)
        assert found(tier) == set(range(COUNT))
        # Others, that never store, find it as well.
        assert found(make(read_only=True)) == set(range(COUNT))
        here = Counter(where(paths).values())
        assert here[paths[0]] < COUNT / 3
    later = time.monotonic() + striped.DRIVE_DOWN_S + 1
    monkeypatch.setattr(striped.time, "monotonic", lambda: later)
    assert found(tier) == set(range(COUNT))
    for number in range(COUNT, 2 * COUNT):
        put(tier, number_name(number), noise(PAGE, number))
    assert Counter(where(paths).values())[paths[0]] > here[paths[0]], "it is tried again"


def test_an_ill_drive_is_left_alone_for_a_while(make: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    break_stores(monkeypatch, paths[0], errno.EROFS)
    tries: list[object] = []
    real = DirectoryTier.put

    def counting(self: DirectoryTier, *rest: object, **options: object) -> object:
        if str(self.root) == paths[0]:
            tries.append(rest)
        return real(self, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectoryTier, "put", counting)
    fill(tier)
    assert len(tries) == 1


def test_an_overdue_write_is_told_and_not_tried_elsewhere(
    make: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who hears of success would give the memory to others, while the hung drive still reads from it."""
    tier = make(*paths)
    home = tier._by_score(number_name(0).first)[0]

    def overdue(*_: object, **__: object) -> None:
        raise TransferOverdue("it hangs", lambda: False)

    monkeypatch.setattr(home.tier, "put", overdue)
    with pytest.raises(TransferOverdue):
        put(tier, number_name(0), noise(PAGE))
    assert where(paths) == {}
    assert home.ill
    put(tier, number_name(0), noise(PAGE))
    assert found(tier, 1) == {0}


def test_what_was_replaced_elsewhere_is_found_before_the_old(
    make: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    fill(tier, 30)
    ill = where(paths)[number_name(0).text]
    break_stores(monkeypatch, ill, errno.EROFS)
    put(tier, number_name(0), noise(PAGE, 99), replace=True)
    assert get(tier, number_name(0)) == noise(PAGE, 99)
    assert tier.remove(FOLDER, number_name(0))
    assert tier.exists(FOLDER, [number_name(0)]) == [False]


def test_no_drive_takes_stores(make: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    fill(tier)
    monkeypatch.setattr(DirectoryTier, "_publish", lambda *_: (_ for _ in ()).throw(TierUnavailable("broken")))
    for _ in range(3):
        with pytest.raises(TierUnavailable):
            put(tier, number_name(COUNT), noise(PAGE))
    assert found(tier) == set(range(COUNT))


def test_a_full_drive_sheds_its_share_only(make: Make, paths: list[str]) -> None:
    tier = make(capacity_bytes=10 * PAGE)
    shed = 0
    for number in range(COUNT):
        try:
            put(tier, number_name(number), noise(PAGE, number))
        except TierFull:
            shed += 1
    assert Counter(where(paths).values()) == dict.fromkeys(paths, 10)
    assert shed == COUNT - 30
    assert tier.used_bytes() == 30 * PAGE


def test_each_directory_has_a_keeper(make: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_engines.offload.keeping.EVICT_PAUSE_S", 0.01)
    tier = make(capacity_bytes=10 * PAGE)
    keepers = start_keepers(tier)
    deadline = time.monotonic() + 30
    for number in range(COUNT):
        while True:
            try:
                put(tier, number_name(number), noise(PAGE, number))
                break
            except TierFull:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    for keeper in keepers:
        keeper.stop()
    assert len(keepers) == 3


@pytest.fixture
def read_only_mount(paths: list[str]) -> Iterator[str]:
    """One of the directories, mounted read-only over itself."""
    path = paths[1]
    try:
        subprocess.run(["mount", "--bind", path, path], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount here; what follows from a read-only drive is tested by injection above")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_drive_that_is_read_only_from_the_start(make: Make, paths: list[str], request: pytest.FixtureRequest) -> None:
    writer = make()
    fill(writer, COUNT // 2)
    request.getfixturevalue("read_only_mount")
    tier = make()
    assert [str(directory.root) for directory in tier.directories] == [paths[0], paths[2]]
    fill(tier)
    assert found(tier) == set(range(COUNT))
    assert tier.remove(FOLDER, number_name(COUNT - 1))
    tier.scan()


# ------------------------------------------------------------------------------------------------------- as a service


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_service_over_several_directories(mode: str, paths: list[str]) -> None:
    fix_ids(paths)
    client = started(setup_for(Path(",".join(paths)), [POOL]), mode)
    prompts = [chain(BLOCKS_PER_CHUNK, f"{mode}{number}") for number in range(12)]
    for hashes in prompts:
        assert store(client, make_store(POOL, hashes, range(BLOCKS_PER_CHUNK))) == ("stored",)
    assert set(where(paths).values()) == set(paths)
    assert "striped(" in client.ready.tier_name
    for hashes in prompts:
        assert load(client, make_run(POOL, hashes, range(8, 8 + BLOCKS_PER_CHUNK))).kinds == ("",)
    client.close()
    shutil.rmtree(paths[0])
    client = started(setup_for(Path(",".join(paths)), [POOL]), mode)
    kinds = [load(client, make_run(POOL, hashes, range(8, 8 + BLOCKS_PER_CHUNK))).kinds[0] for hashes in prompts]
    assert set(kinds) == {"", "missing"}
    assert "LOST" in client.ready.mode_reason
    client.close()
