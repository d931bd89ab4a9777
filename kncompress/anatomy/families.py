"""Which linear maps a model family has, as a table.

A family is one ``Family`` in ``FAMILIES``: where its maps live, which are fused, how their weights lie. The
rest of this package reads the table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MapRow:
    """One linear map of a layer. Rows that name the same module are fused in it, in table order."""

    name: str
    """Canonical name within the layer, e.g. ``attn.q``."""
    group: str
    """Group of ``FactorsConfig`` that it belongs to: ``qkv``, ``o`` or ``mlp``."""
    module: str
    """Path of the module within the layer."""
    outputs: str
    """Size (a key of ``Family.sizes``) of the output."""
    inputs: str
    """Size of the input."""
    mirrored: bool = False
    """Map out of the hidden layer: the group's right factor is transposed."""
    residual: bool = False
    """Writes to the residual stream."""


@dataclass(frozen=True)
class Family:
    """Table of one ``model_type``.

    Paths are relative to the base model, those of modules in a layer to the layer, those of the head to the
    whole model.
    """

    model_type: str
    embedding: str
    layers: str
    attention: str
    """Module of a layer that calls transformers' attention interface."""
    feed_forward: str
    """Module of a layer whose output joins the residual stream."""
    before_head: tuple[str, ...]
    """What the last layer's output passes before the head, in order; a model may lack some."""
    head: str
    rows: tuple[MapRow, ...]
    sizes: Callable[[Any], dict[str, int]]
    """Config -> ``vocabulary``, ``width`` (residual stream), ``layers``, ``head``, and the sizes that the rows name.
    ``embedding`` too where it is not as wide as the residual stream."""
    std: Callable[[Any, bool], float]
    """(config, residual) -> standard deviation of a fresh weight."""
    conv1d: bool = False
    """Weights of the layers' maps lie (in, out), as in transformers' ``Conv1D``."""
    by_head: bool = False
    """The rows of fused maps lie by head: those of the first head of each map, then those of the second, ..."""
    task: str = "causal-lm"
    """What its language models are for: a key of ``LANGUAGE_MODELS``."""
    rotary: bool = False
    """Queries and keys are turned by their positions within each head."""
    by_layer: tuple[str, ...] = ("layer_types",)
    """Config fields that hold a list with one entry a layer, where the config has them."""
    in_heads: tuple[str, ...] = ()
    """Modules of a layer with parameters of the size of a head, not of the residual stream."""
    head_reads_residual: bool = True
    """Between the last layer and the head are only norms of the residual stream."""
    optional: tuple[str, ...] = ()
    """Modules of the base model that some tasks have and others have not."""


LANGUAGE_MODELS = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM"}
"""Task -> auto class of transformers."""


def _gpt2_sizes(config: Any) -> dict[str, int]:
    return {
        "vocabulary": config.vocab_size,
        "width": config.n_embd,
        "head": config.n_embd // config.n_head,
        "hidden": config.n_inner or 4 * config.n_embd,
        "layers": config.n_layer,
    }


def _gpt2_std(config: Any, residual: bool) -> float:
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1.0)


def _llama_sizes(config: Any) -> dict[str, int]:
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


def _opt_sizes(config: Any) -> dict[str, int]:
    return {
        "vocabulary": config.vocab_size,
        "embedding": config.word_embed_proj_dim,
        "width": config.hidden_size,
        "head": config.hidden_size // config.num_attention_heads,
        "hidden": config.ffn_dim,
        "layers": config.num_hidden_layers,
    }


def _bert_sizes(config: Any) -> dict[str, int]:
    """Of the families whose heads together are as wide as the residual stream."""
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "head": config.hidden_size // config.num_attention_heads,
        "hidden": config.intermediate_size,
        "layers": config.num_hidden_layers,
    }


def _one_std(config: Any, residual: bool) -> float:
    return config.init_std if config.model_type == "opt" else config.initializer_range


def _llama_like(model_type: str, in_heads: tuple[str, ...] = ()) -> Family:
    return Family(
        model_type=model_type,
        embedding="embed_tokens",
        layers="layers",
        attention="self_attn",
        feed_forward="mlp",
        before_head=("model.norm",),
        head="lm_head",
        rows=(
            MapRow("attn.q", "qkv", "self_attn.q_proj", "queries", "width"),
            MapRow("attn.k", "qkv", "self_attn.k_proj", "keys", "width"),
            MapRow("attn.v", "qkv", "self_attn.v_proj", "keys", "width"),
            MapRow("attn.o", "o", "self_attn.o_proj", "width", "queries", residual=True),
            MapRow("mlp.gate", "mlp", "mlp.gate_proj", "hidden", "width"),
            MapRow("mlp.up", "mlp", "mlp.up_proj", "hidden", "width"),
            MapRow("mlp.down", "mlp", "mlp.down_proj", "width", "hidden", mirrored=True, residual=True),
        ),
        sizes=_llama_sizes,
        std=_one_std,
        rotary=True,
        in_heads=in_heads,
    )


_TABLE = (
    Family(
        model_type="gpt2",
        embedding="wte",
        layers="h",
        attention="attn",
        feed_forward="mlp",
        before_head=("transformer.ln_f",),
        head="lm_head",
        conv1d=True,
        rows=(
            MapRow("attn.q", "qkv", "attn.c_attn", "width", "width"),
            MapRow("attn.k", "qkv", "attn.c_attn", "width", "width"),
            MapRow("attn.v", "qkv", "attn.c_attn", "width", "width"),
            MapRow("attn.o", "o", "attn.c_proj", "width", "width", residual=True),
            MapRow("mlp.up", "mlp", "mlp.c_fc", "hidden", "width"),
            MapRow("mlp.down", "mlp", "mlp.c_proj", "width", "hidden", mirrored=True, residual=True),
        ),
        sizes=_gpt2_sizes,
        std=_gpt2_std,
    ),
    _llama_like("llama"),
    _llama_like("qwen2"),
    _llama_like("qwen3", in_heads=("self_attn.q_norm", "self_attn.k_norm")),
    Family(
        model_type="opt",
        embedding="decoder.embed_tokens",
        layers="decoder.layers",
        attention="self_attn",
        feed_forward="fc2",
        before_head=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        head="lm_head",
        rows=(
            MapRow("attn.q", "qkv", "self_attn.q_proj", "width", "width"),
            MapRow("attn.k", "qkv", "self_attn.k_proj", "width", "width"),
            MapRow("attn.v", "qkv", "self_attn.v_proj", "width", "width"),
            MapRow("attn.o", "o", "self_attn.out_proj", "width", "width", residual=True),
            MapRow("mlp.up", "mlp", "fc1", "hidden", "width"),
            MapRow("mlp.down", "mlp", "fc2", "width", "hidden", mirrored=True, residual=True),
        ),
        sizes=_opt_sizes,
        std=_one_std,
    ),
    Family(  # Pythia
        model_type="gpt_neox",
        embedding="embed_in",
        layers="layers",
        attention="attention",
        feed_forward="mlp",
        before_head=("gpt_neox.final_layer_norm",),
        head="lm_head",
        rows=(
            MapRow("attn.q", "qkv", "attention.query_key_value", "width", "width"),
            MapRow("attn.k", "qkv", "attention.query_key_value", "width", "width"),
            MapRow("attn.v", "qkv", "attention.query_key_value", "width", "width"),
            MapRow("attn.o", "o", "attention.dense", "width", "width", residual=True),
            MapRow("mlp.up", "mlp", "mlp.dense_h_to_4h", "hidden", "width"),
            MapRow("mlp.down", "mlp", "mlp.dense_4h_to_h", "width", "hidden", mirrored=True, residual=True),
        ),
        sizes=_bert_sizes,
        std=_one_std,
        by_head=True,
        rotary=True,
    ),
    Family(
        model_type="bert",
        embedding="embeddings.word_embeddings",
        layers="encoder.layer",
        attention="attention.self",
        feed_forward="output.dense",
        before_head=("cls.predictions.transform",),
        head="cls.predictions.decoder",
        rows=(
            MapRow("attn.q", "qkv", "attention.self.query", "width", "width"),
            MapRow("attn.k", "qkv", "attention.self.key", "width", "width"),
            MapRow("attn.v", "qkv", "attention.self.value", "width", "width"),
            MapRow("attn.o", "o", "attention.output.dense", "width", "width", residual=True),
            MapRow("mlp.up", "mlp", "intermediate.dense", "hidden", "width"),
            MapRow("mlp.down", "mlp", "output.dense", "width", "hidden", mirrored=True, residual=True),
        ),
        sizes=_bert_sizes,
        std=_one_std,
        task="masked-lm",
        head_reads_residual=False,
        optional=("pooler",),
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}
"""By the config's ``model_type``."""
