"""Sentences as sequences: the format, what is cut, batches of like lengths, padding."""

from typing import Any

import numpy as np
import pytest
import torch

from kncompress.data.tokenizer import train_tokenizer
from kncompress.errors import UserError
from kncompress.glue.files import Example
from kncompress.glue.sequences import LikeLengths, Sequences, encode, padding_token, scoring_loader, training_loader

TEXT = ["The mill stands by the river and the snow lies on the hills until the wind turns. " * 3]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXT, 280, context=32)


def test_format_of_one_sentence_and_of_two(tokenizer: Any) -> None:
    one, two = encode([Example((" The mill \n",), 0), Example(("The mill", "by the river "), 0)], tokenizer, 99)
    assert tokenizer.decode(one) == "The mill"
    assert tokenizer.decode(two) == "The mill\nby the river"
    assert tokenizer.eos_token_id not in two  # which pads


def test_a_tokenizer_that_begins_its_sequences_does_so_here(tokenizer: Any) -> None:
    from tokenizers import processors

    begun = train_tokenizer(TEXT, 280, context=32)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    begun.backend_tokenizer.post_processor = template
    (plain,), (with_start,) = (encode([Example(("by", "the"), 0)], t, 99) for t in (tokenizer, begun))
    assert with_start == [0, *plain]


@pytest.mark.parametrize(
    ("first", "second", "kept"), [(9, 3, (5, 3)), (3, 9, (3, 5)), (9, 9, (4, 4)), (2, 2, (2, 2)), (7, 8, (4, 4))]
)
def test_the_longer_text_is_cut_at_its_end(tokenizer: Any, first: int, second: int, kept: tuple[int, int]) -> None:
    texts = "abcdefghi"[:first], "qrstuvwxy"[:second]
    sizes = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert sizes == [first, second]  # one token a letter
    (ids,) = encode([Example(texts, 0)], tokenizer, 9)
    assert tokenizer.decode(ids) == f"{texts[0][: kept[0]]}\n{texts[1][: kept[1]]}"
    assert len(ids) <= 9


def test_nothing_becomes_one_token(tokenizer: Any) -> None:
    (ids,) = encode([Example(("  ",), 0)], tokenizer, 8)
    assert len(ids) == 1 and ids[0] != tokenizer.eos_token_id


def test_padding_is_on_the_right_and_masked(tokenizer: Any) -> None:
    examples = [
        Example((text,), label) for text, label in (("The mill", 1), ("by the river and the hills", 0), ("a", 1))
    ]
    sequences = Sequences(examples, tokenizer, 32)
    loader, order = scoring_loader(sequences, 3, padding=7)
    (batch,) = loader
    assert order == [2, 0, 1] and batch["labels"].tolist() == [1, 1, 0] and batch["labels"].dtype == torch.int64
    for row, index in enumerate(order):
        ids, length = sequences.ids[index], len(sequences.ids[index])
        assert batch["input_ids"][row, :length].tolist() == ids.tolist()
        assert batch["input_ids"][row, length:].unique().tolist() in ([7], [])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    unlabelled = Sequences([Example(("a",), None)], tokenizer, 32)
    assert "labels" not in next(iter(scoring_loader(unlabelled, 1, 0)[0]))
    scores = Sequences([Example(("a",), 2.5), Example(("b",), 0.0)], tokenizer, 32)
    assert next(iter(scoring_loader(scores, 2, 0)[0]))["labels"].dtype == torch.float32


def test_batches_have_like_lengths_and_every_example_once_a_pass() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 100, 1000)]
    sampler = LikeLengths(lengths, 16, seed=3)
    passes = [list(sampler) for _ in range(2)]
    for batches in passes:
        assert sorted(i for batch in batches for i in batch) == list(range(1000)) and len(batches) == len(sampler) == 63
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
        assert padded < 1.05 * sum(lengths)  # a random order takes 1.7 times
    assert passes[0] != passes[1]
    assert list(LikeLengths(lengths, 16, seed=3)) == passes[0] != list(LikeLengths(lengths, 16, seed=4))


def test_the_training_loader_goes_through_all(tokenizer: Any) -> None:
    sequences = Sequences([Example((word,), i) for i, word in enumerate("abcdefg")], tokenizer, 32)
    labels = [int(n) for batch in training_loader(sequences, 3, 0, seed=0) for n in batch["labels"]]
    assert sorted(labels) == list(range(7))


def test_what_pads(tokenizer: Any) -> None:
    assert padding_token(tokenizer, "x") == tokenizer.eos_token_id
    own = train_tokenizer(TEXT, 280, context=32)
    own.pad_token = "a"
    assert padding_token(own, "x") == own.pad_token_id != own.eos_token_id
    own.pad_token = own.eos_token = None
    with pytest.raises(UserError, match="tokenizer=x: has neither a pad nor an end-of-text token"):
        padding_token(own, "x")
