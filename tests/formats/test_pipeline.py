"""Compressed folders in transformers' pipelines: ``import kncompress`` is all that they need."""

import torch
import transformers
from formats.test_lazy_registration import run_python
from tiny_models import config_of, random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_
from kncompress.formats.pretrained import save_model

HALVES = Plan({"layers.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))})
WORDS = ["[PAD]", "[EOS]", "[UNK]", "[MASK]", *(f"w{number}" for number in range(92))]


def folder_of(kind, path):
    """A compressed model, and a tokenizer of words."""
    model = random_model(config_of(kind))
    compress_(model, HALVES)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **names)
    return model, tokenizer, save_model(model, path, tokenizer)


def test_text_generation_in_a_process_that_imports_the_package(tmp_path):
    model, tokenizer, folder = folder_of("gpt2", tmp_path / "model")
    told = run_python(f"""
import json, kncompress, transformers
generator = transformers.pipeline("text-generation", {str(folder)!r})
options = {{"max_new_tokens": 5, "min_new_tokens": 5, "max_length": None, "do_sample": False}}
print(json.dumps([r["generated_text"] for r in generator("w1 w2 w3", **options)]))
""")
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert told.replace(" ", "") == f'["{"".join(tokenizer.convert_ids_to_tokens(made[0]))}"]'


def test_prompts_of_several_lengths_at_once(tmp_path):
    """Padding on the left changes nothing, in a batch of which every prompt is answered alone too."""
    _, _, folder = folder_of("llama.untied", tmp_path / "model")
    generator = transformers.pipeline("text-generation", str(folder))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "max_length": None, "do_sample": False}
    prompts = ["w5", "w1 w2 w3", "w7 w8 w9 w10 w11"]
    together = generator(prompts, batch_size=3, **options)
    assert [rows[0]["generated_text"] for rows in together] == [
        generator(prompt, **options)[0]["generated_text"] for prompt in prompts
    ]


def test_fill_mask_with_a_bert(tmp_path):
    model, tokenizer, folder = folder_of("bert", tmp_path / "model")
    rows = transformers.pipeline("fill-mask", str(folder))("w1 [MASK] w3", top_k=3)
    logits = model(tokenizer("w1 [MASK] w3", return_tensors="pt")["input_ids"]).logits[0, 1]
    probabilities, tokens = logits.softmax(-1).topk(3)
    assert [row["token"] for row in rows] == tokens.tolist()
    torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), probabilities)
