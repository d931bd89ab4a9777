"""``export`` and ``generate``: what a finished model is used for."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choice, check_not_negative, check_positive, check_share, choice
from kncompress.config.placement import PlacedRunConfig
from kncompress.config.run import DataConfig, ModelRunConfig
from kncompress.errors import UserError


@dataclass
class ExportConfig(ModelRunConfig):
    """``export``: a model, compressed or not, in a form that runs without this package, checked before it is kept.

    ``dense``, ``onnx`` and ``int8`` leave a folder ``model/``, with the tokenizer where there is one; ``merged`` leaves
    ``merged.safetensors``. An export that fails its check leaves neither, one line says why, and the exit code is 1.
    """

    format: str = choice("dense", "dense", "merged", "onnx", "int8")
    """``dense``: a plain transformers folder, the factors multiplied out; ``merged``: its weights as one safetensors
    file; ``onnx``: ONNX, any batch and length, the factors as they are; ``int8``: the same without a cache, its weights
    as the 8-bit integers of ``dynamic``. ``onnx`` and ``int8`` need the extra ``onnx``."""
    cache: bool | None = None
    """Whether the graph of ``onnx`` keeps keys and values between calls: it then generates, in onnxruntime-genai too;
    ``false``: a graph that scores texts in one call. null: ``true`` where the model predicts the next token and asks
    transformers for its attention, as all but GPT-J, GPT-Neo, Bloom, MPT and Falcon do."""
    dtype: str = choice("float32", "float32", "float16", "bfloat16", "stored")
    """Type of the written weights: float32; float16 except of ``int8``; bfloat16 of ``dense`` and ``merged``;
    ``stored``, of ``dense``: that of the model's files (float32 where they have several, and for GGUF)."""
    tolerance: float | None = None
    """Most that a logit may change, as a share of the largest, against the model in the same type; null: 1e-4 in
    float32, 1e-2 in float16, 8e-2 in bfloat16, or three times what the 16 bits alone change, if that is more. ``int8``
    and ``bits`` are measured by the perplexity instead."""
    bits: int | None = None
    """8 or 4: weights of the graph of ``onnx`` with a cache as integers, by onnxruntime's MatMulNBits; small factors
    stay float. null: as ``dtype`` says."""
    dynamic: bool = False
    """Of ``bits=8``: by onnxruntime's dynamic quantisation, a scale for each output of a map and one for all inputs as
    they come; ``false``: by groups."""
    group: int | None = None
    """Of ``bits``: neighbours in a row that share a scale, 16, 32, 64 or 128; null: 64 of 8 bits, 32 of 4."""
    packed: bool = False
    """Of ``bits`` and ``int8``: round the numbers of packed maps as they are, which loses far more; ``false``: those of
    the equal outer products, of which there are more."""
    int8_tolerance: float | None = None
    """Most that ``int8`` or ``bits`` may raise the perplexity, as a share of that of the ONNX file which it is made
    from; null: 0.02, and 1 for 4 bits."""
    tokens: int = 16384
    """Tokens of ``data`` on which that is measured."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text of ``int8`` and ``bits``; nothing else reads any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        types = {"onnx": ("float32", "float16"), "int8": ("float32",), "merged": ("float32", "float16", "bfloat16")}
        check_choice("dtype", self.dtype, types.get(self.format, (self.dtype,)))
        if self.cache and self.format != "onnx":
            raise UserError(f"cache=true: is for format=onnx, and this is format={self.format}")
        self._check_bits()
        for name in ("tolerance", "int8_tolerance", "tokens"):
            check_positive(name, getattr(self, name))

    def _check_bits(self) -> None:
        if self.packed and self.bits is None and self.format != "int8":
            raise UserError("packed=true: is for bits=8, bits=4 or format=int8; other exports leave maps packed")
        if self.dynamic and (self.bits != 8 or self.group is not None):
            given = f"bits={self.bits}" if self.group is None else f"group={self.group}"
            raise UserError(f"dynamic=true: is for bits=8 without a group, and this is {given}")
        if self.group is not None and (self.bits is None or self.group not in (16, 32, 64, 128)):
            raise UserError(f"group={self.group}: must be 16, 32, 64 or 128, with bits=8 or bits=4")
        if self.bits is None:
            return
        if self.bits not in (8, 4):
            raise UserError(f"bits={self.bits}: not one of 8, 4")
        if self.format != "onnx" or self.cache is False or self.dtype != "float32":
            raise UserError(f"bits={self.bits}: needs format=onnx with a cache and dtype=float32")


@dataclass
class GenerateConfig(PlacedRunConfig):
    """``generate``: text from a model, shown as it comes; with ``compare`` another model's beside it.

    Both models draw with the same random numbers; ``result.json`` has the texts.
    """

    prompt: Any = None
    """What to go on from, or a list of such texts; ``''``: a new text."""
    prompts: str | None = None
    """A text file in the place of ``prompt``: a prompt on each line, blank lines left out."""
    compare: str | None = None
    """Second model, as ``model.path``: the teacher beside its student."""
    tokens: int = 64
    """Most new tokens of a text; it also ends at the model's end of text and at its last position."""
    samples: int = 1
    """Texts for each prompt, the n-th with the random numbers of ``seed`` + n - 1."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw among so many tokens, the likeliest ones; null: all."""
    top_p: float = 0.95
    """Draw among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text has already become less likely."""
    backend: str = choice("transformers", "transformers", "onnx")
    """What runs ``model``: ``transformers``, or ``onnx`` (onnxruntime, on the CPU) a folder that ``export format=onnx``
    wrote. ``compare`` is read by transformers, unless it is such a folder."""
    accelerator: str = choice("auto", "auto", "cpu", "gpu")
    """``cpu``, ``gpu`` or ``auto``; of ``backend=transformers``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            told = "null" if self.prompt is None else self.prompt
            raise UserError(f"prompt={told}: give prompt=... or prompts=<text file>, one of the two")
        if isinstance(self.prompt, dict) or (isinstance(self.prompt, list) and not self.prompt):
            raise UserError(f"prompt={self.prompt}: must be a text or a list of texts")
        for name in ("tokens", "samples", "top_k", "top_p", "repetition_penalty"):
            check_positive(name, getattr(self, name))
        check_not_negative("temperature", self.temperature)
        check_share("top_p", self.top_p)
        if self.model.device_map is not None and (self.backend == "onnx" or self.accelerator != "auto"):
            other = "backend=onnx" if self.backend == "onnx" else f"accelerator={self.accelerator}"
            raise UserError(f"model.device_map={self.model.device_map}: chooses the devices; leave out {other}")
