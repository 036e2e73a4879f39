"""What the demo asks the engine: long chats about real documents, one of which leaves another's path half-way."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.texts import Document, documents

QUESTION = "\n\nSummarise the text above in three sentences."
WARM_UP_TOKENS = 2048
# A token of English text is about four characters; twice that is enough for any tokenizer that fits a real model.
CHARS_PER_TOKEN = 5
_BODY_MARK = "BODY"


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids.

    Attributes:
        titles: What each prompt is about.
        prompts: The measured prompts; no two share a block.
        diverging: Begins like the first prompt, then goes elsewhere in the middle of a chunk.
        shared_blocks: Leading whole blocks that `diverging` shares with the first prompt.
        warm_ups: One unrelated prompt for each engine process, so that none finds its warm-up in the tier.
    """

    titles: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    diverging: tuple[int, ...]
    shared_blocks: int
    warm_ups: tuple[tuple[int, ...], ...]

    @property
    def prompt_tokens(self) -> int:
        """Length of each measured prompt."""
        return len(self.prompts[0])


class _Chat:
    """Renders a question about a document with the model's own chat template, cut to an exact number of tokens."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def frame(self, title: str) -> tuple[list[int], list[int]]:
        """Returns what stands before and after the document."""
        messages = [
            # The title comes first, so that not even the first block of two prompts is the same.
            {"role": "system", "content": f"About {title}: you answer questions."},
            {"role": "user", "content": _BODY_MARK + QUESTION},
        ]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = text.split(_BODY_MARK)
        return self.encode(before), self.encode(after)

    def prompt(self, document: Document, tokens: int, start: list[int] | None = None) -> tuple[int, ...]:
        """Returns a prompt of exactly `tokens` tokens; `start` replaces what stands before the document."""
        before, after = self.frame(document.title)
        before = before if start is None else start
        room = tokens - len(before) - len(after)
        body = self.encode(document.body)[:room]
        if len(body) < room:
            raise ValueError(f"{document.title} has only {len(body)} of {room} tokens")
        return (*before, *body, *after)


def build_workload(model: str, prompts: int, prompt_tokens: int, block_size: int) -> Workload:
    """Makes the demo's prompts.

    Args:
        model: Folder with the model's tokenizer.
        prompts: How many.
        prompt_tokens: Length of each.
        block_size: Tokens in a block of the engine.
    """
    chat = _Chat(model)
    found = documents(prompts + 1, prompt_tokens * CHARS_PER_TOKEN)
    measured = tuple(chat.prompt(document, prompt_tokens) for document in found[:prompts])
    # A prime number of blocks is no multiple of any chunk's; a few tokens more end it inside a block, too.
    shared_blocks = largest_prime_below(prompt_tokens // block_size * 2 // 3)
    shared = measured[0][: shared_blocks * block_size + block_size // 3]
    warm_up_tokens = min(WARM_UP_TOKENS, prompt_tokens)
    reader = documents(prompts + 4, prompt_tokens * CHARS_PER_TOKEN)[prompts + 1 :]
    return Workload(
        titles=tuple(document.title for document in found[:prompts]),
        prompts=measured,
        diverging=chat.prompt(found[prompts], prompt_tokens, start=list(shared)),
        shared_blocks=shared_blocks,
        warm_ups=tuple(chat.prompt(document, warm_up_tokens) for document in reader),
    )


def largest_prime_below(limit: int) -> int:
    """Returns the largest prime number that is less than `limit`, which must exceed 2."""
    return next(n for n in range(limit - 1, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1)))
