"""Timing, figures and their shares, peaks of fresh processes, and rivals that compute what ours does."""

import time
from pathlib import Path

import pytest
import torch

from kncompress.anatomy.swap import FusedMaps
from kncompress.bench.child import peak_memory, run_child
from kncompress.bench.fit import rearranged
from kncompress.bench.machine import Ceiling
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.product import check_pace, rival_of
from kncompress.bench.rivals import RIVALS, FormedEveryTime, Unavailable
from kncompress.bench.table import draw, markdown
from kncompress.bench.timing import Rounds, alternate
from kncompress.kron import KroneckerLinear, KroneckerShape, nearest_factors

CPU = torch.device("cpu")


def measured(**changes: object) -> Measurement:
    values = {OURS: 2.0, "dense": 3.0, "other": 8.0}
    fields = {"speedups": {"dense": 1.5, "other": 4.0}, "baseline": "dense", "promised": 2.0, "bound": 0.5}
    return Measurement("product/p/mlp.up/forward", "4x4", values, **{**fields, **changes})  # type: ignore[arg-type]


def test_metrics_are_speed_promise_and_share_of_the_bound() -> None:
    prefix = "product/p/mlp.up/forward"
    assert measured().metrics == {
        f"{prefix}/seconds": 2.0,
        f"{prefix}/speedup": 1.5,
        f"{prefix}/promise": 0.75,
        f"{prefix}/share_of_bound": 0.25,
        f"{prefix}/speedup_over_other": 4.0,
    }
    memory = measured(unit="bytes", promised=None).metrics
    assert memory[f"{prefix}/bytes"] == 2.0 and memory[f"{prefix}/saving"] == 1.5


def test_bound_is_the_slower_of_operations_and_bytes() -> None:
    ceiling = Ceiling(flops=100.0, bandwidth=10.0)
    assert ceiling.seconds(200, 10) == 2.0
    assert ceiling.seconds(200, 50) == 5.0


def test_ratios_are_of_the_same_round() -> None:
    """A slow phase of the machine that hits both calls of a round does not change the ratio."""
    rounds = Rounds({OURS: [1.0, 10.0, 1.0], "rival": [2.0, 20.0, 2.0]})
    assert rounds.ratio("rival", OURS) == 2.0
    assert rounds.medians == {OURS: 1.0, "rival": 2.0}


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.025)) for name in ("a", "b", "c")}
    rounds = alternate(calls, 3, CPU)
    assert order[:6] == ["a", "a", "b", "b", "c", "c"]  # warming up
    assert order[6:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(min(seconds) >= 0.025 and len(seconds) == 3 for seconds in rounds.seconds.values())


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_compute_the_same(name: str, bias: bool, terms: int) -> None:
    """Values and, for the one that is always there, gradients."""
    layer = KroneckerLinear(KroneckerShape((6, 8), (2, 4), terms), bias)
    if bias:
        torch.nn.init.normal_(layer.bias)
    try:
        rival = RIVALS[name](layer)
    except Unavailable as error:
        pytest.skip(str(error))
    x = torch.randn(5, 32, requires_grad=True)
    torch.testing.assert_close(rival(x), layer(x), rtol=1e-4, atol=1e-5)
    if isinstance(rival, FormedEveryTime):
        upstream = torch.randn(5, 12)
        (wanted,) = torch.autograd.grad(layer(x), x, upstream)
        (found,) = torch.autograd.grad(rival(x), x, upstream)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_rival_that_would_take_hours_is_named() -> None:
    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.6)
            return super().forward(x)

    ours, x = torch.nn.Linear(4, 4), torch.randn(16, 4)
    check_pace(ours, torch.nn.Linear(4, 4), x, CPU)
    with pytest.raises(Unavailable, match=r"takes \d+\.\d s, ours \d+\.\d+ s, for 2 tokens"):
        check_pace(ours, Slow(4, 4), x, CPU)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_rival_of_fused_maps_gives_their_outputs_in_the_same_order(blocks: int) -> None:
    layers = {name: KroneckerLinear(KroneckerShape((2, 8), (2, 4))) for name in ("q", "k")}
    fused = FusedMaps({**layers, "v": torch.nn.Linear(32, 8)}, blocks)
    x = torch.randn(5, 32)
    torch.testing.assert_close(rival_of(fused, FormedEveryTime)(x), fused(x), rtol=1e-4, atol=1e-5)


def test_svd_of_the_rearranged_weight_gives_the_nearest_factors() -> None:
    weight = torch.randn(12, 10)
    shape = KroneckerShape((6, 10), (2, 1))
    u, s, v = torch.linalg.svd(rearranged(weight, shape), full_matrices=False)
    svd = torch.kron((u[:, 0] * s[0]).view(6, 10), v[0].view(2, 1))
    left, right = nearest_factors(weight, shape)
    torch.testing.assert_close(torch.kron(left[0], right[0]), svd, rtol=1e-4, atol=1e-5)


def test_peak_is_that_of_the_child_alone(tmp_path: Path) -> None:
    """``ru_maxrss`` of a child starts at what its parent has taken; this parent has taken a block of 400 MiB."""
    block = torch.ones(400 * 2**20, dtype=torch.uint8)
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "held = bytearray(b'x') * (json.loads(Path(sys.argv[1]).read_text())['mebibytes'] << 20)\n"
        "from kncompress.bench.child import peak_memory\n"
        "import torch\n"
        "Path(sys.argv[2]).write_text(json.dumps({'peak': peak_memory(torch.device('cpu'))}))\n"
    )
    small, large = (run_child([str(script)], {"mebibytes": size})["peak"] for size in (1, 201))
    assert abs(large - small - 200 * 2**20) < 40 * 2**20
    assert peak_memory(CPU) > block.numel()


def test_a_child_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("raise ValueError('no such thing')")
    with pytest.raises(Unavailable, match="ValueError: no such thing"):
        run_child([str(script)], {})


def test_the_page_names_what_is_missing(tmp_path: Path) -> None:
    rows = [measured(missing={"tensorly": "not installed (extra `bench`)"})]
    page = " ".join(markdown(rows, "a machine").split())  # columns are padded
    assert "| 1.50x over dense | 2.00x | 0.75 | other 4.00x |" in page
    assert "- tensorly: not installed (extra `bench`) (product/p/mlp.up/forward)" in page
    pytest.importorskip("matplotlib")
    with (tmp_path / "a.png").open("wb") as stream:
        assert draw(stream, rows, "a machine")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
