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


GROUPED = ("mistral", "smollm3", "gemma", "gemma2", "gemma3_text", "granite", "phi3", "olmo2")
"""Families with Llama's fields."""
_WINDOWS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
LAYERED = {
    "smollm3": _WINDOWS | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "gemma2": _WINDOWS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _WINDOWS | {"query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 4},
}
"""What each layer sees, of the families whose layers may differ."""
OLDER = {
    "gptj": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "rotary_dim": 4, "n_inner": 48},
    "gpt_neo": {"hidden_size": 24, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 32, "window_size": 4}
    | {"intermediate_size": 48, "attention_types": [[["global", "local", "local"], 1]]},
    "bloom": {"hidden_size": 24, "n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 32},
    "falcon": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 48},
}
FALCONS = {
    "7b": {},
    "rw": {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def config_of(kind):
    """Config of a kind, ``<model type>[.<variant>]...``: 3 layers, 24 wide, 96 tokens."""
    family, *variants = kind.split(".")
    if family in OLDER:
        names = dict(OLDER[family])
    elif family == "gpt2":
        names = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 32}
    else:
        names = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
        names["ffn_dim" if family == "opt" else "intermediate_size"] = 48
    if family in GROUPED:
        names |= {"num_key_value_heads": 2, "head_dim": 8}
    if family == "falcon":
        names |= FALCONS[variants[0] if variants else "7b"]
    if family in LAYERED:
        names |= LAYERED[family]
    if family in ("llama", "qwen3"):  # grouped queries; heads that together are wider than the residual stream
        names |= {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": "bias" in variants}
    if family == "llama":
        names["mlp_bias"] = "bias" in variants
    elif family == "qwen2":
        names["num_key_value_heads"] = 2
    elif family == "granite":
        names |= {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
        names["attention_multiplier"] = 0.2
    elif family == "stablelm":
        names |= {"qk_layernorm": True, "use_parallel_residual": "parallel" in variants, "num_key_value_heads": 2}
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
NEWER = ("mistral", "smollm3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "phi3")
NEWER += ("stablelm", "stablelm.parallel", "gptj", "gpt_neo", "bloom", "mpt", "falcon", "falcon.rw", "falcon.40b")
"""Families beside those; the default suite has one test of each, the slow one all."""
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
