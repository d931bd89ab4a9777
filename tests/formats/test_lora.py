"""LoRA by peft on compressed models: trained, saved, loaded again, merged into the dense twin."""

import copy

import pytest
import torch
from formats.test_lazy_registration import run_python
from tiny_models import config_of, random_model
from transformers import AutoModelForCausalLM

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_
from kncompress.formats.pretrained import save_model, to_dense
from kncompress.kron import parse_shape

peft = pytest.importorskip("peft")

PLANS = {
    # A fused module with a map that stays dense, outer products beside a sum or packed, and maps that stay dense.
    "gpt2": {
        "embedding": RightFactor((1, 2)),
        "layers.*.attn.[qv]": RightFactor((1, 2)),
        "layers.1.mlp.up": parse_shape("96x1(x)1x24*2 + 48x12(x)2x2"),
        "layers.0.mlp.up": RightFactor((2, 1)),
        "layers.2.mlp.up": parse_shape("p*96x1(x)1x24*5"),
    },
    "llama.bias": {"layers.*": RightFactor((2, 1)), "layers.1.attn.q": "keep"},
    "gpt_neox": {"layers.*": RightFactor((2, 1))},
}
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "llama.bias": ["q_proj", "v_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
}


@pytest.fixture
def folder(kind, tmp_path):
    model = random_model(config_of(kind))
    compress_(model, Plan(PLANS[kind]))
    return save_model(model, tmp_path / "model")


def settings(kind):
    """With what peft asks for where a Conv1D is among the targets, as it is in the dense GPT-2."""
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")


@pytest.mark.parametrize("kind", PLANS)
def test_an_adapter_is_trained_saved_loaded_and_merged(kind, folder, ids, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    before, expected = copy.deepcopy(base.state_dict()), base(ids).logits
    model = peft.get_peft_model(base, settings(kind))
    assert torch.equal(model(ids).logits, expected)  # B starts at 0
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 3 * len(TARGETS[kind])

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    now = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()}
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())

    model.eval()
    trained = model(ids).logits
    assert not torch.equal(trained, expected)
    model.save_pretrained(tmp_path / "adapter")
    names = peft.utils.load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert len(names) == 2 * len(adapted) and all("lora_" in name for name in names)

    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, trained)
    with again.disable_adapter():
        assert torch.equal(again(ids).logits, expected)
    with pytest.raises(ValueError, match="cannot take up a LoRA update: load the adapter into the dense twin"):
        again.merge_and_unload()
    dense = to_dense(AutoModelForCausalLM.from_pretrained(folder))
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, trained, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: changes the base weight"),
        ({"use_dora": True}, "unsupported variant combination"),
    ],
)
def test_what_would_need_the_base_weight_is_refused(folder, options, message):
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(target_modules=["c_fc"], **options)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, config)


def test_layers_are_registered_where_peft_came_first():
    code = """
import peft.tuners.lora.config, kncompress
print(sorted(kind.__name__ for kind in peft.LoraConfig()._custom_modules))
"""
    assert run_python(code) == "['FusedMaps', 'HybridLinear', 'KroneckerLinear', 'PackedLinear']"


@pytest.mark.parametrize("kind", PLANS)
def test_all_linear_names_factored_maps_too(kind, folder, ids):
    """One adapter a module, fused ones among them, as the dense model gets; none for the head."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = []
    for model in (base, to_dense(base)):
        config = settings(kind)
        config.target_modules = "all-linear"
        wrapped = peft.get_peft_model(model, config)
        adapted.append({name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")})
    assert adapted[0] == adapted[1]
    assert len(adapted[0]) == {"gpt2": 12, "llama.bias": 21, "gpt_neox": 12}[kind]
