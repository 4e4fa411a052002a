"""What makes training fast must not change what it trains."""

import pytest
import torch
from accelerate import Accelerator

from facevae.config import make_config
from facevae.data.store import FaceStore
from facevae.model import losses
from facevae.training.trainer import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_trainer(store, **overrides):
    config = make_config(
        "H9",
        "quick",
        overrides={"size": 36, "width": 0.125, "latent_dim": 8, "precision": "fp32"} | overrides,
    )
    return Trainer(config, FaceStore(store), Accelerator(mixed_precision="no"))


def steps(trainer, count=3):
    """The raw loss terms of a trainer's first steps."""
    return [{name: float(value) for name, value in trainer.step(step).items()} for step in range(count)]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Without kernels that add up in another order each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_another_feed_changes_nothing(store):
    streamed, resident = make_trainer(store, feed="streamed"), make_trainer(store, feed="resident")
    assert "resident" in resident.settle(0)["feed"] and "streamed" in streamed.settle(0)["feed"]
    assert steps(streamed) == steps(resident)
    assert streamed.validate() == resident.validate()


def test_bfloat16_learns_what_single_precision_learns(store):
    """Not the same digits, but the same descent; the losses themselves stay in single precision."""
    single, half = (
        steps(make_trainer(store, precision=precision, schedule="constant", learning_rate=1e-3), 30)
        for precision in ("fp32", "bf16")
    )
    assert sum(half[0].values()) == pytest.approx(sum(single[0].values()), rel=0.02)
    first, last, expected = (
        sum(losses.weight_terms(terms).values()) for terms in (half[0], half[29], single[29])
    )
    assert last < 0.8 * first and last == pytest.approx(expected, rel=0.15)
    raw = make_trainer(store, precision="bf16").step(0)
    assert all(value.dtype == torch.float32 for value in raw.values())


@needs_gpu
@pytest.mark.parametrize("feed", ["streamed", "resident"])
def test_a_step_never_waits_for_the_gpu(store, feed):
    trainer = make_trainer(store, feed=feed, precision="auto")
    trainer.step(0)
    trainer.settle(1)
    assert trainer.mode.name == "graph", trainer.mode.reason
    for step in (1, 2):
        trainer.step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 8):
            trainer.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"compile": "on"}, {"compile": "on", "graph": "off"}])
def test_a_step_trains_the_same_in_every_mode(store, settings):
    """Kernel by kernel against one CUDA graph, compiled, and both."""
    plain, trainer = make_trainer(store, graph="off"), make_trainer(store, **settings)
    expected = steps(plain, 8)
    found = steps(trainer, 3)
    trainer.settle(3)
    found += [{name: float(value) for name, value in trainer.step(step).items()} for step in range(3, 8)]
    for one, other in zip(expected, found):
        assert other == pytest.approx(one, rel=1e-2)
    assert ("graph" in trainer.mode.name) == (settings.get("graph") != "off"), trainer.mode.reason
    assert trainer.mode.compiled == ("compile" in settings), trainer.mode.reason
    for one, other in zip(plain.vae.parameters(), trainer.vae.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
