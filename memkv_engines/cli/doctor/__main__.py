"""``python -m memkv_engines.cli.doctor [PATH] [--json]``: the doctor where the command is not installed."""

from __future__ import annotations

import sys

from memkv_engines.cli.doctor import run

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--json"]
    sys.exit(run(words[0] if words else "", as_json="--json" in sys.argv))
