"""A student that is kept layer by layer is the one that is made in memory, killed on the way or not."""

import copy
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config_of, random_model

from kncompress.anatomy import mapped
from kncompress.anatomy.mapped import HALVES, into_files_, let_go, own_, raised
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression import model_fit
from kncompress.compression.compress import compress_
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.parts import Parts
from kncompress.compression.repair import BlockRepair
from kncompress.config import RepairConfig
from kncompress.errors import UserError
from kncompress.formats import pretrained
from kncompress.formats.pretrained import load_model, load_stored, save_model
from kncompress.hub import CHECKSUMS

HALF = RightFactor((2, 1))
ODD = Plan({"layers.1.*": HALF, "layers.2.mlp.up": HALF})
STARTS = ("nearest", "random", "calibrated", "sequential")
ENDS = {"gpt2": "embedding", "llama": "embedding", "llama.untied": "head", "gemma2": "embedding"}
KINDS = tuple(ENDS)


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 512), context=16, batch_tokens=256)


def plan_of(kind):
    return Plan([*ODD.entries, (ENDS[kind], RightFactor((1, 2)))])


def kept(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def half(kind, tmp_path):
    """A folder of a dense model in bfloat16."""
    return save_model(random_model(config_of(kind)), tmp_path / "dense", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
def test_parts_hold_the_student_that_is_made_in_memory(kind, start, text, tmp_path):
    model = random_model(config_of(kind))
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    table = compress_(model, plan_of(kind), start, text=text)
    torch.manual_seed(3)
    parts = Parts(tmp_path / "parts", torch.float32)
    assert compress_(other, plan_of(kind), start, text=text, parts=parts).rows == table.rows
    assert [file.exists() for file in parts.files] == [True] * 5
    expected, found = model.state_dict(), other.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["nearest", "calibrated", "sequential"])
def test_what_lies_in_files_is_fitted_as_what_lies_in_memory(kind, start, half, text, tmp_path):
    """From bfloat16: the fit is that of the model loaded as float32, and only what is saved is rounded."""
    exact = load_model(half, dtype=torch.float32)
    stored = load_stored(half)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    expected = compress_(exact, plan_of(kind), start, text=text)
    found = compress_(stored, plan_of(kind), start, text=text, parts=Parts(tmp_path / "parts", torch.float32))
    assert found.rows == expected.rows
    assert all(torch.equal(stored.state_dict()[key], value) for key, value in exact.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
def test_weights_of_several_types_are_fitted_as_float32(kind, half, text, tmp_path):
    file = half / "model.safetensors"
    weights = load_file(file)
    mixed = {key: value.float() * 1.001 if number % 2 else value for number, (key, value) in enumerate(weights.items())}
    save_file(mixed, file, {"format": "pt"})
    (half / CHECKSUMS).unlink()
    exact, laid = load_model(half, dtype=torch.float32), load_stored(half)
    into_files_(laid, tmp_path / "laid")
    assert {p.dtype for p in laid.parameters()} == {torch.float32} and not list((tmp_path / "laid").iterdir())
    expected = compress_(exact, plan_of(kind), "calibrated", text=text)
    found = compress_(laid, plan_of(kind), "calibrated", text=text, parts=Parts(tmp_path / "parts", torch.float32))
    assert found.rows == expected.rows
    assert all(torch.equal(laid.state_dict()[key], value) for key, value in exact.state_dict().items())


@pytest.mark.parametrize("kind", ["llama.untied"])
def test_the_type_of_the_files_is_kept_and_is_all_that_is_lost(kind, half, text, tmp_path):
    exact, stored = load_model(half, dtype=torch.float32), load_stored(half)
    compress_(exact, plan_of(kind), "calibrated", text=text)
    compress_(stored, plan_of(kind), "calibrated", text=text, parts=Parts(tmp_path / "parts", torch.bfloat16))
    for key, value in exact.state_dict().items():
        assert torch.equal(stored.state_dict()[key], value.bfloat16()), key


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
@pytest.mark.parametrize("start", ["nearest", "calibrated", "sequential"])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_killed_fit_is_taken_up_at_its_layer(kind, start, after, half, text, tmp_path, monkeypatch):
    dtype = torch.bfloat16
    whole = compress_(load_stored(half), plan_of(kind), start, text=text, parts=Parts(tmp_path / "whole", dtype))
    keep, fitted = Parts.keep, Counter()

    def killed(self, stage, errors):
        if len(list(self.folder.glob("*.json"))) == after:
            raise Killed
        keep(self, stage, errors)

    monkeypatch.setattr(Parts, "keep", killed)
    with pytest.raises(Killed):
        compress_(load_stored(half), plan_of(kind), start, text=text, parts=Parts(tmp_path / "cut", dtype))
    monkeypatch.setattr(Parts, "keep", keep)
    before = {name for file in (tmp_path / "cut").glob("*.json") for name in json.loads(file.read_text())["maps"]}
    place = model_fit.ModelFit._place

    def counted(self, sites, fits):
        fitted.update(site.name for site in sites if site.name in fits)
        return place(self, sites, fits)

    monkeypatch.setattr(model_fit.ModelFit, "_place", counted)
    again = compress_(load_stored(half), plan_of(kind), start, text=text, parts=Parts(tmp_path / "cut", dtype))
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole") and again.rows == whole.rows
    assert {row.name for row in whole.rows if row.parameters} - set(fitted) == before


@pytest.mark.parametrize("kind", ["gpt2"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "beside"])
def test_a_damaged_part_is_told(kind, damage, half, text, tmp_path):
    parts = Parts(tmp_path / "parts", torch.float32)
    compress_(load_stored(half), ODD, parts=parts)
    file = parts.files[2]
    if damage == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "gone":
        file.unlink()
    else:
        file.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=r"model-00003-of-00005\S* ?\S*is damaged"):
        compress_(load_stored(half), ODD, parts=Parts(tmp_path / "parts", torch.float32))


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
def test_parts_become_shards_or_one_file(kind, half, tmp_path, monkeypatch):
    for limit, name in ((1 << 29, "one"), (0, "many")):
        monkeypatch.setattr(pretrained, "ONE_FILE", limit)
        model, parts = load_stored(half), Parts(tmp_path / "parts", torch.bfloat16)
        compress_(model, plan_of(kind), parts=parts)
        save_model(model, tmp_path / name, dtype=torch.bfloat16, parts=parts.files)
        parts.remove()
        assert not (tmp_path / "parts").exists()
    one, many = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 5 and (tmp_path / "one/model.safetensors").exists()
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "many/config.json").read_text()
    assert all(torch.equal(many.state_dict()[key], value) for key, value in one.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2"])
def test_a_number_too_large_for_the_type_is_told(kind, half, tmp_path):
    model = load_model(half, dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"dtype=float16: a weight of transformer\.h\.0\.mlp\.c_fc.* is too large"):
        compress_(model, ODD, parts=Parts(tmp_path / "parts", torch.float16))


@pytest.mark.parametrize("kind", ["llama"])
def test_a_repair_of_half_precision_is_in_float32(kind, half, text, tmp_path):
    model = load_stored(half)
    repair = RepairConfig(passes=2)
    table = compress_(model, ODD, text=text, repair=repair, parts=Parts(tmp_path / "parts", torch.bfloat16))
    assert table.repair is not None and table.repair.after[-1] < table.repair.before[-1]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["nearest", "sequential"])
@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
def test_a_repair_from_files_is_that_of_the_whole_model(kind, start, dtype, text, tmp_path, monkeypatch):
    """Bit for bit; and the dense layers that it reads are never in memory but one at a time."""
    folder = save_model(random_model(config_of(kind)), tmp_path / "dense", dtype=dtype)
    whole, told = load_model(folder, dtype=torch.float32), []
    own_(whole)
    wanted = compress_(whole, plan_of(kind), start, text=text, repair=RepairConfig(passes=2))
    run = BlockRepair.run

    def looked_at(self):
        files = mapped._mapped_files()
        told.append(all(mapped._end_of_file(files, p.data) for dense in self.layers for p in dense.parameters()))
        return run(self)

    monkeypatch.setattr(BlockRepair, "run", looked_at)
    parts, model = Parts(tmp_path / "parts", torch.float32), load_stored(folder)
    table = compress_(model, plan_of(kind), start, text=text, repair=RepairConfig(passes=2), parts=parts)
    assert table.repair is not None and wanted.repair is not None and told == [sys.platform == "linux"]
    assert (table.repair.before, table.repair.after) == (wanted.repair.before, wanted.repair.after)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].float()), name


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is mapped")
@pytest.mark.parametrize("kind", ["llama"])
def test_weights_stay_in_their_files(kind, half):
    model = load_stored(half)
    weight = model.model.layers[0].mlp.up_proj.weight
    stored, numbers = weight.data_ptr(), weight.detach().clone()
    assert mapped._end_of_file(mapped._mapped_files(), weight.data) is not None
    with raised(model.model.layers[0]):
        assert weight.dtype == torch.float32 and torch.equal(weight, numbers.float())
    assert weight.dtype == torch.bfloat16 and weight.data_ptr() == stored and torch.equal(weight, numbers)
    own = torch.ones(5000)
    let_go([own, weight.data])  # what is no file's is left alone
    assert own.sum() == 5000 and torch.equal(weight, numbers)
    own_(model)
    assert not {p.dtype for p in model.parameters()} & set(HALVES)
    assert mapped._end_of_file(mapped._mapped_files(), weight.data) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is mapped")
def test_memory_of_a_file_is_given_back(tmp_path):
    """Resident pages of the file fall to nothing: 64 MB are read and given back."""
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.ones(16, 1 << 20)}, tmp_path / "big.safetensors")
    tensor = load_file(tmp_path / "big.safetensors")["a"]

    def resident():
        pages, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                inside = line.endswith("big.safetensors")
            elif inside and line.startswith("Rss:"):
                pages += int(line.split()[1])
        return pages

    assert float(tensor.sum()) == 16 << 20 and resident() > 60_000
    let_go([tensor])
    assert resident() < 100 and float(tensor.sum()) == 16 << 20
    tensor[3, 7] = 5  # what has been changed stays
    let_go([tensor])
    assert float(tensor[3, 7]) == 5


@pytest.mark.parametrize("kind", ["llama"])
@pytest.mark.parametrize("fault", ["mixed", "cut", "missing", "foreign"])
def test_files_of_several_types_are_float32_and_bad_ones_are_told(kind, fault, half):
    from safetensors.torch import load_file, save_file

    weights = load_file(half / "model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    if fault == "mixed":
        weights[names[0]] = weights[names[0]].float()
    for file, some in shards.items():
        save_file({name: weights[name] for name in some}, half / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}}
    if fault == "foreign":
        index["weight_map"][names[0]] = "../a.safetensors"
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    (half / "model.safetensors").unlink()
    (half / "kncompress-checksums.json").unlink()
    if fault == "mixed":
        assert {p.dtype for p in load_stored(half).parameters()} == {torch.float32}
        return
    if fault == "cut":
        (half / "b.safetensors").write_bytes((half / "b.safetensors").read_bytes()[:-7])
    elif fault == "missing":
        (half / "b.safetensors").unlink()
    told = {"cut": "b.safetensors is damaged", "missing": "lacks its weights: b.safetensors", "foreign": "not the name"}
    with pytest.raises(UserError, match=told[fault]) as caught:
        load_stored(half)
    assert "\n" not in str(caught.value)
