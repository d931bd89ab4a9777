"""``dashboard``: a W&B workspace and a report for a project, built by code, saved where there is a key."""

import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kncompress.config import DashboardConfig
from kncompress.diagnosis.network import wandb_key
from kncompress.errors import UserError
from kncompress.reports.dashboard import as_json, wandb_report, workspace
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text
from kncompress.terminal import first_line

_OFFLINE = ("offline", "dryrun", "disabled")
_NOWHERE = "entity"
"""Stands for the entity in files that are not sent anywhere."""


def check(config: DashboardConfig) -> None:
    """The package is installed, and where the server is to be used it may be, and there is a key."""
    if find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: needs wandb-workspaces: pip install 'kncompress[dashboard]'")
    if config.save == "always" and wandb_key() is None:
        raise UserError("save=always: no W&B key; wandb login, or set WANDB_API_KEY, or give save=never")
    mode = os.environ.get("WANDB_MODE")
    if config.save == "always" and mode in _OFFLINE:
        raise UserError(f"save=always: WANDB_MODE={mode} keeps off the network; unset it, or give save=never")


def run(config: DashboardConfig, run_dir: Path) -> dict[str, float]:
    """Write ``workspace.json`` and ``wandb_report.json``, and save both to the server if that is asked for.

    Raises UserError where the server refuses them or is not reached.
    """
    online = config.save != "never" and wandb_key() is not None and os.environ.get("WANDB_MODE") not in _OFFLINE
    with RunRecord.open(run_dir, "dashboard", asdict(config), config.seed) as record:
        entity = config.entity or (_own_entity() if online else _NOWHERE)
        built = {"workspace": workspace(entity, config.project, config.title)}
        built["wandb_report"] = wandb_report(entity, config.project, config.title)
        for name, one in built.items():
            write_text(run_dir / f"{name}.json", as_json(one))
            print(f"{name}: {run_dir / f'{name}.json'}", flush=True)
        for name, one in built.items() if online else ():
            print(f"{name}: {_saved(name, one)}", flush=True)
        if not online:
            print("not saved to the server: there is no W&B key, or it is not wanted (save=never, WANDB_MODE)")
        metrics: dict[str, float] = {"saved": float(online)}
        record.finish("finished", metrics)
    return metrics


def _own_entity() -> str:
    import wandb

    try:
        entity = wandb.Api(timeout=20).default_entity
    except Exception as error:  # of requests, of W&B, of its GraphQL client
        raise _refused(error) from error
    if not entity:
        raise UserError("entity=null: the key has no default entity; give entity=<user or team>")
    return str(entity)


def _saved(name: str, built: Any) -> str:
    try:
        built.save()
        return str(built.url)
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    return UserError(f"save: W&B did not take it ({first_line(error)}); save=never writes the files alone")
