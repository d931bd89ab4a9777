"""Part ``startup``: seconds until the command line answers, in fresh processes."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from kncompress.bench.child import child_environment
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.setting import Setting
from kncompress.bench.timing import alternate

_COMMANDS = {
    OURS: ["-m", "kncompress", "--help"],
    "a wrong key": ["-m", "kncompress", "inspect", "no_such_key=1"],
    "import torch": ["-c", "import torch"],
    "import transformers": ["-c", "import transformers.modeling_utils"],
    "python": ["-c", "pass"],
}


def measure_startup(setting: Setting) -> Iterator[Measurement]:
    """``--help``, an error in the configuration, and imports that both avoid; the bound is bare Python."""
    setting.say("startup")
    calls = {name: _call(words) for name, words in _COMMANDS.items()}
    rounds = alternate(calls, max(2, setting.sizes.long_repeats), setting.device)
    values = dict(rounds.medians)
    bound = values.pop("python")
    more = {"startup/error_seconds": values["a wrong key"]}
    yield Measurement("startup", "python -m kncompress --help", values, bound=bound, more=more)


def _call(words: list[str]) -> Callable[[], object]:
    environment = child_environment()
    # An error in the configuration ends with code 2, as it should.
    return lambda: subprocess.run([sys.executable, *words], env=environment, capture_output=True, check=False)
