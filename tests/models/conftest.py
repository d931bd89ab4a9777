"""Tiny models for the tests of this folder: a GPT-2, and one of every kind that a family comes in."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.utils import logging

logging.disable_progress_bar()


@pytest.fixture
def tiny_config():
    return GPT2Config(
        vocab_size=96,
        n_embd=24,
        n_layer=3,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )


@pytest.fixture
def tiny(tiny_config):
    """Dense, in evaluation mode; biases random, so that a lost one shows."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def config_of(kind):
    """Config of one of ``KINDS``: 3 layers, 24 wide, 96 tokens."""
    if kind.startswith("gpt2"):
        names = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 32}
    else:  # grouped queries; heads that together are wider than the residual stream
        names = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        names |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
        names |= dict.fromkeys(("attention_bias", "mlp_bias"), "bias" in kind)
    build = GPT2Config if kind.startswith("gpt2") else LlamaConfig
    return build(
        vocab_size=96,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings="untied" not in kind,
        **names,
    )


KINDS = ("gpt2", "gpt2_untied", "llama", "llama_untied", "llama_bias")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model_of_kind(kind):
    """Dense, in evaluation mode; every parameter random, so that a lost one shows."""
    return random_model(config_of(kind))


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.mul_(10)
    return model


@pytest.fixture
def ids():
    return torch.randint(2, 96, (2, 7), generator=torch.Generator().manual_seed(1))
