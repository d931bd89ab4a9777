"""Tiny models for the tests of this folder: a GPT-2, and one of every kind that a family comes in."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel
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
    """Config of a kind, ``<model type>[.<variant>]...``: 3 layers, 24 wide, 96 tokens."""
    family, *variants = kind.split(".")
    if family == "gpt2":
        names = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 32}
    else:
        names = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
        names["ffn_dim" if family == "opt" else "intermediate_size"] = 48
    if family in ("llama", "qwen3"):  # grouped queries; heads that together are wider than the residual stream
        names |= {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": "bias" in variants}
    if family == "llama":
        names["mlp_bias"] = "bias" in variants
    elif family == "qwen2":
        names["num_key_value_heads"] = 2
    elif family == "opt":  # as opt-350m: norms after each part, embeddings narrower than the residual stream
        narrow = "narrow" in variants
        names |= {"word_embed_proj_dim": 12 if narrow else 24, "do_layer_norm_before": not narrow}
    return AutoConfig.for_model(
        family,
        vocab_size=96,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings="untied" not in variants,
        **names,
    )


KINDS = ("gpt2", "gpt2.untied", "llama", "llama.untied", "llama.bias")
"""Causal language models that every test of this folder with a ``kind`` is run on."""
RARE = ("qwen2.untied", "qwen3", "opt", "gpt_neox.untied")
"""The same in the slow suite; test_families has them in the default one."""
FURTHER = ("qwen2", "qwen3.untied.bias", "opt.untied", "opt.narrow", "gpt_neox", "bert", "bert.untied")
"""Further ones, and masked language models, for test_families."""


@pytest.fixture(params=[*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in RARE)])
def kind(request):
    return request.param


@pytest.fixture
def model_of_kind(kind):
    """Dense, in evaluation mode; every parameter random, so that a lost one shows."""
    return random_model(config_of(kind))


def random_model(config):
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
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
