"""Part ``product``: a factored map against what the dense model runs, forward and forward with backward."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.plan import Plan, plan_from_config
from kncompress.anatomy.sites import Site, anatomy_of
from kncompress.anatomy.swap import FusedMaps, module_at
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.rivals import RIVALS, Unavailable, check_backward
from kncompress.bench.setting import Setting, random_model
from kncompress.bench.timing import alternate, once
from kncompress.compression.compress import compress_
from kncompress.config import FactorsConfig
from kncompress.errors import UserError
from kncompress.kron import HybridLinear, KroneckerLinear, PackedLinear, Shape
from kncompress.planner.budget import advantage
from kncompress.planner.candidates import outer, packed, packed_rank, sums
from kncompress.terminal import named_line

DENSE, LINEAR = "dense", "nn.Linear"
OUTER, PACKED, SPEEDY = "outer", "packed", "speed"
"""Not presets but shapes: outer products of half the parameters; the same, packed; all that a planner may choose under
``speed``."""
_HOPELESS, _SECONDS = 50, 0.5
"""A rival that takes this many times as long as ours, and this many seconds, for an eighth of the tokens is named and
not timed."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """One module of a student, and the one of the dense model in whose place it stands."""

    name: str
    shapes: tuple[Shape | None, ...]
    """Of each map that the module holds; None where it stays dense."""
    ours: nn.Module
    dense: nn.Module
    inputs: int
    outputs: int

    @property
    def multiply_adds(self) -> int:
        """Of ours, for one token."""
        dense = self.inputs * self.outputs // len(self.shapes)
        return sum(dense if shape is None else shape.multiply_adds for shape in self.shapes)

    @property
    def promised(self) -> float:
        """Dense multiply-adds over ours."""
        return self.inputs * self.outputs / self.multiply_adds

    @property
    def parameters(self) -> int:
        """Of ours."""
        return sum(parameter.numel() for parameter in self.ours.parameters())


def measure_products(setting: Setting, presets: Mapping[str, FactorsConfig]) -> Iterator[Measurement]:
    """Every kind of map that each preset factors; presets that do not fit the model are told and left out."""
    fields = copy.deepcopy(setting.fields)
    fields.num_hidden_layers = min(2, fields.num_hidden_layers)  # layers are alike, and 1 is odd
    dense = random_model(fields, setting.config.seed, setting.device, setting.dtype)
    for name in setting.config.presets:
        try:
            plans = list(_plans(name, presets, fields))
        except UserError as error:
            setting.say(f"product: {name} does not fit: {error}")
            continue
        for label, plan in plans:
            for case in _cases(label, plan, dense):
                setting.say(f"product: {case.name}")
                for backward in (False, True):
                    yield _measure(setting, case, backward)


def _plans(name: str, presets: Mapping[str, FactorsConfig], fields: Any) -> Iterator[tuple[str, Plan]]:
    """Label and plan: one of a preset, many of the shapes under ``speed``."""
    if name not in (OUTER, PACKED, SPEEDY):
        yield name, plan_from_config(presets[name], fields)
        return
    sites = [site for site in anatomy_of(fields).sites.values() if site.layer == 0]
    kinds = {site.name: _shapes(name, site) for site in sites}
    for number in range(max(map(len, kinds.values()))):
        entries = [(site, shapes[number]) for site, shapes in kinds.items() if number < len(shapes)]
        label = f"{name}/{number}" if name == SPEEDY else name
        yield label, Plan(entries)


def _shapes(name: str, site: Site) -> list[Shape]:
    outputs, inputs = site.out_features, site.in_features
    half = outputs * inputs // (outputs + inputs) // 2
    if name == OUTER:
        return [outer(outputs, inputs, max(1, half))]
    if name == PACKED:
        return [_packed(outputs, inputs, 0.5)]
    found: list[Shape] = [outer(outputs, inputs, max(1, rank)) for rank in (half // 4, half, int(1.5 * half))]
    found += [_packed(outputs, inputs, share) for share in (0.125, 0.5, 0.75, 0.9)]
    found += [shape for kind in sums(outputs, inputs) for shape in kind]
    return [shape for shape in found if advantage(shape) * shape.multiply_adds <= outputs * inputs]


def _packed(outputs: int, inputs: int, share: float) -> Shape:
    """Packed outer products of this share of the dense map's parameters."""
    return packed(outputs, inputs, max(1, int(packed_rank(outputs, inputs, share * outputs * inputs))))


def _cases(label: str, plan: Plan, dense: Any) -> Iterator[Case]:
    """One case for each kind of map: equal ones of several layers are measured once."""
    student = copy.deepcopy(dense)
    compress_(student, plan, "random")
    anatomy = anatomy_of(dense)
    shapes = plan.resolve(anatomy)
    seen: set[str] = set()
    for _, sites in anatomy.modules():
        if not any(site.name in shapes for site in sites):
            continue
        kind = kind_of_module(sites)
        if kind in seen or (kind == "embedding" and not (anatomy.tied and anatomy.has_head)):
            continue
        seen.add(kind)
        if kind == "embedding":
            kind, ours, module = "head", student.get_output_embeddings(), dense.get_output_embeddings()
        else:
            ours, module = (module_at(model, sites[0]) for model in (student, dense))
        outputs = sum(site.out_features for site in sites)
        found = tuple(shapes.get(site.name) for site in sites)
        yield Case(f"product/{label}/{kind}", found, ours, module, sites[0].in_features, outputs)


def kind_of_module(sites: list[Site]) -> str:
    """``mlp.up``; ``attn.qkv`` for maps that the dense model keeps in one module."""
    kinds = [site.kind for site in sites]
    prefix = kinds[0].rpartition(".")[0]
    return kinds[0] if len(kinds) == 1 else f"{prefix}." + "".join(kind.rpartition(".")[2] for kind in kinds)


def _measure(setting: Setting, case: Case, backward: bool) -> Measurement:
    tokens, dtype = setting.sizes.tokens, setting.dtype
    x = torch.randn(tokens, case.inputs, device=setting.device).to(dtype)
    upstream = torch.randn(tokens, case.outputs, device=setting.device).to(dtype)
    modules = {OURS: case.ours, DENSE: case.dense, LINEAR: _linear(case).to(setting.device, dtype)}
    missing: dict[str, str] = {}
    rivals = {} if case.name.startswith(f"product/{SPEEDY}/") else RIVALS  # many shapes, and one question: above 1.0x?
    for name, build in rivals.items():
        try:
            if backward:
                check_backward(name, setting.device, dtype)
            modules[name] = rival_of(case.ours, build)
            check_pace(case.ours, modules[name], x, setting.device)
            _check_equal(case.ours, modules[name], x)
            if backward:
                _call(modules[name], x, upstream)()
        except Unavailable as error:
            missing[name] = str(error)
        except Exception as error:  # whatever another package fails with: it is named, and the others go on
            missing[name] = f"failed: {named_line(error)}"
        if name in missing:
            modules.pop(name, None)
    calls = {name: _call(module, x, upstream if backward else None) for name, module in modules.items()}
    rounds = alternate(calls, setting.sizes.repeats, setting.device)
    passes = 3 if backward else 1
    vectors = case.inputs + case.outputs + (2 * case.inputs + case.outputs if backward else 0)
    numbers = tokens * vectors + passes * case.parameters
    return Measurement(
        f"{case.name}/{'step' if backward else 'forward'}",
        f"{' | '.join(dict.fromkeys('dense' if s is None else str(s) for s in case.shapes))}, {tokens:,} tokens",
        rounds.medians,
        {name: rounds.ratio(name, OURS) for name in modules if name != OURS},
        DENSE,
        case.promised,
        setting.ceiling.seconds(2 * passes * tokens * case.multiply_adds, numbers * setting.number_bytes),
        missing=missing,
        operators=setting.operators(calls[OURS]),
    )


def _call(module: nn.Module, x: Tensor, upstream: Tensor | None) -> Callable[[], object]:
    """The forward pass without a graph, or with one and the gradients of inputs and parameters."""
    if upstream is None:

        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return forward
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    for parameter in module.parameters():
        parameter.requires_grad_()
    return lambda: torch.autograd.grad(module(x), wanted, upstream)


def _linear(case: Case) -> nn.Linear:
    return nn.Linear(case.inputs, case.outputs, getattr(case.dense, "bias", None) is not None)


def rival_of(ours: nn.Module, build: Callable[[KroneckerLinear], nn.Module]) -> nn.Module:
    """``ours`` with each factored layer in a rival's form."""
    if isinstance(ours, FusedMaps):
        return FusedMaps({name: rival_of(child, build) for name, child in ours.named_children()}, ours.blocks)
    if isinstance(ours, HybridLinear):
        raise Unavailable("no sums of several shapes")
    if isinstance(ours, PackedLinear):
        raise Unavailable("no packed outer products")
    return build(ours) if isinstance(ours, KroneckerLinear) else ours


def check_pace(ours: nn.Module, rival: nn.Module, x: Tensor, device: torch.device) -> None:
    """Raises Unavailable where a rival would make the benchmark last for hours, judged by the time for an eighth of
    ``x``.

    One of pyfastkron's products with a factor of 1,536x768 takes seven seconds on two cores, for one.
    """
    part = x[: max(1, len(x) // 8)]
    _call(ours, part, None)()
    mine, its = (once(_call(module, part, None), device) for module in (ours, rival))
    if its > max(_HOPELESS * mine, _SECONDS):
        raise Unavailable(f"takes {its:.1f} s, ours {mine:.4f} s, for {len(part)} tokens")


def _check_equal(ours: nn.Module, rival: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted, found = ours(x).float(), rival(x).float()
    error = float((wanted - found).norm() / wanted.norm())
    if not error < _TOLERANCE[x.dtype]:
        raise Unavailable(f"computes something else (relative difference {error:.1e})")
