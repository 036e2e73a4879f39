"""Hostile inputs for everything that parses bytes: nothing but our own errors and misses, no hang, no flood of memory.

    .venvs/dev/bin/python -m tests.trust.hostile                                 # 1,000,000 inputs and more
    .venvs/dev/bin/python -m tests.trust.hostile --targets "chunk" --inputs 50000 --seed 9

What is tried is in `targets.py`. Where `atheris` can be imported (pip install atheris), libFuzzer mutates inputs,
guided by the coverage of this package; else this module does, guided by what came out. Every second input is repaired,
so that it passes the first checks. Each target runs in a process of its own, with a bound on the memory it may take (1
GiB) and on the time of an input (10 s).

Writes build/hostile.json; inputs that broke something are in build/hostile/. Exit status 0: so many inputs, no crash,
and some accepted by each target; 1: not so; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.environments.engine_env import ROOT
from tests.trust import report

CRASHES = report.BUILD / "hostile"
INPUT_TIMEOUT_S = 10
MEMORY_BYTES = 1 << 30
MAX_INPUT_BYTES = 1 << 15
MAX_KEPT = 2000
MAX_CRASHES_TOLD = 20
INTERESTING = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1)
WORDS = (b"\0" * 32, b"\xff" * 8, b"\n", b"- ", b"&a ", b"*a", b"1e999", b"-0", b"\xed\xa0\x80", b"9" * 50)
NESTS = (b"[" * 3000, b'{"a":' * 3000, b"[" * 60, b"- " * 800)


class Session:
    """What came of the inputs to one target.

    Args:
        name: of the target.
    """

    def __init__(self, name: str) -> None:
        # Not before atheris has begun to look at what is imported.
        from tests.trust.targets import TARGETS

        self.target = TARGETS[name]
        self.inputs = self.accepted = 0
        self.refused: Counter[str] = Counter()
        self.crashes: dict[str, dict[str, Any]] = {}
        self.slowest_s = 0.0
        self._memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def put(self, data: bytes) -> str:
        """Parse one input; what came out, in a few words."""
        self.inputs += 1
        started = time.perf_counter()
        try:
            outcome = "accepted " + self.target.parse(data)
            self.accepted += 1
        except self.target.errors as error:
            outcome = f"{type(error).__name__} {re.sub(r'[^a-z ]+', '', str(error))[:40]}"
            self.refused[type(error).__name__] += 1
        except Exception as error:
            outcome = self._crash(error, data)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
        return outcome

    def _crash(self, error: Exception, data: bytes) -> str:
        where = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        if key not in self.crashes and len(self.crashes) < MAX_CRASHES_TOLD:
            CRASHES.mkdir(parents=True, exist_ok=True)
            kept = CRASHES / re.sub(r"\W+", "-", f"{self.target.name} {key}")
            kept.write_bytes(data)
            own = [line for line in traceback.format_exception(error)[-4:]]
            self.crashes[key] = {"inputs": 0, "input": kept.name, "trace": "".join(own)[-1500:]}
        if key in self.crashes:
            self.crashes[key]["inputs"] += 1
        return key

    def report(self, engine: str) -> dict[str, Any]:
        """As a dictionary."""
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._memory
        return {
            "mutated_by": engine,
            "inputs": self.inputs,
            "accepted": self.accepted,
            "refused": dict(self.refused),
            "crashes": self.crashes,
            "slowest_s": round(self.slowest_s, 4),
            "memory_grown_mib": round(grown / 1024, 1),
        }


# ------------------------------------------------------------------------------------------------- mutated by ourselves


def mutated(data: bytes, other: bytes, choice: random.Random) -> bytes:
    """One to eight changes: bits, bytes, numbers, words, pieces cut out, repeated or taken from another input."""
    body = bytearray(data)
    for _ in range(choice.choice((1, 1, 2, 3, 8))):
        at = choice.randrange(len(body) + 1)
        kind = choice.randrange(7)
        if kind == 0 and at < len(body):
            body[at] ^= 1 << choice.randrange(8)
        elif kind == 1 and at < len(body):
            body[at] = choice.randrange(256)
        elif kind == 2:
            width = choice.choice((1, 2, 4, 8))
            number = choice.choice(INTERESTING) * choice.choice((1, 1, -1)) % (1 << 8 * width)
            body[at : at + width] = number.to_bytes(width, choice.choice(("little", "big")))  # type: ignore[arg-type]
        elif kind == 3:
            body[at:at] = choice.choice(NESTS if choice.random() < 0.02 else WORDS)
        elif kind == 4:
            del body[at : at + choice.choice((1, 4, 32, 512))]
        elif kind == 5:
            body[at:at] = body[at : at + choice.choice((1, 8, 64))] * choice.choice((1, 2, 20))
        else:
            start = choice.randrange(len(other) + 1)
            length = choice.choice((1, 8, 64, 512))
            body[at : at + length] = other[start : start + length]
    return bytes(body[:MAX_INPUT_BYTES])


def play_plain(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Mutate here. An input that leads to something new is mutated further."""
    session, choice = Session(name), random.Random(seed)
    kept = list(session.target.seeds)
    seen = {session.put(seed_input) for seed_input in kept}
    with _bounded_time():
        while session.inputs < inputs:
            data = mutated(choice.choice(kept), choice.choice(kept), choice)
            if choice.random() < 0.5:
                data = session.target.repair(data)
            signal.setitimer(signal.ITIMER_REAL, INPUT_TIMEOUT_S)
            outcome = session.put(data)
            if outcome not in seen and len(kept) < MAX_KEPT:
                seen.add(outcome)
                kept.append(data)
    return session.report("this module")


class _bounded_time:
    """An input that takes too long ends as a crash."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self._late)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _late(*_: object) -> None:
        raise TimeoutError(f"an input takes longer than {INPUT_TIMEOUT_S} s")


# --------------------------------------------------------------------------------------------------- mutated by atheris


def play_atheris(name: str, inputs: int, seed: int, answer: Path) -> None:
    """Let libFuzzer mutate; it ends this process."""
    import atheris

    with atheris.instrument_imports(include=["memkv_engines"]):
        session = Session(name)

    def mutate(data: bytes, max_bytes: int, number: int) -> bytes:
        data = atheris.Mutate(data, max_bytes)
        return session.target.repair(data)[:max_bytes] if number % 2 else data

    def one_input(data: bytes) -> None:
        session.put(data)
        if session.inputs % 1000 == 0 or session.inputs >= inputs:
            answer.write_text(json.dumps(session.report("atheris")))

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(session.target.seeds):
            Path(folder, str(number)).write_bytes(data)
        options = [f"-runs={inputs}", f"-seed={seed}", f"-timeout={INPUT_TIMEOUT_S}", f"-max_len={MAX_INPUT_BYTES}"]
        options += [
            f"-rss_limit_mb={MEMORY_BYTES >> 20}",
            f"-artifact_prefix={CRASHES}/",
            "-print_final_stats=0",
            folder,
        ]
        CRASHES.mkdir(parents=True, exist_ok=True)
        atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=mutate)
        atheris.Fuzz()


# ------------------------------------------------------------------------------------------------------------ processes


def play_target(name: str, inputs: int, seed: int, engine: str) -> dict[str, Any]:
    """Play a target in a process of its own; one that dies is a crash."""
    log = report.BUILD / "logs" / "hostile.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "tests.trust.hostile", "--play", name, str(answer)]
        command += ["--inputs", str(inputs), "--seed", str(seed), "--mutate-with", engine]
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if done.returncode or not found:
        found.setdefault("crashes", {})["the process"] = {
            "inputs": 1,
            "input": "",
            "trace": f"it ended with {done.returncode}; see {log.relative_to(ROOT)}",
        }
    return found


def bound_memory() -> None:
    """From here on this process may not take much more memory than it has (libFuzzer has a bound of its own)."""
    now_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + MEMORY_BYTES, -1))


def broken(name: str, found: dict[str, Any], wanted: int) -> list[str]:
    """What does not hold for a target."""
    told = [f"{name}: {key}, {crash['inputs']} inputs: {crash['trace']}" for key, crash in found["crashes"].items()]
    if found.get("inputs", 0) < wanted:
        told.append(f"{name}: {found.get('inputs', 0)} inputs instead of {wanted}")
    if not found.get("accepted"):
        told.append(f"{name}: nothing was accepted: it was never tried in depth")
    return told


def row_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The line of the table."""
    return {
        "target": name,
        "mutated by": found.get("mutated_by", ""),
        "inputs": found.get("inputs", 0),
        "accepted": found.get("accepted", 0),
        "refused": sum(found.get("refused", {}).values()),
        "crashes": len(found["crashes"]),
        "slowest [s]": found.get("slowest_s", 0.0),
        "memory grown [MiB]": found.get("memory_grown_mib", 0.0),
    }


def played(names: Sequence[str], inputs: int, seed: int, engine: str) -> dict[str, dict[str, Any]]:
    """All targets; the inputs are shared out."""
    from tests.trust.targets import TARGETS

    shares = {name: TARGETS[name].share for name in names}
    counts = {name: -(-int(inputs * share) // int(sum(shares.values()))) for name, share in shares.items()}
    found = {}
    with tqdm(total=sum(counts.values()), unit="input", unit_scale=True, disable=None) as progress:
        for name, count in counts.items():
            found[name] = {"wanted": count, **play_target(name, count, seed, engine)}
            progress.update(count)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, show, write."""
    parser = report.parser(__doc__ or "", "hostile.json")
    parser.add_argument("--inputs", type=int, default=1_200_000, help="of all targets together")
    parser.add_argument("--targets", nargs="+", metavar="TARGET", default=[])
    parser.add_argument("--mutate-with", choices=("auto", "atheris", "plain"), default="auto")
    parser.add_argument("--play", nargs=2, metavar=("TARGET", "ANSWER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    engine = options.mutate_with
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "plain"
    if options.play:
        name, answer = options.play[0], Path(options.play[1])
        if engine == "atheris":
            play_atheris(name, options.inputs, options.seed, answer)
        bound_memory()
        answer.write_text(json.dumps(play_plain(name, options.inputs, options.seed)))
        return 0
    from tests.trust.targets import TARGETS

    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown or options.inputs < 1:
        parser.error(f"--targets: choose from {', '.join(TARGETS)}" if unknown else "--inputs: give at least 1")
    found = played(options.targets or list(TARGETS), options.inputs, options.seed, engine)
    wrong = [line for name, target in found.items() for line in broken(name, target, target["wanted"])]
    total = sum(target.get("inputs", 0) for target in found.values())
    return report.conclude(
        options, {"inputs": total, "targets": found}, [row_of(*item) for item in found.items()], wrong
    )


if __name__ == "__main__":
    sys.exit(main())
