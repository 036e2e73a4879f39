"""AddressSanitizer and UBSan find nothing in the source, and do find what is put there."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.build import SOURCE
from tests.kernels.routes import build_host
from tests.kernels.sanitized import DONE, run_process


def test_nothing_is_found() -> None:
    done = run_process(build_host(sanitize=True))
    assert done.returncode == 0 and DONE in done.stdout, done.stderr[-3000:]
    assert "runtime error" not in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("(i64)args.ids[block]", "(&args.ids[447])[1] == 12345 ? 0 : (i64)args.ids[block]", "buffer-overflow"),
        ("1u << (piece.log2_access & 31u)", "1u << piece.log2_access", "shift exponent"),
    ],
)
def test_what_is_put_there_is_found(tmp_path: Path, old: str, new: str, finding: str) -> None:
    text = SOURCE.read_text()
    assert old in text
    changed = tmp_path / SOURCE.name
    changed.write_text(text.replace(old, new))
    done = run_process(build_host(changed, sanitize=True))
    assert done.returncode != 0 and finding in done.stderr, done.stderr[-3000:]
