"""Two processes that share each batch train what one process would have trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from facevae.config import make_config, parse_settings
from facevae.core import FaceVAEError
from facevae.training.launch import launch
from facevae.training.trainer import train

SETTINGS = [
    "steps=20",
    "size=36",
    "width=0.125",
    "latent_dim=8",
    "batch_size=16",
    "log_every=1",
    "validate_every=10",
    "checkpoint_every=5",
    "precision=fp32",
]


def accelerate_launch(store, out, *settings, hypothesis="H9"):
    """Run facevae.training.launch in two processes on the processor, as a user would from a shell."""
    arguments = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "facevae.training.launch",
        "--hypothesis",
        hypothesis,
        "--preset",
        "paper",
        "--data",
        store,
        "--out",
        out,
    ]
    for setting in [*SETTINGS, *settings]:
        arguments += ["--set", setting]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        list(map(str, arguments)), text=True, capture_output=True, env=environment, timeout=300
    )


def losses(run, kind):
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == kind}


@pytest.fixture(scope="module")
def one_process(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train(make_config("H9", "paper", overrides=parse_settings(SETTINGS)), store, out, progress=False)
    return out


def test_losses_of_two_processes_are_those_of_one(store, one_process, tmp_path):
    done = accelerate_launch(store, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    one, two = losses(one_process, "train"), losses(tmp_path / "run", "train")
    assert list(two) == list(range(1, 21))
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4), f"step {step}"
    validation = losses(tmp_path / "run", "validation")
    assert list(validation) == [10, 20] and validation == pytest.approx(
        losses(one_process, "validation"), rel=1e-2
    )
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["processes"]) == ("done", 2)
    assert len(pd.read_parquet(tmp_path / "run" / "metrics.parquet")) > 0
    # The same directory goes on in one process: how many shared the work is no part of what a run is.
    train(
        make_config("H9", "paper", overrides=parse_settings(SETTINGS)),
        store,
        tmp_path / "run",
        progress=False,
    )


def test_an_error_reaches_the_user_once(store, tmp_path):
    done = accelerate_launch(store, tmp_path / "run", "batch_size=15")
    assert done.returncode != 0
    assert done.stderr.count("facevae: A batch of 15 images cannot be shared evenly by 2 processes") == 1


def test_a_notebook_starts_processes_and_gets_their_error(store, tmp_path):
    overrides = parse_settings(SETTINGS) | {"steps": 4, "processes": 2}
    model = launch(make_config("H2", "paper", overrides=overrides), store, tmp_path / "run", progress=False)
    assert (model / "model.safetensors").is_file() and list(losses(tmp_path / "run", "train")) == [1, 2, 3, 4]
    with pytest.raises(FaceVAEError, match="cannot be shared evenly by 2"):
        launch(
            make_config("H2", "paper", overrides=overrides | {"batch_size": 15}),
            store,
            tmp_path / "other",
            progress=False,
        )
