"""The paper preset is the paper's recipe: each of its parts is asserted, so that none can drift unseen."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from facevae.config import HYPOTHESES, make_config, parse_settings
from facevae.data.images import read_image
from facevae.data.loader import face_mask
from facevae.data.store import FaceStore
from facevae.model.vae import FaceVAE
from facevae.training.optimizer import ClippedAdam
from facevae.training.step import learning_rate
from facevae.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def trainer(store):
    """The paper's recipe on images that are here: only the size and width of the network are smaller."""
    return Trainer(
        make_config("H9", "paper", overrides={"size": 36, "width": 0.125, "latent_dim": 16}),
        FaceStore(store),
        Accelerator(),
    )


def test_budget():
    config = make_config("H9", "paper")
    assert config.steps * config.batch_size == 12_800_000 and config.batch_size == 32
    assert config.validate_every == 4000 and config.steps == 100 * config.validate_every
    assert config.val_images == config.test_images == 0, "validation and test use every image"
    assert (config.size, config.width, config.latent_dim, config.flip) == (144, 1, 512, False)


def test_optimiser(trainer):
    optimizer = trainer.optimizer
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.clip_norm == 1e-3
    group = optimizer.param_groups[0]
    assert (group["lr"].item(), group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == (
        pytest.approx(1e-4),
        (0.9, 0.999),
        1e-7,
        0,
        False,
    )
    assert {learning_rate(trainer.config, step) for step in (0, 1, 200_000, 399_999)} == {1e-4}


def test_every_variable_is_clipped_by_itself(trainer):
    trainer.step(0)
    norms = [
        gradient.norm().item()
        for gradient, parameter in zip(trainer.optimizer.gradients(), trainer.vae.parameters())
        if parameter.requires_grad
    ]
    assert max(norms) <= 1e-3 * (1 + 1e-5)
    assert sum(norm > 0.99e-3 for norm in norms) > len(norms) / 2, (
        "clipping as a whole would leave most far below"
    )
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1e-4])
    optimizer = ClippedAdam([a, b], 1e-4, 1e-7, clip_norm=1e-3)
    optimizer.step()
    first, second = optimizer.gradients()
    assert torch.allclose(first, torch.tensor([6e-4, 8e-4])) and second.tolist() == pytest.approx([0, 1e-4])


def test_batch_normalisation_constants(trainer):
    norms = [module for module in trainer.vae.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(
        (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-3, 0.01, True, True)
        for norm in norms
    )


def test_initialisation_is_glorot_uniform():
    torch.manual_seed(0)
    for module in FaceVAE().modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            weight = module.weight.detach()
            receptive = math.prod(weight.shape[2:])
            limit = math.sqrt(6 / (receptive * (weight.shape[0] + weight.shape[1])))
            assert weight.abs().max() <= limit and weight.std() == pytest.approx(
                limit / math.sqrt(3), rel=0.1
            )
            assert module.bias.abs().max() == 0


def test_batches_are_whole_epochs_in_a_seeded_order(trainer, store):
    count = len(FaceStore(store).rows("train"))
    names = [name for step in range(-(-count // 32) * 2) for name in trainer.data.at(step).names]
    assert len(set(names[:count])) == count, "the first epoch shows every image once"
    assert len(set(names[count : 2 * count])) == count and names[count : 2 * count] != names[:count]
    assert trainer.data.at(5).names == trainer.data.at(5).names


def test_masks_have_soft_edges(trainer):
    mask = trainer.data.at(0).mask
    inside = mask[(mask > 0) & (mask < 1)]
    assert 0.005 < inside.numel() / mask.numel() < 0.3 and len(inside.unique()) > 3
    step = torch.zeros(1, 8, 8, dtype=torch.uint8)
    step[..., 4:] = 1
    assert face_mask(step)[0, 0, 0].tolist() == [0, 0, 0, 0.25, 0.75, 1, 1, 1]


def test_images_are_squashed_not_cropped(tmp_path):
    image = np.zeros((218, 178, 3), np.uint8)
    image[:, 89:] = (0, 255, 0)
    image[109:] += np.array([255, 0, 0], np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    small, _ = read_image(tmp_path / "a.png", 144)
    assert small.shape == (144, 144, 3)
    assert (small[:, :, 1] > 127).mean(1).tolist() == pytest.approx([0.5] * 144, abs=0.01)
    assert (small[:, :, 0] > 127).mean(0).tolist() == pytest.approx([0.5] * 144, abs=0.01)


def test_best_validation_loss_decides_which_weights_are_kept(store, tmp_path, monkeypatch):
    losses = {4: 3.0, 8: 2.0, 12: 1.0, 16: 4.0}
    coming = iter(losses.values())
    monkeypatch.setattr(Trainer, "validate", lambda self: ({"l2": 0.0}, {"l2": next(coming)}))
    overrides = parse_settings([*TINY[1::2], "steps=16", "validate_every=4", "checkpoint_every=4"])
    model = train(make_config("H7", overrides=overrides), store, tmp_path / "run", progress=False)
    kept = load_file(model / "model.safetensors")
    third, last = (
        load_file(tmp_path / "run" / "checkpoint" / f"step-{step:08d}.safetensors") for step in (12, 16)
    )
    assert all(kept[name].equal(third[f"model.{name}"]) for name in kept)
    assert any(not kept[name].equal(last[f"model.{name}"]) for name in kept)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["best_step"], status["best_loss"]) == (12, 1.0)


def test_validation_is_the_training_objective(trainer):
    raw, weighted = trainer.validate()
    assert set(raw) == set(weighted) == {"ssim", "l2", "kl", "mask_bce", "mask_dice"}
    assert {name: weighted[name] / raw[name] for name in raw} == pytest.approx(
        {"ssim": 1, "l2": 100, "kl": 1e-3, "mask_bce": 1, "mask_dice": 1}
    )
    assert trainer.validate()[0] == raw, "validation draws the same noise every time"


@pytest.mark.parametrize(
    "name, terms, mask",
    [("H1", "ssim+l1", False), ("H5", "ssim", False), ("H6", "ssim", True), ("H9", "ssim+l2", True)],
)
def test_hypotheses_that_the_papers_text_fixes(name, terms, mask):
    assert (HYPOTHESES[name].terms, HYPOTHESES[name].mask) == (terms, mask)
    assert len({(h.terms, h.mask) for h in HYPOTHESES.values()}) == 10
