"""Samples: the likeliest tokens after prompts of the text, the same that the logits give, within the context."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kncompress.config import SamplesConfig
from kncompress.data.tokenizer import train_tokenizer
from kncompress.data.tokens import TokenStream
from kncompress.training.samples import greedy, prompts, write_samples

TEXT = "The river runs past the old mill. Seven engineers counted the bridges, twice, and found eight. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300, context=32)


def model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def stream(tokenizer, count: int | None = None) -> TokenStream:
    return TokenStream(np.asarray(tokenizer(TEXT)["input_ids"][:count], dtype=np.uint16), 1, len(TEXT))


def test_rows_hold_prompt_text_and_both_models(tokenizer):
    teacher, student, tokens = model(0), model(1), stream(tokenizer)
    before = torch.get_rng_state()
    rows = write_samples(teacher, student, tokens, tokenizer, SamplesConfig(count=3, prompt_tokens=8, tokens=6))
    assert torch.equal(torch.get_rng_state(), before)
    step = len(tokens) // 3
    for number, row in enumerate(rows):
        ids = torch.as_tensor(tokens.tokens[number * step :].astype("int64"))
        assert row["prompt"] == tokenizer.decode(ids[:8]) and row["text"] == tokenizer.decode(ids[8:14])
        for name, network in (("teacher", teacher), ("student", student)):
            written = ids[:8]
            for _ in range(6):  # without a cache, one token at a time
                best = network(written[None]).logits[0, -1].argmax()
                if best == 0:
                    break
                written = torch.cat([written, best[None]])
            assert row[name] == tokenizer.decode(written[8:], skip_special_tokens=True)
    assert len(rows) == 3 and rows[0]["teacher"] != rows[0]["student"]
    assert "teacher" not in write_samples(None, student, tokens, tokenizer, SamplesConfig())[0]


def test_prompts_fit_short_texts_and_contexts(tokenizer):
    assert prompts(stream(tokenizer, 5), SamplesConfig(), 32).shape == (1, 5)
    assert prompts(stream(tokenizer, 0), SamplesConfig(), 32).shape[0] == 0
    assert prompts(stream(tokenizer), SamplesConfig(prompt_tokens=100), 32).shape[1] == 31
    ids = prompts(stream(tokenizer), SamplesConfig(count=1, prompt_tokens=30), 32)
    assert len(greedy(model(0), ids, 50, tokenizer)) == 1  # two tokens are left of the context
