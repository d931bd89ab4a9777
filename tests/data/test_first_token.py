"""Tokenizers that begin every text with a token of their own: so does all that a model reads, wherever it is cut."""

import copy
from importlib.resources import files

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model
from tokenizers.processors import TemplateProcessing

from kncompress.compression.text import calibration_text
from kncompress.config import CalibrationConfig, DataConfig
from kncompress.data.tokenizer import first_token, load_tokenizer
from kncompress.data.tokens import Blocks, token_stream
from kncompress.evaluation import perplexity

FIRST = 7
TEXT = "A story of a dog. " * 40


@pytest.fixture(scope="module")
def plain():
    return load_tokenizer(files("kncompress") / "assets" / "mini")


@pytest.fixture
def tokenizer(plain):
    """Begins every text with token 7, as Gemma's and Llama 3's do with theirs."""
    changed = copy.deepcopy(plain)
    token = changed.convert_ids_to_tokens(FIRST)
    changed.bos_token = token
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, FIRST)])
    return changed


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return DataConfig(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))


def test_only_a_tokenizer_that_adds_one_has_one(plain, tokenizer):
    assert plain.bos_token_id is not None and first_token(plain) is None
    assert first_token(tokenizer) == FIRST


def test_blocks_and_calibration_begin_with_it_and_nothing_else_changes(plain, tokenizer, data):
    blocks, before = (Blocks(token_stream(data, "train", each), 16) for each in (tokenizer, plain))
    for i in range(len(blocks)):
        ids = blocks[i]["input_ids"]
        assert ids[0] == FIRST and torch.equal(ids[1:], before[i]["input_ids"][1:])
    fields = config_of("gpt2")
    settings = CalibrationConfig(tokens=40, context=16)
    texts = [torch.cat([*calibration_text(data, settings, fields, each).batches()][:1]) for each in (tokenizer, plain)]
    assert (texts[0][:, 0] == FIRST).all() and torch.equal(texts[0][:, 1:], texts[1][:, 1:])


def test_windows_are_scored_after_it():
    model = random_model(config_of("llama"))
    tokens = np.arange(20, 84)
    found = perplexity(model, tokens, 16, first=FIRST)
    ids = torch.from_numpy(tokens).view(4, 16).clone()
    ids[:, 0] = FIRST
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found.nll == pytest.approx(float(expected), rel=1e-5)
    assert found.nll != pytest.approx(perplexity(model, tokens, 16).nll, rel=1e-5)
