"""Whether a model's numbers can be counted with, and whether a folder gives back the model that was written to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kncompress.anatomy.mapped import let_go
from kncompress.anatomy.swap import map_names
from kncompress.errors import CheckFailed, UserError
from kncompress.formats.placed import weight_of

_TOKENS = 8
"""Of the text on which a saved model is compared."""
_LARGEST = 2_000_000_000
"""Parameters up to which a saved model is loaded beside the one that it was made of; of larger ones the headers of the
files are compared, for two of them may not fit in memory."""
_ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Share of the largest logit by which a loaded model may differ."""


@torch.no_grad()
def check_finite(model: Any, subject: str, what: str) -> None:
    """Raises UserError, which begins with ``subject``, at the first weight of which ``what`` is true of a number."""
    for name, parameter in model.named_parameters():
        # The largest magnitude: one pass, no temporary, and nothing that could overflow by itself.
        weight = weight_of(model, name, parameter)
        if weight.is_floating_point() and not weight.is_meta and weight.numel():
            most = torch.linalg.vector_norm(weight, ord=float("inf"))
            let_go([weight.data])
            if not torch.isfinite(most):
                raise UserError(f"{subject}: a weight of {_told(model, name)} {what}")


def _told(model: Any, name: str) -> str:
    """The canonical name of the map that a parameter belongs to, and its own."""
    for prefix, known in map_names(model).items():
        if name.startswith(f"{prefix}."):
            return f"{known} ({name})"
    return name


@torch.no_grad()
def check_folder(model: Any, folder: Path, load: Callable[..., Any]) -> None:
    """Raises CheckFailed where ``folder`` is not the model that was saved there.

    Names and shapes are read from the headers; then the folder is loaded as a user will, and gives equal logits on a
    few tokens, unless the model is so large that there may be no room for a second one.

    Args:
        model: what was saved, in the type of the folder.
        folder: just written.
        load: ``load_model``.
    """
    wrong = f"{folder.name}: was written and is not kept:"
    _check_headers(model, folder, wrong)
    first = next(model.parameters())
    large = (folder / "model.safetensors.index.json").is_file()
    if first.is_meta or large or sum(parameter.numel() for parameter in model.parameters()) > _LARGEST:
        return
    try:
        loaded = load(folder, task=_task(model), dtype=first.dtype)
    except UserError as error:
        raise CheckFailed(f"{wrong} it does not load again ({error})") from error
    ids = torch.arange(_TOKENS)[None] % model.config.vocab_size
    modes = [(module, module.training) for module in model.modules()]
    try:
        logits = []
        for each in (model, loaded.to(first.device)):
            logits.append(each.eval()(ids.to(first.device)).logits)
            let_go(each.parameters())
    finally:
        for module, training in modes:
            module.training = training
    expected, found = logits
    gap, scale = (found.float() - expected.float()).abs().max(), expected.float().abs().max()
    if not gap <= _ALLOWED.get(first.dtype, 1e-4) * scale:
        raise CheckFailed(f"{wrong} loaded again its logits differ by {float(gap / scale):.2g} of the largest")


def _task(model: Any) -> str | None:
    return "sequence-classification" if type(model).__name__.endswith("ForSequenceClassification") else None


def _check_headers(model: Any, folder: Path, wrong: str) -> None:
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    if not (folder / "config.json").is_file() or not found:
        raise CheckFailed(f"{wrong} it has no config.json or no weights; is an adapter attached to the model?")
    kept = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    strange = [name for name, shape in found.items() if kept.get(name, shape) != shape]
    if strange:
        name = strange[0]
        raise CheckFailed(f"{wrong} {name} is {found[name]} in the file and {kept[name]} in the model")
