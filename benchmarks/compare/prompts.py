"""The workloads' prompts: pure functions of token ids and a seed, the same for every side and in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.texts import chapters


class Corpus:
    """One long run of real text in tokens, handed out piece by piece and never twice.

    Args:
        model: Folder with the tokenizer.
    """

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.vocabulary = tokenizer.get_vocab_size(with_added_tokens=False)
        self._tokens = _tokens_of(tokenizer)
        self._taken = 0

    def take(self, count: int) -> list[int]:
        """Returns the next tokens.

        Raises:
            LookupError: This Python ships with less text than that.
        """
        found = [token for _, token in zip(range(count), self._tokens, strict=False)]
        if len(found) < count:
            raise LookupError(f"this Python's texts end after {self._taken + len(found)} tokens")
        self._taken += count
        return found


def _tokens_of(tokenizer: object) -> Iterator[int]:
    for chapter in chapters():
        yield from tokenizer.encode(chapter.body, add_special_tokens=False).ids  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Conversation:
    """What a user says: a document with a question first, then short messages."""

    opening: tuple[int, ...]
    messages: tuple[tuple[int, ...], ...]


def conversations(corpus: Corpus, count: int, turns: int, document_tokens: int, user_tokens: int) -> list[Conversation]:
    """Returns conversations of `turns` user messages each."""
    return [
        Conversation(
            tuple(corpus.take(document_tokens)), tuple(tuple(corpus.take(user_tokens)) for _ in range(turns - 1))
        )
        for _ in range(count)
    ]


def rag(
    corpus: Corpus,
    *,
    system_tokens: int,
    passages: int,
    passage_tokens: int,
    per_request: int,
    question_tokens: int,
    requests: int,
    seed: int = 1,
) -> list[list[int]]:
    """Returns prompts of one system prompt, some of the passages in an order of their own, and a question.

    What a prefix cache can use is the system prompt, and as many passages as come first in the same order.
    """
    choice = random.Random(seed)
    system = corpus.take(system_tokens)
    found = [corpus.take(passage_tokens) for _ in range(passages)]
    prompts = []
    for _ in range(requests):
        retrieved = [token for passage in choice.sample(found, per_request) for token in passage]
        prompts.append([*system, *retrieved, *corpus.take(question_tokens)])
    return prompts


def prefix_repetition(
    vocabulary: int, *, prefixes: int, prefix_tokens: int, suffix_tokens: int, prompts: int, seed: int = 1
) -> list[list[int]]:
    """Returns what the dataset `prefix_repetition` of `vllm bench serve` is made of: random prefixes, each with
    `prompts // prefixes` random suffixes, shuffled.

    Raises:
        ValueError: Fewer prompts than prefixes.
    """
    if prompts < prefixes:
        raise ValueError(f"{prompts} prompts for {prefixes} prefixes: give each prefix at least one")
    choice = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [choice.randrange(vocabulary) for _ in range(count)]

    made = []
    for _ in range(prefixes):
        prefix = tokens(prefix_tokens)
        made += [prefix + tokens(suffix_tokens) for _ in range(prompts // prefixes)]
    choice.shuffle(made)
    return made


def shared_prefix(prompt: Sequence[int], earlier: Sequence[Sequence[int]]) -> int:
    """Returns how many leading tokens of a prompt also lead one of the earlier ones."""
    longest = 0
    for other in earlier:
        same = next((n for n, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), None)
        longest = max(longest, min(len(prompt), len(other)) if same is None else same)
    return longest
