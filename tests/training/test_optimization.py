"""Optimisers, their schedule, and the sizes of batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kncompress.config import OptimizerConfig, TrainerConfig
from kncompress.errors import UserError
from kncompress.kron import KroneckerEmbedding, KroneckerLinear, KroneckerShape, PackedLinear, PackedShape
from kncompress.training.batches import plan_batches
from kncompress.training.optimization import (
    OptimizerPair,
    build_optimizer,
    build_schedule,
    parameter_groups,
    warmup_cosine,
)


class Model(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.factored_table = KroneckerEmbedding(KroneckerShape((10, 4), (1, 2)))
        self.map = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.map(self.table(ids) + self.factored_table(ids))).square().mean()


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_only_matrices_decay() -> None:
    model = Model()
    decayed, kept = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert names(model, decayed["params"]) == {"map.weight"}
    assert names(model, kept["params"]) == set(dict(model.named_parameters())) - {"map.weight"}


def test_adamw_takes_every_value_of_its_configuration() -> None:
    """Three steps of one number, against the update rule written out: gradients differ, so every beta matters."""
    config = OptimizerConfig(lr=0.1, beta1=0.7, beta2=0.8, weight_decay=0.5)
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(layer, config)
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate([1.0, -3.0, 0.5], 1):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.step()
        first = 0.7 * first + 0.3 * gradient
        second = 0.8 * second + 0.2 * gradient**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (first / (1 - 0.7**step)) / math.sqrt(second / (1 - 0.8**step))
        assert layer.weight.item() == pytest.approx(value, rel=1e-6)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = Model()
    pair = build_optimizer(model, OptimizerConfig(name="muon"))
    assert isinstance(pair, OptimizerPair)
    assert names(model, pair.parts[0].param_groups[0]["params"]) == {"map.weight"}
    trained = [p for group in pair.param_groups for p in group["params"]]
    assert names(model, trained) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_schedule_reaches_every_parameter_also_after_loading(name: str) -> None:
    config = OptimizerConfig(name=name, lr=0.01, warmup=0.0, final=0.0)
    model = Model()
    optimizer = build_optimizer(model, config)
    optimizer.load_state_dict(build_optimizer(Model(), config).state_dict())
    schedule = build_schedule(optimizer, 2, config)
    model(torch.arange(10)).backward()
    for _ in range(2):
        optimizer.step()
        schedule.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the rate is 0 by now"


def test_a_pair_steps_with_a_closure() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.01))
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.arange(10))
        loss.backward()
        return loss.item()

    for _ in range(20):
        losses.append(optimizer.step(closure))
    assert losses[-1] < losses[0]


def test_warmup_then_cosine() -> None:
    factor = warmup_cosine(100, OptimizerConfig(warmup=0.1, final=0.2))
    assert [factor(0), factor(9), factor(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.6)
    assert factor(100) == factor(1000) == pytest.approx(0.2)
    assert all(factor(s) >= factor(s + 1) for s in range(10, 100))


@given(
    batch=st.integers(1, 100_000),
    micro=st.integers(1, 20_000),
    context=st.integers(2, 2048),
    processes=st.integers(1, 8),
    blocks=st.integers(1, 10_000),
)
def test_batches_add_up(batch: int, micro: int, context: int, processes: int, blocks: int) -> None:
    config = TrainerConfig(batch_tokens=batch, micro_batch_tokens=micro)
    alone = plan_batches(config, context, blocks)
    if alone.step_blocks % processes:
        with pytest.raises(UserError, match=rf"trainer.batch_tokens={batch}: .* multiple of {context * processes}"):
            plan_batches(config, context, blocks, processes)
        return
    plan = plan_batches(config, context, blocks, processes)
    assert (plan.step_tokens, plan.steps) == (alone.step_tokens, alone.steps), "the batch is the same on more devices"
    assert plan.micro_batch * plan.accumulate * processes == plan.step_blocks
    assert plan.micro_batch == 1 or plan.micro_batch * context <= micro
    assert plan.steps == math.ceil(blocks / plan.step_blocks)
    assert abs(plan.step_tokens - batch) <= max(context, batch)


def test_tokens_and_steps_set_the_length() -> None:
    assert plan_batches(TrainerConfig(tokens=100_000, batch_tokens=8192), 512, 7).steps == 13
    assert plan_batches(TrainerConfig(tokens=100_000, steps=5), 512, 7).steps == 5


def test_strategies() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from kncompress.training.sharded_strategy import ShardedStrategy
    from kncompress.training.trainer import _strategy

    sharded = _strategy(TrainerConfig(strategy="fsdp", devices=2, nodes=3, accelerator="cpu"))
    assert isinstance(sharded, ShardedStrategy) and sharded._data_parallel_size == 6
    assert isinstance(_strategy(TrainerConfig(devices=2, accelerator="cpu")), DDPStrategy)
    assert _strategy(TrainerConfig()) == "auto"


def test_packed_maps_are_factors_to_muon_and_have_rates_of_their_own() -> None:
    model = nn.ModuleDict({"map": nn.Linear(8, 6), "packed": PackedLinear(PackedShape.of_rank(6, 8, 2))})
    groups = parameter_groups(model)
    assert groups.layer_matrices == {"map.weight"}
    assert groups.decayed == {"map.weight", "packed.kept", "packed.mix"}
    assert groups.rates.keys() == {"packed.kept", "packed.mix"}


@pytest.mark.parametrize("side", ["left", "right", "scale"])
def test_scaled_rates_move_the_weight_as_a_dense_one(side: str) -> None:
    torch.manual_seed(0)
    layer = KroneckerLinear(KroneckerShape((32, 16), (2, 4), terms=3, scalars=side == "scale"), bias=True)
    before = layer.weight.detach().clone()
    groups = parameter_groups(layer)
    optimizer = build_optimizer(layer, OptimizerConfig(lr=0.01, weight_decay=0, factor_rates="scaled"), groups)
    for name, parameter in layer.named_parameters():
        # Signs at random, as the first step of Adam makes of any gradient.
        parameter.grad = torch.randn_like(parameter).sign() if name == side else torch.zeros_like(parameter)
    optimizer.step()
    moved = (layer.weight.detach() - before).square().mean().sqrt()
    assert moved == pytest.approx(0.01, rel=0.25)
    (plain,) = build_optimizer(
        nn.Linear(4, 4, bias=False), OptimizerConfig(lr=0.01, factor_rates="scaled")
    ).param_groups
    assert plain["lr"] == 0.01


def test_groups_do_not_depend_on_how_large_the_factors_are() -> None:
    """A resumed run builds its optimiser before it has read the factors that were trained."""
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.01, factor_rates="scaled")
    model = nn.ModuleDict({name: KroneckerLinear(KroneckerShape((4, 6), (2, 2), 2)) for name in "abc"})
    first = build_optimizer(model, config)
    order = [names(model, group["params"]) for group in first.param_groups]
    rates = [group["lr"] for group in first.param_groups]
    with torch.no_grad():
        for size, layer in zip((1e-3, 1e3, 1.0), model.values(), strict=True):
            layer.left.mul_(size)
    again = build_optimizer(model, config)
    assert [names(model, group["params"]) for group in again.param_groups] == order
    assert [group["lr"] for group in again.param_groups] != rates
    again.load_state_dict(first.state_dict())
    assert [group["lr"] for group in again.param_groups] == rates


def test_fused_adamw_is_the_plain_one() -> None:
    """After three steps, of a transposed parameter too: the fused one walks through memory, not through indices."""
    models = [Model(), Model()]
    for model in models:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_()
        model.map.weight = nn.Parameter(model.map.weight.detach().T)
    optimizers = [build_optimizer(model, OptimizerConfig(lr=0.1)) for model in models]
    for group in optimizers[1].param_groups:
        assert group["fused"]
        group["fused"] = False
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.arange(10)).backward()
            optimizer.step()
    for fused, plain in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
