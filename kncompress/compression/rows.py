"""Rows of numbers of every batch of a text: in memory while there is room, then in a file that has no name."""

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

ROOM = 1 << 28
"""Bytes that are kept in memory; a layer of SmolLM2-135M gives as much for 8,000 tokens."""


class Rows:
    """One tensor a batch, in order; each read gives what was put there, on the CPU.

    Args:
        tensors: the first ones.
        folder: where the file is made; it is gone with the process. None: the system's for temporary files.
        room: bytes in memory; None: ``ROOM``.

    Raises:
        OSError: the disk takes no more.
    """

    def __init__(
        self, tensors: Iterable[Tensor] = (), folder: str | Path | None = None, room: int | None = None
    ) -> None:
        self.folder, self.room = folder, ROOM if room is None else room
        self._kept: list[Tensor | tuple[int, torch.dtype, torch.Size]] = []
        """A tensor, or where it lies in the file, its type and its shape."""
        self._size = 0
        self._file: BinaryIO | None = None
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        """Put one more."""
        tensor = tensor.detach().cpu()
        self._size += tensor.nbytes
        if self._size <= self.room:
            self._kept.append(tensor)
            return
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        place = self._file.seek(0, 2)
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._kept.append((place, tensor.dtype, tensor.shape))

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        kept = self._kept[number]
        if isinstance(kept, Tensor):
            return kept
        place, dtype, shape = kept
        assert self._file is not None
        self._file.seek(place)
        numbers = np.empty(shape.numel() * dtype.itemsize, dtype=np.uint8)
        if self._file.readinto(numbers.data) != len(numbers):  # type: ignore[attr-defined]
            raise OSError(f"{self.folder}: a temporary file is shorter than what was written")
        return torch.from_numpy(numbers).view(dtype).view(shape)


class NamedRows(Mapping[str, Tensor]):
    """``Rows`` by name; each is put there once. Arguments as of ``Rows``."""

    def __init__(self, folder: str | Path | None = None, room: int | None = None) -> None:
        self._rows = Rows(folder=folder, room=room)
        self._places: dict[str, int] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Put one more."""
        self._places[name] = len(self._rows)
        self._rows.append(tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
