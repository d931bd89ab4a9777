"""Moments are those of what the maps read, however the text is cut, and come back from disk or not at all."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import module_at
from kncompress.compression.compress import compress_
from kncompress.compression.dense_walk import moments, stream_moments
from kncompress.compression.layerwise import CalibrationText, HiddenStates, before_head
from kncompress.compression.moments import (
    MomentFolder,
    fingerprint,
    input_of,
    inputs_of,
    token_frequencies,
)
from kncompress.compression.work import Work
from kncompress.errors import UserError


@pytest.fixture
def text():
    """4 whole blocks and a short one."""
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 75), context=16, batch_tokens=32)


def seen_by_hooks(model, text):
    """{map: everything that its module was called with, (tokens, N)}, from ordinary forward passes."""
    seen = {}
    sites = [site for site in anatomy_of(model).sites.values() if site.group != "embedding"]

    def note(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))

    handles = [module_at(model, site).register_forward_pre_hook(note(site.name)) for site in sites]
    head = model.lm_head.register_forward_pre_hook(note("lm_head"))
    with torch.no_grad():
        for start in range(0, len(text.tokens), text.context):
            model(torch.from_numpy(text.tokens[None, start : start + text.context]))
    for handle in [*handles, head]:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_moments_are_those_of_the_inputs(model_of_kind, text):
    """Every map's module, tied and untied heads; what is shared is one tensor for all its maps."""
    seen = seen_by_hooks(model_of_kind, text)
    anatomy = anatomy_of(model_of_kind)
    found = dict(stream_moments(model_of_kind, text, [*inputs_of(anatomy), "head"]))
    assert len(found) == 3 * 4 + 1
    for site in anatomy.sites.values():
        x = seen["lm_head" if site.name in ("embedding", "head") else site.name].double()
        moment = found[input_of(site)]
        assert moment.count == len(x) == 75
        torch.testing.assert_close(moment.second.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moment.mean.double(), x.mean(0), rtol=1e-4, atol=1e-4)


def test_maps_share_the_moment_of_their_input(model_of_kind):
    shared = {
        name: [site.name.rpartition(".")[2] for site in s] for name, s in inputs_of(anatomy_of(model_of_kind)).items()
    }
    gated = model_of_kind.config.model_type in ("llama", "qwen2", "qwen3")
    hidden = ["gate", "up"] if gated else ["up"]
    assert shared["layers.1.qkv"] == ["q", "k", "v"]
    assert shared["layers.1.o"] == ["o"]
    assert shared["layers.1.mlp"] == hidden
    assert shared["layers.1.mlp.hidden"] == ["down"]


def test_some_inputs_are_what_they_are_among_all(tiny, text):
    every = dict(stream_moments(tiny, text, [*inputs_of(anatomy_of(tiny)), "head"]))
    some = dict(stream_moments(tiny, text, ["layers.1.mlp", "layers.0.o"]))
    assert list(some) == ["layers.0.o", "layers.1.mlp"]
    assert all(torch.equal(moment.second, every[name].second) for name, moment in some.items())


def test_layers_behind_the_last_input_are_not_run(tiny, text):
    tiny.transformer.h[2].register_forward_pre_hook(lambda *_: pytest.fail("layer 2 was run"))
    assert len(dict(stream_moments(tiny, text, ["layers.1.mlp.hidden"]))) == 1


def test_the_size_of_the_batches_does_not_matter(tiny, text):
    name = "layers.2.mlp.hidden"
    whole, cut = (
        dict(stream_moments(tiny, CalibrationText(text.tokens, 16, batch), [name]))[name] for batch in (1000, 1)
    )
    assert whole.count == cut.count
    torch.testing.assert_close(whole.second, cut.second, rtol=1e-5, atol=1e-6)


def test_one_token(tiny):
    text = CalibrationText(np.array([5]), 16)
    moment = dict(stream_moments(tiny, text, ["layers.0.qkv"]))["layers.0.qkv"]
    assert moment.count == 1
    torch.testing.assert_close(moment.second, torch.outer(moment.mean, moment.mean))
    table = compress_(tiny, Plan({"layers.*": RightFactor((2, 1))}), "calibrated", text=text)
    assert 0 <= table.weighted_error < 1
    assert torch.isfinite(tiny(torch.tensor([[5, 6]])).logits).all()


def test_no_tokens_is_an_error(tiny):
    with pytest.raises(UserError, match="no tokens"):
        dict(stream_moments(tiny, CalibrationText(np.array([], dtype=np.int64), 16), ["layers.0.qkv"]))


def test_values_that_are_not_finite_are_an_error(tiny, text):
    with torch.no_grad():
        tiny.transformer.h[1].mlp.c_fc.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"what enters layers.1.mlp.hidden is not finite"):
        dict(stream_moments(tiny, text, ["layers.0.o", "layers.1.mlp.hidden"]))


def test_half_precision_models_have_float32_moments(tiny, text):
    name = "layers.0.mlp.hidden"
    exact = dict(stream_moments(tiny, text, [name]))[name]
    half = dict(stream_moments(tiny.to(torch.bfloat16), text, [name]))[name]
    assert half.second.dtype == torch.float32
    assert float((half.second - exact.second).norm() / exact.second.norm()) < 0.02


def test_dropout_is_off_and_the_mode_restored(tiny, text):
    exact = dict(moments(tiny, text, ["layers.1.o"]))["layers.1.o"]
    tiny.train()
    tiny.transformer.h[0].eval()
    again = dict(moments(tiny, text, ["layers.1.o"]))["layers.1.o"]
    assert torch.equal(exact.second, again.second)
    assert tiny.training and not tiny.transformer.h[0].training and tiny.transformer.h[1].attn.training


def test_hidden_states_are_those_of_the_model(model_of_kind, text):
    model = model_of_kind
    states = HiddenStates(model, text)
    for layer in model.base_model.get_submodule(anatomy_of(model).family.layers):
        states.advance(layer)
    norm = before_head(model)
    for number, ids in enumerate(text.batches()):
        expected = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(states.apply(norm, number), expected)


def test_frequencies(text):
    shares = token_frequencies(text, 96)
    assert shares.shape == (96,)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[int(text.tokens[0])]) == pytest.approx((text.tokens == text.tokens[0]).mean())


def test_moments_come_back_from_disk(tiny, text, tmp_path, monkeypatch):
    folder = tmp_path / "moments"
    first = dict(moments(tiny, replace(text, moments=folder), ["layers.0.o"]))
    both = dict(moments(tiny, replace(text, moments=folder), ["layers.0.o", "layers.2.mlp"]))  # one read, one added
    monkeypatch.setattr(HiddenStates, "__init__", lambda *_: pytest.fail("the model was run again"))
    again = dict(moments(tiny, replace(text, moments=folder), ["layers.2.mlp", "layers.0.o"]))
    assert torch.equal(first["layers.0.o"].second, again["layers.0.o"].second)
    assert torch.equal(both["layers.2.mlp"].mean, again["layers.2.mlp"].mean)
    assert again["layers.2.mlp"].count == 75
    assert {file.name for file in folder.iterdir()} == {"layers.0.o.safetensors", "layers.2.mlp.safetensors"}


@pytest.mark.parametrize("change", ["text", "context", "weights", "config"])
def test_moments_of_something_else_are_refused(tiny, text, tmp_path, change):
    dict(moments(tiny, replace(text, moments=tmp_path), ["layers.0.o"]))
    if change == "text":
        text = CalibrationText(text.tokens[::-1], 16)
    elif change == "context":
        text = CalibrationText(text.tokens, 8)
    elif change == "weights":
        with torch.no_grad():
            tiny.transformer.h[2].mlp.c_fc.bias[3] += 1
    else:
        tiny.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UserError, match=r"calibration.moments=.*layers.0.o.safetensors is of another text or model"):
        dict(moments(tiny, replace(text, moments=tmp_path), ["layers.0.o"]))


def test_fingerprint_is_of_what_counts(tiny, text):
    twin = copy.deepcopy(tiny)
    twin.config._name_or_path = "elsewhere"
    assert fingerprint(twin, CalibrationText(text.tokens.copy(), 16, batch_tokens=1)) == fingerprint(tiny, text)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "shape", "nan"])
def test_damaged_moments_are_refused(tiny, text, tmp_path, damage):
    from safetensors.torch import save_file

    name, mark = "layers.0.o", fingerprint(tiny, text)
    (moment,) = dict(moments(tiny, replace(text, moments=tmp_path), [name])).values()
    file = tmp_path / f"{name}.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-50] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        save_file({"second": moment.second, "mean": moment.mean}, file)
    elif damage == "shape":
        MomentFolder(tmp_path, mark).save(name, replace(moment, second=torch.eye(3)))
    else:
        MomentFolder(tmp_path, mark).save(name, replace(moment, mean=moment.mean * float("nan")))
    with pytest.raises(UserError, match=r"layers.0.o.safetensors is damaged \(.*\); delete it"):
        dict(moments(tiny, replace(text, moments=tmp_path), [name]))


def test_a_file_is_no_folder_for_moments(tiny, text, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="must be a folder"):
        dict(moments(tiny, replace(text, moments=tmp_path / "taken"), ["layers.0.o"]))


def test_a_kill_while_writing_leaves_no_file(tiny, text, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kncompress.compression.moments.save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        dict(moments(tiny, replace(text, moments=tmp_path), ["layers.0.o"]))
    assert not list(tmp_path.iterdir())


def test_the_work_is_told_to_its_end(tiny, text):
    shares = []
    work = Work(lambda what, share: shares.append((what, share)))
    dict(stream_moments(tiny, text, ["layers.1.mlp"], work))
    assert [what for what, _ in shares] == ["layers.0", "layers.1"]
    assert shares[0][1] == 0 < shares[1][1] < 1
    assert work.done == pytest.approx(work.total)


@pytest.mark.gpu
def test_on_a_gpu(text):
    model = random_model(config_of("llama"))
    name = "layers.2.mlp.hidden"
    exact = dict(stream_moments(model, text, [name]))[name]
    moved = dict(stream_moments(model.cuda(), text, [name]))[name]
    assert moved.second.is_cuda
    torch.testing.assert_close(moved.second.cpu(), exact.second, rtol=1e-3, atol=1e-3)
