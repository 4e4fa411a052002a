"""Killed at any step and started again, a run ends with the weights of one that was never disturbed."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, facevae
from safetensors.torch import load_file

SCRIPT = """
import sys
from facevae.hypotheses import make_config, parse_settings
from facevae.training import train
train(make_config("H9", overrides=parse_settings(sys.argv[3:])), sys.argv[1], sys.argv[2], progress=False)
"""
SETTINGS = [*TINY[1::2], "steps=24", "checkpoint_every=3", "validate_every=5", "flip=true", "threads=1"]


def training(store, out, *settings):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(store), str(out), *SETTINGS, *settings], stderr=subprocess.DEVNULL)


def step_of(out) -> int:
    try:
        return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert training(store, out).wait() == 0
    return out


def assert_same_end(run, other):
    for name in ("model/model.safetensors", "checkpoint/step-00000024.safetensors"):
        mine, theirs = load_file(run / name), load_file(other / name)
        assert mine.keys() == theirs.keys() and all(mine[key].equal(theirs[key]) for key in mine), name
    lines = [[{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in (path / "log.jsonl").read_text().splitlines()]
             for path in (run, other)]
    assert lines[0] == lines[1], "the log of the resumed run differs"


def test_sigkill_at_random_steps(store, undisturbed, tmp_path):
    out, kills = tmp_path / "run", 0
    for moment in sorted(random.Random(0).sample(range(2, 23), 4)):
        process = training(store, out)
        while process.poll() is None and step_of(out) < moment:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3, "the run was too quick to be killed"
    assert training(store, out).wait() == 0
    assert_same_end(out, undisturbed)


def test_damaged_checkpoint_is_passed_over(store, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = training(store, out)
    while step_of(out) < 14:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = sorted((out / "checkpoint").glob("step-*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    assert training(store, out).wait() == 0
    assert_same_end(out, undisturbed)


@pytest.mark.parametrize("when", ["under way", "at the end"])
def test_damaged_best_weights_are_found_again(store, undisturbed, tmp_path, when):
    """They cannot be copied from anywhere, so training goes back far enough to meet them again."""
    out = tmp_path / "run"
    if when == "under way":
        process = training(store, out)
        while step_of(out) < 14:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    else:
        assert training(store, out).wait() == 0
    best = out / "checkpoint" / "best.safetensors"
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 4
    best.write_bytes(data)
    assert training(store, out).wait() == 0
    assert_same_end(out, undisturbed)


def test_killed_command_leaves_nobody_training(store, tmp_path):
    """SIGKILL of the command ends the notebook's kernel as well; the same command then finishes the run."""
    out = tmp_path / "run"
    arguments = ["train", "--hypothesis", "H3", "--data", str(store), "--out", str(out), *TINY, "--set", "steps=4000"]
    process = subprocess.Popen([str(Path(sys.executable).parent / "facevae"), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while step_of(out) < 3:
        assert process.poll() is None, "the command ended early"
        time.sleep(0.05)
    kernel = json.loads((out / "status.json").read_text())["pid"]
    process.kill()
    process.wait()
    deadline = time.time() + 15
    while time.time() < deadline and os.path.exists(f"/proc/{kernel}"):
        time.sleep(0.2)
    assert not os.path.exists(f"/proc/{kernel}"), "the kernel outlived the command"


def test_interrupt_says_so_and_resumes(store, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--hypothesis", "H3", "--data", str(store), "--out", str(out), *TINY, "--set", "steps=60"]
    process = subprocess.Popen([str(Path(sys.executable).parent / "facevae"), *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while step_of(out) < 3:
        assert process.poll() is None, "the command ended early"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors.lower() and "Traceback" not in errors
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    facevae(*arguments)
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 61)), "a step is logged twice or missing"


def test_two_processes_cannot_share_a_run(store, tmp_path):
    out = tmp_path / "run"
    first = training(store, out, "steps=4000")
    while step_of(out) < 2:
        time.sleep(0.002)
    second = subprocess.run([sys.executable, "-c", SCRIPT, str(store), str(out), *SETTINGS, "steps=4000"], capture_output=True, text=True)
    still_running = first.poll() is None
    first.kill()
    assert still_running and second.returncode != 0 and "Another process is working on" in second.stderr


def test_full_disk_leaves_the_old_checkpoint_whole(store, undisturbed, tmp_path, monkeypatch):
    import facevae.checkpoint
    from facevae.core import FaceVAEError
    from facevae.hypotheses import make_config, parse_settings
    from facevae.training import train
    from safetensors import SafetensorError
    config, out, save = make_config("H9", overrides=parse_settings(SETTINGS)), tmp_path / "run", facevae.checkpoint.save_tensors
    calls = []

    def full(path, tensors, numbers):
        calls.append(path)
        if len(calls) == 6:
            Path(path).write_bytes(b"half a file")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(path, tensors, numbers)

    monkeypatch.setattr(facevae.checkpoint, "save_tensors", full)
    with pytest.raises(FaceVAEError, match="No space left on device.*Free some space"):
        train(config, store, out, progress=False)
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    assert not list(out.rglob("*.partial")), "something half-written is left behind"
    train(config, store, out, progress=False)
    assert_same_end(out, undisturbed)
