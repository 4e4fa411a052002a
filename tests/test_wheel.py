"""The library from a built wheel, outside the checkout: the same commands, the same notebooks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from conftest import TINY
from test_tutorials import SHORT

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = (".git", ".venv", "demo", "runs", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    done = subprocess.run([*pip, str(folder), str(source)], check=True, capture_output=True, text=True)
    assert "Package would be ignored" not in done.stderr, "setuptools warns of folders of data, 11 lines each"
    return next(folder.glob("facevae-*.whl"))


def study(python, store, folder, **variables):
    """The commands that a user of the installed library types; no checkout in sight."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    for command in (
        ["verify", str(store)],
        ["ablate", "--data", str(store), "--out", str(folder / "sweep"), "--hypotheses", "H5,H6", *TINY],
    ):
        done = subprocess.run(
            [*python, *command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "sweep" / "report.html").exists()


def test_wheel_runs_the_study(wheel, store, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
    )
    where = subprocess.run(
        [sys.executable, "-c", "from facevae.core import notebook_path; print(notebook_path('train'))"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert where.startswith(str(site)), f"the wheel's own notebooks are not used: {where}"
    study(
        [sys.executable, "-c", "from facevae.cli import main; main()"], store, tmp_path, PYTHONPATH=str(site)
    )


def python_of_colab() -> str:
    """Python 3.12, where there is one."""
    named = shutil.which("python3.12")
    works = named and subprocess.run([named, "-c", ""], capture_output=True).returncode == 0
    return named if works else sys.executable


@pytest.mark.slow
def test_quickstart_in_a_bare_environment(wheel, store, tmp_path, monkeypatch):
    """As on Colab: torch is there, facevae is not, and the wheel lies beside the notebook."""
    environment, work = tmp_path / "venv", tmp_path / "work"
    subprocess.run([python_of_colab(), "-m", "venv", environment], check=True)
    binaries = environment / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", "torch", "torchvision", "ipykernel"], check=True)
    kernel = ["ipykernel", "install", "--prefix", environment, "--name", "bare"]
    subprocess.run([binaries / "python", "-m", *kernel], check=True)
    monkeypatch.setenv("JUPYTER_PATH", str(environment / "share" / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    work.mkdir()
    shutil.copy2(wheel, work)
    quickstart = str(ROOT / "nbs" / "tutorials" / "quickstart.ipynb")
    papermill.execute_notebook(
        quickstart, str(work / "out.ipynb"), SHORT, kernel_name="bare", cwd=work, progress_bar=False
    )
    where = [binaries / "python", "-c", "import facevae; print(facevae.__file__)"]
    said = subprocess.run(where, cwd=work, check=True, capture_output=True, text=True).stdout
    assert said.startswith(str(environment)), f"the quickstart used {said}"
    study([str(binaries / "facevae")], store, tmp_path)
