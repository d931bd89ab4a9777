"""The planner: an exact knapsack, budgets that hold, harms that follow the law, and plans that ``compress_`` takes."""

import copy
import itertools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan, plan_from_config
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import dense_weight, module_at
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.inspection import predict
from kncompress.compression.layerwise import CalibrationText
from kncompress.config import FactorsConfig, FitConfig
from kncompress.errors import UserError
from kncompress.kron import (
    Moment,
    PreparedMoment,
    calibrated_factors,
    kronecker_weight,
    parse_shape,
    prepare_outputs,
    two_sided_error,
    two_sided_factors,
    weighted_error,
)
from kncompress.planner import candidates
from kncompress.planner.budget import HarmTable, MapHarms, Reference, advantage, knapsack, spend
from kncompress.planner.candidates import Option, Spectrum, outer, outer_ranks, packed, packed_rank, ranks, sums
from kncompress.planner.harm import HarmMeter, divergence, replaced
from kncompress.planner.ladder import unmeasured_table
from kncompress.planner.sensitivity import exponents, measure_harms
from kncompress.reading import parse_json

SETTINGS = FitConfig(sweeps=2)


def text_of(count, seed=0, context=16):
    return CalibrationText(np.random.default_rng(seed).integers(2, 96, count), context, 64)


def softened(config, scale=0.3):
    """Random weights small enough for the logits to answer about linearly."""
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "wte" not in name and "embed" not in name:
                parameter.mul_(scale)
    return model


def own_weight(model, site):
    return dense_weight(module_at(model, site), site).clone()


@pytest.fixture(scope="module")
def llama():
    return softened(config_of("llama"))


@pytest.fixture(scope="module")
def table(llama):
    return measure_harms(llama, text_of(800), text_of(128, 1), SETTINGS, facts=("tiny", "numbers"))


MAPS = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1e3, allow_subnormal=False)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(MAPS, st.integers(0, 150))
def test_the_knapsack_is_as_good_as_trying_everything(maps, budget):
    sizes, harms = [[s for s, _ in options] for options in maps], [[h for _, h in options] for options in maps]
    totals = [
        (sum(maps[m][i][1] for m, i in enumerate(choice)), sum(maps[m][i][0] for m, i in enumerate(choice)))
        for choice in itertools.product(*(range(len(options)) for options in maps))
    ]
    reached = [harm for harm, size in totals if size <= budget]
    if not reached:
        with pytest.raises(ValueError, match="below the smallest"):
            knapsack(sizes, harms, budget)
        return
    picked = knapsack(sizes, harms, budget)
    assert sum(sizes[m][i] for m, i in enumerate(picked)) <= budget
    assert sum(harms[m][i] for m, i in enumerate(picked)) <= min(reached) * (1 + 1e-6) + 1e-9


def test_the_knapsack_keeps_to_budgets_of_real_size():
    random = np.random.default_rng(0)
    sizes = [[int(x) for x in random.integers(1000, 10**6, 30)] for _ in range(200)]
    harms = [[float(1e-6 * 10 ** random.uniform(0, 5)) for _ in row] for row in sizes]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    for share in (0.0, 0.01, 0.37, 1.0):
        budget = int(low + share * (high - low))
        picked = knapsack(sizes, harms, budget)
        assert sum(row[i] for row, i in zip(sizes, picked, strict=True)) <= budget


@pytest.mark.parametrize("over", [1, 100, 900])
def test_the_knapsack_takes_back_what_the_solver_s_tolerance_let_through(over):
    """HiGHS allows a millionth of the largest option, here a thousand parameters: the budget is exact all the same."""
    budget = 2 * 10**9 - over
    assert sorted(knapsack([[10**9, 10**6]] * 2, [[0.0, 1.0]] * 2, budget)) == [0, 1]


def test_the_knapsack_tells_options_apart_that_differ_by_less_than_the_solver_s_tolerance():
    sizes, harms = [[10**9 - 7 * k for k in range(6)]] * 5, [[float(k) for k in range(6)]] * 5
    least = sum(map(min, sizes))
    for spare, harm in ((0, 25), (6, 25), (7, 24), (100, 11), (174, 1), (175, 0)):
        picked = knapsack(sizes, harms, least + spare)
        assert sum(row[i] for row, i in zip(sizes, picked, strict=True)) <= least + spare
        assert sum(row[i] for row, i in zip(harms, picked, strict=True)) == harm


def test_divergence_is_the_kl_of_the_changed_distribution():
    logits, change = torch.randn(5, 40), torch.randn(5, 40)
    expected = torch.nn.functional.kl_div(
        (logits + change).log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert divergence(logits.softmax(-1), change.clone()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["layers.1.mlp.down", "layers.0.attn.k", "embedding", "head"])
def test_a_replaced_map_harms_as_the_whole_model_says(model_of_kind, name):
    anatomy, text = anatomy_of(model_of_kind), text_of(80)
    if name not in anatomy.sites:
        pytest.skip("the head is tied")
    site = anatomy.sites[name]
    before = {key: value.clone() for key, value in model_of_kind.state_dict().items()}
    weight = torch.randn(site.out_features, site.in_features)
    meter = HarmMeter(model_of_kind, text)
    found = meter.kl({name: weight})
    assert all(torch.equal(before[key], value) for key, value in model_of_kind.state_dict().items())

    ids = list(text.batches())
    with torch.no_grad():
        dense = [model_of_kind(input_ids=x).logits.log_softmax(-1) for x in ids]
        with replaced(model_of_kind, {site: weight}):
            changed = [model_of_kind(input_ids=x).logits.log_softmax(-1) for x in ids]
    whole = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(dense, changed, strict=True)) / 80
    assert found == pytest.approx(whole, rel=1e-3)
    assert meter.kl({name: own_weight(model_of_kind, site)}) == pytest.approx(0, abs=1e-9)


def test_harm_behind_capped_logits():
    """gemma2 bends its logits by tanh."""
    test_a_replaced_map_harms_as_the_whole_model_says(random_model(config_of("gemma2")), "layers.1.mlp.down")


def test_screening_keeps_a_lean_kind_beside_the_best(monkeypatch):
    ratios = {(4, 4): 0.5, (4, 1): 0.8, (2, 1): 0.9, (1, 2): 0.98}  # the last is within the margin
    monkeypatch.setattr(
        candidates, "_against", lambda weight, shapes, *_: ratios.get(getattr(shapes[0], "right", None), 1.5)
    )
    moment = PreparedMoment(Moment(torch.eye(48), torch.zeros(48), 100))
    assert [kind[0].right for kind in candidates.screened(torch.randn(24, 48), moment)] == [(4, 4), (4, 1)]
    del ratios[4, 4]
    assert [kind[0].right for kind in candidates.screened(torch.randn(24, 48), moment)] == [(4, 1)]
    ratios.clear()
    assert candidates.screened(torch.randn(24, 48), moment) == []


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_the_spectrum_knows_error_and_weight_of_every_rank(size):
    inputs = torch.randn(200, size[1]) @ torch.randn(size[1], size[1])
    moment = PreparedMoment(Moment(inputs.T @ inputs / 200, inputs.mean(0), 200), ridge=1e-6)
    weight = torch.randn(size)
    spectrum = Spectrum(weight, moment)
    for rank in ranks(*size):
        fitted = kronecker_weight(*calibrated_factors(weight, outer(*size, rank), moment))
        assert spectrum.error(rank) == pytest.approx(
            weighted_error(weight, calibrated_factors(weight, outer(*size, rank), moment), moment), rel=1e-2, abs=1e-4
        )
        torch.testing.assert_close(spectrum.best(rank), fitted, rtol=1e-2, atol=1e-2)
    between, (low, high) = spectrum.error(3.25), (spectrum.error(rank) for rank in (3, 4))
    assert between**2 == pytest.approx(0.75 * low**2 + 0.25 * high**2)
    assert spectrum.error(0) == 1 and spectrum.error(min(size)) == spectrum.error(min(size) + 5) == 0


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_the_spectrum_between_two_metrics(size):
    inputs, gradients = torch.randn(200, size[1]), torch.randn(200, size[0]) * torch.logspace(-2, 0, size[0])
    moment = PreparedMoment(Moment(inputs.T @ inputs / 200, inputs.mean(0), 200), ridge=1e-6)
    outputs = prepare_outputs(gradients.T @ gradients / 200, 200, ridge=1e-6)
    weight = torch.randn(size)
    spectrum = Spectrum(weight, moment, outputs)
    for rank in ranks(*size)[::6]:
        fitted = two_sided_factors(weight, outer(*size, rank), moment, outputs)
        assert spectrum.error(rank) == pytest.approx(two_sided_error(weight, fitted, moment, outputs), rel=1e-2)
        torch.testing.assert_close(spectrum.best(rank), kronecker_weight(*fitted), rtol=2e-2, atol=2e-2)


def test_harms_by_gradients_are_near_those_that_are_measured(llama, table):
    """Half of tr(G D C D^T) against the KL of the logits, for half of the parameters of each map: within a factor of
    three, and in about the same order."""
    settings = FitConfig(sweeps=2, sides="both")
    found = measure_harms(llama, text_of(3000), text_of(128, 1), settings, harms="gradients")
    measured = measure_harms(llama, text_of(3000), text_of(600, 1), settings)
    pairs = []
    for row, known in zip(found.maps, measured.maps, strict=True):
        if row.name != "embedding":
            reference = known.references[-1]
            pairs.append((row.harm(reference.error, 2.0), reference.kl))
    ours, theirs = np.log(np.array(pairs).T)
    assert np.abs(ours - theirs).max() < np.log(3)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9
    assert {row.name for row in found.maps} == {row.name for row in table.maps}


def test_candidates_are_smaller_than_the_dense_map():
    for size in ((24, 48), (192, 576), (7, 13), (1, 8)):
        assert all(packed(*size, rank).parameters < size[0] * size[1] for rank in ranks(*size))
        assert all(rank * sum(size) < size[0] * size[1] for rank in outer_ranks(*size))
        for shapes in sums(*size):
            assert len({s.parameters for s in shapes}) == len(shapes)
            assert all((s.out_features, s.in_features) == size and s.parameters < size[0] * size[1] for s in shapes)


def test_the_kinds_of_sums_of_a_map():
    """Those that divide it: one right factor each, terms up to a part of the dense map's numbers or full rank."""
    terms = {shapes[0].right: [shape.terms for shape in shapes] for shapes in sums(24, 48)}
    few = {(2, 1): [1], (1, 2): [1], (4, 1): [1, 2, 3], (1, 4): [1, 2, 3], (2, 2): [1, 2, 3]}
    assert terms == few | {(4, 4): [1, 3, 6, 9], (2, 16): [1, 5, 8, 11]}  # 48 is not a multiple of 32
    assert not list(sums(7, 13)) and not list(sums(4, 1))  # nothing divides it; that left factor is a row


@given(st.integers(1, 600), st.integers(1, 600), st.floats(0, 1))
def test_a_packed_rank_has_so_many_numbers(outputs, inputs, share):
    rank = packed_rank(outputs, inputs, share * outputs * inputs)
    assert 0 <= rank <= min(outputs, inputs)
    assert rank * (outputs + inputs) - rank**2 == pytest.approx(share * outputs * inputs, rel=1e-6, abs=1e-6)


def test_low_rank_is_packed(table):
    """Fewer numbers at the same rank, so the other form is never worth choosing."""
    shapes = {o.shape for row in table.maps if row.name.startswith("layers.") for o in row.options}
    assert sum(shape.startswith("p*") for shape in shapes) > 20
    assert not any(re.fullmatch(r"\d+x1\(x\)1x\d+(\*\d+)?", shape) for shape in shapes)


def test_plans_keep_to_the_budget_and_compress_to_what_they_say(llama, table):
    total, last = unique_parameters(llama), -1.0
    for budget in (1.0, 0.9, 0.7, 0.5, 0.3, 0.3 * total):
        plan = spend(table, budget)
        limit = int(budget * total) if budget <= 1 else int(budget)
        assert plan.parameters <= limit
        assert plan.kl >= last or budget > 1
        last = plan.kl
        student = copy.deepcopy(llama)
        factors = plan_from_config(FactorsConfig(maps=plan.maps), llama.config)
        made = compress_(student, factors, "calibrated", text=text_of(800), settings=SETTINGS)
        assert unique_parameters(student) == made.parameters_after == plan.parameters
        assert made.multiply_adds_after == plan.multiply_adds
        assert made.parameters_before == table.parameters and made.multiply_adds_before == table.multiply_adds
    assert spend(table, 1.0).kl == 0 and set(spend(table, 1.0).maps.values()) == {"keep"}


def test_the_sizes_are_known_without_weights(llama, table):
    sizes = unmeasured_table(anatomy_of(llama.config), table.parameters)
    assert sizes.multiply_adds == table.multiply_adds
    for known, row in zip(sizes.maps, table.maps, strict=True):
        costs = {option.shape: (option.parameters, option.multiply_adds) for option in row.options}
        assert {o.shape: (o.parameters, o.multiply_adds) for o in known.options}.items() <= costs.items()


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
def test_a_head_of_its_own_is_counted_once(kind):
    config = config_of(kind)
    dense = predict(config, Plan())
    assert unmeasured_table(anatomy_of(config), 9).multiply_adds == dense.multiply_adds_before


def test_speed_allows_only_shapes_that_are_faster(table):
    plan = spend(table, 0.6, speed=True)
    dense = {row.name: row.multiply_adds for row in table.maps}
    for name, option in plan.chosen.items():
        assert option.shape == "keep" or 1.3 * option.multiply_adds <= dense[name]


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("768x384(x)1x2", 1.9),
        ("192x768(x)4x1*3", 1.9),
        ("768x1(x)1x768*48", 1.3),
        ("p*768x1(x)1x768*48", 1.6),
        ("384x384(x)2x2", 24),  # few multiply-adds are not enough where vectors are turned around
        ("768x1(x)1x768*8 + 384x768(x)2x1", 1.9),
        ("768x1(x)1x768*8 + 384x48(x)2x16", 24),
    ],
)
def test_right_factors_of_several_rows_and_columns_need_more(text, least):
    assert advantage(parse_shape(text)) == least


@pytest.mark.parametrize("budget", [0, -1, float("nan"), 1e-4, 2, 1e9])
def test_a_budget_out_of_reach_is_one_clear_line(table, budget):
    with pytest.raises(UserError, match=r"^budget=") as caught:
        spend(table, budget)
    assert "\n" not in str(caught.value)


def test_a_table_survives_json(table):
    assert parse_json(json.dumps(table.as_dict()).encode(), HarmTable, "harm.json") == table


def test_an_insensitive_layer_is_compressed_most():
    model = softened(config_of("gpt2"))
    with torch.no_grad():
        block = model.transformer.h[1]
        block.attn.c_proj.weight.mul_(1e-3)
        block.mlp.c_proj.weight.mul_(1e-3)
    table = measure_harms(model, text_of(800), text_of(128, 1), SETTINGS)
    plan = spend(table, 0.7)
    kept = dict.fromkeys(range(3), 0)
    for name, option in plan.chosen.items():
        if name.startswith("layers."):
            kept[int(name.split(".")[1])] += option.parameters
    assert kept[1] < 0.5 * min(kept[0], kept[2])


def test_kl_is_about_quadratic_in_the_error(llama):
    """Scaling the error of a map by t scales the KL by t squared, while it is small."""
    anatomy = anatomy_of(llama)
    meter = HarmMeter(llama, text_of(160))
    for name in ("layers.0.mlp.up", "layers.1.attn.v", "layers.2.mlp.down"):
        weight = own_weight(llama, anatomy.sites[name])
        change = 0.05 * weight.std() * torch.randn_like(weight)
        near, far = meter.kl({name: weight + change}), meter.kl({name: weight + 2 * change})
        assert 1.8 < np.log2(far / near) < 2.2, name


def test_measured_exponents_are_near_two(table):
    slopes = exponents(table.maps)
    assert len(slopes) == 7  # every third layer of three
    assert 1.5 < table.exponent < 2.5


def table_of(*together):
    return HarmTable("", "", 9, 9, (), together)


def test_the_kl_of_a_plan_follows_what_maps_were_measured_to_do_together():
    """A power law through the measured points, between them and beyond."""
    table = table_of((0.1, 0.3), (0.4, 0.6))  # slope 1/2
    found = [table.predicted(total) for total in (0.1, 0.2, 0.4, 1.6)]
    assert found == pytest.approx([0.3, 0.3 * 2**0.5, 0.6, 1.2])
    steep = table_of((0.4, 0.16), (0.1, 0.01))  # slope 2, in any order
    assert [steep.predicted(total) for total in (0.05, 0.2)] == pytest.approx([0.0025, 0.04])


def test_few_or_odd_measurements_still_predict():
    assert table_of().predicted(0.7) == 0.7 and table_of((0.1, 0.3)).predicted(0) == 0
    assert table_of((0.1, 0.3)).predicted(0.2) == pytest.approx(0.6)  # one point: its factor
    assert table_of((0.0, 0.3), (0.1, 0.3), (0.2, 0.0)).predicted(0.2) == pytest.approx(0.6)  # nothing is learnt from 0
    assert table_of((0.1, 0.3), (0.2, 0.3)).predicted(0.4) == pytest.approx(0.6)  # slope 0, taken as 1/2
    assert table_of((0.1, 0.1), (0.2, 0.9)).predicted(0.4) == pytest.approx(1.6)  # slope 3.2, taken as 2


def test_harm_goes_through_its_references():
    option = Option("keep", 1, 1, 0.0)
    row = MapHarms("a", 9, 9, (option,), (Reference(0.1, 0.01), Reference(0.2, 0.08)))
    at = {error: row.harm(error, 2.0) for error in (0.0, 0.05, 0.1, 0.2, 0.4)}
    assert at[0.0] == 0
    assert at[0.1] == pytest.approx(0.01) and at[0.2] == pytest.approx(0.08)
    assert at[0.05] == pytest.approx(0.0025) and at[0.4] == pytest.approx(0.32)


def test_what_the_solver_prints_by_itself_is_not_shown(monkeypatch, capfd):
    import ctypes

    import scipy.optimize

    library, solve = ctypes.CDLL(None), scipy.optimize.milp

    def printing(*args, **options):
        library.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
        return solve(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", printing)
    print("before")
    assert knapsack([[1, 2], [3, 4]], [[5.0, 1.0], [2.0, 1.9]], 5) == [1, 0]
    print("after")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
