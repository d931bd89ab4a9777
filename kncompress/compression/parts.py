"""A student on disk part by part as it is made: embedding, each layer, and the rest, a safetensors file each.

A part that is kept is read from its file from then on, so that it costs no memory, and what is run after it computes
with the numbers as they are saved. A run that was stopped takes the parts that are there, once they have been checked.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kncompress.anatomy.mapped import lay_down_, let_go, own_
from kncompress.anatomy.sites import Anatomy, Site
from kncompress.anatomy.swap import empty_module, module_at, put_module, site_path
from kncompress.errors import UserError
from kncompress.kron import Shape
from kncompress.reading import SMALL, Amount, checksum, read_json
from kncompress.runs.whole_file import give_usual_mode, to_disk, write_text

EMBEDDING, REST = "embedding", "rest"


@dataclass(frozen=True)
class MapErrors:
    """What ``Fitted`` tells of a map that is kept."""

    error: Amount
    weighted: Amount | None = None


@dataclass(frozen=True)
class _Kept:
    """What lies beside a part's file, written after it: the part is whole."""

    checksum: str
    maps: dict[str, MapErrors]


def stages_of(anatomy: Anatomy) -> list[str]:
    """Names of all parts, in forward order."""
    return [EMBEDDING, *(f"layers.{number}" for number in range(anatomy.layers)), REST]


def stage_of(site: Site) -> str:
    """Name of the part that a map is in."""
    if site.layer is not None:
        return f"layers.{site.layer}"
    return EMBEDDING if site.group == "embedding" else REST


class Parts:
    """The parts of ``model`` in ``folder``.

    Args:
        folder: made where it is not there; this process has the lock of the run that it is in.
        dtype: type of the weights in the files; None: each as it is in the model.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.folder, self.dtype = folder, dtype
        self._model: Any = None

    def of(self, model: Any, anatomy: Anatomy, shapes: Mapping[str, Shape]) -> "Parts":
        """Say whose parts they are, once its layers are those of the student; returns itself."""
        self._model, self._anatomy, self._shapes = model, anatomy, shapes
        self._stages = stages_of(anatomy)
        base = "" if model.base_model is model else f"{model.base_model_prefix}."
        self._layers = f"{base}{anatomy.family.layers}."
        self._embedding = f"{site_path(model, anatomy.sites['embedding'])}."
        return self

    @property
    def files(self) -> list[Path]:
        """A file for each part, named as transformers names the shards of a model."""
        count = len(self._stages)
        return [self.folder / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    def _file(self, stage: str) -> Path:
        return self.files[self._stages.index(stage)]

    def errors(self, stage: str) -> dict[str, MapErrors] | None:
        """{map: its errors} of a part that is there; None where it is not there yet.

        Raises:
            UserError: it is damaged.
        """
        file = self._file(stage)
        beside, subject = file.with_suffix(".json"), f"run_dir={self.folder.parent}"
        if not beside.is_file():
            return None
        kept = read_json(beside, _Kept, subject, SMALL)
        if not file.is_file() or checksum(file) != kept.checksum:
            raise UserError(f"{subject}: {self.folder.name}/{file.name} is damaged; delete {beside.name}")
        return kept.maps

    def keep(self, stage: str, errors: Mapping[str, MapErrors]) -> None:
        """Write a part of the model as it is now, and have the model read it from there.

        Raises:
            UserError: a number is too large for the type.
        """
        tensors = {key: tensor.detach() for key, tensor in self._tensors(stage)}
        rounded = {key: self._rounded(key, tensor).contiguous() for key, tensor in tensors.items()}
        file = self._file(stage)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            save_file(rounded, temporary, {"format": "pt"})
            give_usual_mode(temporary)
            to_disk(temporary)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        let_go(tensors.values())
        known = {name: {"error": told.error, "weighted": told.weighted} for name, told in errors.items()}
        write_text(file.with_suffix(".json"), json.dumps({"checksum": checksum(file), "maps": known}) + "\n")
        self._read(stage)

    def take(self, stage: str) -> None:
        """Have the model, whose part is dense still, read it from the file that was kept."""
        for module, sites in self._anatomy.modules():
            factored = any(site.name in self._shapes for site in sites)
            if stage_of(sites[0]) == stage and factored and module:
                old = module_at(self._model, sites[0])
                put_module(self._model, sites[0], empty_module(old, sites, self._shapes))
        self._read(stage)

    @contextmanager
    def changing(self, *modules: nn.Module) -> Iterator[None]:
        """Within the block weights of ``modules`` that lie in files are float32 and in memory, to be changed in place.

        What has been changed lies in another file afterwards, which goes with the process; in its former type, where
        that holds the numbers.
        """
        kept = {id(p): (p, p.data) for module in modules for p in module.parameters()}
        for module in modules:
            own_(module)
        yield
        changed: list[tuple[nn.Parameter, Tensor]] = []
        for parameter, stored in kept.values():
            if parameter.data_ptr() == stored.data_ptr():  # it was in memory and stays there
                continue
            rounded = parameter.data.to(stored.dtype)
            if torch.equal(parameter.data, stored.to(parameter.dtype)):
                parameter.data = stored
            else:
                exact = torch.equal(rounded.to(parameter.dtype), parameter.data)
                changed.append((parameter, rounded if exact else parameter.data))
        let_go(stored for _, stored in kept.values())
        lay_down_(changed, self.folder)

    def remove(self) -> None:
        """Remove the parts."""
        for file in [*self.folder.glob("model-*.safetensors"), *self.folder.glob("model-*.json")]:
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _rounded(self, key: str, tensor: Tensor) -> Tensor:
        if self.dtype is None or not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        rounded = tensor.to(self.dtype)
        if not torch.isfinite(rounded).all():
            subject = f"dtype={str(self.dtype).removeprefix('torch.')}"
            raise UserError(f"{subject}: a weight of {key} is too large for it; take bfloat16 or float32")
        return rounded

    def _tensors(self, stage: str) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of what is saved of a part. Of tied ones the embedding's is."""
        seen: set[int] = set()
        ignored = set(self._model._keys_to_ignore_on_save or ())
        embedding = [(key, t) for key, t in self._state() if key.startswith(self._embedding)]
        others = [(key, t) for key, t in self._state() if not key.startswith(self._embedding)]
        for key, tensor in [*embedding, *others]:
            if id(tensor) not in seen and key not in ignored:
                seen.add(id(tensor))
                if self._stage(key) == stage:
                    yield key, tensor

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.state_dict(keep_vars=True).items()

    def _stage(self, key: str) -> str:
        if key.startswith(self._layers):
            return f"layers.{key.removeprefix(self._layers).partition('.')[0]}"
        return EMBEDDING if key.startswith(self._embedding) else REST

    def _read(self, stage: str) -> None:
        with safe_open(self._file(stage), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                owner, _, name = key.rpartition(".")
                module, tensor = self._model.get_submodule(owner), opened.get_tensor(key)
                old = module._parameters.get(name)
                if old is None:
                    module._buffers[name] = tensor
                elif old.is_meta:
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
                else:
                    old.data = tensor  # another module may share it
