"""The authors' weight files and numbers.

Parity with an independent implementation is tested always, with their own code's numbers where these are.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import facevae_here
from keras_numpy import Network, random_weights, save_keras

from facevae.core import FaceVAEError
from facevae.model.keras import load_keras, loss_parity, output_parity
from facevae.model.vae import FaceVAE

REFERENCE = Path(
    os.environ.get(
        "FACEVAE_KERAS_REFERENCE",
        Path(__file__).resolve().parent.parent.parent / "shared" / "keras_reference",
    )
)
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="FACEVAE_KERAS_REFERENCE names no folder")


@pytest.fixture(scope="module", params=[True, False], ids=["with mask", "without mask"])
def fixture(request, tmp_path_factory):
    """A weight file as Keras writes it, and what the network gives for two images."""
    folder = tmp_path_factory.mktemp("keras")
    weights = random_weights(request.param)
    save_keras(folder / "weights.h5", weights)
    images = np.random.default_rng(1).random((2, 144, 144, 3), dtype=np.float32)
    np.savez(folder / "reference.npz", **Network(weights)(images))
    return folder


def test_parity_with_an_independent_implementation(fixture):
    differences = output_parity(fixture / "weights.h5", fixture / "reference.npz")
    assert max(differences.values()) < 1e-4, differences


@needs_reference
@pytest.mark.parametrize("name", ["with_mask", "without_mask"])
def test_parity_with_the_authors_code(name):
    differences = output_parity(REFERENCE / f"{name}.predict.h5", REFERENCE / f"{name}.npz")
    assert max(differences.values()) < 1e-4, differences


@needs_reference
def test_losses_equal_the_authors():
    differences = loss_parity(REFERENCE / "losses.npz")
    assert max(differences.values()) < 1e-5, differences


def test_a_training_file_with_its_optimiser_is_read(fixture, tmp_path):
    import shutil

    import h5py

    path = tmp_path / "training.h5"
    shutil.copy(fixture / "weights.h5", path)
    with h5py.File(path, "a") as file:
        file["optimizer_weights/Adam/conv2d/kernel/m:0"] = np.zeros((3, 3, 3, 32), "f4")
    assert max(output_parity(path, fixture / "reference.npz").values()) < 1e-4


def test_files_that_are_not_the_papers(fixture, tmp_path):
    def message(path):
        with pytest.raises(FaceVAEError) as caught:
            load_keras(path)
        return str(caught.value)

    path, data = tmp_path / "weights.h5", (fixture / "weights.h5").read_bytes()
    assert "no file" in message(path)
    path.write_bytes(b"<html>quota exceeded</html>")
    assert "not a Keras weight file" in message(path)
    path.write_bytes(data[: len(data) // 2])
    assert "cut short" in message(path)
    weights = random_weights(masked=True)
    save_keras(path, {key: value for key, value in weights.items() if not key.startswith("conv2d_7/")})
    assert "lacks the weight 'conv2d_7/kernel'" in message(path)
    save_keras(path, weights | {"conv2d_7/kernel": weights["conv2d_7/kernel"][..., :100]})
    assert "has shape" in message(path)
    save_keras(path, weights | {"conv2d_99/kernel": weights["conv2d/kernel"]})
    assert "conv2d_99" in message(path)


def test_import_and_reconstruct_from_the_command_line(fixture, tmp_path):
    from PIL import Image

    done = facevae_here("import-original", fixture / "weights.h5", "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    vae = FaceVAE.from_pretrained(tmp_path / "model")
    assert vae.config.size == 144 and vae.config.sampling == "original"
    Image.fromarray((np.random.default_rng(0).random((218, 178, 3)) * 255).astype("u1")).save(
        tmp_path / "photo.jpg"
    )
    done = facevae_here(
        "reconstruct", tmp_path / "model", tmp_path / "photo.jpg", "--no-align", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "photo.png") as image:
        assert image.height == 218 and image.width >= 2 * 178
    assert (
        facevae_here("import-original", tmp_path / "photo.jpg", "--out", tmp_path / "other").returncode == 1
    )
    assert not (tmp_path / "other").exists()
