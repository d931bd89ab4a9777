"""Weights that stay in their files until they are read, and are raised to float32 a layer at a time.

transformers leaves weights that keep the type of their safetensors file in the mapped file: they cost address space,
and memory once they have been touched. ``raised`` gives that memory back, so that a walk over the layers holds one of
them. Where such weights are to be changed in place, ``own_`` copies them first.
"""

import copy
import ctypes
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_DONTNEED = 4
_SUFFIX = ".safetensors"
ONE_FILE = 1 << 29
"""Bytes of weights up to which a model's folder has them in one file, whatever parts they were made in."""
_AT_ONCE = 1 << 27
"""Bytes of weights that are written to one file by ``into_files_``."""
HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def raised(*modules: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within the block the parameters of ``modules`` are of ``dtype``; then they are what they were.

    Parameters that are added within the block stay. Memory of those that lie in files is given back.
    """
    kept = {id(p): (p, p.data) for module in modules for p in module.parameters()}
    for parameter, stored in kept.values():
        if stored.is_floating_point() and stored.dtype != dtype:
            parameter.data = stored.to(dtype)
    try:
        yield
    finally:
        for parameter, stored in kept.values():
            parameter.data = stored
        let_go(stored for _, stored in kept.values())


def let_go(tensors: Iterable[Tensor]) -> None:
    """Give back the memory of tensors that lie in mapped safetensors files; it is read again when they are touched.

    What has been changed in place, by training say, is no longer the file's and stays.
    """
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes]
    if sys.platform != "linux" or not tensors:  # elsewhere the system takes it where it needs it
        return
    page, files = os.sysconf("SC_PAGE_SIZE"), _mapped_files()
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        end = _end_of_file(files, tensor)
        if end is not None:
            # Whole pages: at its ends lie its neighbours, and what is given back of them is read again too.
            first, last = first // page * page, min(-(-last // page) * page, -(-end // page) * page)
            if _unchanged(first, last, page):
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)
    give_back_freed()


def give_back_freed() -> None:
    """Give back to the system what has been freed: the C library keeps what lies between larger blocks. (glibc.)"""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _unchanged(first: int, last: int, page: int) -> bool:
    """Whether all pages between two addresses are the file's still (Linux: admin-guide/mm/pagemap.rst)."""
    try:
        with Path("/proc/self/pagemap").open("rb") as pages:
            pages.seek(first // page * 8)
            flags = np.frombuffer(pages.read((last - first) // page * 8), dtype=np.uint64)
    except OSError:
        return False
    present, swapped, of_file = ((flags >> np.uint64(bit)) & np.uint64(1) for bit in (63, 62, 61))
    return len(flags) == (last - first) // page and not (swapped | (present & (of_file ^ np.uint64(1)))).any()


def _end_of_file(files: list[tuple[int, int]], tensor: Tensor) -> int | None:
    """The address at which the mapped file ends that a tensor lies in; None where it lies in none."""
    place = bisect_right(files, tensor.data_ptr(), key=lambda file: file[0]) - 1
    if place < 0 or tensor.data_ptr() + tensor.nbytes > files[place][1]:
        return None
    return files[place][1]


def _mapped_files() -> list[tuple[int, int]]:
    """(first address, end) of every part of this process's memory that is a safetensors file, rising."""
    found: list[tuple[int, int]] = []
    if sys.platform != "linux":
        return found
    with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.rstrip().removesuffix(" (deleted)").endswith(_SUFFIX):
                start, end = line.split(maxsplit=1)[0].split("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def twin(module: nn.Module) -> nn.Module:
    """A copy, for reading alone, whose parameters that lie in files are the same numbers of the same files."""
    files = _mapped_files()
    shared = [p for p in module.parameters() if p.device.type == "cpu" and _end_of_file(files, p.data) is not None]
    return copy.deepcopy(module, {id(p): nn.Parameter(p.data, requires_grad=False) for p in shared})


def lay_down_(numbers: Sequence[tuple[nn.Parameter, Tensor]], folder: Path) -> None:
    """Have parameters be these numbers, read from a file in ``folder`` without a name, that goes with the process."""
    if not numbers or os.name != "posix":  # elsewhere a file that is read cannot be removed: they stay in memory
        for parameter, tensor in numbers:
            parameter.data = tensor
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"model-{os.getpid()}{_SUFFIX}"
    try:
        save_file({str(place): tensor.contiguous() for place, (_, tensor) in enumerate(numbers)}, file)
        with safe_open(file, framework="pt") as opened:
            for place, (parameter, _) in enumerate(numbers):
                parameter.data = opened.get_tensor(str(place))
    finally:
        file.unlink(missing_ok=True)


def into_files_(model: nn.Module, folder: Path) -> None:
    """Have all weights that are in memory lie in files of ``folder``, as ``lay_down_``."""
    files, some, size = _mapped_files(), list[tuple[nn.Parameter, Tensor]](), 0
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and _end_of_file(files, parameter.data) is None:
            some.append((parameter, parameter.data))
            size += parameter.nbytes
            if size > _AT_ONCE:
                lay_down_(some, folder)
                some, size = [], 0
    lay_down_(some, folder)
    del some
    give_back_freed()


def own_(model: nn.Module) -> None:
    """Copy parameters that lie in files into memory, those in half precision as float32, to be changed in place."""
    files, elsewhere = _mapped_files(), sys.platform != "linux"
    for parameter in model.parameters():
        stored = parameter.data
        if stored.device.type == "cpu" and (elsewhere or _end_of_file(files, stored) is not None):
            parameter.data = stored.float() if stored.dtype in HALVES else stored.clone()
            let_go([stored])
