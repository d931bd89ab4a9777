"""The model card tells what the model is, in the form that the hub reads."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.formats.card import CardFacts, card_text
from kncompress.formats.pretrained import save_model
from kncompress.kron import parse_shape

PLAN = Plan({"embedding": RightFactor((1, 2)), "layers.[02].mlp.up": RightFactor((2, 2), terms=2)})


def front(text):
    _, fields, body = text.split("---\n", 2)
    return yaml.safe_load(fields), body


def test_a_saved_folder_has_a_card_of_its_model(tiny, tmp_path, ids):
    dense = unique_parameters(tiny)
    compress_(tiny, PLAN)
    facts = CardFacts("openai-community/gpt2", "wikitext2", {"perplexity/student": 31.25, "kl/student": 0.5})
    folder = save_model(tiny, tmp_path / "model", facts=facts)
    fields, body = front((folder / "README.md").read_text())
    assert fields["base_model"] == "openai-community/gpt2"
    assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", "text-generation")
    assert "kronecker" in fields["tags"]
    count = unique_parameters(tiny)
    assert f"{count:,} parameters" in body and f"has {dense:,} ({count / dense:.1%} are left)" in body
    assert "3 of 19 linear maps" in body
    assert "| layers.*.mlp.up | 0, 2 | 48x12(x)2x2*2 |" in body
    assert "| perplexity/student | 31.25 |" in body and "- text: wikitext2" in body
    code = body.split("```python\n")[1].split("```")[0].replace("this folder or its hub id", str(folder))
    found: dict = {}
    exec(code, found)
    assert isinstance(found["model"], AutoModelForCausalLM._model_mapping[type(tiny.config)])
    assert torch.equal(found["model"](ids).logits, tiny(ids).logits)


@pytest.mark.parametrize(
    ("base", "told"),
    [(None, None), ("/home/me/models/gpt2", "gpt2"), ("asset:mini", "asset:mini"), ("runs/mine", "mine")],
)
def test_what_is_no_hub_id_is_no_base_model(tiny, base, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    fields, body = front(card_text(tiny, CardFacts(base, ["sample", "/home/me/a.txt"])))
    assert "base_model" not in fields
    made = [line for line in body.splitlines() if line.startswith("- made from")]
    assert made == ([] if told is None else [f"- made from: {told}"])
    assert "- text: sample, a.txt" in body and "/home/me" not in body
    assert "import kncompress" not in body and "kronecker" not in fields["tags"]  # dense


@pytest.mark.parametrize("shape", ["48x12(x)2x2*2", "s*48x12(x)2x2", "96x1(x)1x24*3 + 48x24(x)2x1"])
def test_every_kind_of_shape_is_counted(tiny, shape):
    dense = unique_parameters(tiny)
    compress_(tiny, Plan({"layers.1.mlp.up": parse_shape(shape)}))
    assert f"the model has {dense:,} (" in front(card_text(tiny))[1]
