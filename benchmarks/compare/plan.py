"""Profiles: which workloads, how long, how often, and how long that takes on a machine like the one it was made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import cpu_dtype
from benchmarks.compare.names import (
    CONVERSATIONS,
    DOCUMENTS,
    LMCACHE_FS,
    LMCACHE_MEMKV,
    MEMKV,
    MEMKV_MEMORY,
    NATIVE,
    NO_CACHE,
    PREFIX_CACHE,
    RAG,
    REPETITION,
    THROTTLED,
    VLLM_SIDES,
    WORKLOADS,
)

RANDOM_335M = "random-335m"
# Back of the envelope, two virtual cores, SmolLM2-135M in bfloat16: 0.9 s for 1,000 tokens and 13 s for 8,000.
_SECONDS_PER_TOKEN = 0.8e-3
_SECONDS_PER_TOKEN_SQUARED = 0.104e-6
# In float32 on cores that have AVX2 only: 3.0 s and 67 s. So does everything that is mostly prefill.
_FLOAT32_TIMES, _FLOAT32_STAGE_TIMES = 4.0, 1.6
# Of the larger model: 117 s for 8,000 tokens in float32.
_MODEL_TIMES = {RANDOM_335M: 2.3}
# A restored prompt, and what settling after every visit takes: vLLM polls for a second after its last message.
_RESTORE_S = 0.5
_SETTLE_S = 1.4
_VLLM_START_S = 28.0
# Proportional memory of vLLM's three processes without weights and KV, and of LMCache's server without its tier.
_VLLM_BYTES, _LMCACHE_SERVER_BYTES = 17 << 27, 3 << 27
_SGLANG_START_S = 35.0
_SGLANG_REQUEST_S = 0.6

# Of ours the two that the others are judged without, so that they can be measured on their own.
APART = (LMCACHE_MEMKV, MEMKV_MEMORY)

# Rounds of second visits that judgements cannot do without; the others wait until all workloads were run.
NEEDED_ROUNDS = 2
# Where restores are compared, a hit leaves one token to compute: more of them would only blur what restoring costs. One
# behind a block of vLLM's (128 tokens) and of LMCache's (256), so that both have the same hit.
LONGEST, LONGEST_OF_LONG = 31 * 256 + 1, 62 * 256 + 1


@dataclass(frozen=True)
class Documents:
    """Long-document question answering in two passes.

    Attributes:
        lengths: Tokens of each document, with its question.
        answer_tokens: Tokens generated for each.
        restores: Second visits to the longest documents, the first included; only by sides that store.
        gate_rounds: Further second visits by `memkv`, the slowed-down `memkv` and a side that recomputes: in the first
            two rounds to all documents, then to all but the longest.
    """

    lengths: tuple[int, ...]
    answer_tokens: int
    restores: int
    gate_rounds: int

    @property
    def longest(self) -> int:
        """The length at which restores are compared."""
        return max(self.lengths)


@dataclass(frozen=True)
class Conversations:
    """Conversations in turns that outgrow the KV pool.

    Attributes:
        count: How many take turns in a round.
        together: How many are asked at the same time.
        turns: Requests of each.
        document_tokens: Length of the first message.
        user_tokens: Length of each later message.
        answer_tokens: Tokens generated for each request.
        rounds: Repetitions with conversations of their own.
        recomputed_rounds: In how many of them sides without a tier take part: what they recompute takes most of the
            time, and they are told from the others in a few.
    """

    count: int
    together: int
    turns: int
    document_tokens: int
    user_tokens: int
    answer_tokens: int
    rounds: int
    recomputed_rounds: int = 2

    @property
    def longest(self) -> int:
        """Length of a conversation at its end."""
        return self.document_tokens + (self.turns - 1) * self.user_tokens + self.turns * self.answer_tokens


@dataclass(frozen=True)
class Rag:
    """A system prompt that all share, and passages."""

    system_tokens: int
    passages: int
    passage_tokens: int
    per_request: int
    question_tokens: int
    requests: int
    together: int
    answer_tokens: int

    @property
    def longest(self) -> int:
        """Length of a prompt."""
        return self.system_tokens + self.per_request * self.passage_tokens + self.question_tokens


@dataclass(frozen=True)
class PrefixRepetition:
    """As `vllm bench serve --dataset-name prefix_repetition`."""

    prefixes: int
    prefix_tokens: int
    suffix_tokens: int
    prompts: int
    together: int
    answer_tokens: int


@dataclass(frozen=True)
class Profile:
    """Everything that is run.

    Attributes:
        name: What `--profile` takes.
        model: A model's name.
        dtype: Of weights and KV.
        block_size: Tokens in a block of vLLM.
        kv_bytes: vLLM's KV pool.
        max_model_len: vLLM's longest prompt and answer.
        documents, conversations, rag, prefix_repetition: The workloads in vLLM.
        sglang: Conversations in SGLang, asked one at a time.
        sglang_pool_tokens: Its device pool; the host pool is twice that.
        vllm_minutes: Rounds that are not needed are left out when vLLM's stage has taken this long.
        sglang_minutes: The same for SGLang's stage.
        light: Engines in one process with one thread, that start in a third of the time.
        dram_tier_bytes: Memory that each peer in vLLM puts before its disk, and so does `memkv, memory`; `memkv` has
            none.
        staging_bytes: Memory through which ours passes.
        vllm_sides: Who takes part in vLLM's stage.
        apart: The profile in which `APART` take part where memory does not hold all sides at the same time.
        workloads: What vLLM's sides are asked for, of `WORKLOADS`.
        process_sets: How often vLLM's stage is run, each time with fresh processes.
        then: Further profiles that are run in vLLM after this one.
    """

    name: str
    model: str
    dtype: str
    block_size: int
    kv_bytes: int
    max_model_len: int
    documents: Documents
    conversations: Conversations
    rag: Rag
    prefix_repetition: PrefixRepetition
    sglang: Conversations
    sglang_pool_tokens: int
    vllm_minutes: float
    sglang_minutes: float
    light: bool = False
    dram_tier_bytes: int = 512 << 20
    staging_bytes: int = 256 << 20
    vllm_sides: tuple[str, ...] = VLLM_SIDES
    apart: str = ""
    workloads: tuple[str, ...] = WORKLOADS
    process_sets: int = 1
    then: tuple[str, ...] = ()


DEFAULT = Profile(
    name="default",
    model="smollm2",
    dtype="bfloat16",
    block_size=128,
    # One document of 8,000 tokens and a little.
    kv_bytes=224 << 20,
    max_model_len=8192,
    # 16 pairs of the longest.
    documents=Documents(lengths=(1000, 2000, 4000, LONGEST), answer_tokens=4, restores=16, gate_rounds=3),
    # Two at a time are a unit of what is judged: 16 units.
    conversations=Conversations(
        count=8, together=2, turns=4, document_tokens=1500, user_tokens=96, answer_tokens=16, rounds=4
    ),
    rag=Rag(
        system_tokens=512,
        passages=6,
        passage_tokens=480,
        per_request=3,
        question_tokens=48,
        requests=4,
        together=2,
        answer_tokens=16,
    ),
    prefix_repetition=PrefixRepetition(
        prefixes=4, prefix_tokens=1024, suffix_tokens=128, prompts=8, together=4, answer_tokens=16
    ),
    sglang=Conversations(count=4, together=1, turns=3, document_tokens=1500, user_tokens=96, answer_tokens=1, rounds=2),
    # One conversation and a little.
    sglang_pool_tokens=32 * 64,
    vllm_minutes=50.0,
    sglang_minutes=5.0,
    apart="other-sides",
)
FULL = replace(
    DEFAULT,
    name="full",
    documents=Documents(
        lengths=(1000, 1000, 2000, 2000, 4000, 4000, LONGEST, LONGEST, LONGEST),
        answer_tokens=4,
        restores=12,
        gate_rounds=10,
    ),
    conversations=replace(DEFAULT.conversations, document_tokens=3000),
    rag=replace(DEFAULT.rag, requests=18, passages=8),
    prefix_repetition=replace(DEFAULT.prefix_repetition, prefixes=8, prompts=32),
    sglang=replace(DEFAULT.sglang, document_tokens=3000, rounds=3),
    sglang_pool_tokens=60 * 64,
    vllm_minutes=150.0,
    sglang_minutes=40.0,
    then=("long",),
)
LONG = replace(
    DEFAULT,
    name="long",
    # Random weights, and 48 KiB of KV a token.
    model=RANDOM_335M,
    kv_bytes=850 << 20,
    max_model_len=16_640,
    documents=Documents(lengths=(LONGEST, LONGEST_OF_LONG), answer_tokens=4, restores=5, gate_rounds=4),
    vllm_minutes=60.0,
    dram_tier_bytes=1 << 30,
    # What fits into 23 GiB.
    vllm_sides=(PREFIX_CACHE, NATIVE, LMCACHE_FS, MEMKV),
    apart="",
    workloads=(DOCUMENTS,),
)
OTHER_SIDES = replace(
    DEFAULT,
    name="other-sides",
    documents=Documents(lengths=(LONGEST,), answer_tokens=4, restores=4, gate_rounds=0),
    conversations=replace(DEFAULT.conversations, recomputed_rounds=1),
    vllm_minutes=15.0,
    # `APART`, and whom they are held against.
    vllm_sides=(NO_CACHE, NATIVE, *APART),
    apart="",
)
# Where the best peer and ours are within a few percent of each other, as two processes are that do the same: 48 units
# of them and nothing else, four in each set of processes.
TALKS = replace(
    DEFAULT,
    name="conversations",
    conversations=replace(DEFAULT.conversations, rounds=1),
    workloads=(CONVERSATIONS,),
    process_sets=12,
    vllm_minutes=60.0,
    vllm_sides=(NATIVE, MEMKV, MEMKV_MEMORY),
    apart="",
)
TINY = Profile(
    name="tiny",
    model="smollm2",
    dtype="bfloat16",
    block_size=32,
    kv_bytes=16 << 20,
    max_model_len=640,
    documents=Documents(lengths=(300, 600), answer_tokens=2, restores=2, gate_rounds=1),
    conversations=Conversations(
        count=4, together=2, turns=2, document_tokens=300, user_tokens=32, answer_tokens=4, rounds=1
    ),
    rag=Rag(
        system_tokens=96,
        passages=3,
        passage_tokens=64,
        per_request=2,
        question_tokens=16,
        requests=2,
        together=2,
        answer_tokens=2,
    ),
    prefix_repetition=PrefixRepetition(
        prefixes=2, prefix_tokens=128, suffix_tokens=32, prompts=4, together=2, answer_tokens=2
    ),
    sglang=Conversations(count=3, together=1, turns=2, document_tokens=400, user_tokens=48, answer_tokens=1, rounds=1),
    sglang_pool_tokens=33 * 16,
    vllm_minutes=10.0,
    sglang_minutes=10.0,
    light=True,
)
# The others ask for a part of it, and their results do not take its place.
WHOLE = (DEFAULT.name, FULL.name)
PROFILES = {profile.name: profile for profile in (DEFAULT, FULL, LONG, TALKS, OTHER_SIDES, TINY)}


def in_dtype(profile: Profile, dtype: str) -> Profile:
    """Returns a profile of `PROFILES` with pools for as many tokens in another dtype, and the time that takes."""
    times = _FLOAT32_STAGE_TIMES if dtype == cpu_dtype.FLOAT32 and not profile.light else 1.0
    return replace(
        profile,
        dtype=dtype,
        vllm_minutes=times * profile.vllm_minutes,
        sglang_minutes=times * profile.sglang_minutes,
        kv_bytes=cpu_dtype.kv_bytes(profile.kv_bytes, dtype),
        dram_tier_bytes=cpu_dtype.kv_bytes(profile.dram_tier_bytes, dtype),
        staging_bytes=cpu_dtype.kv_bytes(profile.staging_bytes, dtype),
    )


@dataclass(frozen=True)
class Estimate:
    """One line of the plan: what, how many visits, and seconds."""

    what: str
    visits: int
    seconds: float


def prefill_s(profile: Profile, tokens: int) -> float:
    """Returns the seconds that computing a prompt takes, roughly."""
    times = _MODEL_TIMES.get(profile.model, 1.0) * (_FLOAT32_TIMES if profile.dtype == cpu_dtype.FLOAT32 else 1.0)
    return times * (_SECONDS_PER_TOKEN * tokens + _SECONDS_PER_TOKEN_SQUARED * tokens * tokens)


def answer_timeout_s(profile: Profile) -> float:
    """Returns when a side that has not answered counts as dead: what its longest prompt takes under any load."""
    return max(300.0, 5 * prefill_s(profile, profile.max_model_len))


def estimate_vllm(profile: Profile, sides: int, storing: int) -> list[Estimate]:
    """Returns what vLLM's stage takes.

    Args:
        profile: What is run.
        sides: All sides but the slowed-down one.
        storing: Those of them that store.
    """
    started = sides + (DOCUMENTS in profile.workloads)
    found = [
        Estimate("engines start", started, _VLLM_START_S * started),
        *(_documents(profile, sides, storing) if DOCUMENTS in profile.workloads else ()),
        *(_conversations(profile, sides, storing) if CONVERSATIONS in profile.workloads else ()),
        *(_requests(profile, sides, workload) for workload in (RAG, REPETITION) if workload in profile.workloads),
    ]
    return [Estimate(one.what, profile.process_sets * one.visits, profile.process_sets * one.seconds) for one in found]


def _documents(profile: Profile, sides: int, storing: int) -> list[Estimate]:
    plan, prefill = profile.documents, partial(prefill_s, profile)
    pass_s = sum(map(prefill, plan.lengths))
    short_s = sum(prefill(length) for length in plan.lengths if length != plan.longest)
    documents, longest = len(plan.lengths), sum(length == plan.longest for length in plan.lengths)
    recomputing, whole = sides - storing, min(NEEDED_ROUNDS, plan.gate_rounds)
    return [
        _line("documents, first visits", documents * sides, pass_s * sides),
        _line(
            "documents, second visits and local hits",
            documents * (recomputing - 1 + 2 * storing),
            pass_s * (recomputing - 1) + documents * storing * 2 * _RESTORE_S,
        ),
        _line(
            "more restores of the longest",
            (plan.restores - 1) * longest * storing * 2,
            (plan.restores - 1) * longest * storing * 2 * _RESTORE_S,
        ),
        _line(
            "hits against recomputing, a fast and a slow tier",
            3 * (documents * whole + (plan.gate_rounds - whole) * (documents - longest)),
            pass_s * whole + (plan.gate_rounds - whole) * short_s + 4 * _RESTORE_S * plan.gate_rounds * documents,
        ),
    ]


def _conversations(profile: Profile, sides: int, storing: int) -> list[Estimate]:
    talk, recomputing = profile.conversations, sides - storing
    groups, later = talk.rounds * talk.count // talk.together, talk.turns - 1
    talk_s, recomputed = prefill_s(profile, talk.longest), min(talk.rounds, talk.recomputed_rounds)
    turn_s = _RESTORE_S + prefill_s(profile, talk.user_tokens)
    return [
        _line(
            "conversations",
            talk.turns * (groups * storing + recomputed * recomputing * talk.count // talk.together),
            talk.count
            * (talk.rounds * storing * (talk_s + later * turn_s) + recomputed * recomputing * talk.turns * talk_s),
        ),
        _line("conversations resumed", groups * storing, talk.rounds * talk.count * storing * turn_s),
    ]


def _requests(profile: Profile, sides: int, workload: str) -> Estimate:
    if workload == RAG:
        rag = profile.rag
        return _line(
            "RAG", rag.requests // rag.together * sides, rag.requests * sides * prefill_s(profile, rag.longest)
        )
    one = profile.prefix_repetition
    return _line(
        "prefix repetition",
        one.prompts // one.together * sides,
        one.prompts * sides * prefill_s(profile, one.prefix_tokens + one.suffix_tokens),
    )


def vllm_memory_bytes(profile: Profile, sides: Sequence[str]) -> int:
    """Returns about how much memory vLLM's sides need while all of them live; the slowed-down one comes late."""
    total = 0
    for side in sides:
        if side == THROTTLED:
            continue
        # Weights are about as large as the pools of these profiles.
        total += _VLLM_BYTES + 2 * profile.kv_bytes
        total += profile.dram_tier_bytes if side in (NATIVE, LMCACHE_FS, LMCACHE_MEMKV, MEMKV_MEMORY) else 0
        total += _LMCACHE_SERVER_BYTES if side in (LMCACHE_FS, LMCACHE_MEMKV) else 0
    return total


def estimate_sglang(profile: Profile, sides: int) -> list[Estimate]:
    """Returns what SGLang's stage takes; one side of them stores nothing."""
    talk = profile.sglang
    visits = talk.rounds * talk.count * talk.turns * sides
    computed = talk.rounds * talk.count * (sides + talk.turns - 1) * prefill_s(profile, talk.longest)
    return [
        Estimate("engines start", sides, _SGLANG_START_S * sides),
        Estimate("conversations", visits, computed + visits * _SGLANG_REQUEST_S),
    ]


def _line(what: str, visits: int, seconds: float) -> Estimate:
    return Estimate(what, visits, seconds + visits * _SETTLE_S)
