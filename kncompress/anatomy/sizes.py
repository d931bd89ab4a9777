"""Sizes of the maps of each family, and the standard deviation of a fresh weight, from its transformers config."""

import math
from typing import Any


def gpt2_sizes(config: Any) -> dict[str, int]:
    """Of GPT-2."""
    return {
        "vocabulary": config.vocab_size,
        "width": config.n_embd,
        "head": config.n_embd // config.n_head,
        "hidden": config.n_inner or 4 * config.n_embd,
        "layers": config.n_layer,
    }


def gpt2_std(config: Any, residual: bool) -> float:
    """Of GPT-2: smaller where a map writes to the residual stream."""
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1.0)


def llama_sizes(config: Any) -> dict[str, int]:
    """Of Llama and its like, whose heads together may be wider or narrower than the residual stream."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "head": head,
        "hidden": config.intermediate_size,
        "queries": config.num_attention_heads * head,
        "keys": (config.num_key_value_heads or config.num_attention_heads) * head,
        "layers": config.num_hidden_layers,
    }


def opt_sizes(config: Any) -> dict[str, int]:
    """Of OPT, whose embedding may be narrower than the residual stream."""
    return {
        "vocabulary": config.vocab_size,
        "embedding": config.word_embed_proj_dim,
        "width": config.hidden_size,
        "head": config.hidden_size // config.num_attention_heads,
        "hidden": config.ffn_dim,
        "layers": config.num_hidden_layers,
    }


def bert_sizes(config: Any) -> dict[str, int]:
    """Of the families whose heads together are as wide as the residual stream."""
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "head": config.hidden_size // config.num_attention_heads,
        "hidden": config.intermediate_size,
        "layers": config.num_hidden_layers,
    }


def by_head(config: Any) -> dict[str, int]:
    """The same, with the rows of fused maps by head."""
    return bert_sizes(config) | {"blocks": config.num_attention_heads}


def gptj_sizes(config: Any) -> dict[str, int]:
    """Also GPT-Neo's: four times the width in the hidden layer where the config does not say."""
    hidden = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None)
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "head": config.hidden_size // config.num_attention_heads,
        "hidden": hidden or 4 * config.hidden_size,
        "layers": config.num_hidden_layers,
    }


def bloom_sizes(config: Any) -> dict[str, int]:
    """Of Bloom: four times the width in the hidden layer, fused maps by head."""
    return gptj_sizes(config) | {"blocks": config.num_attention_heads}


def falcon_sizes(config: Any) -> dict[str, int]:
    """Falcon-7b has one head of keys and values, Falcon-40b some, each beside its queries, Falcon-RW one for each."""
    sizes = gptj_sizes(config)
    heads = config.num_attention_heads
    keys = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    return sizes | {
        "hidden": config.ffn_hidden_size or 4 * config.hidden_size,
        "queries": heads * sizes["head"],
        "keys": keys * sizes["head"],
        "blocks": keys,
    }


def one_std(config: Any, residual: bool) -> float:
    """The same for every map, as most configs have it."""
    return config.init_std if config.model_type == "opt" else config.initializer_range
