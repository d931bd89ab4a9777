"""``doctor``: checks the installation, the hub, W&B, devices, caches and disk, and says what to do."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from kncompress.config import DoctorConfig
from kncompress.diagnosis.devices import check_devices
from kncompress.diagnosis.findings import findings_text
from kncompress.diagnosis.installation import check_installation
from kncompress.diagnosis.network import check_hub, check_wandb
from kncompress.diagnosis.storage import check_storage
from kncompress.errors import CheckFailed
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text


def run(config: DoctorConfig, run_dir: Path) -> dict[str, float]:
    """Print the findings; ``run_dir`` gets ``doctor.txt`` and ``doctor.json``.

    Raises:
        CheckFailed: something without which the verbs cannot work.
    """
    with RunRecord.open(run_dir, "doctor", asdict(config), config.seed) as record:
        findings = [
            *check_installation(),
            *check_hub(config.network, config.timeout),
            *check_wandb(config.network, config.timeout),
            *check_devices(config.compile),
            *check_storage(run_dir, config.free),
        ]
        text = findings_text(findings)
        write_text(run_dir / "doctor.txt", text + "\n")
        write_text(run_dir / "doctor.json", json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
        levels = Counter(finding.level for finding in findings)
        metrics: dict[str, float] = {"ok": levels["ok"], "notes": levels["note"], "broken": levels["broken"]}
        print(f"{text}\n\n{levels['ok']} ok, {levels['note']} to note, {levels['broken']} broken", flush=True)
        if levels["broken"]:
            names = ", ".join(finding.name for finding in findings if finding.level == "broken")
            error = CheckFailed(f"doctor: broken: {names}; what to do is said above")
            record.finish("failed", metrics, error=error)
            raise error
        record.finish("finished", metrics)
    return metrics
