"""What is read from a config alone is what compressing the real model gives."""

import json

import pytest
from tiny_models import config_of, random_model
from transformers import GPT2Config

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import module_at
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.inspection import inspect_config, predict
from kncompress.compression.inspection_table import grouped, inspection_text, number_list, preset_text
from kncompress.errors import UserError
from kncompress.kron import parse_shape

PLANS = {
    "dense": Plan(),
    "factors": Plan(
        {
            "embedding": RightFactor((1, 2)),
            "layers.1.*": RightFactor((2, 1)),
            "layers.0.attn.k": RightFactor((2, 2), terms=2),
        }
    ),
}


def test_hybrids_are_counted_as_they_are_made(kind):
    config = config_of(kind)
    site = anatomy_of(config).sites["layers.1.mlp.down"]
    outer = f"{site.out_features}x1(x)1x{site.in_features}*3"
    plan = Plan({site.name: parse_shape(f"{outer} + {site.out_features // 2}x{site.in_features // 2}(x)2x2*2")})
    model = random_model(config_of(kind))
    made, told = compress_(model, plan), inspect_config(config, plan)
    assert told.totals["parameters/student"] == made.parameters_after == unique_parameters(model)
    row = next(row for row in told.maps if row.name == site.name)
    assert row.shape == str(plan.entries[0][1])
    assert row.parameters == sum(p.numel() for p in module_at(model, site).parts.parameters())
    assert row.multiply_adds == made.rows[0].multiply_adds
    assert row.shape in inspection_text(told)


@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_agrees_with_the_real_thing(kind, plan, layers):
    config = config_of(kind)
    told, found = predict(config, plan, layers), inspect_config(config, plan, layers)
    model = random_model(config_of(kind))
    made = compress_(model, plan, layers=layers)
    for table in (told, found.compression):
        assert (table.parameters_before, table.parameters_after) == (made.parameters_before, made.parameters_after)
        assert (table.multiply_adds_before, table.multiply_adds_after) == (
            made.multiply_adds_before,
            made.multiply_adds_after,
        )
    assert found.totals["parameters/student"] == unique_parameters(model)
    assert config.to_dict() == config_of(kind).to_dict()
    # Row by row, against the modules themselves.
    sites = anatomy_of(model).sites
    rows = {row.name: row for row in found.maps}
    assert list(rows) == [*sites, *(["head"] if "head" not in sites else [])]
    for name, site in sites.items():
        module = module_at(model, site)
        fused = site.part and type(module).__name__ != "FusedMaps"
        module = getattr(module, site.part) if site.part and not fused else module
        factors = [p for key, p in module.named_parameters() if key in ("left", "right", "weight")]
        assert rows[name].parameters == sum(p.numel() for p in factors) // (3 if fused else 1)
        assert (rows[name].shape == "dense") == (len(factors) == 1)
    assert sum(row.parameters for row in found.maps) + found.other_parameters == unique_parameters(model)
    assert (
        sum(row.multiply_adds for row in found.maps if row.name != "embedding") + (rows["embedding"].multiply_adds)
        == made.multiply_adds_after
    )


def test_a_tied_head_works_but_owns_nothing():
    rows = {row.name: row for row in inspect_config(config_of("llama"), PLANS["factors"]).maps}
    assert (rows["head"].shape, rows["head"].parameters) == ("96x12(x)1x2", 0)
    assert (rows["head"].multiply_adds, rows["head"].dense_multiply_adds) == (96 * 12 + 24, 96 * 24)


def test_gpt2_small_without_weights():
    found = inspect_config(GPT2Config(), Plan(), layers=(0, 2, 4, 7, 9, 11))
    assert found.totals["parameters/teacher"] == 124_439_808
    assert found.totals["parameters/student"] == 81_912_576
    assert found.sides[768] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 768]
    assert found.sides[50257] == [1, 29, 1733, 50257]


def test_text_groups_equal_maps():
    config = GPT2Config(n_layer=30)
    plan = Plan({f"layers.{layer}.mlp.up": RightFactor((4, 1)) for layer in range(1, 30, 2)})
    found = inspect_config(config, plan)
    names = {name: count for name, count, _ in grouped(found.maps)}
    assert names["layers.{1,3,...,29}.mlp.up"] == names["layers.{0,2,...,28}.mlp.up"] == 15
    assert names["layers.{0-29}.attn.q"] == 30 and names["embedding"] == 1
    assert sum(names.values()) == len(found.maps)
    short, long = inspection_text(found), inspection_text(found, every_map=True)
    assert len(short.splitlines()) < 40 and len(long.splitlines()) > 180
    assert "layers.17.mlp.up" in long and "layers.17.mlp.up" not in short
    for text in (short, long):
        assert "768x768(x)4x1" in text
        assert f"{found.compression.parameters_after:,} of {found.compression.parameters_before:,}" in text
        assert (
            f"{4 * found.compression.parameters_after:,}" in text
            and f"{2 * found.compression.parameters_after:,}" in text
        )


def test_text_names_the_kept_layers():
    text = inspection_text(inspect_config(GPT2Config(), Plan(), layers=(0, 2, 4, 7, 9, 11)))
    assert text.startswith("gpt2, 12 layers, the student keeps 0,2,4,7,9,11\n")
    assert "layers.{0-5}.mlp.up" in text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([0], "0"),
        ([0, 1], "0,1"),
        ([0, 1, 2], "0-2"),
        ([1, 3, 5], "1,3,5"),
        ([1, 3, 5, 7, 9], "1,3,...,9"),
        ([0, 1, 2, 5, 9], "0-2,5,9"),
    ],
)
def test_lists_of_numbers_are_short(numbers, text):
    assert number_list(numbers) == text


def test_presets_that_do_not_fit_tell_why():
    table = predict(GPT2Config(), Plan())
    lines = preset_text({"dense": table, "odd": "factors.mlp.right=[5, 1]: 5 does not divide 3072"}).splitlines()
    assert lines[1].split() == ["dense", "124,439,808", "100.0%", f"{table.multiply_adds_after:,}", "100.0%"]
    assert lines[2].split(None, 1) == ["odd", "does not fit: factors.mlp.right=[5, 1]: 5 does not divide 3072"]


def test_as_json():
    found = inspect_config(config_of("llama.untied"), PLANS["factors"], (0, 2))
    read = json.loads(json.dumps(found.as_dict()))
    assert read["layers"] == {"teacher": 3, "kept": [0, 2]}
    assert read["totals"] == found.totals
    assert read["bytes"]["student"]["bfloat16"] == 2 * found.totals["parameters/student"]
    assert read["divisors"]["24"] == [1, 2, 3, 4, 6, 8, 12, 24]
    assert [row["name"] for row in read["maps"]] == [row.name for row in found.maps]


def test_what_cannot_be_built_is_the_users_to_fix():
    config = config_of("gpt2")
    config.n_head = 5
    with pytest.raises(UserError, match=r"transformers builds no model of this configuration: .*divisible"):
        predict(config, Plan())
    model = random_model(config_of("gpt2"))
    compress_(model, PLANS["factors"])
    with pytest.raises(UserError, match="factored already, or quantised"):
        predict(model.config, Plan())
