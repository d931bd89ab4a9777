"""The last word of a passage, from all that comes before it: LAMBADA's measure (Paperno et al., 2016).

The protocol is that of most tools, for the version of the data by GPT-2's authors. The last space divides the last word
from the rest, and is tokenised with the word. A word is right if each of its tokens is the likeliest. The perplexity is
that of whole words.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from kncompress.evaluation.scoring import input_device


class LastWords(NamedTuple):
    """What a model makes of the last words of passages."""

    accuracy: float
    """Share of passages whose last word the model would have written."""
    perplexity: float
    """exp of the mean negative log-likelihood of a word, in nats."""
    passages: int


class Item(NamedTuple):
    """A passage as tokens, of which the last ``target`` are the word."""

    tokens: list[int]
    target: int


def items_of(passages: Sequence[str], tokenizer: Any, window: int) -> list[Item]:
    """Passages as tokens, cut at the front to ``window``.

    Raises:
        ValueError: a passage of a single word.
    """
    found = []
    for passage in passages:
        context, _, word = passage.strip().rpartition(" ")
        if not context.strip():
            raise ValueError(f"a passage of one word: {passage.strip()[:40]!r}")
        before = tokenizer(context.rstrip(), verbose=False)["input_ids"]
        whole = tokenizer(f"{context.rstrip()} {word}", verbose=False)["input_ids"]
        target = max(1, len(whole) - len(before))
        found.append(Item(whole[-max(window, 2) :], min(target, window - 1)))
    return found


@torch.no_grad()
def last_words(
    model: Any,
    tokenizer: Any,
    passages: Sequence[str],
    window: int,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], object] | None = None,
) -> LastWords:
    """Accuracy and perplexity of the last words.

    Args:
        model: causal language model, in evaluation mode, on any device.
        tokenizer: its tokenizer.
        passages: two words or more each.
        window: most tokens of a passage; a longer one loses its beginning.
        batch_tokens: most tokens in one forward pass, padding included.
        progress: called as ``progress(passages done, passages in all)``.

    Raises:
        ValueError: no passage, or one of a single word.
    """
    if not passages:
        raise ValueError("no passages")
    items = sorted(items_of(passages, tokenizer, window), key=lambda item: len(item.tokens))
    right, nats, done = 0, 0.0, 0
    while done < len(items):
        # The shortest come first: the last of a batch is its longest.
        count = 1
        while done + count < len(items) and (count + 1) * len(items[done + count].tokens) <= batch_tokens:
            count += 1
        batch = items[done : done + count]
        ids = pad_sequence([torch.tensor(item.tokens) for item in batch], batch_first=True).to(input_device(model))
        # Padding stands on the right, out of sight of every real token.
        logits = model(input_ids=ids, use_cache=False).logits
        for row, item in enumerate(batch):
            end = len(item.tokens)
            scores = logits[row, end - item.target - 1 : end - 1].float().log_softmax(-1)
            wanted = ids[row, end - item.target : end]
            nats -= float(scores.gather(1, wanted[:, None]).sum())
            right += bool((scores.argmax(-1) == wanted).all())
        done += count
        if progress is not None:
            progress(done, len(items))
    return LastWords(right / len(items), math.exp(min(nats / len(items), 700.0)), len(items))
