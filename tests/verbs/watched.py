"""The command line with ``train`` watched: every batch is noted in ``$WATCH``, and one process can be made to fail.

``python watched.py train ...``. Each line of the file has the optimiser step, the rank and a digest of each row.
Under torchrun there is a file for each of its starts: ``$WATCH`` and their number from 0.
``$FAIL="<seed> <rank>"`` raises in that process of the run with that seed, at its second step. ``$MUON=float32`` has
Muon make a matrix orthogonal in float32: torch does it in bfloat16, and rounds otherwise where it multiplies in pieces.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from kncompress.__main__ import main


def _watch() -> None:
    from kncompress.training.pretraining import ILKDPretraining

    trained = ILKDPretraining.training_step

    def step(self: Any, batch: dict[str, Any], batch_index: int) -> Any:
        rank, number = self.trainer.global_rank, self.trainer.global_step
        rows = [hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in batch["input_ids"].cpu().numpy()]
        with Path(os.environ["WATCH"] + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")).open("a") as file:
            file.write(f"{number} {rank} {','.join(rows)}\n")
        seed = os.environ["PL_GLOBAL_SEED"]
        if os.environ.get("FAIL") == f"{seed} {rank}" and number == 1:
            raise RuntimeError("made to fail")
        return trained(self, batch, batch_index)

    ILKDPretraining.training_step = step  # type: ignore[method-assign]


def _muon_in_float32() -> None:
    import inspect

    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert "grad.bfloat16()" in source
    exec(source.replace("grad.bfloat16()", "grad.float()"), vars(_muon))


if __name__ == "__main__":
    _watch()
    if os.environ.get("MUON") == "float32":
        _muon_in_float32()
    sys.exit(main())
