"""The Hugging Face hub and Weights & Biases: settings, keys (never shown), and whether they answer."""

import contextlib
import netrc
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from kncompress.diagnosis.findings import Finding, Level
from kncompress.diagnosis.storage import hub_home
from kncompress.terminal import first_line

HUB, WANDB = "Hugging Face hub", "Weights & Biases"
_TRUE = ("1", "on", "yes", "true")


def answer(url: str, seconds: float) -> str:
    """Why ``url`` does not answer within ``seconds``, or nothing. An answer of any kind but a server's fault counts.

    In a thread of its own, since looking up a name has no time limit.
    """
    outcome: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                outcome.append("")
        except urllib.error.HTTPError as error:
            outcome.append(f"HTTP {error.code}" if error.code >= 500 else "")
        except Exception as error:
            outcome.append(first_line(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer in {seconds:g} seconds"


def check_hub(ask: bool, seconds: float) -> list[Finding]:
    """Where the hub is, whether it may be and can be asked, and whether there is a token."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    offline = next((n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _set(n)), None)
    findings = [_reach(HUB, endpoint, offline, ask, seconds, "models and data sets must lie here: folders, or HF_HOME")]
    token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else None
    with contextlib.suppress(RuntimeError):  # ~ and a user who is unknown: told among the folders
        file = Path(os.environ.get("HF_TOKEN_PATH", hub_home() / "token")).expanduser()
        token = token or (str(file) if _holds_text(file) else None)
    if token:
        findings.append(Finding(HUB, "token", "ok", f"in {token}"))
    else:
        todo = "only for private or gated models: hf auth login"
        findings.append(Finding(HUB, "token", "note", "none", todo))
    return findings


def check_wandb(ask: bool, seconds: float) -> list[Finding]:
    """Key, mode and server. Runs are logged offline unless told otherwise, so none of these is essential."""
    base = wandb_url()
    mode = os.environ.get("WANDB_MODE")
    disabled = f"WANDB_MODE={mode}" if mode in ("offline", "dryrun", "disabled") else None
    findings = [_reach(WANDB, base, disabled, ask, seconds, "runs are logged to their folders: logger.mode=offline")]
    place = wandb_key()
    if place:
        findings.append(Finding(WANDB, "key", "ok", f"in {place}"))
    else:
        todo = "for logger.mode=online: wandb login, or set WANDB_API_KEY"
        findings.append(Finding(WANDB, "key", "note", "none", todo))
    text = f"WANDB_MODE={mode}, which overrides logger.mode" if mode else "logger.mode (offline unless told otherwise)"
    findings.append(Finding(WANDB, "mode", "ok", text))
    return findings


def _reach(area: str, url: str, forbidden: str | None, ask: bool, seconds: float, without: str) -> Finding:
    level: Level = "note"
    if forbidden is not None:
        return Finding(area, "server", level, f"not asked: {forbidden} keeps off the network", without)
    if not ask:
        return Finding(area, "server", level, f"not asked: network=false ({url})")
    reason = answer(url, seconds)
    if not reason:
        return Finding(area, "server", "ok", f"{url} answers")
    return Finding(area, "server", level, f"{url} cannot be reached ({reason})", without)


def wandb_key() -> str | None:
    """Where the key of W&B's server is, not what it is: the variable, or the netrc file; None: there is none."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    server = urlsplit(wandb_url())
    named = os.environ.get("NETRC")
    for name in [named] if named else ["~/.netrc", "~/_netrc"]:
        file = Path(name).expanduser()
        try:
            found = netrc.netrc(str(file))
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
        # W&B writes the port too where there is one; older versions did not.
        if any(found.authenticators(host) for host in (server.netloc, server.hostname) if host):
            return str(file)
    return None


def wandb_url() -> str:
    """W&B's server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def _set(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE


def _holds_text(file: Path) -> bool:
    try:
        return bool(file.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return False
