"""Text that the model itself writes, in the place of one that is given."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.compression import own_text
from kncompress.compression.own_text import with_own_text
from kncompress.compression.text import calibration_text, check_calibration
from kncompress.config import CalibrationConfig, DataConfig
from kncompress.config.run import OwnTextConfig
from kncompress.data.sources import find_sources
from kncompress.data.tokenizer import load_tokenizer
from kncompress.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(files("kncompress") / "assets" / "mini")


def made(tokenizer):
    config = config_of("gpt2")
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), None, tokenizer.eos_token_id
    return random_model(config)


@pytest.fixture(scope="module")
def model(tokenizer):
    return made(tokenizer)


@pytest.fixture
def data(tmp_path):
    own = OwnTextConfig(tokens=100, length=20, batch=2)
    return DataConfig(source="model", cache_dir=str(tmp_path / "cache"), own=own)


def rows(found):
    return [json.loads(line) for file in found.source for line in Path(file).read_text().splitlines()]


def test_the_text_is_drawn_once_and_goes_on_where_it_stopped(model, tokenizer, data, monkeypatch):
    state = torch.random.get_rng_state()
    first = with_own_text(data, model, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 100 <= sum(row["tokens"] for row in rows(first)) < 100 + 40
    assert all(len(tokenizer(row["text"])["input_ids"]) > 0 for row in rows(first))
    whole = [Path(file).read_text() for file in first.source]
    Path(first.source[-1]).unlink()  # killed before the last batch
    drawn = []
    batch = own_text._batch
    monkeypatch.setattr(own_text, "_batch", lambda *args: drawn.append(args[-1]) or batch(*args))
    again = with_own_text(data, model, tokenizer)
    assert drawn == [len(whole) - 1]
    assert [Path(file).read_text() for file in again.source] == whole
    more = with_own_text(replace(data, own=replace(data.own, tokens=150)), model, tokenizer)
    assert more.source[: len(whole)] == again.source and len(more.source) > len(whole)


def test_another_model_seed_or_temperature_is_another_text(model, tokenizer, data):
    other = made(tokenizer)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    texts = [
        with_own_text(data, model, tokenizer),
        with_own_text(data, other, tokenizer),
        with_own_text(replace(data, seed=1), model, tokenizer),
        with_own_text(replace(data, own=replace(data.own, temperature=0.5)), model, tokenizer),
    ]
    assert len({rows(text)[0]["text"] for text in texts}) == len(texts)


def test_it_stands_beside_other_sources_and_is_calibrated_on(model, tokenizer, data, tmp_path):
    (tmp_path / "text.txt").write_text("A story of a dog. " * 200)
    mixed = replace(data, source=[str(tmp_path / "text.txt"), "model"])
    check_calibration(mixed, CalibrationConfig(), model.config)
    found = with_own_text(mixed, model, tokenizer)
    assert found.source[0] == str(tmp_path / "text.txt") and len(found.source) > 1
    text = calibration_text(found, CalibrationConfig(tokens=80, context=16), model.config, tokenizer)
    assert len(text.tokens) == 80
    assert with_own_text(found, model, tokenizer) == found


def test_verbs_that_draw_nothing_refuse_it():
    with pytest.raises(UserError, match=r"data\.source=model: .* is for data\.source of compress, plan and train"):
        find_sources("model", "data.source")
