"""Draws from a teacher's distributions, kept on disk: a sweep's jobs read what the first of them has drawn.

A block of training text is drawn when it is first trained on, and each has a checksum, so that a killed run leaves
nothing to repair, and several processes may fill one cache. What a block's draws are depends on the seed and its number
alone.
"""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from kncompress.distill.sampled import Draws, draw
from kncompress.errors import UserError
from kncompress.reading import SMALL, Count, read_json
from kncompress.runs.whole_file import write_text

FACTS, TOKENS, ENTROPY, SUMS = "facts.json", "tokens.bin", "entropy.bin", "sums.bin"
_KEY = "objective.cache"


@dataclass(frozen=True)
class Facts:
    """What decides the content of a cache."""

    teacher: str
    """Hash of its weights."""
    tokenizer: str
    text: str
    """Hash of the training split."""
    context: Count
    """Tokens of a block."""
    blocks: Count
    vocabulary: Count
    samples: Count
    """Tokens drawn from each distribution."""
    temperature: float
    seed: Count


class TeacherCache:
    """Draws for every block of a text.

    Args:
        folder: made where it is absent.
        facts: what the draws must be of.

    Raises:
        UserError: the folder holds draws of something else, is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.folder, self.facts = folder, facts
        check_cache(folder, facts)
        kind = np.uint16 if facts.vocabulary <= 2**16 else np.uint32
        rows = (facts.blocks, facts.context)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                self._tokens = _file(folder / TOKENS, np.dtype(kind), (*rows, facts.samples))
                self._entropy = _file(folder / ENTROPY, np.dtype(np.float16), rows)
                self._sums = _file(folder / SUMS, np.dtype(np.uint32), (facts.blocks,))
                if not (folder / FACTS).exists():
                    write_text(folder / FACTS, dumps(asdict(facts), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{_KEY}={folder}: cannot be written ({error.strerror or error})") from error

    @property
    def bytes_of_token(self) -> int:
        """Bytes that the draws of one token take."""
        return self._tokens.itemsize * self.facts.samples + self._entropy.itemsize

    def outlook(self) -> str:
        """How much is drawn, and what the whole takes, in a line."""
        whole = self.bytes_of_token * self.facts.blocks * self.facts.context
        drawn = int(np.count_nonzero(self._sums))
        return (
            f"{_KEY}: {drawn:,} of {self.facts.blocks:,} blocks are drawn; all take {whole / 1e6:,.1f} MB, "
            f"{self.bytes_of_token} bytes a token"
        )

    def draws(
        self,
        blocks: Tensor,
        logits: Callable[[Tensor], Tensor],
        device: torch.device,
        anywhere: Callable[[bool], bool] | None = None,
    ) -> Draws:
        """Those of some blocks.

        Args:
            blocks: (B,) numbers.
            logits: asked for the places in ``blocks`` of those that are not drawn yet, (M,); returns the teacher's
                (M, T, V).
            device: of what is returned.
            anywhere: whether any process lacks draws, where all have to ask the teacher together; of one that lacks
                none the first block is asked for.
        """
        numbers = blocks.tolist()
        missing = [place for place, number in enumerate(numbers) if not self._is_whole(number)]
        if bool(missing) if anywhere is None else anywhere(bool(missing)):
            found = logits(torch.tensor(missing or [0], device=device))
            for place, row in zip(missing, found, strict=bool(missing)):
                self._draw(numbers[place], row)
        tokens = np.stack([self._tokens[number] for number in numbers]).astype(np.int64)
        entropy = np.stack([self._entropy[number] for number in numbers]).astype(np.float32)
        return Draws(torch.from_numpy(tokens).to(device), torch.from_numpy(entropy).to(device))

    def _draw(self, number: int, logits: Tensor) -> None:
        generator = torch.Generator(logits.device).manual_seed((self.facts.seed << 32) + number)
        made = draw(logits[None], self.facts.samples, self.facts.temperature, generator)
        self._tokens[number] = made.tokens[0].cpu().numpy().astype(self._tokens.dtype)
        self._entropy[number] = made.entropy[0].cpu().numpy().astype(np.float16)
        self._sums[number] = self._sum(number)

    def _is_whole(self, number: int) -> bool:
        """Whether a block is drawn; one whose draws have changed since is drawn again."""
        return bool(self._sums[number]) and self._sums[number] == self._sum(number)

    def _sum(self, number: int) -> int:
        """CRC-32 of a block's draws, or 1 where that is 0, which stands for none."""
        return zlib.crc32(self._entropy[number].tobytes(), zlib.crc32(self._tokens[number].tobytes())) or 1


def check_cache(folder: Path, facts: Facts) -> None:
    """Raises UserError where ``folder`` holds draws of something else, or other files."""
    if not (folder / FACTS).is_file():
        if folder.exists() and (not folder.is_dir() or _foreign(folder)):
            raise UserError(f"{_KEY}={folder}: holds other files; give a new folder, or one with draws of a teacher")
        return
    kept = asdict(read_json(folder / FACTS, Facts, f"{_KEY}={folder}", SMALL))
    for name, wanted in asdict(facts).items():
        if kept[name] != wanted:
            values = "" if isinstance(wanted, str) else f" ({kept[name]:g}, not {wanted:g})"
            raise UserError(f"{_KEY}={folder}: its draws are of another {name}{values}; give another folder")


def _foreign(folder: Path) -> bool:
    return any(file.name not in (TOKENS, ENTROPY, SUMS, ".lock") for file in folder.iterdir())


def _file(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros, of which the system stores what is written; one that is there keeps what it holds."""
    size = int(np.prod(shape)) * kind.itemsize
    if not path.exists() or path.stat().st_size != size:
        with path.open("wb") as file:
            file.truncate(size)
    return np.memmap(path, kind, mode="r+", shape=shape)
