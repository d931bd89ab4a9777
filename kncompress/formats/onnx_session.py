"""ONNX files run by onnxruntime on the CPU, called as models of transformers are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import positions_of
from kncompress.formats.onnx_decoder import FROM_END

EXACT_PRODUCTS = "session.x64quantprecision"
"""onnxruntime's key for 8-bit products that do not saturate on x86 without VNNI, "1"; elsewhere it changes nothing
(onnxruntime_session_options_config_keys.h)."""


def open_session(file: Path) -> Any:
    """onnxruntime's session of a file, on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry(EXACT_PRODUCTS, "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class _Session(nn.Module):
    """A file that is run with as many threads as torch uses; no gradients.

    Args:
        file: ONNX.
        config: the transformers config of the model that it was made from.
    """

    def __init__(self, file: Path, config: Any = None) -> None:
        super().__init__()
        self.session = open_session(file)
        self.config, self.bytes = config, sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
        # Whoever asks a model for its device looks at a parameter.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.place.device


class OnnxModel(_Session):
    """``input_ids`` (B, T), ``attention_mask`` (B, T) or None -> ``.logits`` (B, T, V); a graph of ``write_onnx``."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """Logits of all positions."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
        (logits,) = self.session.run(["logits"], feeds)
        return SimpleNamespace(logits=torch.from_numpy(logits))


class OnnxDecoder(_Session):
    """The graph of ``write_decoder``: as ``OnnxModel``, with a cache; rows are padded at their end.

    ``past_key_values`` is what the call before returned under that name.
    """

    def __init__(self, file: Path, config: Any = None) -> None:
        super().__init__(file, config)
        inputs = self.session.get_inputs()
        self._past = {value.name: value for value in inputs if value.name.startswith("past_key_values.")}
        self.generation_config: Any = None
        """Where texts end; for whoever writes with it."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: list[Any] | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> SimpleNamespace:
        """``.logits`` (B, T, V), or of the last ``logits_to_keep`` tokens, and ``.past_key_values``.

        Args:
            input_ids: (B, T), those that no call has read yet.
            attention_mask: (B, past + T); None: all are read.
        """
        rows, tokens = input_ids.shape
        past = past_key_values or [self._empty(value, rows) for value in self._past.values()]
        mask = input_ids.new_ones(rows, past[0].shape[2] + tokens) if attention_mask is None else attention_mask
        feeds = dict(zip(self._past, past, strict=True))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        chosen = torch.arange((logits_to_keep or tokens) - 1, -1, -1)
        texts = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, FROM_END: chosen}
        feeds |= {name: value.contiguous().numpy() for name, value in texts.items()}
        logits, *present = self.session.run(None, feeds)
        return SimpleNamespace(logits=torch.from_numpy(logits), past_key_values=present if use_cache else None)

    def _empty(self, value: Any, rows: int) -> Any:
        import numpy as np

        _, heads, _, size = value.shape
        return np.zeros((rows, heads, 0, size), np.float16 if "float16" in value.type else np.float32)


@torch.no_grad()
def largest_difference(model: Any, other: Any, seed: int = 0) -> float:
    """The largest difference between two models' logits, as a share of the first one's largest logit.

    On random tokens: one token alone, several rows, rows with padding before or after their tokens, and all positions
    (256 at most). Logits of padding do not count: what attends to nothing is left open. nan where either has a logit of
    a token that is no number. A graph with a cache is not given padding before the tokens, and reads the last rows a
    second time, token by token: so it is asked for the text that it would go on with.
    """
    config, cached = model.config, isinstance(other, OnnxDecoder)
    random = torch.Generator().manual_seed(seed)
    worst, largest = torch.zeros(2)
    most = min(positions_of(config), 256)
    for rows, tokens in ((1, 1), (3, 5), (2, most)):
        tokens = min(tokens, most)
        ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=random)
        mask = torch.ones_like(ids)
        mask[0, max(1, tokens - 2) :] = 0
        if rows > 2 and not cached:
            mask[1, : tokens // 2] = 0
        first, second = (
            each(input_ids=ids, attention_mask=mask, use_cache=False).logits.float() for each in (model, other)
        )
        if cached and tokens > 1:
            first, mask = torch.cat([first, first]), torch.cat([mask, mask])
            second = torch.cat([second, _in_steps(other, ids)])
        if first.ndim > 2:  # of a classifier they are those of whole rows
            first, second = first[mask.bool()], second[mask.bool()]
        worst = torch.maximum(worst, (first - second).abs().max())  # nan stays nan, which Python's max drops
        largest = torch.maximum(largest, first.abs().max())
    return float(worst / largest if largest else worst)


def _in_steps(decoder: OnnxDecoder, ids: Tensor, steps: int = 8) -> Tensor:
    """Logits (B, T, V) of ``ids`` (B, T), the last ``steps`` tokens, or all but the first, one at a time."""
    begun = max(1, ids.shape[1] - steps)
    found = decoder(input_ids=ids[:, :begun])
    parts = [found.logits]
    for token in ids[:, begun:].split(1, dim=1):
        found = decoder(input_ids=token, past_key_values=found.past_key_values)
        parts.append(found.logits)
    return torch.cat(parts, dim=1).float()
