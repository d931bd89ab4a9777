"""What a student keeps of its teacher: ``factors.depth``, what it may not ask for, and factors of the kept layers."""

import pytest
import torch
from transformers import CodeGenConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from kncompress.anatomy.layerdrop import config_of_layers
from kncompress.compression.student_plan import StudentPlan, student_layers
from kncompress.config import FactorConfig, FactorsConfig
from kncompress.errors import UserError
from kncompress.training.student import factor_, make_student

GPT2, LLAMA = GPT2Config(), LlamaConfig(num_hidden_layers=30)


@pytest.mark.parametrize(
    ("depth", "config", "layers"),
    [
        (None, GPT2, None),
        (6, GPT2, (0, 2, 4, 7, 9, 11)),
        (0.5, GPT2, (0, 2, 4, 7, 9, 11)),
        (12, GPT2, None),
        (0.99, GPT2, None),
        (list(range(12)), GPT2, None),
        (1, GPT2, (11,)),
        (0.01, GPT2, (11,)),
        (0.375, GPT2, (0, 3, 6, 8, 11)),  # 4.5 layers: 5
        ([1, 5, 6], GPT2, (1, 5, 6)),
        (0.1, LLAMA, (0, 15, 29)),
    ],
)
def test_layers(depth, config, layers):
    assert student_layers(FactorsConfig(depth=depth), config) == layers


def test_halves_are_rounded_as_written():
    """0.29 * 50 is 14.499999999999998 in binary."""
    layers = student_layers(FactorsConfig(depth=0.29), LlamaConfig(num_hidden_layers=50))
    assert layers is not None and len(layers) == 15


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (0, "factors.depth=0: must lie between 1 and the model's 12 layers"),
        (-1, "factors.depth=-1: must lie between 1"),
        (13, "factors.depth=13: must lie between 1 and the model's 12 layers"),
        (1.0, "factors.depth=1.0: must be a number of layers, a share between 0 and 1, or a list of layers"),
        (-0.5, "factors.depth=-0.5: must be a number"),
        (True, "factors.depth=True: must be a number"),
        ("half", "factors.depth=half: must be a number"),
        (float("nan"), "factors.depth=nan: must be a number"),
        ([], "factors.depth=[]: the model has layers 0 to 11"),
        ([0, 12], "factors.depth=[0, 12]: the model has layers 0 to 11"),
        ([4, 2], "factors.depth=[4, 2]: must rise"),
        ([0, 0], "factors.depth=[0, 0]: must rise"),
        ([0, 1.5], "factors.depth=[0, 1.5]: the model has layers 0 to 11"),
    ],
)
def test_mistakes_are_named(depth, message):
    for ask in (student_layers, StudentPlan.of):
        with pytest.raises(UserError) as caught:
            ask(FactorsConfig(depth=depth), GPT2)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_a_family_without_a_table_is_named():
    with pytest.raises(UserError, match="model_type=codegen"):
        student_layers(FactorsConfig(depth=2), CodeGenConfig())


def test_factors_count_the_students_layers():
    factors = FactorsConfig(depth=0.5, layers="odd", mlp=FactorConfig([2, 1]))
    plan = StudentPlan.of(factors, GPT2)
    assert (plan.layers, GPT2.n_layer) == ((0, 2, 4, 7, 9, 11), 12)
    shapes = plan.maps.resolve(config_of_layers(GPT2, plan.layers))
    assert sorted({int(name.split(".")[1]) for name in shapes}) == [1, 3, 5]
    factors.layers = [6]
    with pytest.raises(UserError) as caught:
        StudentPlan.of(factors, GPT2)
    assert str(caught.value) == "factors.layers=[6]: with factors.depth=0.5 the student has layers 0 to 5"


@pytest.fixture
def teacher():
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def test_student_and_teacher_layers(teacher):
    factors = FactorsConfig(depth=3, layers=[1], o=FactorConfig([1, 2]))
    plan = StudentPlan.of(factors, teacher.config)
    student, table = make_student(teacher, plan, "nearest")
    assert plan.layers == table.layers == (0, 2, 3)
    assert (student.config.n_layer, teacher.config.n_layer, len(teacher.transformer.h)) == (3, 4, 4)
    assert torch.equal(student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[2].mlp.c_fc.weight)
    assert [row.name for row in table.rows] == ["layers.1.attn.o"]
    assert table.parameters_before == sum(p.numel() for p in teacher.parameters())
    assert table.parameters_after == sum(p.numel() for p in student.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert make_student(teacher, StudentPlan.of(FactorsConfig(), teacher.config), "nearest")[1].layers is None


def test_distilgpt2_has_its_published_size():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2)
    table = factor_(model, StudentPlan.of(FactorsConfig(depth=0.5), GPT2), "nearest")
    assert table.parameters_after == sum(p.numel() for p in model.parameters()) == 81_912_576
    assert table.layers == (0, 2, 4, 7, 9, 11)
    assert GPT2.n_layer == 12
