"""One run that is killed, frozen, damaged or out of disk.

It ends with the weights of one that was never disturbed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import TINY, facevae
from faults import all_gone, differences, kill, locks_of, read, state_of, step_of, wait_until

SCRIPT = """
import sys
from facevae.config import make_config, parse_settings
from facevae.training import train
train(make_config("H9", overrides=parse_settings(sys.argv[3:])), sys.argv[1], sys.argv[2], progress=False)
"""
SETTINGS = [*TINY[1::2], "steps=60", "checkpoint_every=3", "validate_every=5", "flip=true", "threads=1"]


def training(store, out, *settings, cwd=None, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store), str(out), *SETTINGS, *settings],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def ends(process) -> str:
    """Wait for a process that must end well; returns its errors."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="session")
def undisturbed(store, shared):
    return shared("undisturbed-run", lambda folder: ends(training(store, folder / "run"))) / "run"


@pytest.fixture
def same(undisturbed, tally):
    def check(out, faults=1):
        found = differences(out, undisturbed)
        tally(faults=faults, runs=1, differences=len(found))
        assert not found, found

    return check


def has_got_to(out, step: int) -> bool:
    return step_of(out) >= step


def newest(out) -> Path:
    return max((out / "checkpoint").glob("step-*.safetensors"))


def test_damaged_checkpoints_are_passed_over(store, tmp_path, same):
    """First the newest is cut off, then a single bit of the newest is turned.

    The one before it is used, and it says so.
    """
    out = tmp_path / "run"
    for least, damage in (
        (14, lambda data: data[:-7]),
        (34, lambda data: data[:9000] + bytes([data[9000] ^ 4]) + data[9001:]),
    ):
        process = training(store, out)
        wait_until(partial(has_got_to, out, least), f"step {least}", process=process)
        process.kill()
        errors = process.communicate()[1]
        path = newest(out)
        path.write_bytes(damage(path.read_bytes()))
    assert "is passed over" in errors
    assert path.name in ends(training(store, out))
    notes = read(out / "status.json")["notes"]
    assert len(notes) == 2 and path.name in notes[1] and "the one before it is used" in notes[1]
    same(out, faults=2)


@pytest.mark.parametrize("when", ["under way", "at the end"])
def test_damaged_best_weights_are_found_again(store, tmp_path, same, when):
    """They cannot be copied from anywhere, so training goes back far enough to meet them again."""
    out = tmp_path / "run"
    process = training(store, out)
    if when == "under way":
        wait_until(lambda: step_of(out) >= 14, "step 14", process=process)
        process.kill()
        process.communicate()
    else:
        ends(process)
    best = out / "checkpoint" / "best.safetensors"
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 4
    best.write_bytes(data)
    ends(training(store, out))
    same(out)


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int):
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk_leaves_the_old_checkpoint_whole(store, tmp_path, same):
    with small_disk(tmp_path / "disk", 24) as disk:
        out, filler = disk / "run", disk / "filler"
        process = training(store, out)
        wait_until(lambda: step_of(out) >= 10, "step 10", process=process)
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))
        _, errors = process.communicate(timeout=300)
        assert process.returncode != 0 and "No space left on device" in errors and "Free some space" in errors
        saved = newest(out)
        filler.unlink()
        assert step_of(out) < 60 and state_of(out) in ("running", "interrupted")
        assert "passed over" not in ends(training(store, out)), f"{saved} was not whole"
        same(out)


def sleeps(store, out, moment: int) -> int:
    """A process is frozen, as on another machine, and its run taken over and completed.

    Returns how many files it wrote when it woke.
    """
    fast = {"FACEVAE_HEARTBEAT": "0.3"}
    sleeper = training(store, out, **fast)
    wait_until(lambda: step_of(out) >= moment, f"step {moment}", process=sleeper)
    kill(sleeper.pid, signal.SIGSTOP)
    file = out / "claims" / "000001.json"
    beat = file.stat().st_mtime
    file.write_text(json.dumps(read(file) | {"machine": "another"}))
    os.utime(file, (beat, beat))
    (out / ".lock").unlink()
    time.sleep(4)
    ends(training(store, out, **fast))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kill(sleeper.pid, signal.SIGCONT)
    _, errors = sleeper.communicate(timeout=200)
    assert sleeper.returncode != 0 and "was taken over by another process" in errors, errors
    assert len(locks_of(out)) == 2
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return sum(after.get(path) != before.get(path) for path in after.keys() | before.keys())


def test_a_sleeper_of_another_machine_writes_nothing_when_it_wakes(store, tmp_path, same):
    """The system's locks and process numbers do not reach other machines.

    There only the number of the run's lock keeps the first process out.
    """
    assert sleeps(store, tmp_path / "run", 8) == 0
    same(tmp_path / "run")


@pytest.mark.slow
def test_many_sleepers_write_nothing_whenever_they_freeze(store, tmp_path, same):
    for moment in range(5, 45, 4):
        assert sleeps(store, tmp_path / f"run{moment}", moment) == 0
        same(tmp_path / f"run{moment}")


def test_two_processes_cannot_share_a_run(store, tmp_path, tally):
    out = tmp_path / "run"
    first = training(store, out, "steps=4000")
    wait_until(lambda: step_of(out) >= 2, "step 2", process=first)
    second = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(store), str(out), *SETTINGS, "steps=4000"],
        capture_output=True,
        text=True,
    )
    still_running = first.poll() is None
    first.kill()
    first.wait()
    assert still_running and second.returncode != 0 and "Another process is working on" in second.stderr
    tally(faults=1)


def command(store, out, *settings):
    arguments = ["train", "--hypothesis", "H3", "--data", str(store), "--out", str(out), *TINY]
    return [*arguments, *(part for setting in settings for part in ("--set", setting))]


def started(arguments):
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "facevae"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_command_leaves_nobody_training(store, tmp_path, tally):
    """SIGKILL of the command ends the notebook's kernel as well."""
    out = tmp_path / "run"
    process = started(command(store, out, "steps=4000"))
    wait_until(lambda: step_of(out) >= 3, "step 3", process=process)
    kernel = psutil.Process(read(out / "status.json")["pid"])
    process.kill()
    process.wait()
    assert not all_gone([kernel]), "the kernel outlived the command"
    tally(faults=1)


def test_interrupt_says_so_and_resumes(store, tmp_path, tally):
    out = tmp_path / "run"
    arguments = command(store, out, "steps=90", "checkpoint_every=10", "validate_every=30")
    process = started(arguments)
    wait_until(lambda: step_of(out) >= 3, "step 3", process=process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130 and "interrupted" in errors.lower() and "Traceback" not in errors
    assert state_of(out) == "interrupted"
    facevae(*arguments)
    assert state_of(out) == "done"
    steps = [
        json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if '"train"' in line
    ]
    assert steps == list(range(1, 91)), "a step is logged twice or missing"
    tally(faults=1, runs=1)


def test_a_run_of_other_code_is_refused_by_name_until_it_is_accepted(store, tmp_path):
    """As after an upgrade: the same settings, but the library that began the run had other source."""
    out, mine = tmp_path / "run", Path(__file__).parent.parent / "facevae"
    shutil.copytree(mine, tmp_path / "old" / "facevae")
    with open(tmp_path / "old" / "facevae" / "model" / "losses.py", "a") as file:
        file.write("\nCHANGED = True\n")
    process = training(store, out, cwd=tmp_path / "old", PYTHONPATH=str(tmp_path / "old"))
    wait_until(lambda: step_of(out) >= 10, "step 10", process=process)
    process.kill()
    process.wait()
    arguments = ["train", "--hypothesis", "H9", "--data", store, "--out", out]
    arguments += [part for setting in SETTINGS for part in ("--set", setting)]
    done = facevae(*arguments, check=False)
    assert (
        done.returncode == 1
        and "holds a run of other code: code is '" in done.stderr
        and "--accept-code" in done.stderr
    ), done.stderr
    facevae(*arguments, "--accept-code")
    assert state_of(out) == "done"
