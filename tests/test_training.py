"""The habits of training: options from a file, more steps, weights to begin with, early stopping, Ctrl-C."""

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, TINY, facevae_here

from facevae.config import make_config, parse_settings
from facevae.training.configuration import extension, initial_settings
from facevae.training.run import RunDirectory
from facevae.training.trainer import train

SETTINGS = parse_settings(TINY[1::2])


def losses(run):
    """(kind, step, loss) of each line of a run's log."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def trained(store, out, **overrides):
    """A run directory, trained in this process."""
    return train(make_config("H9", overrides=SETTINGS | overrides), store, out, progress=False).parent


def test_a_run_and_its_file_give_the_same_losses(store, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"hypothesis: H9\ndata: {store}\nseed: 1\nset: {{steps: 2, flip: false, graph: off}}\n"
    )
    command = ["--config", tmp_path / "mine.yaml", *TINY, "--set", "steps=4"]
    done = facevae_here("train", *command, "--out", tmp_path / "first")
    assert done.returncode == 0 and "seed 1: 4 steps" in done.stdout, done.stderr
    written = tmp_path / "first" / "run.yaml"
    done = facevae_here("train", "--config", written, "--out", tmp_path / "second")
    assert done.returncode == 0 and losses(tmp_path / "first") == losses(tmp_path / "second"), done.stderr
    done = facevae_here("train", "--config", written, "--out", tmp_path / "first")
    assert "is finished already" in done.stdout


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hypotesis: H9", "Did you mean 'hypothesis'?"),
        ("hypothesis: H9\nhypothesis: H5", "twice"),
        ("hypothesis: &x H9\nset: *x", "refers to another part"),
        ("hypothesis: {H9: 1}", "'hypothesis' in"),
        ("hypothesis: H9\nset: {stepps: 1}", "Did you mean 'steps'?"),
        ("hypothesis: H9\nset: {extended_at: [x]}", "extended_at"),
        ("x" * 70_000, "larger than"),
    ],
)
def test_files_that_are_no_options(store, tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    done = facevae_here(
        "train", "--data", store, "--out", tmp_path / "run", "--config", tmp_path / "run.yaml"
    )
    assert done.returncode == 1 and expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_sweep_leaves_the_options_that_plan_it_again(store, tmp_path):
    from facevae.sweep.plan import plan_sweep

    plan_sweep(store, tmp_path / "first", "H5,H6", [0, 1], overrides=SETTINGS)
    written = tmp_path / "first" / "sweep.yaml"
    done = facevae_here("ablate", "--config", written, "--out", tmp_path / "first", "--set", "steps=9")
    assert done.returncode == 1 and "another sweep" in done.stderr
    plan_sweep(store, tmp_path / "first", "H5", [0], overrides=SETTINGS | {"feed": "streamed"})
    done = facevae_here(
        "ablate", "--config", written, "--out", tmp_path / "second", "--only", "H5:seed7", "--seeds", "0-1"
    )
    assert done.returncode == 1 and "'H5:seed7' is not in this sweep" in done.stderr
    assert "H6:seed1" in done.stderr


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_an_extended_run_is_the_run_of_its_file(store, tmp_path, schedule):
    first = trained(store, tmp_path / "first", schedule=schedule, threads=1)
    before = losses(first)
    more = extension(RunDirectory(first).config, 12)
    saved = json.loads((first / "config.json").read_text())
    from facevae.safe_io import write_object

    saved.pop("content_sha256")
    write_object(first / "config.json", saved | more)
    trained(store, first, schedule=schedule, threads=1, **more)
    assert losses(first)[: len(before)] == before and losses(first)[-1][1] == 12
    again = trained(store, tmp_path / "again", schedule=schedule, threads=1, **more)
    assert losses(again) == losses(first)
    if schedule == "constant":
        whole = trained(store, tmp_path / "whole", schedule=schedule, threads=1, steps=12)
        assert losses(whole) == losses(first)


def test_extend_by_the_command(study, store, tmp_path):
    run = Path(shutil.copytree(study / "H9" / "seed0", tmp_path / "run"))
    command = ["train", "--hypothesis", "H9", "--data", store, "--out", run, *TINY, "--extend"]
    done = facevae_here(*command, 4)
    assert done.returncode == 1 and "has 8 steps and cannot be extended to 4" in done.stderr
    other = facevae_here(*command, 10, "--set", "width=0.2")
    assert other.returncode == 1 and "width is 0.1 there and 0.2 here" in other.stderr
    assert RunDirectory(run).status["state"] == "done", "nothing was changed"
    done = facevae_here(*command, 10)
    assert done.returncode == 0, done.stderr
    status = RunDirectory(run).status
    assert (status["state"], status["step"], status["steps"]) == ("done", 10, 10)
    assert RunDirectory(run).config.extended_at == (8,) and losses(run)[-1][1] == 10
    assert "is finished already" in facevae_here(*command, 10).stdout
    own = facevae_here("train", "--data", store, "--out", run, "--extend", 12, "--dry-run")
    assert "12 steps of" in own.stdout and "10 of them done" in own.stdout, own.stderr
    seed = facevae_here("train", "--data", store, "--out", run, "--extend", 12, "--seed", 1)
    assert seed.returncode == 1 and "seed is 0 there and 1 here" in seed.stderr
    preset = facevae_here("train", "--data", store, "--out", run, "--extend", 12, "--preset", "modern")
    assert preset.returncode == 1 and "preset is 'quick' there and 'modern' here" in preset.stderr
    inside = facevae_here(*command[:6], study / "H9" / "seed0", *command[7:], 10)
    assert inside.returncode == 1 and "whose runs all have as many steps" in inside.stderr


def test_weights_to_begin_with(store, tmp_path):
    first = trained(store, tmp_path / "a run", threads=1)
    begun = initial_settings(first, {})
    config = make_config("H9", overrides=SETTINGS | begun)
    assert begun["initial_sha256"] in config.model_dump().values()
    second = trained(store, tmp_path / "second", threads=1, **begun)
    assert losses(second)[0][2] < losses(first)[0][2], "it begins where the other ended"
    assert "SHA-256 " + begun["initial_sha256"] in (second / "model" / "README.md").read_text()
    assert str(tmp_path) not in (second / "model" / "README.md").read_text()
    command = ["train", "--hypothesis", "H9", "--data", store, "--out", tmp_path / "third", *TINY]
    done = facevae_here(*command, "--from", first, "--set", "width=0.2")
    assert done.returncode == 1 and "--set width=0.1" in done.stderr and not (tmp_path / "third").exists()
    done = facevae_here(*command, "--from", tmp_path / "nothing")
    assert done.returncode == 1 and "Give a finished run" in done.stderr
    by_command = facevae_here(*command, "--from", first, "--set", "threads=1")
    assert by_command.returncode == 0 and losses(tmp_path / "third") == losses(second), by_command.stderr


def test_a_run_without_patience_left_stops_and_says_so(store, tmp_path):
    # Weights that stand still, and statistics of the last batch alone: validation goes up and down.
    worse = {"learning_rate": 1e-12, "schedule": "constant", "norm_momentum": 1.0}
    worse |= {"steps": 40, "validate_every": 2, "patience": 2}
    run = RunDirectory(trained(store, tmp_path / "run", **worse))
    status = run.status
    assert status["step"] == status["best_step"] + 4 < status["steps"] == 40 == run.config.steps
    assert f"Stopped at step {status['step']} of 40" in status["stop_reason"]
    assert "stopped early" in (run.model / "README.md").read_text()
    before = losses(run.path)
    trained(store, run.path, **worse)
    assert losses(run.path) == before, "a run that goes on stops where it stopped"


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_is_told_what_the_log_is_told(store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(store, tmp_path / "run", track="tensorboard")
    plain = trained(store, tmp_path / "plain")
    assert losses(run) == losses(plain), "what a run computes does not depend on it"
    trained(store, run)  # the same run
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx({step: loss for kind, step, loss in losses(run) if kind == "train"})
    assert [event.step for event in events.Scalars("validation/ssim")] == [4, 8]


def test_another_tracker_goes_on_with_its_run(store, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        "from types import SimpleNamespace\ncalls = []\n"
        "config = SimpleNamespace(update=lambda *a, **b: None)\n"
        "def init(**options):\n    calls.append(options)\n"
        "    return SimpleNamespace(id='abc', log=lambda *a, **b: calls.append(a), finish=lambda: None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = trained(store, tmp_path / "run", track="wandb")
    trained(store, run, track="wandb")
    starts = [call for call in sys.modules.pop("wandb").calls if isinstance(call, dict)]
    assert [start["id"] for start in starts] == [None, "abc"] and starts[0]["name"] == "H9 seed 0"


def test_a_tracker_that_is_not_installed_is_missed_at_once(store, tmp_path):
    if find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    command = ["train", "--hypothesis", "H9", "--data", store, "--out", tmp_path / "run", *TINY]
    done = facevae_here(*command, "--set", "track=mlflow")
    assert done.returncode == 1 and "mlflow is not installed" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_interrupt_is_answered_at_once(store, stand_in, tmp_path):
    import os

    command = [str(Path(sys.executable).parent / "facevae"), "train", "--hypothesis", "H9", "--data", store]
    command += ["--out", tmp_path / "run", *TINY, "--set", "steps=2000"]
    variables = os.environ | {"PYTHONPATH": str(stand_in)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables, cwd=ROOT)
    run = RunDirectory(tmp_path / "run")
    until = time.monotonic() + 60
    while run.status.get("step", 0) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    begun, line = time.monotonic(), ""
    while "Ctrl-C" not in line:
        line = process.stderr.readline()
    assert time.monotonic() - begun < 2 and "a second Ctrl-C ends at once" in line
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "The same command goes on where it stopped." in rest
    assert run.status["state"] == "interrupted"
