"""The commit of the code that ran."""

import subprocess

import pytest

from kncompress.runs.origin import code_commit


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, "-C", folder, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("package", "conf"):
        (tmp_path / name).mkdir()
    (tmp_path / "package" / "errors.py").write_text("")
    (tmp_path / "conf" / "train.yaml").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as a git hook sets it
    return tmp_path


def test_clean_checkout(checkout):
    (checkout / "runs").mkdir()
    (checkout / "runs" / "run.json").write_text("")  # results are no change of the code
    found = code_commit(checkout / "package")
    head = (checkout / ".git" / "HEAD").read_text().split()[-1]
    assert found == {"sha": (checkout / ".git" / head).read_text().strip(), "dirty": False}


@pytest.mark.parametrize("path", ["package/errors.py", "package/new.py", "conf/train.yaml", "pyproject.toml"])
def test_changed_code_is_dirty(checkout, path):
    (checkout / path).write_text("changed")
    assert code_commit(checkout / "package")["dirty"] is True


def test_package_installed_into_another_checkout_has_no_commit(checkout):
    installed = checkout / ".venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "errors.py").write_text("")
    assert code_commit(installed) == {"sha": None, "dirty": None}


def test_no_git_is_no_error(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_commit(checkout / "package") == {"sha": None, "dirty": None}


def test_no_checkout_and_no_commit(tmp_path):
    (tmp_path / "errors.py").write_text("")
    assert code_commit(tmp_path) == {"sha": None, "dirty": None}
    git(tmp_path, "init", "-q")
    assert code_commit(tmp_path) == {"sha": None, "dirty": None}
