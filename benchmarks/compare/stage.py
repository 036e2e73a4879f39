"""One engine's contestants, from their start to their end, in that engine's environment.

    python -m benchmarks.compare.stage vllm --profile tiny --dtype float32 --minutes 10 \
        --output build/compare/vllm.json --folder build

Started by `benchmarks.compare`; writes its JSON as it goes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness
from benchmarks.compare.driver import Clock, Driver, Say
from benchmarks.compare.names import (
    CONVERSATIONS,
    DOCUMENTS,
    LMCACHE_FS,
    LMCACHE_MEMKV,
    MEMKV,
    MEMKV_MEMORY,
    NATIVE,
    NO_CACHE,
    NO_STORAGE,
    PREFIX_CACHE,
    RAG,
    REPETITION,
    RESUMED,
    SGLANG_SIDES,
    THROTTLED,
    VLLM_SIDES,
)
from benchmarks.compare.plan import (
    NEEDED_ROUNDS,
    PROFILES,
    RANDOM_335M,
    PrefixRepetition,
    Profile,
    Rag,
    answer_timeout_s,
    in_dtype,
)
from benchmarks.compare.prompts import Corpus, prefix_repetition, rag
from benchmarks.compare.record import Record
from benchmarks.compare.side import Side
from benchmarks.harness import Progress
from tests.environments.engine_env import ROOT

LOGS = ROOT / "build" / "logs"
WARM_UP_TOKENS = 256
# Rounds with a name of their own, so that no visit of these is taken for one of the others.
FIRST_GATE_ROUND = 101
PACKAGES = ("vllm", "sglang", "torch", "transformers")


Make = Callable[[], Side]


@dataclass(frozen=True)
class Run:
    """What goes with a run of a stage.

    Attributes:
        record: Where notes go.
        clock: When to leave out what can be left out.
        say: Told how it goes.
        late_sides: Sides that start when others are done, and what starts them.
    """

    record: Record
    clock: Clock
    say: Say
    late_sides: tuple[tuple[str, Make], ...] = ()

    def is_late(self, what: str) -> bool:
        """Tells whether the time is up, and notes what is left out for it."""
        late = self.clock.is_late()
        if late:
            self.record.note(f"out of time: without {what}")
        return late


def vllm_makers(profile: Profile, model: Path, scratch: Path) -> dict[str, Make]:
    """Returns what starts vLLM's contestants."""
    from benchmarks.compare import vllm_sides as sides
    from benchmarks.engine_run import EngineSpec

    environment = {"PYTHONPATH": str(ROOT)}
    if profile.light:
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}

    def spec(*, prefix_caching: bool = True) -> EngineSpec:
        return EngineSpec(
            str(model),
            profile.dtype,
            threads=",".join(map(str, sorted(os.sched_getaffinity(0)))),
            arguments={
                "max_model_len": profile.max_model_len,
                "block_size": profile.block_size,
                "kv_cache_memory_bytes": profile.kv_bytes,
                "max_num_batched_tokens": 8192,
                "enable_prefix_caching": prefix_caching,
            },
            environment=environment,
            answer_timeout_s=answer_timeout_s(profile),
        )

    def folder(name: str) -> Path:
        made = scratch / file_name(name)
        made.mkdir(exist_ok=True)
        return made

    def lmcache(name: str, adapter_of: Callable[[Path], dict[str, Any]]) -> Side:
        return sides.LMCacheSide(name, spec(), adapter_of(folder(name)), folder(name), log_of(name), dram_bytes)

    # A light engine may recompute a short prompt faster than a busy machine loads it; there, loading is what is tested.
    ours: dict[str, Any] = {"cost_gate": "off" if profile.light else "on", "staging_bytes": profile.staging_bytes}
    dram_bytes = profile.dram_tier_bytes
    makers = {
        NO_CACHE: lambda: sides.VllmSide(NO_CACHE, spec(prefix_caching=False), None, log_of(NO_CACHE)),
        PREFIX_CACHE: lambda: sides.VllmSide(PREFIX_CACHE, spec(), None, log_of(PREFIX_CACHE)),
        NATIVE: lambda: sides.NativeSide(spec(), folder(NATIVE), log_of(NATIVE), dram_bytes),
        LMCACHE_FS: lambda: lmcache(LMCACHE_FS, sides.fs_adapter),
        LMCACHE_MEMKV: lambda: lmcache(LMCACHE_MEMKV, sides.memkv_adapter),
        MEMKV: lambda: sides.MemKVSide(MEMKV, spec(), folder(MEMKV), log_of(MEMKV), **ours),
        MEMKV_MEMORY: lambda: sides.MemorySide(
            spec(),
            folder(MEMKV_MEMORY),
            log_of(MEMKV_MEMORY),
            dram_bytes,
            # It is not asked for what takes more.
            **{**ours, "staging_bytes": profile.staging_bytes // 2},
        ),
        THROTTLED: lambda: sides.ThrottledSide(spec(), folder(MEMKV), log_of(THROTTLED), **ours),
    }
    # LMCache's servers must be up before their engines can start: they go first.
    first = [LMCACHE_FS, LMCACHE_MEMKV]
    order = [*first, *(name for name in makers if name not in first)]
    return {name: makers[name] for name in order}


def sglang_makers(profile: Profile, scratch: Path) -> dict[str, Make]:
    """Returns what starts SGLang's contestants."""
    from benchmarks.compare import sglang_sides as sides

    arguments = {
        "dtype": "float32" if profile.light else profile.dtype,
        "page_size": 16 if profile.light else 64,
        "max_total_tokens": profile.sglang_pool_tokens,
        "context_length": 2048 if profile.light else 8192,
        "hicache_ratio": 2.0,
        "disable_overlap_schedule": profile.light,
        # An idle engine must leave the cores to the one that works.
        "sleep_on_idle": True,
    }

    def make(name: str) -> Side:
        folder = None if name == NO_STORAGE else scratch / file_name(name)
        if folder:
            folder.mkdir()
        kind = "tiny-sg-llama" if profile.light else profile.model
        return sides.SglangSide(name, kind, arguments, folder, log_of(name), light=profile.light)

    return {name: partial(make, name) for name in SGLANG_SIDES}


def file_name(name: str) -> str:
    """Returns a contestant's name without what file names had better not hold."""
    return name.replace(",", "").replace(" ", "-")


def log_of(name: str) -> Path:
    """Returns where a contestant's output goes."""
    return LOGS / f"compare-{file_name(name)}.log"


def run_vllm(driver: Driver, profile: Profile, corpus: Corpus, run: Run) -> None:
    """The profile's workloads in vLLM; all but documents begin with nothing in memory."""
    driver.start([corpus.take(min(WARM_UP_TOKENS, profile.max_model_len // 2)) for _ in VLLM_SIDES])
    documents = documents_of(profile, corpus)
    if documents:
        documents_twice(driver, profile, documents, run)
    if CONVERSATIONS in profile.workloads:
        driver.forget_all()
        run.say(CONVERSATIONS)
        driver.conversations(profile.conversations, corpus, cold=False)
        run.say(RESUMED)
        driver.resume(profile.conversations, corpus)
    if RAG in profile.workloads:
        driver.forget_all()
        run.say(RAG)
        driver.requests(RAG, rag_prompts(profile.rag, corpus), profile.rag.together, profile.rag.answer_tokens)
    if REPETITION in profile.workloads:
        driver.forget_all()
        run.say(REPETITION)
        one = profile.prefix_repetition
        driver.requests(REPETITION, repetition_prompts(one, corpus), one.together, one.answer_tokens)
    if documents:
        hits_against_recomputing(driver, profile, documents, corpus, run)


def documents_of(profile: Profile, corpus: Corpus) -> dict[str, list[int]]:
    """Returns the profile's documents by what they are called; none where they are left out."""
    lengths = profile.documents.lengths if DOCUMENTS in profile.workloads else ()
    return {f"document {number}, {length} tokens": corpus.take(length) for number, length in enumerate(lengths, 1)}


def documents_twice(driver: Driver, profile: Profile, documents: Mapping[str, Sequence[int]], run: Run) -> None:
    """First visits, second visits, and more restores of the longest."""
    plan = profile.documents
    longest = {unit: prompt for unit, prompt in documents.items() if len(prompt) == plan.longest}
    run.say("documents: first visits")
    driver.documents_first(documents, plan, MEMKV, profile.block_size)
    run.say("documents: second visits")
    # The other side that recomputes is asked beside hits, further down.
    driver.documents_again(documents, plan, 1, [name for name in driver.asked_for_documents() if name != PREFIX_CACHE])
    for number in range(2, plan.restores + 1):
        if number > NEEDED_ROUNDS and run.is_late(f"documents: restores from round {number} on"):
            break
        run.say(f"documents: round {number} of restores")
        driver.documents_again(longest, plan, number, driver.storing())


def hits_against_recomputing(
    driver: Driver, profile: Profile, documents: Mapping[str, Sequence[int]], corpus: Corpus, run: Run
) -> None:
    """Hits on documents of every length in turns with recomputing them, from a fast tier and from a slow one.

    The slow one comes late, in place of sides that are done: what all need at once is the most memory there is.
    """
    plan = profile.documents
    if run.late_sides:
        # They have been asked for everything.
        driver.retire([NO_CACHE, LMCACHE_MEMKV, MEMKV_MEMORY])
    for name, make in run.late_sides:
        run.say("the slow tier's engine starts")
        # Its cost gate knows what prefill costs from prompts that it computes first.
        lengths = sorted(set(plan.lengths))[:-1] or plan.lengths
        driver.join(name, make, [corpus.take(length) for length in lengths])
    sides = [PREFIX_CACHE, MEMKV, THROTTLED]
    for number in range(plan.gate_rounds):
        if number >= NEEDED_ROUNDS and run.is_late(f"documents: hits against recomputing from round {number + 1} on"):
            break
        run.say(f"documents: round {number + 1} of hits against recomputing")
        # Recomputing the longest takes longest, and there the answer is clearest.
        asked = documents if number < NEEDED_ROUNDS else {u: p for u, p in documents.items() if len(p) < plan.longest}
        driver.documents_again(asked, plan, FIRST_GATE_ROUND + number, sides, local_hits=False)


def rag_prompts(one: Rag, corpus: Corpus) -> list[list[int]]:
    """Returns prompts of a system prompt and some of its passages."""
    return rag(
        corpus,
        system_tokens=one.system_tokens,
        passages=one.passages,
        passage_tokens=one.passage_tokens,
        per_request=one.per_request,
        question_tokens=one.question_tokens,
        requests=one.requests,
    )


def repetition_prompts(one: PrefixRepetition, corpus: Corpus) -> list[list[int]]:
    """Returns prompts of a few prefixes, each with many suffixes."""
    return prefix_repetition(
        corpus.vocabulary,
        prefixes=one.prefixes,
        prefix_tokens=one.prefix_tokens,
        suffix_tokens=one.suffix_tokens,
        prompts=one.prompts,
    )


def run_sglang(driver: Driver, profile: Profile, corpus: Corpus, say: Say) -> None:
    """Conversations in SGLang."""
    driver.start([corpus.take(WARM_UP_TOKENS) for _ in SGLANG_SIDES])
    say("conversations")
    driver.conversations(profile.sglang, corpus, cold=True)


def run_set(stage: str, driver: Driver, makers: Mapping[str, Make], profile: Profile, corpus: Corpus, run: Run) -> None:
    """Everything with one set of processes, which are ended whatever becomes of it; who has failed before is out."""
    sides = run.record.body["sides"]
    try:
        driver.add({name: make for name, make in makers.items() if sides.get(name, {}).get("status") != "failed"})
        if stage == "vllm":
            run_vllm(driver, profile, corpus, run)
        else:
            run_sglang(driver, profile, corpus, run.say)
        driver.finish()
    finally:
        driver.close()


def empty(folder: Path) -> None:
    """Removes what is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True)


def model_of(stage: str, profile: Profile) -> Path:
    """Returns the model's folder, built where it is not there."""
    if stage == "sglang":
        from tests.environments.sglang_models import ensure_model as ensure_sglang_model

        return ensure_sglang_model("tiny-sg-llama" if profile.light else profile.model)
    if profile.model == RANDOM_335M:
        from benchmarks.compare.long_model import ensure_long_model

        return ensure_long_model()
    from tests.environments.models import ensure_model

    return ensure_model(profile.model)


def versions() -> dict[str, str]:
    """Returns the versions of what takes part, as far as this environment or LMCache's has it."""
    found = {}
    for folder in (ROOT / ".venvs" / "lmcache").glob("lib/python*/site-packages/lmcache-*.dist-info"):
        found["lmcache"] = folder.name.removeprefix("lmcache-").removesuffix(".dist-info")
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a stage; returns 0 when no side failed."""
    # Whoever ends this with SIGTERM ends the engines too, and nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("vllm", "sglang"))
    parser.add_argument("--profile", choices=PROFILES, default="default")
    parser.add_argument("--dtype", choices=cpu_dtype.DTYPES, required=True)
    parser.add_argument("--sides", type=lambda text: text.split(";"), help="names, separated by semicolons")
    parser.add_argument("--minutes", type=float, required=True, help="when to leave out further rounds")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the sides store; emptied afterwards")
    parsed = parser.parse_args(arguments)
    profile, is_vllm = in_dtype(PROFILES[parsed.profile], parsed.dtype), parsed.stage == "vllm"
    names = parsed.sides or (profile.vllm_sides if is_vllm else SGLANG_SIDES)
    LOGS.mkdir(parents=True, exist_ok=True)
    parsed.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="compare-", dir=parsed.folder))
    say = Progress()
    ticks = harness.cpu_ticks()
    environment = {
        **harness.environment(scratch), "versions": versions(), "page_costs_us": harness.page_costs_us()
    }  # fmt: skip
    head = {"stage": parsed.stage, "asked": names, "profile": asdict(profile), "environment": environment}
    record = Record(parsed.output, head)
    try:
        model = model_of(parsed.stage, profile)
        makers = vllm_makers(profile, model, scratch) if is_vllm else sglang_makers(profile, scratch)
        clock, corpus = Clock(parsed.minutes), Corpus(model)
        late = {name: makers[name] for name in names if name == THROTTLED}
        run = Run(record, clock, say, tuple(late.items()))
        started = {name: make for name, make in makers.items() if name in names and name != THROTTLED}
        for number in range(1, (profile.process_sets if is_vllm else 1) + 1):
            if number > 1 and run.is_late(f"sets of processes from {number} on"):
                break
            run_set(parsed.stage, Driver(record, clock, say, number), started, profile, corpus, run)
            empty(scratch)
        record.body["environment"]["stolen_share"] = harness.stolen_share(ticks, harness.cpu_ticks())
        record.body["complete"] = True
    finally:
        record.save()
        shutil.rmtree(scratch, ignore_errors=True)
    failed = [name for name, side in record.body["sides"].items() if side["status"] == "failed"]
    for name in failed:
        print(f"FAILED: {name}: {record.body['sides'][name]['error'].splitlines()[0]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
