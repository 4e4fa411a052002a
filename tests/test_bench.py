"""`facevae bench` at a tiny scale: every row is there, ratios are quotients; mistypes are answered."""

import json
import math
import re

import pytest
import torch
from conftest import facevae_here

from facevae.bench.baseline import PlainVAE, plain_losses
from facevae.config import make_config
from facevae.model.losses import loss_terms, weight_terms
from facevae.model.vae import FaceVAE

SMALL = ["--seconds", 1]
for setting in ("size=36", "width=0.1", "latent_dim=8", "batch_size=8"):
    SMALL += ["--set", setting]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "tiny.json"
    done = facevae_here("bench", "--recipes", "quick", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".png").stat().st_size > 5000 and out.with_suffix(".pdf").exists()
    return json.loads(out.read_text()), done.stdout


def test_every_measurement_has_a_row_with_a_rate(result):
    benchmark, _ = result
    assert {row["measurement"] for row in benchmark["rows"]} == {
        "reference",
        "step",
        "resident",
        "evaluation",
        "packing",
        "drawing",
    }
    assert {"fp32"} <= {row["precision"] for row in benchmark["rows"] if row["measurement"] == "step"}
    for row in benchmark["rows"]:
        assert (
            math.isfinite(row["images_per_second"])
            and 0 < row["slowest"] <= row["images_per_second"] <= row["fastest"]
        ), row
        assert row["peak_memory_mb"] >= 0 and row["turns"] >= 2 and row["memory_kind"]


def test_ratios_are_quotients_of_rates(result):
    benchmark, _ = result
    rates = {
        row["measurement"]: row["images_per_second"]
        for row in benchmark["rows"]
        if row["measurement"] != "step"
    }
    usual = next(row for row in benchmark["rows"] if row["usual"])["images_per_second"]
    for row in benchmark["rows"]:
        if row["measurement"] in ("step", "resident", "reference"):
            assert row["ratio"] == pytest.approx(row["images_per_second"] / rates["reference"], rel=1e-6)
        else:
            assert row["ratio"] is None
    ratios = benchmark["ratios"]["quick"]
    assert ratios["step_to_reference"] == pytest.approx(usual / rates["reference"], rel=1e-6)
    assert ratios["evaluation_to_training"] == pytest.approx(usual / (3 * rates["evaluation"]), rel=1e-6)
    assert 0 < ratios["input_share"] < 1


def test_the_bound_the_machine_and_what_is_missing_are_reported(result):
    benchmark, text = result
    roofline = benchmark["roofline"]["quick"]
    reached = roofline["bound_ms"] / roofline["step_ms"]
    assert roofline["reached"] == pytest.approx(reached) and reached > 0
    assert {"convolution", "loss", "optimiser", "input"} <= {kind["kind"] for kind in roofline["kinds"]}
    assert {"device", "processor", "cores", "threads", "torch", "torchvision", "python"} <= set(
        benchmark["machine"]
    )
    assert benchmark["configs"]["quick"]["hypothesis"] == "H9" and benchmark["configs"]["quick"]["size"] == 36
    assert benchmark["opening"]["pictures"] == 200_000 and benchmark["opening"]["seconds"] < 1
    assert "plain loop" in text and "of the bound reached" in text
    if not torch.cuda.is_available():
        assert benchmark["needs_gpu"] and "needs a GPU" in text


def test_the_plain_loop_computes_what_the_library_computes():
    config = make_config("H9", overrides={"size": 36, "width": 0.1, "latent_dim": 8})
    vae, plain = FaceVAE(config.model), PlainVAE(config.model)
    plain.load_state_dict(dict(zip(plain.state_dict(), vae.state_dict().values())))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in vae.parameters())
    images, mask, noise = torch.rand(4, 3, 36, 36), torch.rand(4, 1, 36, 36), torch.randn(4, 8)
    out, plain_out = vae(images, noise=noise, sample=True), plain(images, noise)
    for expected, value in zip(out, plain_out):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    losses = weight_terms(loss_terms(out, images, mask, ("ssim", "l2")), config.weights)
    plain_terms = plain_losses(plain_out, images, mask)
    assert set(losses) == set(plain_terms)
    for name, loss in losses.items():
        assert plain_terms[name].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--only", "stepp"], "Did you mean 'step'?"),
        (["--recipes", "quik"], "Did you mean 'quick'?"),
        (["--set", "sizze=36"], "Did you mean 'size'?"),
        (["--out", "result.txt"], "result.json"),
        (["--seconds", "-1"], "--seconds"),
    ],
)
def test_mistypes_are_answered_before_anything_starts(options, expected):
    done = facevae_here("bench", *options)
    assert done.returncode and expected in re.sub(r"\s+", " ", done.stderr), done.stderr


def test_help():
    done = facevae_here("bench", "--help")
    assert done.returncode == 0 and "--only" in done.stdout and "roofline" in done.stdout
