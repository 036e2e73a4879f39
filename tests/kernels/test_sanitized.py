"""AddressSanitizer and UBSan find nothing in the source, and a bad read that is put there is found."""

from __future__ import annotations

from pathlib import Path

from kernels.build import SOURCE
from tests.kernels.routes import build_host
from tests.kernels.sanitized import DONE, run_process


def test_nothing_is_found() -> None:
    done = run_process(build_host(sanitize=True))
    assert done.returncode == 0 and DONE in done.stdout, done.stderr[-3000:]
    assert "runtime error" not in done.stderr


def test_what_is_put_there_is_found(tmp_path: Path) -> None:
    """A read behind the argument struct, which no checker of the routes sees in plain C++."""
    changed = tmp_path / SOURCE.name
    ids = "(i64)args.ids[block]"
    changed.write_text(SOURCE.read_text().replace(ids, f"(&args.ids[447])[1] == 12345 ? 0 : {ids}"))
    done = run_process(build_host(changed, sanitize=True))
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr[-3000:]
    assert "buffer-overflow" in done.stderr
