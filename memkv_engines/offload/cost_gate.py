"""The cost gate: how much of a hit to load, so that a hit is never slower than recomputing.

A request of n tokens has c of them in the engine's memory, and the tier holds those up to h. With L(bytes) for loading
and P(a, b) for the prefill of [a, b) (``estimates``), loading up to k costs the request

    T(k) = L(bytes of [c, k)) + P(k, n)    for k > c,        T(c) = P(c, n)

What is best? L grows by the same amount with each token, while a token's prefill costs the more the later it is. So
T' falls as k grows, T is concave, and its least value is at an end: **all or nothing**. A load must be a prefix, and
the tokens worth most are the last ones; where a part is worth loading, all is worth more. P(h, n) is paid either way,
so the question is whether L([c, h)) <= P(c, h).

With two levels of different speed, memory and the tier behind it, the ends of each level's part are candidates, too. So
of a hit whose leading part lies in memory, [c, m), that part is judged for itself, and then the rest, [m, h), as a hit
that begins where memory ends. Memory in the middle of a hit only makes it cheaper.

What waits before the request is left out on both sides: without a tier, the same requests would wait for each other's
prefill, and where each load is no longer than the prefill it saves, neither is a queue of them. (Measured loads are
told from their waiting: ``LoadTicket.ahead_bytes``.)

It is the request's own time to the first token that is decided on. In vLLM a load runs beside the engine's steps and
costs hardly any time of the device, so for throughput even a slow load is a gain; we promise latency.

Exceptions, each bounded:

- *Not measured yet.* Without a measured load everything is loaded. As with every load, the I/O service stops reading
  when it turns out slower than the prefill it saves (``LoadTicket.stop_s``): the cost is the first chunks, which are
  read at once. Until a prefill was measured it is assumed to produce ``PRIOR_PREFILL_BYTES_PER_S`` of KV.
- *Overdue.* While a load is long past its stop nothing else is loaded: the tier hangs.
- *Trials.* Who declines never learns that the tier is well again. So now and then a leading part is loaded: as much as
  takes ``TRIAL_SHARE`` of the prefill it belongs to, at least a chunk, and so seldom that trials take no more than
  ``TRIAL_DUTY`` of the time. After one that was much faster than expected the next one may follow at once. (Memory
  needs none: where it was found slower than recomputing, which takes a machine in trouble, that is forgotten at once.)
- *Negligible.* A load of ``NEGLIGIBLE_LOAD_S`` is always made: that is noise to the request.

Decisions have hysteresis per length (a power of two): what was declined must be predicted to save ``RESUME_GAIN``
before it is loaded again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memkv_engines.limits import (
    COLD_LOAD_S,
    FORGET_LOAD_S,
    MAX_TRIAL_OFFERS,
    MIN_TRIAL_TOKENS,
    NEGLIGIBLE_LOAD_S,
    OVERDUE_SLACK_S,
    PRIOR_PREFILL_BYTES_PER_S,
    RESUME_GAIN,
    STOP_FLOOR_S,
    STOP_MARGIN,
    TRIAL_DUTY,
    TRIAL_PAUSE_S,
    TRIAL_SHARE,
)
from memkv_engines.log import Throttle, get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.estimates import LoadCost, PrefillCost

log = get_logger(__name__)


@dataclass(frozen=True)
class Candidate:
    """What could be loaded: tokens [start, stop) of a request, in so many bytes of the slowest rank.

    Attributes:
        start, stop, size_bytes: as told.
        memory_tokens: so many of the first tokens lie in memory on every rank; all, or a multiple of the block size.
        memory_bytes: so many of all bytes do.
    """

    start: int
    stop: int
    size_bytes: int
    memory_tokens: int = 0
    memory_bytes: int = 0

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def tier_bytes(self) -> int:
        """What must be read."""
        return max(0, self.size_bytes - self.memory_bytes)

    def leading(self, tokens: int) -> Candidate:
        """Its first tokens."""
        size_bytes = self.size_bytes * tokens // max(1, self.tokens)
        memory_tokens = min(tokens, self.memory_tokens)
        memory_bytes = size_bytes if memory_tokens == tokens else min(size_bytes, self.memory_bytes)
        return Candidate(self.start, self.start + tokens, size_bytes, memory_tokens, memory_bytes)

    def behind(self, tokens: int) -> Candidate:
        """What follows its first tokens, which lie in memory."""
        first = self.leading(tokens)
        memory_bytes = max(0, self.memory_bytes - first.memory_bytes)
        return Candidate(first.stop, self.stop, self.size_bytes - first.size_bytes, 0, memory_bytes)


@dataclass(frozen=True)
class Verdict:
    """How much of a hit to load.

    Attributes:
        tokens: from the hit's start on; all, a leading part, or none.
        reason: ``faster | negligible | unmeasured | trial | slower | memory | off``; of what is read, if anything is.
    """

    tokens: int
    reason: str


@dataclass(eq=False)
class LoadTicket:
    """A load under way.

    Attributes:
        size_bytes: what it shall read from the tier.
        ahead_bytes: what loads before it shall still read; they share the tier, and are served in order.
        predicted_s: what it should take with its waiting; 0 where that was unknown.
        stop_s: to be stopped as soon as it is seen to take longer, from its first chunk on; 0: never.
        overdue_at: when it should long have ended.
        is_trial: it was made to measure the tier again.
    """

    size_bytes: int
    ahead_bytes: int
    predicted_s: float
    stop_s: float
    overdue_at: float
    is_trial: bool


class CostGate:
    """Judges hits. Thread-safe; nothing blocks. One for each process that decides.

    Args:
        enabled: off, everything is loaded and nothing is stopped.
        counters: where to count, under this object's lock only; its own by default.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, enabled: bool, counters: Counters | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.enabled = enabled
        self.counters = counters or Counters()
        self._clock = clock
        self._load, self._memory, self._prefill = LoadCost(clock), LoadCost(clock), PrefillCost(clock)
        self._under_way: list[LoadTicket] = []
        # Whether a load from the tier has ended well, even if it told little, being of memory for the most part.
        self._has_read = False
        self._declining: dict[int, bool] = {}
        self._next_trial, self._trials = 0.0, 0
        # Trials that wait for their load, by start: where they may end, and what they may take.
        self._offers: dict[int, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._lines = Throttle()

    # --- learning --------------------------------------------------------------

    def load_began(self, hit: Candidate) -> LoadTicket:
        """A load begins; ``load_ended`` must follow, whatever becomes of it."""
        with self._lock:
            ahead = sum(t.size_bytes for t in self._under_way)
            read = hit.behind(hit.memory_tokens)
            trial_s = self._take_trial(read)
            stop_s = self.enabled * self._stop_s(read, trial_s)
            predicted_s = self._load.seconds(ahead + hit.tier_bytes) if hit.tier_bytes else 0.0
            waits_until = max((t.overdue_at - OVERDUE_SLACK_S for t in self._under_way), default=0.0)
            overdue_at = max(self._clock(), waits_until) + self._stop_s(hit, trial_s) + OVERDUE_SLACK_S
            ticket = LoadTicket(hit.tier_bytes, ahead, predicted_s, stop_s, overdue_at, trial_s > 0)
            self._under_way.append(ticket)
            return ticket

    def load_ended(
        self,
        ticket: LoadTicket,
        read_bytes: int = 0,
        seconds: float = 0.0,
        *,
        memory_bytes: int = 0,
        stopped: bool = False,
    ) -> None:
        """A load ended.

        Args:
            ticket: as it began.
            read_bytes: what it read.
            seconds: how long that took with its waiting; 0: it failed, and tells nothing.
            memory_bytes: what it took from memory.
            stopped: it was stopped for being slow.
        """
        with self._lock:
            if ticket not in self._under_way:
                return  # forgotten: nobody had heard of it for too long
            later = self._under_way.index(ticket)
            del self._under_way[later]
            for other in self._under_way[later:]:
                # Stopped early: those behind did not wait for all of it.
                other.ahead_bytes -= max(0, ticket.size_bytes - read_bytes)
            if not self.enabled or seconds <= 0:
                return
            if read_bytes <= 0:
                self._memory.observe(memory_bytes, seconds)
                return
            self._has_read = True
            if memory_bytes > read_bytes and not stopped:
                return  # Most of the time went into what was not read.
            moved = max(0, ticket.ahead_bytes) + read_bytes
            better = ticket.is_trial and 2 * seconds < self._load.seconds(moved)
            if better:
                self._next_trial = self._clock()
            if stopped or better:
                # The tier is not what it was. To be wrong about this costs a recompute and a trial, or a load that is
                # stopped; to hold on to the past costs more of them.
                self._load.forget()
            elif ticket.predicted_s:
                self.counters.add("gate_error_microseconds", int(abs(seconds - ticket.predicted_s) * 1e6))
            self._load.observe(moved, seconds)

    def observe_prefill(self, spans: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step of the engine computed these spans of tokens."""
        if self.enabled:
            with self._lock:
                self._prefill.observe(spans, seconds)

    # --- deciding --------------------------------------------------------------

    @property
    def undecided(self) -> bool:
        """Whether the first load of all from the tier is under way: who waits for it knows more."""
        with self._lock:
            if not self.enabled or self._has_read or self._overdue():
                return False
            # What takes nothing from the tier tells nothing of it.
            return any(ticket.size_bytes for ticket in self._under_way)

    def judge(self, hit: Candidate, block_tokens: int = 1, least_tokens: int = 0) -> Verdict:
        """How much of a hit to load. Counts: ask once for a request.

        Args:
            hit: what could be loaded; not empty.
            block_tokens: a part is a multiple of this.
            least_tokens: a part is at least this long, and at least ``MIN_TRIAL_TOKENS``.
        """
        if not self.enabled:
            return Verdict(hit.tokens, "off")
        with self._lock:
            verdict = self._judge_levels(hit, block_tokens, max(least_tokens, MIN_TRIAL_TOKENS))
            self.counters.add(f"gate_{verdict.reason}")
            self.counters.add("gate_declined_tokens", hit.tokens - verdict.tokens)
            held = self._lines.admit(verdict.reason) if verdict.tokens < hit.tokens else None
            if held is not None:
                text = "cost gate: %d of %d stored tokens are loaded (%s) (%d more such lines held back)"
                log.info(text, verdict.tokens, hit.tokens, verdict.reason, held)
            return verdict

    # --- inside ----------------------------------------------------------------

    def _overdue(self) -> bool:
        now = self._clock()
        self._under_way = [t for t in self._under_way if now < t.overdue_at + FORGET_LOAD_S]
        return any(ticket.overdue_at < now for ticket in self._under_way)

    def _worth(self, hit: Candidate) -> float:
        """Seconds of prefill that a load saves."""
        if self._prefill.known:
            return self._prefill.seconds(hit.start, hit.stop)
        return max(COLD_LOAD_S, hit.size_bytes / PRIOR_PREFILL_BYTES_PER_S)

    def _stop_s(self, hit: Candidate, trial_s: float) -> float:
        return max(STOP_FLOOR_S, STOP_MARGIN * max(self._worth(hit), trial_s))

    def _take_trial(self, hit: Candidate) -> float:
        """What a load may take if it is a trial: more than it saves, since it would teach nothing else; else 0.

        Only a load that begins ends the turn: other ranks, whose turn may come later, must have agreed to it.
        """
        stop, budget_s = self._offers.get(hit.start, (0, 0.0))
        if hit.stop > stop or not hit.tokens:
            return 0.0
        self._offers.clear()
        self._trials += 1
        self._next_trial = self._clock() + max(TRIAL_PAUSE_S, self._load.seconds(hit.size_bytes) / TRIAL_DUTY)
        return budget_s

    def _judge_levels(self, hit: Candidate, block_tokens: int, least_tokens: int) -> Verdict:
        if not hit.memory_tokens:
            return self._judge(hit, block_tokens, least_tokens)
        first, rest = hit.leading(hit.memory_tokens), hit.behind(hit.memory_tokens)
        if self._memory.seconds(first.size_bytes) > max(NEGLIGIBLE_LOAD_S, self._worth(first)):
            self._memory.forget()
            return Verdict(0, "slower")
        more = self._judge(rest, block_tokens, least_tokens) if rest.tokens else Verdict(0, "")
        return Verdict(first.tokens + more.tokens, more.reason if more.tokens else "memory")

    def _judge(self, hit: Candidate, block_tokens: int, least_tokens: int) -> Verdict:
        if self._overdue():
            return Verdict(0, "slower")
        if not self._load.known:
            return Verdict(hit.tokens, "unmeasured")
        load_s = self._load.seconds(hit.tier_bytes) + self._memory.seconds(hit.memory_bytes)
        worth_s = self._worth(hit)
        if load_s <= NEGLIGIBLE_LOAD_S:
            return Verdict(hit.tokens, "negligible")
        length = hit.tokens.bit_length()
        was_declining = self._declining.get(length, False)
        declines = load_s > worth_s * ((1 - RESUME_GAIN) if was_declining else 1)
        self._declining[length] = declines
        if declines != was_declining:
            self._report(hit, load_s, worth_s, declines)
        if declines and not was_declining:
            # What made us decline was measured just now.
            self._next_trial = max(self._next_trial, self._clock() + TRIAL_PAUSE_S)
        if not declines:
            return Verdict(hit.tokens, "faster")
        return self._trial(hit, worth_s, block_tokens, least_tokens) or Verdict(0, "slower")

    def _trial(self, hit: Candidate, worth_s: float, block_tokens: int, least_tokens: int) -> Verdict | None:
        if self._clock() < self._next_trial:
            return None
        # Of two sizes, or latency could not be told from bandwidth.
        budget_s = TRIAL_SHARE * worth_s / (1 + self._trials % 2)
        share = self._load.bytes_in(budget_s) / max(1, hit.size_bytes)
        tokens = max(int(hit.tokens * share), least_tokens)
        tokens = min(-(-tokens // block_tokens) * block_tokens, hit.tokens)
        if len(self._offers) >= MAX_TRIAL_OFFERS:
            self._offers.clear()
        self._offers[hit.start] = (hit.start + tokens, budget_s)
        return Verdict(tokens, "trial")

    def _report(self, hit: Candidate, load_s: float, worth_s: float, declines: bool) -> None:
        self.counters.add("gate_flips")
        held = self._lines.admit("flip")
        if held is not None:
            log.info(
                "cost gate: hits of about %d tokens are %s: %.3f s to load %.1f MB, %.3f s to recompute%s "
                "(%d more such lines held back)",
                hit.tokens,
                "not loaded any more" if declines else "loaded again",
                load_s,
                hit.size_bytes / 1e6,
                worth_s,
                "" if self._prefill.known else " (assumed)",
                held,
            )
