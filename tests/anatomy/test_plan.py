"""Plans: what is chosen, and what is refused with which words."""

import pytest
from transformers import GPT2Config

from kncompress.anatomy.plan import Plan, RightFactor, plan_from_config
from kncompress.config import FactorConfig, FactorsConfig
from kncompress.errors import UserError
from kncompress.kron import HybridShape, KroneckerShape

GPT2_SMALL = GPT2Config()


def resolve(**factors):
    return plan_from_config(FactorsConfig(**factors), GPT2_SMALL).resolve(GPT2_SMALL)


def test_later_entries_win_and_keep_keeps(tiny_config):
    shape = KroneckerShape((24, 24), (4, 1))
    plan = Plan(
        {
            "layers.*.mlp.up": RightFactor((2, 1)),
            "layers.1.mlp.up": shape,
            "layers.2.*": "keep",
        }
    )
    assert plan.resolve(tiny_config) == {
        "layers.0.mlp.up": KroneckerShape((48, 24), (2, 1)),
        "layers.1.mlp.up": shape,
    }


def test_resolve_follows_the_models_order(tiny_config):
    plan = Plan({"layers.1.attn.q": RightFactor((1, 2)), "embedding": RightFactor((1, 2))})
    assert list(plan.resolve(tiny_config)) == ["embedding", "layers.1.attn.q"]


def test_mlp_right_is_mirrored_on_the_way_out():
    shapes = resolve(mlp=FactorConfig([4, 1]))
    assert str(shapes["layers.5.mlp.up"]) == "768x768(x)4x1"
    assert str(shapes["layers.5.mlp.down"]) == "768x768(x)1x4"


def test_qkv_and_o_right_is_literal():
    shapes = resolve(qkv=FactorConfig([2, 1]), o=FactorConfig([2, 1]))
    assert len(shapes) == 48
    assert {str(shape) for shape in shapes.values()} == {"384x768(x)2x1"}


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("odd", [1, 3, 5, 7, 9, 11]), ("even", [0, 2, 4, 6, 8, 10]), ("all", list(range(12))), ([0, 7], [0, 7])],
)
def test_layers(layers, chosen):
    assert list(resolve(layers=layers, o=FactorConfig())) == [f"layers.{i}.attn.o" for i in chosen]


def test_group_layers_override():
    shapes = resolve(layers="odd", o=FactorConfig(), mlp=FactorConfig([2, 1], layers=[0]))
    assert {name for name in shapes if "mlp" in name} == {"layers.0.mlp.up", "layers.0.mlp.down"}
    assert sum("attn.o" in name for name in shapes) == 6


def test_maps_come_last():
    shapes = resolve(
        mlp=FactorConfig([2, 1]),
        maps={"layers.3.mlp.up": "768x768(x)4x1*2", "layers.[0-2].mlp.*": "keep"},
    )
    assert str(shapes["layers.3.mlp.up"]) == "768x768(x)4x1*2"
    assert "layers.0.mlp.up" not in shapes
    assert len(shapes) == 18


def test_a_hybrid_is_a_shape_like_any():
    text = "3072x1(x)1x768*8 + 1536x768(x)2x1"
    shapes = resolve(mlp=FactorConfig([2, 1]), maps={"layers.3.mlp.up": text, "layers.4.mlp.up": "keep"})
    assert shapes["layers.3.mlp.up"] == HybridShape.parse(text)
    assert str(shapes["layers.3.mlp.up"]) == text
    assert "layers.4.mlp.up" not in shapes


MISTAKES = [
    ({"maps": {"layers.1.attn.q": "768x1(x)1x768 +"}}, "factors.maps.layers.1.attn.q=768x1(x)1x768 +: "),
    (
        {"maps": {"layers.1.mlp.up": "768x1(x)1x768 + 384x768(x)2x1"}},
        "factors.maps.layers.1.mlp.up=768x1(x)1x768 + 384x768(x)2x1: makes 768x768, but layers.1.mlp.up is 3072x768",
    ),
    (
        {"maps": {"embedding": "50257x1(x)1x768 + 50257x384(x)1x2"}},
        "factors.maps.embedding=50257x1(x)1x768 + 50257x384(x)1x2: an embedding takes a single Kronecker shape",
    ),
    ({"mlp": FactorConfig([7, 1])}, "factors.mlp.right=[7, 1]: 7 does not divide 3072"),
    ({"embedding": FactorConfig([1, 5])}, "factors.embedding.right=[1, 5]: 5 does not divide 768"),
    ({"mlp": FactorConfig([2])}, "factors.mlp.right=[2]: must be two numbers"),
    ({"mlp": FactorConfig([2, 0])}, "factors.mlp.right=[2, 0]: 0 is not a positive"),
    ({"o": FactorConfig([1, 2], terms=9)}, "factors.o.terms=9: "),
    ({"layers": [13], "o": FactorConfig()}, "factors.layers=[13]: the model has layers 0 to 11"),
    ({"layers": [-1], "o": FactorConfig()}, "factors.layers=[-1]: the model has layers 0 to 11"),
    ({"layers": [True], "o": FactorConfig()}, "factors.layers=[True]: the model has layers 0 to 11"),
    ({"layers": None, "o": FactorConfig()}, "factors.layers=[None]: the model has layers 0 to 11"),
    ({"layers": 1.5, "o": FactorConfig()}, "factors.layers=[1.5]: the model has layers 0 to 11"),
    ({"layers": "some", "o": FactorConfig()}, "factors.layers=some: not one of all, odd, even"),
    ({"layers": [], "o": FactorConfig()}, "factors.layers=[]: names no layer"),
    ({"o": FactorConfig(layers=[12])}, "factors.o.layers=[12]: the model has layers 0 to 11"),
    ({"embedding": FactorConfig(layers=[1])}, "factors.embedding.layers=[1]: the embedding has no layers"),
    ({"maps": {"layers.1.mlp.upp": "keep"}}, "factors.maps.layers.1.mlp.upp: matches no map of the model; "),
    ({"maps": {"head": "keep"}}, "factors.maps.head: the head is tied to the embedding"),
    ({"maps": {"layers.1.mlp.up": "big"}}, "factors.maps.layers.1.mlp.up=big: "),
    (
        {"maps": {"layers.1.mlp.*": "768x768(x)4x1"}},
        "factors.maps.layers.1.mlp.*=768x768(x)4x1: makes 3072x768, but layers.1.mlp.down is 768x3072",
    ),
]


@pytest.mark.parametrize(("factors", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(factors, message):
    with pytest.raises(UserError) as caught:
        resolve(**factors)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_wrong_pattern_is_answered_with_near_names(tiny_config):
    with pytest.raises(UserError, match=r"nearest names: layers\.1\.mlp\.up, "):
        Plan({"layers.1.mlp.upp": "keep"}).resolve(tiny_config)


def test_untied_head_is_a_map(tiny_config):
    tiny_config.tie_word_embeddings = False
    assert str(Plan({"head": RightFactor((1, 2))}).resolve(tiny_config)["head"]) == "96x12(x)1x2"


def test_scalars_are_of_every_factored_map(tiny_config):
    maps = {"layers.1.mlp.up": "96x1(x)1x24*2 + 48x24(x)2x1", "layers.2.*": "keep"}
    mlp = FactorConfig([2, 1])
    factors = FactorsConfig(layers=[1, 2], embedding=FactorConfig([1, 2]), mlp=mlp, maps=maps, scalars=True)
    shapes = plan_from_config(factors, tiny_config).resolve(tiny_config)
    assert {name: str(shape) for name, shape in shapes.items()} == {
        "embedding": "s*96x12(x)1x2",
        "layers.1.mlp.up": "s*96x1(x)1x24*2 + s*48x24(x)2x1",
        "layers.1.mlp.down": "s*24x48(x)1x2",
    }
