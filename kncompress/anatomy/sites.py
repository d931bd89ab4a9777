"""The linear maps of one model, from its family's table; no weights are needed, a transformers config is enough."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from kncompress.anatomy.families import FAMILIES, Family
from kncompress.errors import UserError

LAYERS_AT_MOST, SIZE_AT_MOST = 2_000, 2**28
"""The largest models of today have 126 layers, rows of 16,384 and 262,144 tokens."""


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
    """First row of this map in the fused weight (out, in), or in each of its blocks."""
    blocks: int
    """Equal blocks of the fused weight that hold some rows of each map: 1, or as many as there are heads."""
    out_features: int
    in_features: int
    conv1d: bool
    mirrored: bool
    std: float

    @property
    def kind(self) -> str:
        """The name without its layer, as ``mlp.up``."""
        return place_of(self.name).kind


class Place(NamedTuple):
    """Where the name of a map puts it."""

    layer: int | None
    """None for embedding and head."""
    kind: str
    """The name without its layer."""


def place_of(name: str) -> Place:
    """Layer and kind of a map: (3, ``mlp.up``) for ``layers.3.mlp.up``."""
    match name.split(".", 2):
        case ["layers", layer, kind] if layer.isdecimal():
            return Place(int(layer), kind)
    return Place(None, name)


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
    has_head = not hasattr(source, "named_modules") or _has(source, family.head)
    tied = bool(getattr(config, "tie_word_embeddings", True)) and not _apart(source, family)
    sites = [_end("embedding", family.embedding, sizes, family.std(config, False))]
    for layer in range(sizes["layers"]):
        sites.extend(_layer_sites(family, config, sizes, layer))
    if has_head and not tied:
        sites.append(_end("head", family.head, sizes, family.std(config, False)))
    return Anatomy(family, {site.name: site for site in sites}, sizes["layers"], tied, has_head)


def check_sizes(config: Any, subject: str) -> None:
    """Raises UserError, which begins with ``subject``, for a config whose numbers make no model that could be.

    A damaged or a stranger's one would take minutes to build a million layers. Families without a table pass.
    """
    family = FAMILIES.get(getattr(config, "model_type", None) or "")
    if family is None:
        return
    try:
        sizes = family.sizes(config)
    except (ArithmeticError, TypeError, AttributeError) as error:
        raise UserError(f"{subject}: its sizes make no model ({error})") from None
    for name, size in sizes.items():
        most = LAYERS_AT_MOST if name == "layers" else SIZE_AT_MOST
        if type(size) is not int or not 1 <= size <= most:
            raise UserError(f"{subject}: {name}={size}: must be a whole number from 1 to {most:,}")


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
        "one entry of the table in kncompress/anatomy/families.py: the paths of its maps, which are fused, their sizes"
    )


def language_task(config: Any) -> str:
    """What the language models of this config are for, a key of ``LANGUAGE_MODELS``; no table is needed.

    Raises:
        UserError: transformers has no such model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type].task
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    raise UserError(f"model_type={model_type}: transformers has no model of it that predicts the next token")


def heads_agree(model: Any) -> bool:
    """Whether a model's head is the embedding where its config says so; true for families without a table."""
    family = FAMILIES.get(model.config.model_type)
    return family is None or not (getattr(model.config, "tie_word_embeddings", False) and _apart(model, family))


def _apart(source: Any, family: Family) -> bool:
    """Whether a model has a head of its own beside the embedding, whatever its config says.

    Before their weights are read (on the meta device) the two are not tied yet: then the config decides.
    """
    if not hasattr(source, "named_modules") or not _has(source, family.head):
        return False
    ends = (source.base_model.get_submodule(family.embedding), source.get_submodule(family.head))
    table, head = (next(end.parameters(), None) for end in ends)
    if table is None or head is None or table.is_meta or head.is_meta:
        return False
    return table is not head and table.data_ptr() != head.data_ptr()


def positions_of(config: Any) -> int:
    """Tokens that a model of this config reads at once: what it says under any name, or 2,048 where it says nothing.

    Biases that grow with the distance (ALiBi) and states that go from token to token set no limit of their own.
    """
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_ctx"))
    return next((value for value in named if isinstance(value, int)), 2048)


def _has(model: Any, path: str) -> bool:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model is not None


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
    """Embedding or head: both (vocabulary, width of the embedding), never fused."""
    width = sizes.get("embedding", sizes["width"])
    return Site(name, name, None, module, None, 0, 1, sizes["vocabulary"], width, False, False, std)


def _layer_sites(family: Family, config: Any, sizes: dict[str, int], layer: int) -> Iterator[Site]:
    fused = Counter(row.module for row in family.rows)
    start: Counter[str] = Counter()
    for row in family.rows:
        blocks = sizes.get("blocks", 1) if fused[row.module] > 1 else 1
        yield Site(
            name=f"layers.{layer}.{row.name}",
            group=row.group,
            layer=layer,
            module=f"{family.layers}.{layer}.{row.module}",
            part=row.name.rpartition(".")[2] if fused[row.module] > 1 else None,
            start=start[row.module],
            blocks=blocks,
            out_features=sizes[row.outputs],
            in_features=sizes[row.inputs],
            conv1d=family.conv1d,
            mirrored=row.mirrored,
            std=family.std(config, row.residual),
        )
        start[row.module] += sizes[row.outputs] // blocks
