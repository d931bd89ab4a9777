"""Writing token by token: as transformers' ``generate``, with draws that follow the model's distribution."""

import itertools

import pytest
import torch
from tiny_models import KINDS, RARE, config_of, random_model

from kncompress.config import GenerateConfig
from kncompress.evaluation.continuation import Continuation, Writer, _drawn, _tokens, continuation


def settings(**values):
    return GenerateConfig(prompt="", **values)


@pytest.mark.parametrize("kind", [*KINDS[::2], *RARE, "opt.narrow"])
def test_greedy_tokens_are_those_of_transformers(kind):
    """With a cache, whatever a family makes of positions; up to the last position."""
    model = random_model(config_of(kind))
    model.generation_config.eos_token_id = None
    start = [5, 17, 40, 3]
    for penalty in (1.0, 1.3):
        ours = list(_tokens(model, start, settings(temperature=0, repetition_penalty=penalty), 0))
        assert len(ours) == 32 - 4 + 1
        options = {"do_sample": False, "repetition_penalty": penalty, "pad_token_id": 0}
        theirs = model.generate(torch.tensor([start]), max_new_tokens=28, **options)[0, 4:].tolist()
        assert ours[:28] == theirs


def test_draws_follow_the_distribution():
    scores = torch.tensor([0.1, 2.0, -torch.inf, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.tensor([_drawn(scores, 1.0, generator) for _ in range(4000)]), minlength=5)
    torch.testing.assert_close(drawn / 4000, scores.softmax(-1), atol=0.02, rtol=0)
    assert drawn[2] == 0


def test_near_models_draw_near_texts():
    """The same random numbers: tokens of two models differ where their distributions do, and hardly else."""
    scores = torch.randn(300, 50, generator=torch.Generator().manual_seed(1))
    near = scores + 0.01 * torch.randn(300, 50, generator=torch.Generator().manual_seed(2))
    draws = []
    for rows in (scores, near):
        generator = torch.Generator().manual_seed(0)
        draws.append([_drawn(row, 1.0, generator) for row in rows])
    assert sum(a == b for a, b in zip(*draws, strict=True)) > 250


@pytest.mark.parametrize(("option", "kept"), [({"top_k": 2}, 2), ({"top_p": 0.6}, None)])
def test_unlikely_tokens_are_left_out(option, kept):
    model = random_model(config_of("gpt2"))
    with torch.no_grad():
        shares = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1).sort(descending=True)
    if kept is None:
        kept = int((shares.values.cumsum(-1) < 0.6).sum()) + 1
    config = settings(temperature=1.0, **({"top_p": 1.0} | option))
    seen = {next(_tokens(model, [5, 6], config, seed)) for seed in range(60)}
    assert seen <= set(shares.indices[:kept].tolist())
    assert len(seen) > 1 or kept == 1


class Bytes:
    """A tokenizer of bytes: token n is byte n + 32, and the last two are those of an e with an accent."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text, verbose):
        return {"input_ids": [byte - 32 for byte in text.encode()]}

    def decode(self, ids, skip_special_tokens):
        table = [*range(32, 126), 0xC3, 0xA9]
        return bytes(table[number] for number in ids).decode(errors="replace")


def test_text_grows_by_whole_characters_and_ends_where_the_model_says(monkeypatch):
    written = [1, 94, 95, 2, 0, 7]
    monkeypatch.setattr("kncompress.evaluation.continuation._tokens", lambda *_: iter(written))
    model = random_model(config_of("gpt2"))
    model.generation_config.eos_token_id = [0, 50]
    states = [
        Continuation(s.text, s.tokens, s.stopped)
        for s in continuation(Writer("bytes", model, Bytes()), "", settings(), 0)
    ]
    assert [state.text for state in states[:4]] == ["!", "!", "!\u00e9", '!\u00e9"']
    assert states[-1] == Continuation('!\u00e9"', 5, "end")
    assert all(state.stopped == "" for state in states[:-1])
    assert len(list(itertools.islice(states, 10))) == 5
