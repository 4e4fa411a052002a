"""A store and a sweep made by the library when it was one flat folder: they are read and gone on with."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import contents, facevae, facevae_here

ARCHIVE = Path(__file__).parent / "data" / "sweep_of_flat_library.tar.xz"
SETTINGS = (
    *("steps=300", "width=0.02", "latent_dim=4", "batch_size=4", "log_every=20", "validate_every=50"),
    *("checkpoint_every=10", "val_images=4", "test_images=4"),
)
COMMAND = [
    *("ablate", "--data", "store", "--out", "sweep", "--preset", "quick", "--hypotheses", "H5,H6"),
    *(part for setting in SETTINGS for part in ("--set", setting)),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    shutil.unpack_archive(ARCHIVE, folder)
    return folder


@pytest.fixture
def old(unpacked, tmp_path, monkeypatch):
    """The working directory, with the store and a sweep: H5 is done, H6 was interrupted at step 60 of 300."""
    old = Path(shutil.copytree(unpacked, tmp_path / "old"))
    monkeypatch.chdir(old)
    return old


def test_the_store_is_whole(old):
    assert "40 faces of 36 x 36 pixels" in facevae_here("verify", "store").stdout


def test_status_and_report_read_the_sweep(old):
    shown = facevae_here("status", "sweep").stdout
    assert "2 runs: 1 done, 1 interrupted" in shown and "60/300" in shown and "300/300" in shown
    facevae("report", "sweep")
    report = (old / "sweep" / "report.html").read_text()
    assert "H5" in report and "H6" in report and "interrupted" in report


def test_the_sweep_is_loaded_for_an_analysis(old):
    from facevae import load_sweep

    sweep = load_sweep(old / "sweep")
    assert set(sweep.metrics["hypothesis"]) == {"H5"} and sweep.metrics["ssim"].notna().all()


def test_other_code_is_named_in_one_sentence(old):
    before = contents(old / "sweep" / "H6")
    done = facevae_here(*COMMAND)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "holds a run of other code: code is '" in done.stderr and "Give --accept-code" in done.stderr
    assert contents(old / "sweep" / "H6") == before


def test_accepted_code_goes_on_from_the_last_checkpoint(old):
    finished, interrupted = (old / "sweep" / name / "seed0" for name in ("H5", "H6"))
    before = contents(finished)
    facevae(*COMMAND, "--accept-code")
    assert contents(finished) == before, "a run that was done is not left alone"
    assert json.loads((interrupted / "status.json").read_text())["state"] == "done"
    assert (interrupted / "metrics.parquet").exists() and (old / "sweep" / "report.html").exists()
    log = [json.loads(line) for line in (interrupted / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == list(range(20, 301, 20))
    assert "2 runs: 2 done" in facevae_here("status", "sweep").stdout
