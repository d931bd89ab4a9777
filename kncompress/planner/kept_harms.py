"""What a plan has measured so far, a file for each map: after a kill the same command reads it and does the rest."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from kncompress.kron import Shape, parse_shape
from kncompress.planner.budget import MapHarms
from kncompress.reading import read_json
from kncompress.runs.whole_file import write_text

_KINDS = "kinds.json"


class KeptHarms:
    """Files in ``folder``; None: nothing is kept.

    A file that is read gives the bits that were measured: JSON holds every digit of a float.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def kinds(self, find: Callable[[], dict[str, list[list[Shape]]]]) -> dict[str, list[list[Shape]]]:
        """The kinds of shapes to try on each map, as kept or found now. Raises UserError where the file is damaged."""
        if self.folder is None:
            return find()
        file = self.folder / _KINDS
        if not file.is_file():
            found = find()
            names = {name: [[str(shape) for shape in kind] for kind in kinds] for name, kinds in found.items()}
            self.folder.mkdir(exist_ok=True)
            write_text(file, json.dumps(names) + "\n")
            return found
        kept = read_json(file, dict[str, list[list[str]]], f"run_dir={self.folder.parent}")
        return {name: [[parse_shape(shape) for shape in kind] for kind in kinds] for name, kinds in kept.items()}

    def harms(self, name: str, measure: Callable[[], MapHarms]) -> MapHarms:
        """The harms of a map, as kept or measured now. Raises UserError where its file is damaged."""
        if self.folder is None:
            return measure()
        file = self.folder / f"{name}.json"
        if not file.is_file():
            measured = measure()
            self.folder.mkdir(exist_ok=True)
            write_text(file, json.dumps(asdict(measured)) + "\n")
            return measured
        return read_json(file, MapHarms, f"run_dir={self.folder.parent}")

    def remove(self, names: list[str]) -> None:
        """Remove the files of these maps, once a table holds them all."""
        if self.folder is not None and self.folder.is_dir():
            for name in [*names, _KINDS.removesuffix(".json")]:
                (self.folder / f"{name}.json").unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
