"""Moments of output gradients, against one backward pass through the whole model, for every kind of model."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import KINDS, config_of, random_model

from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import module_at
from kncompress.compression.compress import compress_
from kncompress.compression.dense_walk import DenseWalk, moments
from kncompress.compression.layerwise import CalibrationText, evaluating
from kncompress.compression.rows import Rows
from kncompress.config import FitConfig
from kncompress.errors import UserError
from kncompress.kron import parse_shape

SHAPES = {"up": "96x1(x)1x24*4", "down": "p*24x1(x)1x96*4"}
TOKENS = np.random.default_rng(0).integers(2, 96, 45)


def output_moments(model, text, names):
    """{map: moment of the gradients at its outputs}, of a walk over the layers."""
    with evaluating(model):
        walk, found = DenseWalk(model, text, (), names), {}
        if "embedding" in names:
            found["embedding"] = walk.embedding()
        for number in range(walk.anatomy.layers):
            record = walk.layer(number)
            sites = [site for name in names if (site := walk.anatomy.sites[name]).layer == number]
            found |= {site.name: record.output(site) for site in sites}
    return found


def by_one_pass(model, labels):
    """{module: (tokens, all M)} gradients at its outputs, of the cross-entropy of these labels; ``first``: of what
    enters the first layer."""
    anatomy, found, handles = anatomy_of(model), {}, []

    def entered(_, args, options):
        states = args[0] if args else options["hidden_states"]
        states.register_hook(lambda gradient: found.setdefault("first", []).append(gradient.flatten(0, -2)))

    first = model.base_model.get_submodule(anatomy.family.layers)[0]
    handles.append(first.register_forward_pre_hook(entered, with_kwargs=True))
    for _, sites in anatomy.modules():
        if sites[0].layer is None:
            continue

        def hook(_, __, output, sites=sites):
            output.register_hook(lambda gradient: found.setdefault(sites[0].module, []).append(gradient.flatten(0, -2)))

        handles.append(module_at(model, sites[0]).register_forward_hook(hook))
    blocks = [TOKENS[i : i + 32] for i in range(0, len(TOKENS), 32)]
    for ids, wanted in zip(blocks, torch.tensor(labels).split([len(b) for b in blocks]), strict=True):
        logits = model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {module: torch.cat(parts) for module, parts in found.items()}


@pytest.mark.parametrize("kind", [*KINDS, "gemma2", "gemma3_text", "granite"])
def test_moments_are_those_of_one_pass_through_the_model(kind, monkeypatch):
    """Fused maps and single ones, layers that see less than others, logits that are scaled or capped after the head."""
    model, drawn = random_model(config_of(kind)), []
    draw = torch.multinomial

    def remembered(*args, **options):
        labels = draw(*args, **options)
        drawn.append(labels.flatten())
        return labels

    monkeypatch.setattr(torch, "multinomial", remembered)
    names = [name for name in anatomy_of(model).sites if name != "head"]
    found = output_moments(model, CalibrationText(TOKENS, 32), names)
    labels = torch.cat(drawn).tolist()
    assert len(labels) == len(TOKENS) and set(found) == set(names)
    backward = by_one_pass(model, labels)
    anatomy = anatomy_of(model)
    first = backward["first"].double()
    expected = first.T @ first / len(TOKENS)
    torch.testing.assert_close(
        found["embedding"].second.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())
    )
    for module, sites in anatomy.modules():
        if sites[0].layer is None:
            continue
        g = backward[module].double()
        for site in sites:
            rows = torch.arange(g.shape[1]).unflatten(0, (site.blocks, -1))
            size = site.out_features // site.blocks
            own = g[:, rows[:, site.start : site.start + size].flatten()]
            expected = own.T @ own / len(TOKENS)
            torch.testing.assert_close(
                found[site.name].second.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())
            )
            assert found[site.name].count == len(TOKENS)


def test_states_that_lie_in_files_are_the_same(monkeypatch):
    """With no room in memory for any states, of a model whose layers see differently far."""
    model = random_model(config_of("gemma3_text"))
    names = [name for name, site in anatomy_of(model).sites.items() if site.layer is not None]
    every = output_moments(model, CalibrationText(TOKENS, 32), names)
    read = Rows.__getitem__
    from_file = []

    def counted(self, number):
        from_file.append(self._file is not None)
        return read(self, number)

    monkeypatch.setattr(Rows, "__getitem__", counted)
    for name, moment in output_moments(model, CalibrationText(TOKENS, 32, room=0), names).items():
        assert torch.equal(moment.second, every[name].second), name
    assert from_file and all(from_file)


def test_a_step_along_a_map_changes_the_kl_by_half_of_the_error(tiny, ids):
    """The reason for it all: KL(dense || changed) is about tr(G D C D^T) / 2, here for a rank-1 change of one map."""
    text = CalibrationText(np.random.default_rng(1).integers(2, 96, 4096), 32)
    site = anatomy_of(tiny).sites["layers.1.mlp.up"]
    output = output_moments(tiny, text, [site.name])[site.name]
    (_, inputs), *_ = moments(tiny, text, ["layers.1.mlp"])
    change = 1e-2 * torch.randn(site.out_features, site.in_features, generator=torch.Generator().manual_seed(0))
    predicted = float(((output.second @ change @ inputs.second) * change).sum()) / 2
    weight = module_at(tiny, site).weight
    with torch.no_grad():
        before = [tiny(input_ids=batch, use_cache=False).logits.log_softmax(-1) for batch in text.batches()]
        weight += change.T if site.conv1d else change
        after = [tiny(input_ids=batch, use_cache=False).logits.log_softmax(-1) for batch in text.batches()]
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)) / 4096
    assert predicted == pytest.approx(kl, rel=0.25)


def test_moments_are_kept_and_found_again(tiny, tmp_path):
    text = CalibrationText(TOKENS, 32, moments=tmp_path / "kept")
    names = ["layers.0.mlp.up", "layers.2.attn.o"]
    first = output_moments(tiny, text, names[:1])
    both = output_moments(tiny, text, names)
    assert torch.equal(first[names[0]].second, both[names[0]].second)
    assert sorted(f.name for f in (tmp_path / "kept").iterdir()) == [f"{name}.gradient.safetensors" for name in names]
    with torch.no_grad():
        tiny.transformer.h[0].mlp.c_fc.weight += 1
    with pytest.raises(UserError, match="of another text or model"):
        output_moments(tiny, text, names)


def test_a_model_that_gives_no_numbers_is_told(tiny):
    with torch.no_grad():
        tiny.transformer.h[2].ln_2.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="its logits are not finite"):
        output_moments(tiny, CalibrationText(TOKENS, 32), ["layers.1.mlp.up"])


@pytest.mark.parametrize("start", ["calibrated", "sequential"])
def test_fits_to_both_sides_do_less_harm(start):
    """The feed-forward maps at rank 4 of 24, packed and not: KL to the dense model on the text of the fit."""
    text = CalibrationText(np.random.default_rng(1).integers(2, 96, 4096), 32)
    model = random_model(config_of("gpt2"))
    plan = Plan({f"layers.*.mlp.{name}": parse_shape(text) for name, text in SHAPES.items()})
    with torch.no_grad():
        dense = [model(input_ids=batch, use_cache=False).logits.log_softmax(-1) for batch in text.batches()]
    harms = {}
    for sides in ("inputs", "both"):
        student = copy.deepcopy(model)
        table = compress_(student, plan, start, text=text, settings=FitConfig(sides=sides))
        assert all(row.weighted is not None for row in table.rows)
        with torch.no_grad():
            logs = [student(input_ids=batch, use_cache=False).logits.log_softmax(-1) for batch in text.batches()]
        harms[sides] = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(dense, logs, strict=True)) / 4096
    assert 0 < harms["both"] < 0.97 * harms["inputs"], harms


@pytest.mark.parametrize("start", ["calibrated", "sequential"])
def test_a_row_of_a_head_counts_as_often_as_its_token_occurs(start):
    tokens = np.random.default_rng(1).integers(2, 96, 4096)
    tokens[::2] = 5
    text = CalibrationText(tokens, 32)
    model = random_model(config_of("gpt2.untied"))
    head = model.lm_head.weight.detach()
    errors = {}
    for sides in ("inputs", "both"):
        student = copy.deepcopy(model)
        shapes = Plan({"head": parse_shape("96x1(x)1x24*8")})
        compress_(student, shapes, start, text=text, settings=FitConfig(sides=sides))
        with torch.no_grad():
            errors[sides] = float((student.lm_head.weight - head)[5].norm() / head[5].norm())
    assert errors["both"] < 0.5 * errors["inputs"], errors
