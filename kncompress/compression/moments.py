"""Second moments and means of vectors, such as the inputs of a model's maps over sample text, in memory and on disk.

Products are float32, sums float64 (float32 on devices without it), results float32. Maps that share an input share its
moment.
"""

import hashlib
import os
import time
import zlib
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kncompress.anatomy.mapped import HALVES, let_go
from kncompress.anatomy.sites import Anatomy, Site
from kncompress.compression.layerwise import CalibrationText
from kncompress.config import FitConfig
from kncompress.errors import UserError
from kncompress.kron import Moment, RowWeights, row_weights
from kncompress.kron.dense_product import without_autocast
from kncompress.reading import checksum_text
from kncompress.runs.whole_file import give_usual_mode
from kncompress.terminal import first_line

_FORMAT = "kncompress moment 2"
_STALE = 3600.0
"""Seconds after which a temporary file is a killed process's: another may be writing into the same folder."""
_VARYING = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Fields of a config that do not change what a model computes."""


def input_of(site: Site) -> str:
    """Name of what a map reads: ``layers.3.qkv``, ``layers.3.o``, ``layers.3.mlp``, ``layers.3.mlp.hidden`` or
    ``head``. Of the embedding, which reads token ids: ``head``, what its rows are multiplied by where it is tied."""
    if site.layer is None:
        return "head"
    return f"layers.{site.layer}.{site.group}" + (".hidden" if site.mirrored else "")


def inputs_of(anatomy: Anatomy, layer: int | None = None) -> dict[str, list[Site]]:
    """{input: the maps that read it}, in forward order; of one layer or of the whole model, without the embedding."""
    sites = [site for site in anatomy.sites.values() if site.group != "embedding" and layer in (None, site.layer)]
    return {name: list(group) for name, group in groupby(sites, key=input_of)}


class MomentSum:
    """Running moments of vectors of ``size`` numbers."""

    def __init__(self, size: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.second = torch.zeros(size, size, dtype=dtype, device=device)
        self.mean = torch.zeros(size, dtype=dtype, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in vectors (..., size)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        with without_autocast(x.device):
            self.second += x.T @ x
            self.mean += x.sum(0, dtype=self.mean.dtype)
        self.count += len(x)

    def moment(self) -> Moment:
        """Averages so far, float32."""
        return Moment((self.second / self.count).float(), (self.mean / self.count).float(), self.count)


def path_in_layer(site: Site) -> str:
    """Path of a map's module within its layer: what follows ``layers.3.`` or ``h.3.``."""
    return site.module.partition(f".{site.layer}.")[2]


def finite(moment: Moment, name: str) -> Moment:
    """The moment itself; UserError where it holds values that are not finite."""
    if torch.isfinite(moment.second).all() and torch.isfinite(moment.mean).all():
        return moment
    raise UserError(f"model: what enters {name} is not finite on the calibration text; its factors cannot be fitted")


def token_frequencies(text: CalibrationText, vocabulary: int) -> Tensor:
    """(V,): share of each token in the text, float32."""
    counts = torch.bincount(torch.cat([ids.flatten() for ids in text.batches()]), minlength=vocabulary)
    return (counts / counts.sum()).float()


def head_weights(text: CalibrationText, site: Site, settings: FitConfig) -> RowWeights | None:
    """What each row of a head counts where both sides do: as often as its token occurs, the model expects it."""
    return row_weights(token_frequencies(text, site.out_features)) if settings.sides == "both" else None


def fingerprint(model: Any, text: CalibrationText) -> str:
    """Hash of all that decides the moments: tokens, blocks, weights, and the fields of the model's config."""
    digest = hashlib.sha256()
    fields = {key: value for key, value in model.config.to_dict().items() if key not in _VARYING}
    digest.update(f"{text.context}|{sorted(fields.items())}".encode())
    digest.update(np.ascontiguousarray(text.tokens, dtype=np.int64).tobytes())
    digest.update(b"" if text.first is None else f"first {text.first}".encode())
    digest.update(weights_digest(model.base_model).encode())
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of all weights and buffers: names, types, shapes, values, of half precision as float32."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        exact = weight.detach().cpu().float() if weight.dtype in HALVES else weight.detach().cpu()
        digest.update(f"|{name}:{exact.dtype}:{list(exact.shape)}|".encode())
        digest.update(exact.contiguous().flatten().view(torch.uint8).numpy())
        let_go([weight.detach()])
    return digest.hexdigest()


def _checksum(moment: Moment) -> str:
    value = zlib.crc32(f"{moment.count}|{moment.second.dtype}|{moment.mean.dtype}".encode())
    for tensor in (moment.second, moment.mean):
        value = zlib.crc32(tensor.numpy().data, value)
    return checksum_text(value)


class MomentFolder:
    """Moments on disk, one safetensors file an input, each written whole and marked with its ``fingerprint``.

    Raises:
        UserError: ``folder`` is a file.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder).expanduser(), fingerprint
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self._key}: must be a folder")

    @property
    def _key(self) -> str:
        return f"calibration.moments={self.folder}"

    def load(self, name: str, size: int) -> Moment | None:
        """The moment of an input of ``size`` numbers; None where it is not there yet.

        Raises:
            UserError: the file is damaged, or of another text or model.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                self._check(path, facts)
                moment = Moment(file.get_tensor("second"), file.get_tensor("mean"), int(facts["count"]))
            if facts.get("checksum") != _checksum(moment):
                raise ValueError("not as it was written")
            if moment.second.shape != (size, size) or moment.mean.shape != (size,):
                raise ValueError(f"not of {size} inputs")
            if not (torch.isfinite(moment.second).all() and torch.isfinite(moment.mean).all()):
                raise ValueError("values that are not finite")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{self._key}: {path.name} is damaged ({first_line(error)}); delete it") from None
        return moment

    def known(self, name: str) -> bool:
        """Whether the moment of an input is there; its numbers are not read yet. UserError as ``load``."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                self._check(path, file.metadata() or {})
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{self._key}: {path.name} is damaged ({first_line(error)}); delete it") from None
        return True

    def found(self, name: str, size: int, device: torch.device) -> Moment:
        """``load`` of one that is ``known``, on a device."""
        moment = self.load(name, size)
        if moment is None:
            raise UserError(f"{self._key}: {name}.safetensors is gone")
        return Moment(moment.second.to(device), moment.mean.to(device), moment.count)

    def _check(self, path: Path, facts: dict[str, str]) -> None:
        if facts.get("format") != _FORMAT:
            raise ValueError("not written by kncompress")
        if facts.get("fingerprint") != self.fingerprint:
            raise UserError(f"{self._key}: {path.name} is of another text or model; name another folder or delete it")

    def save(self, name: str, moment: Moment) -> None:
        """Keep the moment of an input.

        Raises:
            UserError: the folder cannot be written.
        """
        moment = Moment(moment.second.cpu().contiguous(), moment.mean.cpu().contiguous(), moment.count)
        facts = {"format": _FORMAT, "fingerprint": self.fingerprint, "input": name, "count": str(moment.count)}
        facts["checksum"] = _checksum(moment)
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(f".{path.name}.*.tmp"):
                if time.time() - stale.stat().st_mtime > _STALE:
                    stale.unlink(missing_ok=True)  # of a process that was killed
            try:
                save_file({"second": moment.second, "mean": moment.mean}, temporary, facts)
                give_usual_mode(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._key}: cannot be written ({error})") from error
