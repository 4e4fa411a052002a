"""What a study takes of a machine's memory: only the processes that compute hold what computing needs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import TINY, facevae

needs_pss = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="only Linux counts memory that processes share"
)


def imported(code, *names):
    """Which of the named packages a fresh interpreter has imported after running some code."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys; print('imported', *(name for name in {names} if name in sys.modules))",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def command(*arguments):
    """Code that runs the facevae command in the interpreter that runs the code."""
    return (
        f"import contextlib, sys; sys.argv = ['facevae', *{[str(part) for part in arguments]}]\n"
        "from facevae.cli import main\nwith contextlib.suppress(SystemExit): main()"
    )


@pytest.mark.parametrize(
    "module", ["sweep.runner", "sweep.status", "sweep.scheduler", "training.run", "data.store", "config"]
)
def test_processes_that_watch_over_a_run_read_no_tables(module):
    assert imported(f"import facevae.{module}", "torch", "pandas") == []


def test_a_sweep_is_dispatched_and_watched_without_torch(store, stand_in, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    monkeypatch.chdir(stand_in)  # python -c looks there first
    assert imported(command("ablate", "--help"), "torch", "pandas") == []
    ablate = command("ablate", "--data", store, "--out", out, "--hypotheses", "H9", *TINY)
    assert imported(ablate, "torch", "pandas", "distributed") == []
    for made in (out / "report.html", out / "H9" / "seed0" / "metrics.parquet"):
        assert made.exists(), f"it did not get as far as {made.name}"
    assert imported(command("status", out), "torch") == []


def proportional_bytes(process):
    """What a process and its children hold, shared pages counted in parts."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            pass
    return total


@pytest.mark.slow
@needs_pss
def test_the_quick_study_fits_two_gigabytes(tmp_path):
    """Two runs at a time, from training over evaluation to the report; fewer steps hold no less."""
    store, out, peak = tmp_path / "store", tmp_path / "sweep", 0
    facevae("pack", "synthetic", "--count", 1500, "--seed", 0, "--size", 72, "--out", store)
    arguments = ["ablate", "--data", store, "--out", out, "--preset", "quick", "--hypotheses", "H2,H9,H6"]
    arguments += ["--workers", 2, "--set", "steps=40"]
    with psutil.Popen(
        [str(Path(sys.executable).parent / "facevae"), *map(str, arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    ) as study:
        while study.poll() is None:
            try:
                peak = max(peak, proportional_bytes(study))
            except psutil.Error:
                pass
            time.sleep(0.2)
    assert study.returncode == 0 and (out / "report.html").exists()
    assert peak < 2e9, f"{peak / 1e9:.2f} GB"
