"""The model card of an exported ONNX folder: how to run it, in lines to copy."""

from typing import Any

import torch
from huggingface_hub import ModelCardData

GENAI_LINES = """\
import onnxruntime_genai as genai

model = genai.Model(".")
tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
prompt = tokenizer.encode("The river, in spring,")
parameters.set_search_options(max_length=len(prompt) + 20)
generator = genai.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
LOOP_LINES = """\
import numpy, onnxruntime, tokenizers

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # or it says that from_end, below, is no constant
options.add_session_config_entry("session.x64quantprecision", "1")  # or 8-bit products saturate on x86 without VNNI
session = onnxruntime.InferenceSession("model.onnx", options)
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
past = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
kept = [numpy.zeros((1, value.shape[1], 0, value.shape[3]), numpy.float32) for value in past]
text = tokenizer.encode("The river, in spring,").ids
for step in range(20):
    new = text[kept[0].shape[2] :]  # the prompt, then one token at a time
    feeds = {value.name: tensor for value, tensor in zip(past, kept)}
    feeds["input_ids"] = numpy.array([new])
    feeds["attention_mask"] = numpy.ones((1, len(text)), numpy.int64)
    feeds["position_ids"] = numpy.arange(len(text) - len(new), len(text))[None]
    logits, *kept = session.run(None, feeds)
    text.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(text))
"""
SCORE_LINES = """\
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # or 8-bit products saturate on x86 without VNNI
session = onnxruntime.InferenceSession("model.onnx", options)
logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]  # both int64, (rows, tokens)
"""


def onnx_card(model: Any, generates: bool) -> str:
    """Markdown, for ``README.md`` of the folder.

    Args:
        model: that the graph was made from.
        generates: whether the graph has a cache.
    """
    task = "text-generation" if generates else None
    data = ModelCardData(library_name="onnx", pipeline_tag=task, tags=["kncompress"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {type(model).__name__} as ONNX",
        f"{parameters:,} parameters. Neither transformers nor torch nor kncompress is needed to run it.",
    ]
    if not generates:
        return "\n\n".join([*parts, f"With onnxruntime:\n\n```python\n{SCORE_LINES}```"]) + "\n"
    loop = LOOP_LINES.replace("float32", "float16") if model.dtype == torch.float16 else LOOP_LINES
    return (
        "\n\n".join(
            [
                *parts,
                f"`pip install onnxruntime-genai`, then, in this folder:\n\n```python\n{GENAI_LINES}```",
                "Or with onnxruntime alone (`pip install onnxruntime tokenizers`), always the likeliest token:\n\n"
                f"```python\n{loop}```",
                "Rows of a batch are padded at their end. `logits` are those of the last token; the optional input "
                "`from_end` asks for others: how many tokens before the last each of them lies.",
            ]
        )
        + "\n"
    )
