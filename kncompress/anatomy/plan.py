"""Which map becomes which Kronecker sum: patterns over map names, checked against a model's sizes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.config import FactorConfig, FactorsConfig
from kncompress.errors import UserError
from kncompress.kron import KroneckerShape, Shape, ShapeError, parse_shape, with_scalars

Keep = Literal["keep"]


@dataclass(frozen=True)
class RightFactor:
    """Right factor and terms; the left factor follows from the size of each map."""

    right: tuple[int, int]
    """(m2, n2), out x in."""
    terms: int = 1
    key: str = ""
    """Config key that error messages name, e.g. ``factors.mlp``."""
    scalars: bool = False
    """Whether each term has a learned scalar."""

    def fit(self, site: Site) -> KroneckerShape:
        """The shape of one map.

        Raises:
            UserError: the factor does not fit it.
        """
        try:
            shape = KroneckerShape.fit(site.out_features, site.in_features, self.right, self.terms)
            return replace(shape, scalars=self.scalars)
        except ShapeError as error:
            prefix = f"{self.key}." if self.key else f"{site.name}: "
            raise UserError(f"{prefix}{error}") from error


Entry = Shape | RightFactor | Keep


class Plan:
    """Ordered {pattern: shape, right factor or ``keep``} over canonical map names; later entries win.

    Names are ``embedding``, ``head`` (where it is not tied), ``layers.{i}.attn.q|k|v|o`` and, in a GPT-2,
    ``layers.{i}.mlp.up|down``, in a Llama ``layers.{i}.mlp.gate|up|down``. Patterns are those of ``fnmatch``;
    ``*`` also matches dots. Maps that no pattern matches stay dense.
    """

    def __init__(self, entries: Mapping[str, Entry] | Sequence[tuple[str, Entry]] = ()) -> None:
        items = entries.items() if isinstance(entries, Mapping) else entries
        self.entries: tuple[tuple[str, Entry], ...] = tuple(items)

    def __repr__(self) -> str:
        lines = (f"  {pattern}: {entry}" for pattern, entry in self.entries)
        return "\n".join(("Plan", *lines))

    def resolve(self, source: Any) -> dict[str, Shape]:
        """Shape of every map that is factored, in the model's order.

        Args:
            source: transformers model or config, or an ``Anatomy``; no weights are read.

        Raises:
            UserError: a pattern matches nothing, or a shape does not fit its map.
        """
        anatomy = source if isinstance(source, Anatomy) else anatomy_of(source)
        chosen: dict[str, Shape | None] = {}
        for pattern, entry in self.entries:
            for site in _matches(pattern, anatomy):
                chosen[site.name] = _shape(pattern, entry, site)
        return {name: shape for name in anatomy.sites if (shape := chosen.get(name)) is not None}


def _matches(pattern: str, anatomy: Anatomy) -> list[Site]:
    found = [site for name, site in anatomy.sites.items() if fnmatchcase(name, pattern)]
    if found:
        return found
    if anatomy.tied and pattern == "head":
        raise UserError("factors.maps.head: the head is tied to the embedding; name embedding instead")
    near = get_close_matches(pattern, anatomy.sites, n=3, cutoff=0.5) or list(anatomy.sites)[:3]
    raise UserError(f"factors.maps.{pattern}: matches no map of the model; nearest names: {', '.join(near)}")


def _shape(pattern: str, entry: Entry, site: Site) -> Shape | None:
    if isinstance(entry, RightFactor):
        return entry.fit(site)
    if entry == "keep":
        return None
    if not isinstance(entry, Shape):
        raise UserError(f"factors.maps.{pattern}={entry}: not a Kronecker shape or keep")
    if site.group == "embedding" and not isinstance(entry, KroneckerShape):
        raise UserError(f"factors.maps.{pattern}={entry}: an embedding takes a single Kronecker shape, without + or p*")
    if (entry.out_features, entry.in_features) != (site.out_features, site.in_features):
        raise UserError(
            f"factors.maps.{pattern}={entry}: makes {entry.out_features}x{entry.in_features}, "
            f"but {site.name} is {site.out_features}x{site.in_features} (out x in)"
        )
    return entry


def plan_from_config(factors: FactorsConfig, source: Any) -> Plan:
    """The plan that ``factors`` asks of a model: its groups, then its explicit ``maps``.

    Args:
        factors: the config group; layers count from 0.
        source: transformers model or config, or an ``Anatomy``; no weights are read. Where ``factors.depth``
            drops layers: that of the student, of the kept layers alone.

    Raises:
        UserError: names the key at fault, e.g. ``factors.layers=[13]: the model has layers 0 to 11``.
    """
    anatomy = source if isinstance(source, Anatomy) else anatomy_of(source)
    entries: list[tuple[str, Entry]] = []
    for group in ("embedding", "qkv", "o", "mlp"):
        config = getattr(factors, group)
        if config is not None:
            entries.extend(_group(group, config, factors, anatomy))
    for pattern, text in factors.maps.items():
        entries.append((pattern, _explicit(pattern, text)))
    if factors.scalars:
        entries = [(pattern, _scaled(entry)) for pattern, entry in entries]
    plan = Plan(entries)
    plan.resolve(anatomy)
    return plan


def _group(group: str, config: FactorConfig, factors: FactorsConfig, anatomy: Anatomy) -> Iterator[tuple[str, Entry]]:
    key = f"factors.{group}"
    right = _right(key, config.right)
    if group == "embedding":
        if config.layers is not None:
            raise UserError(f"{key}.layers={config.layers}: the embedding has no layers; leave it out")
        yield "embedding", RightFactor(right, config.terms, key)
        return
    owner = "the model" if factors.depth is None else f"with factors.depth={factors.depth} the student"
    if config.layers is None:
        chosen = _layers("factors.layers", factors.layers, anatomy.layers, owner)
    else:
        chosen = _layers(f"{key}.layers", config.layers, anatomy.layers, owner)
    for site in anatomy.sites.values():
        if site.group == group and site.layer in chosen:
            yield site.name, RightFactor(right[::-1] if site.mirrored else right, config.terms, key)


def _scaled(entry: Entry) -> Entry:
    """The same with a learned scalar for each term."""
    if isinstance(entry, RightFactor):
        return replace(entry, scalars=True)
    if entry == "keep":
        return entry
    try:
        return with_scalars(entry)
    except ShapeError as error:
        raise UserError(f"factors.scalars=true: {error}") from error


def _right(key: str, value: Any) -> tuple[int, int]:
    sides = list(value)
    if len(sides) != 2:
        raise UserError(f"{key}.right={sides}: must be two numbers, rows and columns of the right factor")
    return sides[0], sides[1]


def _layers(key: str, value: Any, count: int, owner: str) -> list[int]:
    """Layer numbers that ``value`` names, in a model of ``count`` layers."""
    named = {"all": range(count), "odd": range(1, count, 2), "even": range(0, count, 2)}
    known = f"{owner} has layers 0 to {count - 1}"
    if isinstance(value, str):
        if value not in named:
            raise UserError(f"{key}={value}: not one of all, odd, even or a list of layers; {known}")
        chosen = list(named[value])
    else:
        chosen = list(value) if isinstance(value, list | tuple) else [value]
        if any(type(layer) is not int or not 0 <= layer < count for layer in chosen):
            raise UserError(f"{key}={chosen}: {known}")
    if not chosen:
        raise UserError(f"{key}={value}: names no layer; {known}")
    return chosen


def _explicit(pattern: str, text: str) -> Entry:
    if text == "keep":
        return "keep"
    try:
        return parse_shape(text)
    except ShapeError as error:
        raise UserError(f"factors.maps.{pattern}={text}: {error}; or keep") from error
