"""What a family of models is: where its linear maps lie, which are fused, how their weights lie."""

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
    ``embedding`` too where it is not as wide as the residual stream; ``blocks`` where the rows of fused maps lie by
    head, or by group of heads: those of the first of each map, then those of the second, ..."""
    std: Callable[[Any, bool], float]
    """(config, residual) -> standard deviation of a fresh weight."""
    conv1d: bool = False
    """Weights of the layers' maps lie (in, out), as in transformers' ``Conv1D``."""
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
    adds_in_place: bool = False
    """A layer adds to the output of its feed-forward part in place."""
    optional: tuple[str, ...] = ()
    """Modules of the base model that some tasks have and others have not."""


LANGUAGE_MODELS = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM"}
"""Task -> auto class of transformers."""
