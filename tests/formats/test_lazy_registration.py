"""``import kncompress`` is light, and still makes transformers know the format, whatever comes first.

The two plain import orders are tested with a real folder in test_pretrained.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_neither_torch_nor_transformers():
    code = "import sys, kncompress; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, kncompress; transformers.AutoModelForCausalLM",
        "import kncompress.formats.pretrained",
        "import kncompress, importlib; importlib.reload(kncompress)",
    ],
)
def test_registered_once_in_any_order(imports):
    code = f"""
{imports}
import sys
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["kronecker"].__name__ == "KroneckerLoader"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["kronecker"].__name__ == "KroneckerConfig"
from kncompress.formats.plugin import register
register()
print(sum(type(finder).__name__ == "_RegisterAfterImport" for finder in sys.meta_path))
"""
    assert int(run_python(code)) <= 1
