"""A model that is changed before its fit while its weights lie in files: as in memory, and a layer at a time."""

import sys

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy import mapped
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.model_fit import ModelFit
from kncompress.compression.parts import Parts
from kncompress.config import FitConfig
from kncompress.formats.pretrained import load_model, load_stored, save_model

HALF = RightFactor((2, 1))
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is mapped")


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 512), context=16, batch_tokens=256)


def folder_of(kind, path, dtype=torch.bfloat16, **fields):
    """A folder of a dense model."""
    config = config_of(kind)
    for name, value in fields.items():
        setattr(config, name, value)
    return save_model(random_model(config), path, dtype=dtype)


@pytest.fixture
def in_memory(monkeypatch):
    """Names of the parameters that lie in no file when the fit begins."""
    found, run = [], ModelFit.run

    def looked_at(self, *given):
        files = mapped._mapped_files()
        found[:] = [n for n, p in self.model.named_parameters() if mapped._end_of_file(files, p.data) is None]
        return run(self, *given)

    monkeypatch.setattr(ModelFit, "run", looked_at)
    return found


def same(model, other):
    expected, found = model.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@linux
@pytest.mark.parametrize("kind", ["gpt2", "gpt2.scaled", "llama.untied", "gemma2"])
@pytest.mark.parametrize("start", ["nearest", "sequential"])
def test_the_layers_that_are_left_stay_in_their_files(kind, start, text, tmp_path, in_memory):
    """Bit for bit the student of the whole model in float32; of GPT-2's queries that are scaled anew one layer's are in
    memory."""
    fields = {"scale_attn_by_inverse_layer_idx": True} if kind == "gpt2.scaled" else {}
    folder = folder_of(kind.removesuffix(".scaled"), tmp_path / "dense", **fields)
    exact, stored = load_model(folder, dtype=torch.float32), load_stored(folder)
    plan = Plan({"layers.1.*": HALF, "layers.0.mlp.up": HALF})
    expected = compress_(exact, plan, start, layers=(0, 2), text=text)
    parts = Parts(tmp_path / "parts", torch.float32)
    found = compress_(stored, plan, start, layers=(0, 2), text=text, parts=parts)
    assert in_memory == [f"transformer.h.1.attn.c_attn.{name}" for name in ("weight", "bias") if fields]
    assert found.rows == expected.rows and found.parameters_before == expected.parameters_before
    assert len(parts.files) == 4 and all(file.exists() for file in parts.files)
    same(exact, stored)


@linux
@pytest.mark.parametrize("kind", ["gpt2", "llama.untied", "gemma2"])
@pytest.mark.parametrize("start", ["nearest", "calibrated", "sequential"])
@pytest.mark.parametrize("which", [["hidden", "residual"], ["heads"], ["hidden", "heads", "residual"]], ids="+".join)
def test_what_symmetries_change_lies_in_files_again(kind, start, which, text, tmp_path, in_memory):
    """Bit for bit the student of the whole model in float32; another order needs no wider type."""
    folder, settings = folder_of(kind, tmp_path / "dense"), FitConfig(symmetries=which)
    exact, stored = load_model(folder, dtype=torch.float32), load_stored(folder)
    plan = Plan({"layers.*": HALF, "layers.*.o": RightFactor((1, 2)), "embedding": RightFactor((1, 2))})
    expected = compress_(exact, plan, start, text=text, settings=settings)
    types, run = set(), ModelFit.run

    def looked_at(self, *given):
        types.update(p.dtype for p in self.model.parameters())
        return run(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelFit, "run", looked_at)
        parts = Parts(tmp_path / "parts", torch.float32)
        found = compress_(stored, plan, start, text=text, settings=settings, parts=parts)
    assert found.arrangement == expected.arrangement and found.rows == expected.rows
    if kind != "gemma2":  # whose residual stream is one that cannot be turned
        assert all(getattr(found.arrangement, {"heads": "values"}.get(name, name)) for name in which)
    assert in_memory == [] and types == {torch.bfloat16, *([torch.float32] if "heads" in which else [])}
    assert sorted(file.name for file in parts.folder.glob("*.safetensors")) == sorted(f.name for f in parts.files)
    same(exact, stored)
