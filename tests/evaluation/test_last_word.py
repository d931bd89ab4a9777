"""The last words of passages, against a loop without batches."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kncompress.evaluation import last_words
from kncompress.training.student import locate

PASSAGES = [
    "The city lies on the river and the river gave the city its name",
    "He was born in London and died in London",
    "It is the capital of the country and the largest city of the country",
    "a b",
]


@pytest.fixture(scope="module")
def mini():
    folder = locate("asset:mini")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_equal_to_a_loop_over_passages(mini, batch_tokens):
    model, tokenizer = mini
    nats, right = [], []
    for passage in PASSAGES:
        whole = tokenizer(passage, return_tensors="pt")["input_ids"]
        target = whole.shape[1] - len(tokenizer(passage.rpartition(" ")[0])["input_ids"])
        with torch.no_grad():
            scores = model(whole).logits[0, :-1].log_softmax(-1)[-target:]
        wanted = whole[0, -target:]
        nats.append(-float(scores[range(target), wanted].sum()))
        right.append(scores.argmax(-1).tolist() == wanted.tolist())
    found = last_words(model, tokenizer, PASSAGES, 128, batch_tokens)
    assert found.passages == len(PASSAGES) and found.accuracy == sum(right) / len(right)
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


def test_only_the_end_of_a_long_passage_is_read(mini):
    model, tokenizer = mini
    end = "born in London and died in London"
    window = len(tokenizer(" " + end)["input_ids"])
    long = last_words(model, tokenizer, ["once upon a time " * 40 + end], window)
    other = last_words(model, tokenizer, ["another text with other words " * 30 + end], window)
    assert long == other


@pytest.mark.parametrize(("passages", "message"), [([], "no passages"), (["word"], "one word: 'word'")])
def test_nothing_to_score_is_told(mini, passages, message):
    with pytest.raises(ValueError, match=message):
        last_words(*mini, passages, 128)
