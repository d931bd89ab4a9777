"""Compress GPT-class language models into Kronecker products, repaired by intermediate-layer distillation.

Importing the package imports neither torch nor transformers. It arranges that compressed folders load by
plain ``from_pretrained``: the ``kronecker`` loader registers itself when ``transformers.quantizers`` is
imported, or now, where that has already happened. In the same way peft learns LoRA on factored maps.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__version__ = "0.1.0"

_PLUGINS = {
    "transformers.quantizers": "kncompress.formats.plugin",
    "peft.tuners.lora.config": "kncompress.formats.lora",
}
"""Host -> the module of ours that registers itself there at its end.

It may be the one that imports the host: then it is half-way through when the host has run, and importing it does
nothing.
"""


class _RegisterAfterImport(MetaPathFinder):
    """Finds a host as Python would, and imports its plug-in once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PLUGINS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(_PLUGINS[fullname])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


for _host, _plugin in _PLUGINS.items():
    if _host in sys.modules:
        importlib.import_module(_plugin)
if not any(type(finder).__name__ == _RegisterAfterImport.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfterImport())
