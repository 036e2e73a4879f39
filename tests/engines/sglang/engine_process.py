"""One SGLang engine, driven by lines of JSON; `engines.py` starts it.

    python -m tests.engines.sglang.engine_process

The first line on standard input holds the engine's arguments, every further one an order: `{"do": "generate", ...}` or
`{"do": "flush"}`. Each is answered by a line on what was standard output; what SGLang itself prints there goes to
standard error. The engine ends with standard input, and with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any

from benchmarks import restore_timers

PR_SET_PDEATHSIG = 1

# SGLang's processes are spawned and import this module first.
restore_timers.install_if_wanted()


def generate(engine: Any, input_ids: list[int], sampling: dict[str, Any], salt: str = "") -> dict[str, Any]:
    """Answers one prompt."""
    salted = {"cache_salt": salt} if salt else {}
    result = engine.generate(input_ids=input_ids, sampling_params=sampling, return_logprob=True, **salted)
    told = result["meta_info"]
    return {
        "tokens": result["output_ids"],
        "logprobs": [entry[0] for entry in told["output_token_logprobs"]],
        "cached": told["cached_tokens"],
        "details": told.get("cached_tokens_details") or {},
    }


def flush(engine: Any) -> dict[str, Any]:
    """Empties device and host pool; SGLang refuses while anything is still being copied or stored."""
    return {"success": bool(engine.flush_cache().success)}


ORDERS = {"generate": generate, "flush": flush}


def answered(order: Any, *arguments: Any, **more: Any) -> dict[str, Any]:
    """Returns what an order returns, or its traceback under `error`."""
    try:
        answer: dict[str, Any] = order(*arguments, **more)
        return answer
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    """Starts the engine and answers until standard input ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A forked process gets its variables after this module was imported; what it forks inherits the timers.
    restore_timers.install_if_wanted()
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        # A forked process that outlives this one would keep it from being seen as ended.
        os.register_at_fork(after_in_child=answers.close)
        arguments = json.loads(sys.stdin.readline())
        from sglang import Engine

        with Engine(**arguments) as engine:
            answers.write(json.dumps({"ready": True}) + "\n")
            for line in sys.stdin:
                order = json.loads(line)
                answers.write(json.dumps(answered(ORDERS[order.pop("do")], engine, **order)) + "\n")


if __name__ == "__main__":
    main()
