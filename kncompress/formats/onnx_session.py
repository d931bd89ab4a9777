"""An ONNX file run by onnxruntime on the CPU, called as a model of transformers is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import positions_of


class OnnxModel(nn.Module):
    """``input_ids`` (B, T), ``attention_mask`` (B, T) or None -> ``.logits``, (B, T, V); no gradients, no cache.

    Args:
        file: written by ``models.onnx_graph``.
        config: the transformers config of the model that it was made from.
    """

    def __init__(self, file: Path, config: Any = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.config = config
        # Whoever asks a model for its device looks at a parameter.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """Logits of all positions."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
        (logits,) = self.session.run(["logits"], feeds)
        return SimpleNamespace(logits=torch.from_numpy(logits))


@torch.no_grad()
def largest_difference(model: Any, other: Any, seed: int = 0) -> float:
    """The largest difference between two models' logits, as a share of the first one's largest logit.

    On random tokens: one token alone, several rows, rows with padding before or after their tokens, and all positions
    (256 at most). Logits of padding do not count: what attends to nothing is left open. nan where either has a logit of
    a token that is no number.
    """
    config = model.config
    random = torch.Generator().manual_seed(seed)
    worst, largest = torch.zeros(2)
    most = min(positions_of(config), 256)
    for rows, tokens in ((1, 1), (3, 5), (2, most)):
        tokens = min(tokens, most)
        ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=random)
        mask = torch.ones_like(ids)
        mask[0, max(1, tokens - 2) :] = 0
        if rows > 2:
            mask[1, : tokens // 2] = 0
        first, second = (
            each(input_ids=ids, attention_mask=mask, use_cache=False).logits.float() for each in (model, other)
        )
        if first.ndim > 2:  # of a classifier they are those of whole rows
            first, second = first[mask.bool()], second[mask.bool()]
        worst = torch.maximum(worst, (first - second).abs().max())  # nan stays nan, which Python's max drops
        largest = torch.maximum(largest, first.abs().max())
    return float(worst / largest if largest else worst)
