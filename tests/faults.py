"""Faults as they happen, for tests that inject them.

Processes to kill, runs to watch, and whether two runs ended alike.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import TINY
from safetensors.torch import load_file

# Long enough to be hit in the middle, and with a checkpoint every few steps.
SETTINGS = [*TINY[1::2], "steps=40", "checkpoint_every=4", "validate_every=10", "flip=true", "threads=1"]
COMMAND = str(Path(sys.executable).parent / "facevae")
SWEEP = """
import json, sys
from facevae.config import parse_settings
from facevae.core import FaceVAEError
from facevae.sweep.plan import plan_sweep
from facevae.sweep.scheduler import run_sweep
store, out, hypotheses = sys.argv[1:4]
settings, options = map(json.loads, sys.argv[4:6])
specs = plan_sweep(store, out, hypotheses, overrides=parse_settings(settings))
try: print("FAILED", run_sweep(specs, store, progress=False, **options))
except FaceVAEError as error: sys.exit(f"facevae: {error}")
"""


def sweep_process(store, out, hypotheses, settings=SETTINGS, environment=None, **options) -> subprocess.Popen:
    """A sweep without its report, as a process; its output can be read as text."""
    options = {"workers": 2} | options
    arguments = [str(store), str(out), hypotheses, json.dumps(list(settings)), json.dumps(options)]
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | (environment or {}),
    )


def finished(process: subprocess.Popen, timeout: float = 600) -> str:
    """Wait for a process that must end well; returns its output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0 and "Traceback" not in output, output
    return output


def run_of(out, hypothesis: str, seed: int = 0) -> Path:
    return Path(out) / hypothesis / f"seed{seed}"


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def step_of(run: Path) -> int:
    """The last step that a run has logged."""
    try:
        return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def state_of(run: Path) -> str:
    return read(run / "status.json").get("state", "none")


def locks_of(run: Path) -> list[dict]:
    """Every lock ever acquired on a run: one for each time that it was executed."""
    return [read(path) for path in sorted((run / "claims").glob("*.json"))]


def wait_until(condition, what: str, timeout: float = 240, process: subprocess.Popen | None = None):
    """Wait until a condition holds; returns what it gave."""
    until = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        assert process is None or process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.01)


def kernel_of(run: Path) -> int | None:
    """The process that trains a run, when there is one that is alive."""
    newest = (locks_of(run) or [{}])[-1]
    kernel = newest.get("kernel")
    return kernel["pid"] if kernel and not newest.get("ended") and psutil.pid_exists(kernel["pid"]) else None


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def listening(processes: list[psutil.Process]) -> list[str]:
    """Addresses on which processes listen."""
    return [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def all_gone(processes: list[psutil.Process], timeout: float = 60) -> list[psutil.Process]:
    """Those that are still there after a while."""
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
        return True
    except ProcessLookupError:
        return False


def differences(run: Path, other: Path, metrics: bool = True) -> list[str]:
    """In what two runs ended differently: weights, last checkpoint, metrics, logged losses; bit for bit."""
    found = []
    last = max(path.name for path in (other / "checkpoint").glob("step-*.safetensors"))
    for name in ("model/model.safetensors", "checkpoint/best.safetensors", f"checkpoint/{last}"):
        mine, theirs = load_file(run / name), load_file(other / name)
        if mine.keys() != theirs.keys() or not all(mine[key].equal(theirs[key]) for key in mine):
            found.append(f"{run}: {name} differs")
    if (
        metrics
        and (other / "metrics.parquet").exists()
        and (run / "metrics.parquet").read_bytes() != (other / "metrics.parquet").read_bytes()
    ):
        found.append(f"{run}: metrics.parquet differs")
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "images_per_second"}
            for line in (path / "log.jsonl").read_text().splitlines()
        ]
        for path in (run, other)
    ]
    if logs[0] != logs[1]:
        found.append(f"{run}: log.jsonl differs")
    if left := [path for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]:
        found.append(f"{run}: {left} left behind")
    return found
