"""Samples of a model and their distance from real faces: in a run, at the command, in the report."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import facevae_here, rewrite
from PIL import Image

from facevae.analysis.claims import SweepAnalysis
from facevae.analysis.figures import study_figures
from facevae.analysis.report import render_markdown
from facevae.analysis.results import load_sweep
from facevae.data.loader import Batches
from facevae.data.store import FaceStore
from facevae.metrics.tables import SAMPLE_SOURCES
from facevae.model.sampling import sample_distances, sample_latents
from facevae.model.vae import FaceVAE, ModelConfig


class Dealer(torch.nn.Module):
    """A generative model that is as good as it is told: what it decodes are training faces, with noise."""

    config = SimpleNamespace(size=36, latent_dim=2, mask_decoder=False, sampling="gaussian")

    def __init__(self, store: FaceStore, noise: float):
        super().__init__()
        (batch,) = Batches(store, "train", batch_size=len(store.rows("train")))
        self.faces, self.noise = torch.nn.Parameter(batch.images), noise

    def encode(self, images):
        return images.mean((2, 3))[:, :2], torch.full((len(images), 2), -1.0)

    def decode(self, latents):
        rows = (1000 * latents[:, 0]).long() % len(self.faces)
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(len(latents), 3, 36, 36, generator=rng)
        return (self.faces[rows] + self.noise * noise).clamp(0, 1), None


def test_the_distance_is_none_for_real_faces_and_grows_with_what_is_wrong_with_them(store):
    faces = FaceStore(store)
    tables = [
        sample_distances(Dealer(faces, noise), faces).set_index("source") for noise in (0, 0.05, 0.1, 0.2)
    ]
    prior = [table.kid["prior"] for table in tables]
    assert prior[0] < 3 * tables[0].standard_error["prior"], "as near as other real faces"
    assert prior == sorted(prior) and prior[-1] > 10 * abs(prior[0])
    assert len({table.kid["real"] for table in tables}) == 1, "which no model has a part in"


def test_the_authors_sampling_is_sampled_as_they_do(store):
    """They add noise * log_std, so an aggregate posterior at the optimum of the KL has no noise."""
    from facevae.model.sampling import encode_store

    vae = FaceVAE(ModelConfig(size=36, width=0.1, latent_dim=8, sampling="original")).eval()
    torch.nn.init.zeros_(vae.log_std.weight)
    for log_std, spread in ((0.0, 0.0), (-2.0, 2.0)):
        torch.nn.init.constant_(vae.log_std.bias, log_std)
        faces = encode_store(vae, FaceStore(store), limit=20)
        offsets = sample_latents(vae, "posterior", 20, 0, faces).sort(0).values - faces.mean.sort(0).values
        assert offsets.abs().max() < 1e-6 if spread == 0 else 0.5 < offsets.std() / spread < 1.5


def test_a_run_ends_with_how_far_its_samples_are(study):
    from facevae.metrics.tables import load_distances

    table = load_distances(study / "H9" / "seed0" / "distances.parquet")
    assert tuple(table.source) == tuple(SAMPLE_SOURCES) and set(table["view"]) == {"face"}
    assert set(table["count"]) == {8} and np.isfinite(table.kid).all()
    assert set(load_distances(study / "H5" / "seed1" / "distances.parquet")["view"]) == {"raw"}
    sweep = load_sweep(study)
    assert len(sweep.distances) == 6 * len(SAMPLE_SOURCES) and not sweep.runs.error.any()


def test_the_report_shows_samples_and_says_what_the_weight_of_the_kl_costs(study):
    report = (study / "report.html").read_text()
    start = report.index('<div id="samples-and-what-the-weight-of-the-kl-costs">')
    section = report[start : report.index("</details>", start)]
    assert re.search(r"Samples of \S+ from the prior are −?\d+\.\d{3} away from real faces", section)
    assert 'id="sampled_faces"' in section and "cannot be drawn" not in section
    rows = re.findall(r'<th scope="row"[^>]*>(\S+) ', section)
    assert rows == ["H5", "H9", "l1+l2+mask"] and "Aggregate posterior" in section
    assert (study / "figures" / "sampled_faces.pdf").exists()


def test_runs_of_before_are_reported_without(study, tmp_path):
    old = shutil.copytree(study, tmp_path / "old")
    for run in old.glob("*/seed*"):
        (run / "distances.parquet").unlink()
        digests = json.loads((run / "status.json").read_text())["sha256"]
        rewrite(run / "status.json", sha256={k: v for k, v in digests.items() if k != "distances.parquet"})
    sweep = load_sweep(old)
    assert sweep.distances.empty and not sweep.runs.error.any() and set(sweep.runs.state) == {"done"}
    analysis = SweepAnalysis(sweep, resamples=100)
    page = render_markdown(analysis, study_figures(analysis, names=["sampled_faces"]))
    assert "was not measured" in page and "Aggregate posterior |" not in page
    assert "(figures/sampled_faces.png)" in page, "what the models draw is shown all the same"


@pytest.mark.parametrize("options", [(), ("--from", "posterior"), ("--from", "gaussian")])
def test_the_command_says_what_it_sampled_and_how_far_that_is(store, study, tmp_path, options):
    sheets = [tmp_path / "a.png", tmp_path / "b.png"]
    for sheet in sheets:
        done = facevae_here(
            "sample", study / "H9/seed0/model", "--out", sheet, "--count", 10, "--data", store, *options
        )
        assert done.returncode == 0, done.stderr
        source = options[1] if options else "prior"
        assert f"{sheet}: 10 {SAMPLE_SOURCES[source]}, seed 0" in done.stdout
        assert len(re.findall(r"^  .* -?\d+\.\d{3} ± \d+\.\d{3}$", done.stdout, re.M)) == len(SAMPLE_SOURCES)
    assert sheets[0].read_bytes() == sheets[1].read_bytes(), "the seed decides"
    assert Image.open(sheets[0]).size == (4 * 40 + 4, 3 * 40 + 4)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--from", "postrior"], "Did you mean 'posterior'?"),
        (["--from", "posterior"], "--data"),
        (["--out", "samples.jpg"], "should end in .png"),
        (["--data", "no-store"], "no-store"),
        (["--count", "0"], "--count"),
    ],
)
def test_what_cannot_be_sampled_is_said_before_anything_is_written(tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    done = facevae_here("sample", "drawn-faces", "--out", "samples.png", *options)
    assert done.returncode and expected in re.sub(r"\s+", " ", done.stderr) and not list(tmp_path.iterdir())
