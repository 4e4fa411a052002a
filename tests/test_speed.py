"""What makes training fast must not change what it trains."""

from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator

from facevae.config import make_config
from facevae.data.store import FaceStore
from facevae.metrics.filters import blur_by_products
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
    return [{name: float(value) for name, value in trainer.step(step)[0].items()} for step in range(count)]


def test_a_compiled_step_trains_the_same(store, monkeypatch):
    """Traced whole, as a GPU would run it (windows by matrix products); the code generator is left out."""
    monkeypatch.setattr(losses, "blur", blur_by_products)
    plain = steps(make_trainer(store))
    real = torch.compile
    with patch(
        "torch.compile", lambda function, mode=None: real(function, backend="aot_eager", fullgraph=True)
    ):
        trainer = make_trainer(store, compile="on")
    compiled = steps(trainer)
    assert trainer.compiled, "it went back to the uncompiled step"
    for one, other in zip(plain, compiled):
        assert other == pytest.approx(one, rel=1e-4)


def test_a_step_that_cannot_be_compiled_is_run_as_it_is(store):
    def refuse(function, mode=None):
        def broken(*arguments):
            raise RuntimeError("no compiler found")

        return broken

    with patch("torch.compile", refuse):
        trainer = make_trainer(store, compile="on")
    with pytest.warns(UserWarning, match="could not be compiled.*no compiler found.*compile=off"):
        uncompiled = steps(trainer)
    assert uncompiled == steps(make_trainer(store)) and not trainer.compiled


def test_another_feed_changes_nothing(store):
    streamed, resident = make_trainer(store, feed="streamed"), make_trainer(store, feed="resident")
    assert "resident" in resident.choose_source()["feed"] and "streamed" in streamed.choose_source()["feed"]
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
    raw, _ = make_trainer(store, precision="bf16").step(0)
    assert all(value.dtype == torch.float32 for value in raw.values())


@needs_gpu
@pytest.mark.parametrize("feed", ["streamed", "resident"])
def test_a_step_never_waits_for_the_gpu(store, feed):
    trainer = make_trainer(store, feed=feed, precision="auto")
    trainer.step(0)
    trainer.choose_source()
    for step in (1, 2):
        trainer.step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 8):
            trainer.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_compiled_for_the_gpu_trains_the_same(store):
    plain = steps(make_trainer(store), 5)
    trainer = make_trainer(store, compile="on")
    for one, other in zip(plain, steps(trainer, 5)):
        assert other == pytest.approx(one, rel=1e-3)
    assert trainer.compiled
