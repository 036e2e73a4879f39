"""Processes that share a tier's directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.tier.directory import DirectoryTier
from tests.fast.samples import make_name, noise
from tests.fast.test_tiers import get

PAGE = ALIGN_BYTES

_WRITER = """
import sys
from memkv_engines.tier.directory import DirectoryTier
from tests.fast.samples import NAMESPACE, aligned, make_name, noise

tier = DirectoryTier(sys.argv[1], direct_io="off")
print("ready", flush=True)
sys.stdin.readline()
for step in range(40):
    name = make_name(4, str(step % 4))
    tier.put(NAMESPACE.folder, name, [aligned(noise(64 * 4096, step % 4))], replace=step % 3 > 0)
    with tier.open(NAMESPACE.folder, name) as reader:
        view = aligned(bytes(64 * 4096))
        reader.read([view], 0)
        assert view == noise(64 * 4096, step % 4)
print("done", flush=True)
"""


def test_processes_put_the_same_chunks_at_once(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path / "kv")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    results = [writer.communicate("go\n", timeout=60)[0] for writer in writers]
    assert results == ["done\n", "done\n"]
    tier = DirectoryTier(tmp_path / "kv", direct_io="off")
    assert {get(tier, make_name(4, str(i))) == noise(64 * PAGE, i) for i in range(4)} == {True}
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 4
    tier.close()
