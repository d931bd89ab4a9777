"""Part ``fit``: the nearest factors of a whole model, and of single maps against the SVD of the rearranged weight."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import dense_weight, module_at
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.product import kind_of_module
from kncompress.bench.setting import Setting, random_model
from kncompress.bench.timing import alternate, once
from kncompress.compression.compress import compress_
from kncompress.kron import KroneckerShape, Moment, PreparedMoment, calibrated_factors, nearest_factors

SVD = "svd"
_SWEEPS = 20


def measure_fit(setting: Setting, plan: Plan) -> Iterator[Measurement]:
    """``fit``: seconds of ``compress_`` on the whole model. Its speed-up counts the maps whose smaller factor has two
    elements, one by one (``fit/<map>``). ``fit/<map>/calibrated``: least squares on random inputs.
    """
    setting.say("fit: all maps")
    dense = random_model(setting.fields, setting.config.seed, setting.device, torch.float32)
    seconds = []
    for _ in range(setting.sizes.long_repeats + 1):
        student = copy.deepcopy(dense)
        seconds.append(once(partial(compress_, student, plan, "nearest"), setting.device))
        del student
    anatomy = anatomy_of(dense)
    shapes = {name: s for name, s in plan.resolve(anatomy).items() if isinstance(s, KroneckerShape)}
    kinds: dict[tuple[str, KroneckerShape], str] = {}
    count: Counter[tuple[str, KroneckerShape]] = Counter()
    for name, shape in shapes.items():
        key = (kind_of_module([anatomy.sites[name]]), shape)
        kinds.setdefault(key, name)
        count[key] += 1
    singles, ours, svd = [], 0.0, 0.0
    for key, name in kinds.items():
        site = anatomy.sites[name]
        setting.say(f"fit: {key[0]}, {key[1]}")
        weight = dense_weight(module_at(dense, site), site).contiguous()
        single = _map(setting, key[0], weight, key[1])
        singles.append(single)
        if SVD in single.values:
            ours += count[key] * single.values[OURS]
            svd += count[key] * single.values[SVD]
        if site.group != "embedding":
            singles.append(_calibrated(setting, key[0], weight, key[1]))
    middle = sorted(seconds[1:])[len(seconds[1:]) // 2]
    yield Measurement(
        "fit",
        f"{len(shapes)} maps",
        {OURS: middle},
        {SVD: svd / ours} if ours else {},
        SVD if ours else None,
        bound=setting.float32_ceiling.seconds(0, 4 * sum(shape.dense_parameters for shape in shapes.values())),
    )
    yield from singles


def rearranged(weight: Tensor, shape: KroneckerShape) -> Tensor:
    """R(W), (m1 n1, m2 n2): a Kronecker sum becomes a matrix of its number of terms as rank."""
    (m1, n1), (m2, n2) = shape.left, shape.right
    return weight.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


def _map(setting: Setting, kind: str, weight: Tensor, shape: KroneckerShape) -> Measurement:
    calls: dict[str, Callable[[], object]] = {OURS: lambda: nearest_factors(weight, shape)}
    missing = {}
    if min(shape.left[0] * shape.left[1], shape.right[0] * shape.right[1]) == 2:
        calls[SVD] = lambda: torch.linalg.svd(rearranged(weight, shape), full_matrices=False)
    else:
        missing[SVD] = "only where a factor has two elements"
    rounds = alternate(calls, setting.sizes.long_repeats, setting.device)
    return Measurement(
        f"fit/{kind}",
        str(shape),
        rounds.medians,
        {SVD: rounds.ratio(SVD, OURS)} if SVD in calls else {},
        SVD if SVD in calls else None,
        bound=setting.float32_ceiling.seconds(0, 4 * weight.numel()),
        missing=missing,
    )


def _calibrated(setting: Setting, kind: str, weight: Tensor, shape: KroneckerShape) -> Measurement:
    inputs = weight.shape[1]
    x = torch.randn(2 * inputs, inputs, device=weight.device)
    prepared = PreparedMoment(Moment(x.T @ x / len(x), x.mean(0), len(x)), False)
    seconds = once(lambda: calibrated_factors(weight, shape, prepared, sweeps=_SWEEPS), setting.device)
    return Measurement(f"fit/{kind}/calibrated", f"{shape}, at most {_SWEEPS} sweeps", {OURS: seconds})
