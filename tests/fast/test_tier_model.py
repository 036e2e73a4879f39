"""Whatever is done to a directory tier, in whatever order, it answers as a dictionary would."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memkv_engines.errors import ChunkError, MemKVError
from memkv_engines.keys import ChunkName
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.tier import directory
from memkv_engines.tier.base import ChunkReader, Tier
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.memory import MemoryTier
from memkv_engines.transports.posix import BUFFERED, ModeReport
from tests.fast.samples import NAMESPACE, aligned, noise
from tests.fast.test_tiers import variant

FOLDERS = [NAMESPACE.folder, NAMESPACE.derive(adapter="x").folder]
NAMES = [variant(count, prompt) for prompt in "ab" for count in (2, 3, 4)]
folders = st.sampled_from(FOLDERS)
names = st.sampled_from(NAMES)


def outcome(action: object, *arguments: object, **options: object) -> object:
    """What an action returns, or the kind of error it raises."""
    assert callable(action)
    try:
        return action(*arguments, **options)
    except MemKVError as error:
        return type(error)


def read_all(reader: ChunkReader) -> bytes:
    view = aligned(bytes(reader.object_bytes))
    reader.read([view], 0)
    return bytes(view)


class TierMachine(RuleBasedStateMachine):
    """Does everything to both tiers and compares every answer."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self.real: Tier = self._open()
        self.model = MemoryTier()
        self.readers: list[tuple[ChunkReader, ChunkReader]] = []

    def _open(self) -> DirectoryTier:
        # Timing the device at every start would be nearly all this test does.
        with mock.patch.object(directory, "probe_modes", lambda *_: ModeReport(BUFFERED, "not probed", {}, {})):
            return DirectoryTier(Path(self._scratch.name) / "kv")

    def both(self, method: str, *arguments: object, **options: object) -> None:
        real = outcome(getattr(self.real, method), *arguments, **options)
        assert real == outcome(getattr(self.model, method), *arguments, **options)

    @rule(folder=folders, name=names, pages=st.integers(1, 3), seed=st.integers(0, 9), replace=st.booleans())
    def put(self, folder: str, name: ChunkName, pages: int, seed: int, replace: bool) -> None:
        self.both("put", folder, name, [aligned(noise(pages * ALIGN_BYTES, seed))], replace=replace)

    @rule(folder=folders, name=names)
    def remove(self, folder: str, name: ChunkName) -> None:
        self.both("remove", folder, name)

    @rule(folder=folders, some=st.lists(names))
    def exists(self, folder: str, some: list[ChunkName]) -> None:
        self.both("exists", folder, some)

    @rule(folder=folders, name=names)
    def variants(self, folder: str, name: ChunkName) -> None:
        question = (folder, name.first, name.group, name.shard_text)
        assert set(self.real.variants(*question)) == set(self.model.variants(*question))

    @rule(folder=folders, name=names)
    def open(self, folder: str, name: ChunkName) -> None:
        real, model = outcome(self.real.open, folder, name), outcome(self.model.open, folder, name)
        if isinstance(model, ChunkReader):
            assert isinstance(real, ChunkReader)
            self.readers.append((real, model))
        else:
            assert real is model
            assert issubclass(real, ChunkError)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read_and_close(self, data: st.DataObject) -> None:
        real, model = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        assert read_all(real) == read_all(model)
        real.close()

    @rule()
    def scan(self) -> None:
        assert isinstance(self.real, DirectoryTier)
        assert self.real.scan() == self.model.used_bytes()

    @rule()
    def start_again(self) -> None:
        self.real.close()
        self.real = self._open()

    @rule(folder=st.sampled_from([NAMESPACE, NAMESPACE.derive(adapter="x")]))
    def write_manifest(self, folder: object) -> None:
        self.both("write_manifest", folder)

    @invariant()
    def the_same_objects(self) -> None:
        for folder in FOLDERS:
            assert set(self.real.names(folder)) == set(self.model.names(folder))

    @invariant()
    def the_same_size(self) -> None:
        assert self.real.used_bytes() in (None, self.model.used_bytes())

    def teardown(self) -> None:
        for real, _ in self.readers:
            real.close()
        self.real.close()
        self._scratch.cleanup()


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
