"""What `--dry-run` says of runs before they are begun, and how many runs share a machine."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
from conftest import TINY, facevae_here

from facevae.config import make_config, parse_settings
from facevae.model.vae import FaceVAE
from facevae.safe_io import read_object
from facevae.sweep.cluster import LocalWorkerPool
from facevae.sweep.cost import sweep_workers
from facevae.sweep.plan import plan_sweep
from facevae.sweep.scheduler import run_sweep
from facevae.sweep.workers import GPUSharing

SETTINGS = parse_settings(TINY[1::2])
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def seconds_said(text):
    """Seconds of the first duration that a line calls "about"."""
    number, unit = re.search(r"about ([\d.]+) (s|min|h|d)\b", text).groups()
    return float(number) * SECONDS[unit]


def test_a_dry_run_says_what_a_run_will_be_and_writes_nothing(store, study, tmp_path):
    options = ["--hypothesis", "H9", "--data", store, *TINY]
    said = facevae_here("train", *options, "--out", tmp_path / "run", "--dry-run")
    assert said.returncode == 0, said.stderr
    config = make_config("H9", overrides=SETTINGS).fit(36)
    parameters = sum(values.numel() for values in FaceVAE(config.model).parameters())
    assert f"8 steps of 8 images (64 images), {parameters:,} parameters" in said.stdout
    assert "GB of memory" in said.stdout and "An estimate" in said.stdout
    assert not list(tmp_path.iterdir()), "it wrote something"
    took = read_object(study / "H9" / "seed0" / "status.json")["seconds"]  # of the same run
    assert 0.05 < seconds_said(said.stdout) / took < 20
    done = facevae_here("train", *options, "--out", study / "H9" / "seed0", "--dry-run")
    assert "is finished already" in done.stdout, done.stderr


def test_a_dry_run_of_a_sweep_adds_its_runs_up(store, tmp_path):
    options = ["--data", store, "--out", tmp_path / "sweep", "--hypotheses", "H5,H6,H9", "--workers", "2"]
    said = facevae_here("ablate", *options, *TINY, "--dry-run")
    assert said.returncode == 0, said.stderr
    masked, plain, total = said.stdout.splitlines()[:3]
    assert masked.startswith("2 runs with masks (H6, H9), each: 8 steps of 8 images")
    assert plain.startswith("H5 seed 0: 8 steps of 8 images (64 images)")
    assert total.startswith("In all 3 runs, 2 at a time: 192 images, about ") and seconds_said(total) > 0
    assert "As many as --workers says" in said.stdout
    assert not list(tmp_path.iterdir()), "it wrote something"


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--set", "stepps=10"], "Did you mean 'steps'?"),
        (["--set", "size=72"], "holds 36 px"),
        (["--workers", "two"], "from 1 to 1000, or auto"),
        (["--hypotheses", "H99"], "'H99'"),
        (["--scheduler", "tcp://nowhere:1"], "--dry-run measures this machine"),
    ],
)
def test_a_dry_run_refuses_what_the_command_refuses(store, tmp_path, options, expected):
    said = facevae_here("ablate", "--data", store, "--out", tmp_path / "sweep", *options, "--dry-run")
    assert said.returncode == 1 and expected in said.stderr, said.stderr
    assert not list(tmp_path.iterdir())


def test_how_many_runs_went_at_a_time_stands_in_the_sweep(store, tmp_path, monkeypatch):
    """Also after the same command has found nothing more to do, and in the report's facts."""
    made = []

    class Pool(LocalWorkerPool):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def submit(self, worker, job):
            raise KeyboardInterrupt

    monkeypatch.setattr("facevae.sweep.scheduler.LocalWorkerPool", Pool)
    specs = plan_sweep(store, tmp_path / "sweep", "H5,H6,H9", overrides=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(specs, store, 2, progress=False)
    expected = "2 workers of this machine. As many as --workers says."
    assert str(made[0]) == read_object(tmp_path / "sweep" / "sweep.json")["workers"] == expected
    plan_sweep(store, tmp_path / "sweep", overrides=SETTINGS)
    assert read_object(tmp_path / "sweep" / "sweep.json")["workers"] == expected


def test_threads_do_not_spin_wherever_training_is_started_from():
    """Two runs that are started by hand slowed each other tenfold: their threads spun for each other."""
    code = "import os, facevae; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    plain = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    for own, expected in (({}, "PASSIVE 10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE 10000")):
        done = subprocess.run([sys.executable, "-c", code], env=plain | own, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_runs_that_share_a_gpu_find_mps_and_the_sweep_says_so(store, tmp_path, monkeypatch):
    """The GPUs of the daemon are numbered from 0, whatever CUDA_VISIBLE_DEVICES was when it was started."""
    environments, ended = [], []

    class Pool(LocalWorkerPool):
        def submit(self, worker, job):
            environments.extend(self._environments.values())
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def share(count):
        try:
            yield GPUSharing({"CUDA_MPS_PIPE_DIRECTORY": "/private/pipe"}, f"The {count} share a GPU by MPS.")
        finally:
            ended.append(count)

    monkeypatch.setattr("facevae.sweep.scheduler.LocalWorkerPool", Pool)
    monkeypatch.setattr("facevae.sweep.scheduler.share_gpus", share)
    monkeypatch.setattr("facevae.sweep.workers._count_gpus", lambda visible: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    specs = plan_sweep(store, tmp_path / "sweep", "H5,H6,H9", overrides=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(specs, store, 3, progress=False)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["0"] * 3 and ended == [3]
    assert {each["CUDA_MPS_PIPE_DIRECTORY"] for each in environments} == {"/private/pipe"}
    saved = read_object(tmp_path / "sweep" / "sweep.json")["workers"]
    assert saved == "3 workers of this machine. As many as --workers says. The 3 share a GPU by MPS."


def test_auto_measures_a_run_only_when_a_gpu_may_be_shared(store, tmp_path, monkeypatch):
    specs, measured = plan_sweep(store, tmp_path / "sweep", "H5,H6,H9", overrides=SETTINGS), []

    def fake(config, data, environment):
        measured.append(config.hypothesis)
        return {"memory": 4 * 10**9, "free": [12 * 10**9]}

    monkeypatch.setattr("facevae.sweep.cost.measure", fake)
    monkeypatch.setattr("facevae.sweep.workers.cpu_count", lambda: 16)
    monkeypatch.setattr("facevae.sweep.workers.shutil.which", lambda name: name)
    assert sweep_workers(specs, store).count == 2 and not measured  # on a processor
    for module in ("workers", "cost"):
        monkeypatch.setattr(f"facevae.sweep.{module}.visible_gpus", lambda: ["0"])
    assert sweep_workers(specs, store, 5).count == 5 and not measured
    chosen = sweep_workers(specs, store)
    assert chosen.count == 2 and measured == ["H9"]
    assert chosen.why == "Chosen for 4.0 GB a run, 12.0 GB free on a GPU, 16 processor cores and 3 runs."


def test_the_report_says_how_many_runs_went_at_a_time(study):
    chosen = read_object(study / "sweep.json")["workers"]
    assert " of this machine. Chosen for " in chosen and chosen in (study / "report.html").read_text()
