"""Which linear maps a model family has, as a table.

A family is one ``Family`` in ``FAMILIES``: where its maps live, which are fused, how their weights lie. The
rest of this package reads the table. No weights are needed, a transformers config is enough.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kncompress.errors import UserError


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
    """Table of one ``model_type``. Paths are relative to the base model, ``head`` to the whole model."""

    model_type: str
    embedding: str
    layers: str
    attention: str
    feed_forward: str
    final_norm: str
    """What the last layer's output passes before the head."""
    head: str
    conv1d: bool
    """Weights of the layers' maps lie (in, out), as in transformers' ``Conv1D``."""
    rows: tuple[MapRow, ...]
    sizes: Callable[[Any], dict[str, int]]
    """Config -> ``vocabulary``, ``width`` (residual stream), ``layers``, ``head``, and the sizes that the rows name."""
    std: Callable[[Any, bool], float]
    """(config, residual) -> standard deviation of a fresh weight."""
    rotary: bool = False
    """Queries and keys are turned by their positions within each head."""
    by_layer: tuple[str, ...] = ("layer_types",)
    """Config fields that hold a list with one entry a layer, where the config has them."""


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


def _llama_std(config: Any, residual: bool) -> float:
    return config.initializer_range


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        model_type="gpt2",
        embedding="wte",
        layers="h",
        attention="attn",
        feed_forward="mlp",
        final_norm="ln_f",
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
    "llama": Family(
        model_type="llama",
        embedding="embed_tokens",
        layers="layers",
        attention="self_attn",
        feed_forward="mlp",
        final_norm="norm",
        head="lm_head",
        conv1d=False,
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
        std=_llama_std,
        rotary=True,
    ),
}


@dataclass(frozen=True)
class Site:
    """One map of one model: its canonical name, where it lives, and its size."""

    name: str
    group: str
    """``embedding``, ``head``, ``qkv``, ``o`` or ``mlp``."""
    layer: int | None
    module: str
    """Path in the base model; in the whole model for the head."""
    part: str | None
    """Name of this map inside a fused module; None where the module is the map."""
    start: int
    """First row of this map in the fused weight (out, in)."""
    out_features: int
    in_features: int
    conv1d: bool
    mirrored: bool
    std: float


@dataclass(frozen=True)
class Anatomy:
    """All maps of one model in forward order, by canonical name."""

    family: Family
    sites: Mapping[str, Site]
    layers: int
    tied: bool
    """The head's weight is the embedding's."""
    has_head: bool

    def modules(self) -> Iterator[tuple[str, list[Site]]]:
        """Each module that holds maps, with its maps in the order of their outputs."""
        for module, sites in groupby(self.sites.values(), key=lambda site: site.module):
            yield module, list(sites)


def anatomy_of(source: Any, config: Any = None) -> Anatomy:
    """Anatomy of a transformers model or config (of a config: with a language-model head).

    The head is a map of its own (``head``) only where it is not tied to the embedding.

    Args:
        source: the model or its config; no weights are read.
        config: what to go by instead of the model's own config, e.g. one of fewer layers.

    Raises:
        UserError: the family has no table.
    """
    if config is None:
        config = getattr(source, "config", source)
    family = family_of(source, config)
    sizes = family.sizes(config)
    has_head = not hasattr(source, "named_modules") or getattr(source, family.head, None) is not None
    tied = bool(getattr(config, "tie_word_embeddings", True))
    sites = [_end("embedding", family.embedding, sizes, family.std(config, False))]
    for layer in range(sizes["layers"]):
        sites.extend(_layer_sites(family, config, sizes, layer))
    if has_head and not tied:
        sites.append(_end("head", family.head, sizes, family.std(config, False)))
    return Anatomy(family, {site.name: site for site in sites}, sizes["layers"], tied, has_head)


def family_of(source: Any, config: Any = None) -> Family:
    """The table of a transformers model or config.

    Raises:
        UserError: there is none; tells the module types that hold the model's matrices.
    """
    config = getattr(source, "config", source) if config is None else config
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    kinds = _matrix_modules(source)
    found = "; it has " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) if kinds else ""
    raise UserError(
        f"model_type={model_type}: no table of its maps{found}; known: {', '.join(sorted(FAMILIES))}; a new family is "
        "one entry of FAMILIES in kncompress/models/anatomy.py: the paths of its maps, which are fused, their sizes"
    )


def _matrix_modules(source: Any) -> Counter[str]:
    """How many modules of each type hold a matrix; nothing for a config that transformers builds no model of."""
    if not hasattr(source, "named_modules"):
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                source = AutoModelForCausalLM.from_config(source)
        except Exception:  # any family's own code; the message goes without the types
            return Counter()
    return Counter(
        type(module).__name__
        for _, module in source.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def _end(name: str, module: str, sizes: dict[str, int], std: float) -> Site:
    """Embedding or head: both (vocabulary, width), never fused."""
    return Site(name, name, None, module, None, 0, sizes["vocabulary"], sizes["width"], False, False, std)


def _layer_sites(family: Family, config: Any, sizes: dict[str, int], layer: int) -> Iterator[Site]:
    fused = Counter(row.module for row in family.rows)
    start: Counter[str] = Counter()
    for row in family.rows:
        yield Site(
            name=f"layers.{layer}.{row.name}",
            group=row.group,
            layer=layer,
            module=f"{family.layers}.{layer}.{row.module}",
            part=row.name.rpartition(".")[2] if fused[row.module] > 1 else None,
            start=start[row.module],
            out_features=sizes[row.outputs],
            in_features=sizes[row.inputs],
            conv1d=family.conv1d,
            mirrored=row.mirrored,
            std=family.std(config, row.residual),
        )
        start[row.module] += sizes[row.outputs]
