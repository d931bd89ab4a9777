"""``dashboard``: a W&B workspace and a report for a project, built by code, saved where there is a key."""

import netrc
import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kncompress.config import DashboardConfig
from kncompress.errors import UserError
from kncompress.tracking.dashboard import as_json, report, workspace
from kncompress.tracking.record import RunRecord
from kncompress.tracking.whole_file import write_text

_OFFLINE = ("offline", "dryrun", "disabled")
_NOWHERE = "entity"
"""Stands for the entity in files that are not sent anywhere."""


def check(config: DashboardConfig) -> None:
    """The package is installed, and there is a key where one is needed."""
    if find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: needs wandb-workspaces: pip install 'kncompress[dashboard]'")
    if config.save == "always" and not has_key():
        raise UserError("save=always: no W&B key; wandb login, or set WANDB_API_KEY, or give save=never")


def run(config: DashboardConfig, run_dir: Path) -> dict[str, float]:
    """Write ``workspace.json`` and ``wandb_report.json``, and save both to the server if that is asked for.

    Raises UserError where the server refuses them or is not reached.
    """
    check(config)
    online = config.save != "never" and has_key() and os.environ.get("WANDB_MODE") not in _OFFLINE
    with RunRecord.open(run_dir, "dashboard", asdict(config), config.seed) as record:
        entity = config.entity or (_own_entity() if online else _NOWHERE)
        built = {"workspace": workspace(entity, config.project, config.title)}
        built["wandb_report"] = report(entity, config.project, config.title)
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


def has_key() -> bool:
    """Whether W&B has a key: in the environment, or for its server in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]:
        try:
            if netrc.netrc(str(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _own_entity() -> str:
    import wandb

    try:
        return str(wandb.Api(timeout=20).default_entity)
    except Exception as error:  # of requests, of W&B, of its GraphQL client
        raise _refused(error) from error


def _saved(name: str, built: Any) -> str:
    try:
        built.save()
        return str(built.url)
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"save: W&B did not take it ({reason}); save=never writes the files alone")
