"""Request traces in the form that Mooncake published and `vllm bench serve` replays: one JSON object a line.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}

`hash_ids` name the prompt's blocks in order, the last one possibly cut short; equal ids are equal tokens, so that a
common run of leading ids is a common prefix. Mooncake's blocks are 512 tokens long.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MOONCAKE_BLOCK_TOKENS = 512
MAX_LINE_CHARS = 1 << 20


class TraceError(Exception):
    """A trace that cannot be used; the message names line, key and value."""


@dataclass(frozen=True)
class Request:
    """One line of a trace.

    Attributes:
        timestamp_ms: When it arrived; only the order counts here.
        input_tokens: Length of the prompt.
        output_tokens: Length of the answer.
        blocks: The ids of the prompt's blocks.
    """

    timestamp_ms: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]

    def as_json(self) -> str:
        """Returns the line."""
        return json.dumps(
            {
                "timestamp": self.timestamp_ms,
                "input_length": self.input_tokens,
                "output_length": self.output_tokens,
                "hash_ids": list(self.blocks),
            }
        )


def read_trace(path: Path, block_tokens: int, limit: int | None = None) -> list[Request]:
    """Reads a trace, in the order of arrival.

    Args:
        path: The file.
        block_tokens: Length of the blocks that its ids name.
        limit: Take no more than the first so many.

    Raises:
        TraceError: A line is no request, or its ids do not cover its prompt.
    """
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(found) >= limit:
                break
            if line.strip():
                found.append(_request(line, number, block_tokens))
    if not found:
        raise TraceError(f"{path.name} holds no request")
    return sorted(found, key=lambda request: request.timestamp_ms)


def _request(line: str, number: int, block_tokens: int) -> Request:
    if len(line) > MAX_LINE_CHARS:
        raise TraceError(f"line {number} has {len(line)} characters, more than {MAX_LINE_CHARS}")
    try:
        told = json.loads(line)
    except ValueError as error:
        raise TraceError(f"line {number} is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise TraceError(f"line {number} is no JSON object")
    numbers = {}
    for key, least in (("timestamp", 0), ("input_length", 1), ("output_length", 0)):
        value = told.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
            raise TraceError(f"line {number}: {key!r} is {value!r}: give a number of at least {least}")
        numbers[key] = value
    blocks = told.get("hash_ids")
    if not isinstance(blocks, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in blocks):
        raise TraceError(f"line {number}: 'hash_ids' is no list of whole numbers")
    tokens = int(numbers["input_length"])
    if len(blocks) != -(-tokens // block_tokens):
        raise TraceError(
            f"line {number}: {len(blocks)} 'hash_ids' of {block_tokens} tokens do not make 'input_length' {tokens}: "
            "give the length of the trace's blocks with --trace-block-tokens"
        )
    return Request(float(numbers["timestamp"]), tokens, int(numbers["output_length"]), tuple(blocks))


def conversations(
    *,
    count: int,
    turns: int,
    document_tokens: int,
    turn_tokens: int,
    output_tokens: int,
    block_tokens: int,
    system_blocks: int = 1,
    pause_s: float = 60.0,
    seed: int = 1,
) -> list[Request]:
    """Makes a trace of conversations: a system prompt that all share, a document, then a question a turn.

    Each turn's prompt is the one before with `turn_tokens` more, which stand for the last answer and the next question.
    Conversations start evenly over the first pause; a user thinks for an exponentially distributed time. What is long
    ago when a user comes back has been thrown out meanwhile.

    Args:
        count: Conversations.
        turns: Requests of each.
        document_tokens: Length of the first prompt, the system prompt included.
        turn_tokens: What each later turn adds; whole blocks, so that a prefix stays one.
        output_tokens: Length of each answer.
        block_tokens: Length of the trace's blocks.
        system_blocks: Blocks of the system prompt.
        pause_s: Mean time between a user's requests.
        seed: Of the pauses.

    Raises:
        ValueError: Lengths that are no whole blocks.
    """
    if document_tokens % block_tokens or turn_tokens % block_tokens:
        raise ValueError(f"document and turn must be multiples of {block_tokens} tokens")
    if document_tokens < system_blocks * block_tokens:
        raise ValueError("the system prompt is longer than the first prompt")
    choice = random.Random(seed)
    system = list(range(system_blocks))
    following = system_blocks
    requests = []
    for number in range(count):
        now, blocks = 1000.0 * pause_s * number / count, list(system)
        for turn in range(turns):
            wanted = (document_tokens + turn * turn_tokens) // block_tokens
            fresh = wanted - len(blocks)
            blocks += range(following, following + fresh)
            following += fresh
            requests.append(Request(now, len(blocks) * block_tokens, output_tokens, tuple(blocks)))
            now += 1000.0 * choice.expovariate(1.0 / pause_s)
    return sorted(requests, key=lambda request: request.timestamp_ms)


def prompt_of(request: Request, block_tokens: int, vocabulary: int) -> list[int]:
    """Returns a request's tokens; blocks of one id are the same in every request."""
    tokens: list[int] = []
    for block in request.blocks:
        choice = random.Random(f"block {block}")
        tokens += [choice.randrange(vocabulary) for _ in range(block_tokens)]
    return tokens[: request.input_tokens]


def seen_tokens(requests: Sequence[Request], block_tokens: int) -> list[int]:
    """Returns, for each request, how many leading tokens of its prompt an earlier request had computed.

    Whole blocks of the trace; the last token of a prompt is always computed, since the answer follows from it.
    """
    known: set[tuple[int, ...]] = set()
    found = []
    for request in requests:
        whole = request.input_tokens // block_tokens
        covered = next((n for n in range(whole, 0, -1) if request.blocks[:n] in known), 0)
        found.append(min(covered * block_tokens, request.input_tokens - 1))
        known.update(request.blocks[:n] for n in range(1, whole + 1))
    return found


def write_trace(requests: Iterable[Request], path: Path) -> None:
    """Writes a trace."""
    path.write_text("".join(request.as_json() + "\n" for request in requests), encoding="utf-8")
