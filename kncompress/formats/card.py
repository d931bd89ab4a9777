"""The model card of a saved folder: README.md with what the hub reads in front, ready for ``push_to_hub``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kncompress.anatomy.sites import anatomy_of, place_of
from kncompress.kron import parse_shape

TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
}
"""End of a model class's name -> what the hub calls its task, and the auto class that loads it."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CardFacts:
    """Facts about a model that its folder does not hold."""

    base: str | None = None
    """Model that it was made from: a hub id, or where it lay."""
    data: Any = None
    """Text that it was trained or calibrated on: a source as in ``data.source``."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As in ``result.json``."""


def card_text(model: Any, facts: CardFacts | None = None) -> str:
    """Markdown: parameters, plan, data, metrics, how to load; in front of it the fields that the hub reads.

    Args:
        model: transformers model of a family with an anatomy, dense or compressed.
        facts: what else is known.
    """
    facts = facts or CardFacts()
    config = getattr(model.config, "quantization_config", None)
    maps: dict[str, str] = dict(getattr(config, "maps", {}))
    name = type(model).__name__
    task, auto = next((value for end, value in TASKS.items() if name.endswith(end)), (None, "AutoModel"))
    parts = [
        _front(task, facts.base, bool(maps)),
        f"# {'Compressed ' if maps else ''}{name}\n\n" + _parameters(model, maps),
        _source(facts),
        _metrics(facts.metrics),
        _plan(maps),
        _loading(auto, bool(maps)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(task: str | None, base: str | None, factored: bool) -> str:
    from huggingface_hub import ModelCardData

    if base is not None and (not _HUB_ID.fullmatch(base) or Path(base).exists()):  # the hub takes ids alone
        base = None
    tags = ["kncompress", "kronecker"] if factored else ["kncompress"]
    data = ModelCardData(library_name="transformers", pipeline_tag=task, base_model=base, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _parameters(model: Any, maps: Mapping[str, str]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    text = f"{count:,} parameters, embedding and head included, shared ones counted once."
    if not maps:
        return text
    shapes = [parse_shape(shape) for shape in maps.values()]
    dense = count + sum(shape.dense_parameters - shape.parameters for shape in shapes)
    return (
        f"{text} {len(maps)} of {len(anatomy_of(model).sites)} linear maps are Kronecker sums; with dense ones in "
        f"their place the model has {dense:,} ({count / dense:.1%} are left)."
    )


def _source(facts: CardFacts) -> str:
    lines = [
        f"- {label}: {_place(value)}" for label, value in (("made from", facts.base), ("text", facts.data)) if value
    ]
    return "\n".join(["## Source", "", *lines]) if lines else ""


def _place(value: Any) -> str:
    """A source, or a list of them, as others may read it: of a local path its last name."""
    if not isinstance(value, str):
        return ", ".join(_place(item) for item in value)
    return Path(value).name if Path(value).is_absolute() or Path(value).exists() else value


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = [f"| {name} | {value:,.6g} |" for name, value in metrics.items()]
    return "\n".join(["## Metrics", "", "| metric | value |", "| --- | ---: |", *rows])


def _plan(maps: Mapping[str, str]) -> str:
    """A line for each shape, equal ones of several layers together."""
    if not maps:
        return ""

    groups: dict[tuple[str, str], list[int]] = {}
    for name, shape in maps.items():
        layer, kind = place_of(name)
        layers = groups.setdefault((kind if layer is None else f"layers.*.{kind}", shape), [])
        layers.extend([] if layer is None else [layer])
    rows = [
        f"| {name} | {', '.join(map(str, sorted(layers))) or '-'} | {shape} |"
        for (name, shape), layers in sorted(groups.items())
    ]
    return "\n".join(["## Plan", "", "| map | layers | shape |", "| --- | --- | --- |", *rows])


def _loading(auto: str, factored: bool) -> str:
    lines = ["## Use", ""]
    if factored:
        lines += ["`pip install kncompress`; importing it lets transformers read the factors.", ""]
    lines += ["```python", *(["import kncompress"] if factored else []), f"from transformers import {auto}", ""]
    return "\n".join([*lines, f'model = {auto}.from_pretrained("this folder or its hub id")', "```"])
