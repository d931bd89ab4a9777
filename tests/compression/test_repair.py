"""Block-wise repair: blocks come nearer to the dense ones, on text that it has not seen, and never end up worse."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.repair import HELD_SHARE, rate_at, split
from kncompress.config import CompressConfig, RepairConfig
from kncompress.errors import UserError
from kncompress.kron.gauge import factor_rates

PLAN = Plan({"layers.1.*": RightFactor((2, 2), 2)})
REPAIR = RepairConfig(passes=3)


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 5003), context=16)


def states_after(model, ids):
    """Hidden states after every layer, (B, T, D) each."""
    seen = []
    layers = model.base_model.get_submodule(anatomy_of(model).family.layers)
    note = lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model.base_model(ids)
    for handle in handles:
        handle.remove()
    return seen


def errors(dense, model, tokens):
    """|h - h_dense|^2 / |h_dense|^2 by token, its mean after every layer; by the whole model's own forward."""
    ids = torch.from_numpy(tokens).view(-1, 16)
    pairs = zip(states_after(model, ids), states_after(dense, ids), strict=True)
    return [float(((own - right).square().sum(-1) / right.square().sum(-1)).mean()) for own, right in pairs]


@pytest.mark.parametrize("start", ["nearest", "sequential"])
@pytest.mark.parametrize("kind", ["gpt2", "llama.bias"])
def test_blocks_come_nearer_on_unseen_text(kind, start, text):
    dense = random_model(config_of(kind))
    fitted, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    compress_(fitted, PLAN, start, text=text)
    repair = compress_(repaired, PLAN, start, text=text, repair=REPAIR).repair
    held = split(text)[1].tokens[: 39 * 16]
    assert repair.before == pytest.approx(errors(dense, fitted, held)[1:], rel=0.05)  # a rest apart
    assert repair.after == pytest.approx(errors(dense, repaired, held)[1:], rel=0.05)
    share = 0.8 if start == "nearest" else 0.97  # weights at random leave little to gain after the sequential fit
    assert all(after < share * before for before, after in zip(repair.before, repair.after, strict=True))
    other = np.random.default_rng(1).integers(2, 96, 1024)
    assert errors(dense, repaired, other)[2] < share * errors(dense, fitted, other)[2]
    before, after = fitted.state_dict(), repaired.state_dict()
    assert list(before) == list(after)  # nothing new
    early = [name for name in before if ".0." in name and ".1." not in name and ".2." not in name]
    assert len(early) > 8 and all(torch.equal(before[name], after[name]) for name in early)
    trained = [name for name in before if ".1." in name or ".2." in name]
    assert all(not torch.equal(before[name], after[name]) for name in trained if "masked" not in name)


def test_it_is_deterministic_and_leaves_gradients_and_modes_alone(tiny, text):
    twin = copy.deepcopy(tiny)
    tiny.train()
    tiny.transformer.wpe.requires_grad_(False)
    state = torch.get_rng_state()
    compress_(tiny, PLAN, "nearest", text=text, repair=REPAIR)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    compress_(twin, PLAN, "nearest", text=text, repair=REPAIR)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), twin.parameters(), strict=True))
    assert all(module.training for module in tiny.modules())
    flags = {name: p.requires_grad for name, p in tiny.named_parameters()}
    assert [name for name, wanted in flags.items() if not wanted] == ["transformer.wpe.weight"]
    assert all(p.grad is None for p in tiny.parameters())


def test_the_rate_rises_over_a_tenth_and_falls_to_nothing():
    assert [rate_at(step, 40) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rate_at(22, 40) == pytest.approx(0.5) and rate_at(40, 40) == rate_at(50, 40) == 0
    falling = [rate_at(step, 40) for step in range(4, 41)]
    assert falling == sorted(falling, reverse=True) and rate_at(0, 1) == rate_at(1, 3) == 1.0


def test_every_step_takes_the_rate_of_its_time_and_of_its_parameter(tiny, text):
    rates, steps = {}, {}

    def note(optimizer, *_):
        numbers = {id(p): number for number, layer in enumerate(tiny.transformer.h) for p in layer.parameters()}
        number = numbers[id(optimizer.param_groups[0]["params"][0])]
        rates.setdefault(number, factor_rates(tiny.transformer.h[number]))
        given = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        named = tiny.transformer.h[number].named_parameters()
        steps.setdefault(number, []).append({name: given[id(p)] for name, p in named})

    handle = register_optimizer_step_pre_hook(note)
    try:
        compress_(tiny, PLAN, "nearest", text=text, repair=REPAIR)
    finally:
        handle.remove()
    assert list(steps) == [1, 2] and rates[2] == {}
    assert len(rates[1]) == 2 * 6 and all(abs(rate - 1) > 0.1 for rate in rates[1].values())
    for number, taken in steps.items():
        for step, found in enumerate(taken):
            rate = REPAIR.lr * rate_at(step, len(taken))
            assert found == pytest.approx({name: rate * rates[number].get(name, 1.0) for name in found})


@pytest.mark.parametrize("lr", [10.0, 1e30])
def test_a_rate_that_tears_the_blocks_leaves_them_as_fitted(tiny, text, lr):
    fitted = copy.deepcopy(tiny)
    compress_(fitted, PLAN, "calibrated", text=text)
    settings = RepairConfig(passes=2, lr=lr)
    repair = compress_(tiny, PLAN, "calibrated", text=text, repair=settings).repair
    assert repair.after == repair.before
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), fitted.parameters(), strict=True))


def test_the_held_out_part_is_the_end_in_whole_blocks(text):
    steps, held = split(text)
    blocks = len(text.tokens) // 16
    assert np.array_equal(np.concatenate([steps.tokens, held.tokens]), text.tokens)
    assert len(steps.tokens) == 16 * (blocks - blocks // HELD_SHARE)
    short = CalibrationText(text.tokens[: 16 * 7 + 3], 16)
    assert all(np.array_equal(part.tokens, short.tokens) for part in split(short))


def test_embedding_and_a_tied_head_stay_as_fitted(text):
    """The first block answers for the embedding's error too."""
    tiny = random_model(config_of("gpt2"))
    plan = Plan({"embedding": RightFactor((1, 2))})
    fitted = copy.deepcopy(tiny)
    compress_(fitted, plan, "nearest", text=text)
    table = compress_(tiny, plan, "nearest", text=text, repair=REPAIR)
    assert len(table.repair.before) == 3 and table.repair.after[0] < 0.95 * table.repair.before[0]
    assert torch.equal(tiny.transformer.wte.left, fitted.transformer.wte.left)
    assert tiny.lm_head.left is tiny.transformer.wte.left
    assert table.parameters_after == unique_parameters(tiny)


def test_progress_reaches_the_end_and_never_falls(tiny, text):
    seen = []
    compress_(tiny, PLAN, "calibrated", lambda what, share: seen.append((what, share)), text=text, repair=REPAIR)
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[-1] < 1
    assert [what for what, _ in seen][-2:] == ["layers.1 repair", "layers.2 repair"]


def test_bad_settings_are_named_and_change_nothing(tiny, text):
    for model, start, read, message in (
        (tiny, "nearest", None, "repair.passes=3: needs a text"),
        (tiny, "random", text, "repair.passes=3: needs a text, and a start other than random"),
        (copy.deepcopy(tiny).bfloat16(), "nearest", text, "repair.passes=3: needs a model in float32"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UserError, match=message):
            compress_(model, PLAN, start, text=read, repair=REPAIR)
        assert list(model.state_dict()) == list(before)
    with pytest.raises(UserError, match=r"repair.passes=3: needs a start that is fitted"):
        CompressConfig(start="random", repair=REPAIR)
    with pytest.raises(UserError, match=r"repair.passes=-1: must be 0 or more"):
        RepairConfig(passes=-1)
    with pytest.raises(UserError, match=r"repair.lr=0: must be greater than 0"):
        RepairConfig(passes=1, lr=0)
