"""What runs a model's folder: transformers, onnxruntime by our own loop, onnxruntime-genai; each writes greedily."""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kncompress.config import BenchConfig
from kncompress.config.measurement import RUNTIMES
from kncompress.errors import UserError
from kncompress.formats.onnx_folder import load_decoder
from kncompress.formats.onnx_graph import PACKAGES
from kncompress.formats.pretrained import load_model

TRANSFORMERS, ONNXRUNTIME, GENAI = RUNTIMES


class Runtime(Protocol):
    """A model in memory."""

    def write(self, ids: Tensor, new: int, tick: Callable[[], None]) -> None:
        """Reads ``ids`` (B, T), int64, and writes ``new`` tokens after each row, always the likeliest; calls ``tick``
        as each is known."""


class Transformers:
    """A model folder, by transformers' ``generate``.

    Args:
        folder: dense, or compressed.
        device: where it runs.
        dtype: of its weights there.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.model = load_model(folder, dtype=dtype).to(device).eval()

    def write(self, ids: Tensor, new: int, tick: Callable[[], None]) -> None:
        """See ``Runtime``."""
        from transformers.generation.streamers import BaseStreamer

        class Ticks(BaseStreamer):
            begun = False

            def put(self, _: Tensor) -> None:
                if self.begun:  # the first time it gets the prompt
                    tick()
                self.begun = True

            def end(self) -> None:
                pass

        ids = ids.to(self.model.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}
        self.model.generate(ids, max_new_tokens=new, min_new_tokens=new, streamer=Ticks(), **options)


class Onnxruntime:
    """A folder of ``export format=onnx``, as ``generate backend=onnx`` runs it, on the CPU in the graph's own type."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.model = load_decoder(folder, str(folder))

    def write(self, ids: Tensor, new: int, tick: Callable[[], None]) -> None:
        """See ``Runtime``."""
        cache = None
        for _ in range(new):
            found = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            ids, cache = found.logits[:, -1].argmax(-1, keepdim=True), found.past_key_values
            tick()


class OnnxruntimeGenai:
    """The same folder by onnxruntime-genai, with as many threads as torch has."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        import onnxruntime_genai

        self.package = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": torch.get_num_threads()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)

    def write(self, ids: Tensor, new: int, tick: Callable[[], None]) -> None:
        """See ``Runtime``."""
        rows, tokens = ids.shape
        parameters = self.package.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=rows, max_length=tokens + new, min_length=tokens + new)
        generator = self.package.Generator(self.model, parameters)
        generator.append_tokens(ids.int().numpy())
        for _ in range(new):
            generator.generate_next_token()
            tick()


_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    TRANSFORMERS: {},
    ONNXRUNTIME: {"onnx": PACKAGES},
    GENAI: {"onnx": PACKAGES, "genai": ("onnxruntime_genai",)},
}
"""Runtime -> extra -> packages."""
_LOADED: dict[str, Callable[[Path, torch.device, torch.dtype], Runtime]] = {
    TRANSFORMERS: Transformers,
    ONNXRUNTIME: Onnxruntime,
    GENAI: OnnxruntimeGenai,
}


def load_runtime(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Runtime:
    """``folder`` as the runtime of this name has it in memory."""
    return _LOADED[name](folder, device, dtype)


def import_packages(name: str) -> None:
    """Those of a runtime, before its memory is measured."""
    import_module("transformers.generation.utils" if name == TRANSFORMERS else name.replace("-", "_"))


def runtimes_of(config: BenchConfig, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those to measure; and where all that are installed are asked for, the others and what they lack.

    Raises:
        UserError: one is named that is not installed or does not run on ``device``.
    """
    named = config.named_runtimes
    lacking = {name: why for name in named or RUNTIMES if (why := _lacks(name, device)) is not None}
    if named and lacking:
        name, why = next(iter(lacking.items()))
        raise UserError(f"runtimes={name}: {why}")
    return [name for name in named or RUNTIMES if name not in lacking], lacking


def _lacks(name: str, device: torch.device) -> str | None:
    if name != TRANSFORMERS and device.type != "cpu":
        return "runs on the CPU here; give accelerator=cpu"
    for extra, packages in _NEEDS[name].items():
        for package in packages:
            if find_spec(package) is None:
                return f"needs the package {package}: pip install 'kncompress[{extra}]'"
    return None
