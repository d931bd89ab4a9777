"""Which linear maps a model family has, as a table.

A family is one ``Family`` in ``FAMILIES``: where its maps live, which are fused, how their weights lie. The
rest of this package reads the table.
"""

from kncompress.anatomy.family import LANGUAGE_MODELS, Family, MapRow
from kncompress.anatomy.sizes import (
    bert_sizes,
    bloom_sizes,
    by_head,
    falcon_sizes,
    gpt2_sizes,
    gpt2_std,
    gptj_sizes,
    llama_sizes,
    one_std,
    opt_sizes,
)

__all__ = ["FAMILIES", "LANGUAGE_MODELS", "Family", "MapRow"]

_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_FUSED = ("self_attn.qkv_proj",) * 3 + ("mlp.gate_up_proj",) * 2


def _llama_like(
    model_type: str,
    in_heads: tuple[str, ...] = (),
    feed_forward: str = "mlp",
    reading: tuple[str, ...] = _SPLIT,
    by_layer: tuple[str, ...] = ("layer_types",),
) -> Family:
    """A family whose layers have Llama's maps; ``reading``: modules of those that read the residual stream."""
    q, k, v, gate, up = reading
    return Family(
        model_type=model_type,
        embedding="embed_tokens",
        layers="layers",
        attention="self_attn",
        feed_forward=feed_forward,
        before_head=("model.norm",),
        head="lm_head",
        rows=(
            MapRow("attn.q", "qkv", q, "queries", "width"),
            MapRow("attn.k", "qkv", k, "keys", "width"),
            MapRow("attn.v", "qkv", v, "keys", "width"),
            MapRow("attn.o", "o", "self_attn.o_proj", "width", "queries", residual=True),
            MapRow("mlp.gate", "mlp", gate, "hidden", "width"),
            MapRow("mlp.up", "mlp", up, "hidden", "width"),
            MapRow("mlp.down", "mlp", "mlp.down_proj", "width", "hidden", mirrored=True, residual=True),
        ),
        sizes=llama_sizes,
        std=one_std,
        rotary=True,
        in_heads=in_heads,
        by_layer=by_layer,
    )


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_AFTER = "post_feedforward_layernorm"
"""Where the feed-forward part has a norm behind it."""


def _attention_then_mlp(names: tuple[str, ...], keys: str = "width", queries: str = "width") -> tuple[MapRow, ...]:
    """Rows of a layer whose feed-forward part has two maps: the modules of q, k, v, o, up and down."""
    q, k, v, o, up, down = names
    return (
        MapRow("attn.q", "qkv", q, queries, "width"),
        MapRow("attn.k", "qkv", k, keys, "width"),
        MapRow("attn.v", "qkv", v, keys, "width"),
        MapRow("attn.o", "o", o, "width", queries, residual=True),
        MapRow("mlp.up", "mlp", up, "hidden", "width"),
        MapRow("mlp.down", "mlp", down, "width", "hidden", mirrored=True, residual=True),
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
        sizes=gpt2_sizes,
        std=gpt2_std,
    ),
    _llama_like("llama"),
    _llama_like("qwen2"),
    _llama_like("qwen3", in_heads=_HEAD_NORMS),
    _llama_like("mistral"),
    _llama_like("smollm3", by_layer=("layer_types", "no_rope_layers")),
    _llama_like("granite"),
    _llama_like("gemma"),
    _llama_like("gemma2", feed_forward=_AFTER),
    _llama_like("gemma3_text", in_heads=_HEAD_NORMS, feed_forward=_AFTER),
    _llama_like("olmo2", in_heads=_HEAD_NORMS, feed_forward=_AFTER),
    _llama_like("phi3", reading=_FUSED),
    _llama_like("stablelm", in_heads=("self_attn.q_layernorm", "self_attn.k_layernorm")),
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
        sizes=opt_sizes,
        std=one_std,
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
        sizes=by_head,
        std=one_std,
        rotary=True,
    ),
    Family(
        model_type="gptj",
        embedding="wte",
        layers="h",
        attention="attn",
        feed_forward="mlp",
        before_head=("transformer.ln_f",),
        head="lm_head",
        rows=_attention_then_mlp(
            ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
        ),
        sizes=gptj_sizes,
        std=one_std,
        rotary=True,
    ),
    Family(
        model_type="gpt_neo",
        embedding="wte",
        layers="h",
        attention="attn.attention",
        feed_forward="mlp",
        before_head=("transformer.ln_f",),
        head="lm_head",
        rows=_attention_then_mlp(
            (
                "attn.attention.q_proj",
                "attn.attention.k_proj",
                "attn.attention.v_proj",
                "attn.attention.out_proj",
                "mlp.c_fc",
                "mlp.c_proj",
            )
        ),
        sizes=gptj_sizes,
        std=one_std,
        by_layer=("attention_layers",),
    ),
    Family(
        model_type="bloom",
        embedding="word_embeddings",
        layers="h",
        attention="self_attention",
        feed_forward="mlp.dense_4h_to_h",
        before_head=("transformer.ln_f",),
        head="lm_head",
        rows=_attention_then_mlp(
            (
                *["self_attention.query_key_value"] * 3,
                "self_attention.dense",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            )
        ),
        sizes=bloom_sizes,
        std=one_std,
    ),
    Family(
        model_type="mpt",
        embedding="wte",
        layers="blocks",
        attention="attn",
        feed_forward="ffn.down_proj",
        before_head=("transformer.norm_f",),
        head="lm_head",
        rows=_attention_then_mlp((*["attn.Wqkv"] * 3, "attn.out_proj", "ffn.up_proj", "ffn.down_proj")),
        sizes=gptj_sizes,
        std=one_std,
    ),
    Family(
        model_type="falcon",
        embedding="word_embeddings",
        layers="h",
        attention="self_attention",
        feed_forward="mlp",
        before_head=("transformer.ln_f",),
        head="lm_head",
        rows=_attention_then_mlp(
            (
                *["self_attention.query_key_value"] * 3,
                "self_attention.dense",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            ),
            keys="keys",
            queries="queries",
        ),
        sizes=falcon_sizes,
        std=one_std,
        rotary=True,
        adds_in_place=True,
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
        sizes=bert_sizes,
        std=one_std,
        task="masked-lm",
        head_reads_residual=False,
        optional=("pooler",),
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}
"""By the config's ``model_type``."""
