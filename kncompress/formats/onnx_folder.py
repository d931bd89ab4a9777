"""What lies beside an ONNX graph: config, tokenizer, what onnxruntime-genai reads, a card with lines to copy."""

import copy
import json
from pathlib import Path
from typing import Any

from kncompress.anatomy.sites import positions_of
from kncompress.errors import UserError
from kncompress.formats.onnx_card import onnx_card
from kncompress.formats.onnx_decoder import CacheSizes
from kncompress.formats.onnx_graph import check_packages
from kncompress.formats.onnx_session import EXACT_PRODUCTS, OnnxDecoder
from kncompress.formats.stored import check_checksums, write_checksums
from kncompress.terminal import first_line

GRAPH = "model.onnx"
GENAI = "genai_config.json"


def accompany(model: Any, tokenizer: Any, folder: Path, sizes: list[CacheSizes]) -> None:
    """Write it into ``folder``.

    Args:
        model: that the graph was made from.
        tokenizer: or None.
        folder: that holds the graph.
        sizes: of the cache of one that generates, else empty: then nothing is written for onnxruntime-genai.
    """
    fields = copy.deepcopy(model.config)
    if hasattr(fields, "quantization_config"):  # the graph holds the factors
        del fields.quantization_config
    fields.save_pretrained(folder)
    (folder / "README.md").write_text(onnx_card(model, bool(sizes)), encoding="utf-8")
    write_checksums(folder, "*.onnx*")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if sizes:
        model.generation_config.save_pretrained(folder)
        told = genai_config(model, tokenizer, sizes)
        (folder / GENAI).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def check_backend(folder: Path, backend: str, path: str) -> None:
    """Raises UserError, which names ``path``, where ``folder`` is not what ``backend`` reads: transformers or onnx."""
    if backend == "transformers":
        if (folder / GENAI).exists():
            raise UserError(f"backend=transformers: model={path} is a graph of ONNX; give backend=onnx")
        return
    key = f"backend=onnx model={path}"
    missing = next((name for name in (GENAI, GRAPH) if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(
            f"{key}: has no {missing}; give the folder model/ that export format=onnx wrote of a model that generates"
        )
    check_packages(key, ("onnxruntime",))


def load_decoder(folder: Path, path: str) -> OnnxDecoder:
    """The graph of such a folder, with the configs that lie beside it. Raises UserError, which names ``path``, where a
    file is damaged."""
    from transformers import AutoConfig, GenerationConfig

    check_checksums(folder, sorted(folder.glob(f"{GRAPH}*")), path)
    try:
        model = OnnxDecoder(folder / GRAPH, AutoConfig.from_pretrained(folder))
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of onnxruntime, which has no common class for them, or of a config
        raise UserError(f"model.path={path}: cannot be read: {first_line(error)}") from error
    return model


def genai_config(model: Any, tokenizer: Any, sizes: list[CacheSizes]) -> dict[str, Any]:
    """The content of ``genai_config.json`` of a graph that ``write_decoder`` wrote."""
    fields, ends = model.config, end_tokens(model, tokenizer)
    first = fields.bos_token_id if fields.bos_token_id is not None else next(iter(ends), 0)
    filling = fields.pad_token_id if fields.pad_token_id is not None else next(iter(ends), 0)
    positions = positions_of(fields)
    cache = {"past_key_names": ".%d.key", "past_value_names": ".%d.value"}
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first,
            "eos_token_id": ends or [first],
            "pad_token_id": filling,
            "vocab_size": fields.vocab_size,
            "context_length": positions,
            "decoder": {
                "session_options": {"provider_options": [], EXACT_PRODUCTS: "1"},
                "filename": GRAPH,
                "hidden_size": fields.hidden_size,
                "head_size": sizes[0].head,
                "num_attention_heads": fields.num_attention_heads,
                "num_key_value_heads": sizes[0].key_heads,
                "num_hidden_layers": len(sizes),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                }
                | {name: f"past_key_values{text}" for name, text in cache.items()},
                "outputs": {"logits": "logits"}
                | {name.replace("past", "present"): f"present{text}" for name, text in cache.items()},
            },
        },
        "search": {"do_sample": False, "max_length": positions, "num_beams": 1, "past_present_share_buffer": True},
    }


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens at which a text ends, the tokenizer's and those of the generation config."""
    ends = model.generation_config.eos_token_id
    named = [*(ends if isinstance(ends, list) else [ends]), getattr(tokenizer, "eos_token_id", None)]
    return sorted({token for token in named if token is not None})
