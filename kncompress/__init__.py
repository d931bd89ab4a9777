"""Compress GPT-class language models into Kronecker products, repaired by intermediate-layer distillation.

Importing the package imports neither torch nor transformers. It arranges that compressed folders load by
plain ``from_pretrained``: the ``kronecker`` loader registers itself when ``transformers.quantizers`` is
imported, or now, where that has already happened.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__version__ = "0.1.0"

_HOST = "transformers.quantizers"


def _register() -> None:
    # The plug-in registers itself at its end. It may be the one that imports the host: then it is half-way
    # through here, and this import does nothing.
    importlib.import_module("kncompress.models.plugin")


class _RegisterAfterImport(MetaPathFinder):
    """Finds ``transformers.quantizers`` as Python would, and registers the loader once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOST:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _HOST in sys.modules:
    _register()
elif not any(type(finder).__name__ == _RegisterAfterImport.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfterImport())
