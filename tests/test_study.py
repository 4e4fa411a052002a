"""The study end to end: runs, failures, repetition, report; by the command and by papermill."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY, facevae, facevae_here, rewrite
from PIL import Image
from test_report import assert_self_contained

VIEWS = {"raw", "composite", "face"}


def test_every_run_has_its_files(study):
    for hypothesis in ("H5", "H9", "l1+l2+mask"):
        for seed in (0, 1):
            run = study / hypothesis / f"seed{seed}"
            for name in (
                "config.json",
                "status.json",
                "log.jsonl",
                "train.ipynb",
                "checkpoint",
                "model/config.json",
                "model/model.safetensors",
                "metrics.parquet",
                "samples.png",
            ):
                assert (run / name).exists(), f"{run / name} is missing"
            assert json.loads((run / "status.json").read_text())["state"] == "done"
            config = json.loads((run / "config.json").read_text())
            requested = {"hypothesis": hypothesis, "seed": seed, "steps": 8, "size": 36}
            assert requested.items() <= config.items()
            assert config["mask"] == (hypothesis != "H5")


def test_metrics_have_a_row_for_each_image_and_view(study):
    masked, plain = (pd.read_parquet(study / name / "seed0" / "metrics.parquet") for name in ("H9", "H5"))
    assert set(plain["view"]) == VIEWS and set(masked["view"]) == VIEWS | {"predicted"}
    assert (
        masked.groupby("view")["image"].nunique().eq(8).all()
        and not masked.duplicated(["image", "view"]).any()
    )
    for column in ("ssim", "l1", "l2", "psnr", "sharpness", "delta_e"):
        assert masked[column].notna().all(), column
    means = masked.groupby("view")[["l1", "delta_e"]].mean()
    assert (means.loc["composite"] < means.loc["raw"]).all(), "the pasted background costs nothing"


def test_log_has_named_terms_raw_and_weighted(study):
    lines = [json.loads(line) for line in (study / "H9" / "seed0" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [4, 8]
    for line in lines:
        assert set(line["raw"]) == set(line["weighted"]) == {"ssim", "l2", "kl", "mask_bce", "mask_dice"}
        assert line["loss"] == pytest.approx(sum(line["weighted"].values()))
        assert line["weighted"]["kl"] == pytest.approx(1e-3 * line["raw"]["kl"])


def test_results_and_report(study):
    results = pd.read_csv(study / "results.csv")
    assert set(results["hypothesis"]) == {"H5", "H9", "l1+l2+mask"} and set(results["seed"]) == {0, 1}
    assert any((study / "figures").glob("*.png"))
    assert_self_contained(study / "report.html")


def test_again_does_nothing_more_and_more_does_only_that(study, store, stand_in, tmp_path):
    sweep = Path(shutil.copytree(study, tmp_path / "study"))
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*/*/metrics.parquet")}
    more = ["--hypotheses", "H5,H9,H7", "--seeds", "0"]
    facevae("ablate", "--data", store, "--out", sweep, *more, *TINY, PYTHONPATH=str(stand_in))
    after = {path: path.stat().st_mtime_ns for path in sweep.glob("*/*/metrics.parquet")}
    assert {path: after[path] for path in before} == before
    assert [path.parts[-3] for path in after.keys() - before.keys()] == ["H7"]
    saved = json.loads((sweep / "sweep.json").read_text())
    assert [h["name"] for h in saved["hypotheses"]] == ["H5", "H9", "l1+l2+mask", "H7"]
    assert saved["seeds"] == [0, 1]


def test_other_settings_are_refused_by_name(study, store):
    command = ["ablate", "--data", store, "--out", study, "--hypotheses", "H5", *TINY, "--set", "steps=9"]
    done = facevae_here(*command)
    assert done.returncode == 1 and "settings" in done.stderr and "Traceback" not in done.stderr


def test_a_failed_run_is_marked_and_the_rest_goes_on(store, stand_in, tmp_path):
    out = tmp_path / "study"
    bad = tmp_path / "study" / "H7" / "seed0"
    bad.parent.mkdir(parents=True)
    bad.write_text("a file where the run directory should be")
    command = ["ablate", "--data", store, "--out", out, "--hypotheses", "H7,H5", *TINY]
    done = facevae(*command, check=False, PYTHONPATH=str(stand_in))
    assert done.returncode == 1 and "H7 seed 0" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((out / "H5" / "seed0" / "status.json").read_text())["state"] == "done"
    assert (out / "report.html").exists()
    bad.unlink()
    facevae(*command, PYTHONPATH=str(stand_in))
    assert json.loads((bad / "status.json").read_text())["state"] == "done"


def test_a_loss_that_is_not_finite_is_named(store, tmp_path):
    command = ["train", "--hypothesis", "H7", "--data", store, "--out", tmp_path / "run", *TINY]
    done = facevae(*command, "--set", "learning_rate=1e30", "--set", "schedule=constant", check=False)
    assert done.returncode == 1 and "not finite at step" in done.stderr
    assert "'l2'" in done.stderr or "'kl'" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["error"]


def papermill(tmp_path, store, *parameters):
    notebook = Path(__file__).parent.parent / "nbs" / "experiments" / "train.ipynb"
    known = {"data": store, "out": tmp_path / "run", "preset": "quick", "settings": " ".join(TINY[1::2])}
    command = [sys.executable, "-m", "papermill", notebook, tmp_path / "out.ipynb"]
    for name, value in known.items():
        command += ["-p", name, value]
    return subprocess.run([*map(str, command), *parameters], capture_output=True, text=True)


def test_papermill_runs_what_it_was_asked(store, tmp_path):
    done = papermill(tmp_path, store, "-p", "hypothesis", "H9")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["terms"] == "ssim+l2"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_papermill_with_a_mistyped_parameter_fails(store, tmp_path):
    done = papermill(tmp_path, store, "-p", "hypothesys", "H5")
    assert done.returncode != 0 and "Did you mean 'hypothesis'?" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_figures_of_a_partial_sweep(study, store, tmp_path):
    """What is missing is said; faces of a store that sweep.json names by a relative path are drawn."""
    copy = Path(shutil.copytree(study, tmp_path / "study"))
    (copy / "H9" / "seed0" / "metrics.parquet").write_bytes(b"not parquet")
    shutil.rmtree(copy / "H5" / "seed1")
    shutil.copytree(store, tmp_path / "faces")
    rewrite(copy / "sweep.json", data="faces")
    facevae("report", "study", cwd=tmp_path)
    page = (copy / "report.md").read_text()
    assert "missing" in page.lower() and "facevae report study" in page
    figure = copy / "figures" / "visual_comparison.png"
    with Image.open(figure) as image:
        assert image.height > 300, "a notice stands in the place of the faces"
