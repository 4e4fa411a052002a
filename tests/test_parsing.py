"""Face parsers: networks against others' implementations, wrong weights, and a command that is killed."""

import csv
import errno
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import facevae_here
from PIL import Image
from test_hostile import PLANTED, plant, refused, refused_command

from facevae.data.labels import FACE_PARTS, LABEL_CLASSES, LABEL_SCHEMES, class_ids, remap_labels
from facevae.data.loader import face_mask
from facevae.data.packing import pack
from facevae.data.sources import FolderSource
from facevae.parsing import bisenet, segformer
from facevae.parsing.bisenet import BiSeNet, fetch_bisenet, load_bisenet
from facevae.parsing.label_folder import parse_folder
from facevae.parsing.label_quality import is_whole, score_labels
from facevae.parsing.parser import FaceParser
from facevae.parsing.segformer import load_segformer
from facevae.synthetic.render import draw_faces


def random_bisenet(seed: int = 0) -> BiSeNet:
    """Random weights, and running statistics as uneven as trained ones."""
    torch.manual_seed(seed)
    network = BiSeNet().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_bisenet().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Drawn faces as files of several sizes, in a folder and a folder inside it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, face in enumerate(draw_faces(range(14), size=144).images.numpy()):
        size = (178, 218) if i % 3 else (90, 110)
        Image.fromarray(face).resize(size).save(
            folder / ("more" if i % 2 else "") / f"{i:02d}.jpg", quality=95
        )
    return folder


def maps(out: Path) -> dict[str, np.ndarray]:
    """The label maps of a directory, by name."""
    return {path.relative_to(out).as_posix(): np.asarray(Image.open(path)) for path in out.rglob("*.png")}


def same(maps: dict[str, np.ndarray], others: dict[str, np.ndarray], share: float = 0) -> bool:
    """Whether two directories hold the same label maps, but for a share of their pixels."""
    return maps.keys() == others.keys() and all(
        maps[name].shape == others[name].shape and (maps[name] != others[name]).mean() <= share
        for name in maps
    )


# Networks


@pytest.fixture(scope="module")
def theirs():
    """The BiSeNet that the package hairtone carries, without the rest of it, which wants OpenCV."""
    spec = importlib.util.find_spec("hairtone")
    if spec is None:
        pytest.skip("hairtone is not installed: pip install --no-deps hairtone==0.1.4")
    package = types.ModuleType("hairtone")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["hairtone"] = package
    yield importlib.import_module("hairtone._vendor.bisenet.model").BiSeNet
    for name in [name for name in sys.modules if name.split(".")[0] == "hairtone"]:
        del sys.modules[name]


@pytest.mark.parametrize("height, width", [(64, 64), (128, 96), (160, 224)])
def test_bisenet_equals_another_implementation(theirs, height, width):
    ours, other = random_bisenet(), theirs(n_classes=19).eval()
    assert set(ours.state_dict()) == set(other.state_dict()) and len(ours.state_dict()) == 191
    other.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, height, width)
    with torch.inference_mode():
        expected, expected16, expected32 = other(images)
        _, context8, context16 = ours.cp(images)
        found = [
            torch.nn.functional.interpolate(logits, (height, width), mode="bilinear", align_corners=True)
            for logits in (ours(images), ours.conv_out16(context8), ours.conv_out32(context16))
        ]
    torch.testing.assert_close(found, [expected, expected16, expected32], rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1 and expected.argmax(1).unique().numel() > 2, (
        "a network that says the same everywhere proves nothing"
    )


def test_bisenet_parser_does_what_the_original_script_does(theirs, weights):
    """Pillow's bilinear squash to 512, ImageNet's normalisation, the largest logit: pixel by pixel."""
    from torchvision.transforms.functional import normalize, to_tensor

    image = Image.fromarray(draw_faces(range(1), size=144).images[0].numpy()).resize(
        (512, 512), Image.Resampling.BILINEAR
    )
    other = theirs(n_classes=19).eval()
    other.load_state_dict(torch.load(weights, weights_only=True))
    with torch.inference_mode():
        expected = (
            other(normalize(to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None])[0]
            .argmax(1)
            .numpy()
        )
    found = load_bisenet(weights, any_weights=True)(np.asarray(image)[None]).numpy()
    assert found.dtype == np.uint8 and found.shape == (1, 512, 512)
    assert (found != remap_labels(expected, "face-parsing")).mean() < 1e-4, (
        "but for logits that are all but equal"
    )


def test_segformer_equals_the_pipeline_of_transformers(tmp_path, monkeypatch):
    """A tiny one with random weights, saved and read without a network; its classes have other numbers."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install facevae[segformer]"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(1)
    names = LABEL_SCHEMES["celebamask-hq"]
    config = transformers.SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=32,
        id2label=dict(enumerate(names)),
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    torch.nn.init.normal_(model.decode_head.classifier.weight, 0, 1)
    model.save_pretrained(tmp_path / "tiny")
    processor = transformers.SegformerImageProcessor(
        size={"height": 128, "width": 128}, do_reduce_labels=False
    )
    processor.save_pretrained(tmp_path / "tiny")
    parser = load_segformer(tmp_path / "tiny", any_weights=True)
    images = np.stack(
        [
            np.asarray(Image.fromarray(face).resize((128, 128)))
            for face in draw_faces(range(2), size=72).images.numpy()
        ]
    )
    with torch.inference_mode():
        logits = model(**processor(list(images), return_tensors="pt")).logits
        expected = torch.nn.functional.interpolate(logits, (128, 128), mode="bilinear").argmax(1).numpy()
    found = parser(images).numpy()
    assert len(np.unique(expected)) > 2
    assert (np.array(LABEL_CLASSES)[found] != np.array(names)[expected]).mean() < 1e-3
    assert parser.size == 128 and parser.revision is None
    assert (
        parser.weights_sha256
        == hashlib.sha256((tmp_path / "tiny" / "model.safetensors").read_bytes()).hexdigest()
    )
    said = refused(load_segformer, tmp_path / "tiny")
    assert parser.weights_sha256 in said and segformer.SEGFORMER_SHA256 in said


def test_glasses_stay_glasses_in_every_scheme():
    """Class 3 is glasses for one parser and an eyebrow for another; class 6 is the other way round."""
    for scheme, names in LABEL_SCHEMES.items():

        def network(images, names=names):
            logits = torch.zeros(len(images), 19, *images.shape[2:])
            logits[:, names.index("skin")], logits[:, names.index("eye_g"), 20:30] = 1, 2
            return logits

        labels = FaceParser("toy", network, names, "", size=64)(np.zeros((1, 64, 64, 3), np.uint8))
        assert (labels[0, 20:30] == LABEL_CLASSES.index("eye_g")).all() and (
            labels[0, :20] == LABEL_CLASSES.index("skin")
        ).all(), scheme
        without = tuple(part for part in FACE_PARTS if part != "eye_g")
        assert (
            face_mask(labels, soft=False).all()
            and not face_mask(labels, parts=without, soft=False)[0, 0, 20:30].any()
        )


# Weights


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", PLANTED)
def test_payload_as_weights(tmp_path, photos, monkeypatch, how):
    """Nothing runs, whether the digest is wrong, right, or not asked for."""
    path, marker = tmp_path / "weights.pth", tmp_path / "executed"
    plant(path, how, marker)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    said = refused(load_bisenet, path)
    assert digest in said and bisenet.BISENET_SHA256 in said
    assert "does not hold weights" in refused(load_bisenet, path, any_weights=True)
    assert digest in refused_command(
        "parse-masks", "--images", photos, "--out", tmp_path / "out", "--weights", path
    )
    monkeypatch.setattr(bisenet, "BISENET_SHA256", digest)
    assert "does not hold weights" in refused(load_bisenet, path)
    (tmp_path / "model").mkdir()
    for name in segformer.SEGFORMER_FILES:
        plant(tmp_path / "model" / name, how, marker)
    refused(load_segformer, tmp_path / "model", any_weights=True)
    (tmp_path / "model" / "config.json").write_text(
        '{"auto_map": {"SegformerForSemanticSegmentation": "evil.Model"}, "model_type": "segformer"}'
    )
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 512}')
    (tmp_path / "model" / "evil.py").write_text(f"__import__('os').mkdir({str(marker)!r})")
    refused(load_segformer, tmp_path / "model", any_weights=True)
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["lost", "more", "shape", "list", "cut"])
def test_checkpoint_that_does_not_fit(tmp_path, weights, change):
    state = torch.load(weights, weights_only=True)
    if change == "lost":
        del state["ffm.conv1.weight"]
    if change == "more":
        state["cp.resnet.fc.weight"] = torch.zeros(2)
    if change == "shape":
        state["conv_out.conv_out.weight"] = torch.zeros(18, 256, 1, 1)
    torch.save(list(state.values()) if change == "list" else state, tmp_path / "other.pth")
    if change == "cut":
        (tmp_path / "other.pth").write_bytes(weights.read_bytes()[:-1000])
    said = refused(load_bisenet, tmp_path / "other.pth", any_weights=True)
    assert {
        "lost": "ffm.conv1.weight",
        "more": "cp.resnet.fc.weight",
        "shape": "conv_out.conv_out.weight",
    }.get(change, "other.pth") in said


def test_weights_are_fetched_once_and_checked(tmp_path, weights, monkeypatch):
    cache = tmp_path / "hub" / "checkpoints" / "parsing_bisenet.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(bisenet, "BISENET_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    monkeypatch.setattr(bisenet, "BISENET_BYTES", weights.stat().st_size)
    page = tmp_path / "page.html"
    page.write_text("<html>Too many people have viewed or downloaded this file recently")
    for wrong in (page.as_uri(), (tmp_path / "nothing").as_uri(), "https://facevae.invalid/weights.pth"):
        monkeypatch.setattr(bisenet, "BISENET_URL", wrong)
        said = refused(fetch_bisenet, progress=False)
        assert wrong in said and bisenet.BISENET_SHA256 in said and "--weights" in said and str(cache) in said
        assert not list(cache.parent.iterdir())
    monkeypatch.setattr(bisenet, "BISENET_URL", weights.as_uri())
    assert fetch_bisenet(progress=False) == cache and cache.read_bytes() == weights.read_bytes()
    cache.write_bytes(bytes(bisenet.BISENET_BYTES))  # damaged: fetched again
    assert fetch_bisenet(progress=False).read_bytes() == weights.read_bytes()
    monkeypatch.setattr(bisenet, "BISENET_URL", "https://facevae.invalid/weights.pth")
    assert load_bisenet().revision == bisenet.BISENET_REVISION


def test_segformer_that_cannot_be_fetched(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        segformer, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    said = refused(load_segformer)
    assert segformer.SEGFORMER_REVISION in said and "model.safetensors" in said and "--weights DIR" in said


# The command


def test_help():
    done = facevae_here("parse-masks", "--help")
    assert (
        done.returncode == 0
        and "Usage: facevae parse-masks" in done.stdout
        and "CelebAMask-HQ" in done.stdout
    )
    assert "parse-masks" in facevae_here("--help").stdout


def command(photos, out, weights, *options, **popen):
    return subprocess.Popen(
        [
            str(Path(sys.executable).parent / "facevae"),
            "parse-masks",
            "--images",
            str(photos),
            "--out",
            str(out),
            "--weights",
            str(weights),
            "--any-weights",
            "--batch-size",
            "2",
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def parse_here(photos: Path, out: Path, weights: Path, *more):
    """facevae parse-masks in this process."""
    given = ["--images", photos, "--out", out, "--weights", weights, "--any-weights"]
    return facevae_here("parse-masks", *given, *more)


@pytest.fixture(scope="module")
def undisturbed(photos, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "labels"
    done = parse_here(photos, out, weights, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    return out


def label_count(out: Path) -> int:
    """How many label maps a directory holds; another process may be removing what it had only begun."""
    return sum(name.endswith(".png") for _, _, names in os.walk(out) for name in names)


def until_labelled(out: Path, count: int, process: subprocess.Popen) -> None:
    """Wait until a directory holds so many label maps."""
    until = time.monotonic() + 60
    while label_count(out) < count:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.005)


def test_interrupted_killed_and_resumed(photos, weights, undisturbed, tmp_path):
    """By Ctrl-C, then by force, and given again: what was done stays, to the time of its writing."""
    out = tmp_path / "labels"
    process = command(photos, out, weights)
    until_labelled(out, 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "goes on where it stopped" in said and "Traceback" not in said
    process = command(photos, out, weights)
    until_labelled(out, min(label_count(out), 10) + 1, process)
    os.kill(process.pid, signal.SIGSTOP)  # it is still there, and holds the directory
    second = parse_here(photos, out, weights)
    assert second.returncode == 1 and "Another process" in second.stderr
    process.kill()
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if is_whole(path)}
    assert 3 <= len(done) < 14 and not json.loads((out / "parsing.json").read_text())["complete"]
    after = parse_here(photos, out, weights, "--batch-size", 2)
    assert after.returncode == 0 and "14 label maps" in after.stdout, after.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in done.items()), (
        "something was parsed twice"
    )
    assert same(maps(out), maps(undisturbed), 1e-3), (
        "but for logits that are all but equal: the size of a batch decides"
    )
    assert len(maps(out)) == 14
    assert (out / "parsing.json").read_text() == (undisturbed / "parsing.json").read_text()
    assert len((out / "quality.csv").read_text().splitlines()) == 15
    assert (out / "doubtful.jpg").stat().st_size and not [
        path for path in out.rglob(".*") if path.name.endswith(".partial")
    ]


class Quick:
    """A parser that tells parts apart by how red they are, in no time."""

    name, scheme, weights_sha256, revision, size = "quick", "face-parsing", "0" * 64, None, 64

    def __call__(self, images):
        time.sleep(0.002)
        return torch.from_numpy((images[..., 0] // 14).astype(np.uint8))


def test_killed_again_and_again(tmp_path):
    """Whatever the moment, no label map is half there or written twice, and each has its row in the end."""
    images, out = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(300):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(images / f"{i:03d}.png")
    written, kills = {}, 0
    for more in (0, 1, 17, 40, 60, 90, 1000):
        process = multiprocessing.get_context("fork").Process(
            target=parse_folder, args=(images, out, Quick(), 4, 2, 0.01, False)
        )
        process.start()
        while process.is_alive() and (
            not out.exists()
            or sum(entry.name.endswith(".png") for entry in os.scandir(out)) < len(written) + more
        ):
            time.sleep(0.002)
        kills += process.is_alive()
        process.kill()
        process.join()
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        assert all(is_whole(out / name) for name in now) and written.items() <= now.items(), "written twice"
        written = now
    assert kills >= 4 and process.exitcode == 0 and len(written) == 300
    with open(out / "quality.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path(row["name"]).stem for row in rows) == sorted(Path(name).stem for name in written)
    doubts = [float(row["doubt"]) for row in rows]
    assert (
        doubts == sorted(doubts, reverse=True) and json.loads((out / "parsing.json").read_text())["complete"]
    )


@pytest.fixture
def labelled(photos, tmp_path):
    parse_folder(photos, tmp_path / "labels", Quick(), progress=False)
    return tmp_path / "labels"


def test_what_only_looks_finished_is_done_again(photos, labelled):
    before, kept = maps(labelled), (labelled / "04.png").stat().st_mtime_ns
    (labelled / "00.png").write_bytes(b"")  # as a power cut leaves it
    whole = (labelled / "02.png").read_bytes()
    (labelled / "02.png").write_bytes(whole[: len(whole) // 2])
    (labelled / "more" / "01.png").unlink()
    parse_folder(photos, labelled, Quick(), progress=False)
    assert same(maps(labelled), before) and (labelled / "04.png").stat().st_mtime_ns == kept


def test_another_parser_or_directory_is_refused(photos, undisturbed, weights, tmp_path):
    torch.save(random_bisenet(seed=5).state_dict(), tmp_path / "others.pth")
    said = refused_command(
        "parse-masks",
        "--images",
        photos,
        "--out",
        undisturbed,
        "--weights",
        tmp_path / "others.pth",
        "--any-weights",
    )
    assert (
        "weights_sha256" in said
        and json.loads((undisturbed / "parsing.json").read_text())["weights_sha256"] in said
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    common = ("--weights", weights, "--any-weights")
    assert "letter.txt" in refused_command(
        "parse-masks", "--images", photos, "--out", tmp_path / "full", *common
    )
    assert "images themselves" in refused_command("parse-masks", "--images", photos, "--out", photos, *common)
    assert "no folder" in refused_command(
        "parse-masks", "--images", tmp_path / "none", "--out", tmp_path / "out", *common
    )
    assert "bisenet" in refused_command(
        "parse-masks", "--images", photos, "--out", tmp_path / "out", "--parser", "bisnet"
    )
    assert "--device" in refused_command(
        "parse-masks", "--images", photos, "--out", tmp_path / "out", "--device", "cuda:77", *common
    )
    (tmp_path / "link").symlink_to(tmp_path / "full" / "letter.txt")
    assert "Choose another" in refused_command(
        "parse-masks", "--images", photos, "--out", tmp_path / "link", *common
    )
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear" and not (tmp_path / "out").exists()


def test_full_disk_says_so_and_the_rest_is_done_later(photos, labelled, tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if str(target).endswith(".png") and len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert "no space left" in refused(
        parse_folder, photos, tmp_path / "later", Quick(), batch_size=2, progress=False
    )
    monkeypatch.undo()
    assert 0 < len(maps(tmp_path / "later")) < 14
    parse_folder(photos, tmp_path / "later", Quick(), progress=False)
    assert same(maps(tmp_path / "later"), maps(labelled))


@pytest.mark.filterwarnings("ignore:The labels")  # which mean nothing
def test_label_maps_are_ready_to_be_packed(photos, labelled, tmp_path):
    scheme = json.loads((labelled / "parsing.json").read_text())["scheme"]
    store = pack(FolderSource(photos, labelled, scheme=scheme, size=36), tmp_path / "store", progress=False)
    assert (
        len(store) == 14
        and not store.manifest.skipped
        and not [note for note in store.manifest.notes if "no image" in note]
    )


# Real weights


@pytest.mark.skipif(
    "FACEVAE_BISENET_WEIGHTS" not in os.environ,
    reason="set FACEVAE_BISENET_WEIGHTS to 79999_iter.pth, or to parsing_bisenet.pth of facexlib",
)
def test_real_weights_on_real_faces(tmp_path):
    """An astronaut; and with FACEVAE_FACES, a folder of images/ and labels/, hand-drawn masks."""
    from skimage.data import astronaut

    parser = load_bisenet(os.environ["FACEVAE_BISENET_WEIGHTS"])
    assert parser.revision == bisenet.BISENET_REVISION
    face = astronaut()[0:218, 135:313]  # (218, 178, 3), framed as in CelebA
    labels = parser(face[None]).numpy()[0]
    found = score_labels(labels)
    assert found["ordered"] and not found["missing"] and found["doubt"] < 0.3, found
    assert 0.2 < found["face"] < 0.8 and np.isin(labels[:5, :5], class_ids()).mean() < 0.5
    if "FACEVAE_FACES" in os.environ:
        overlaps = []
        for path in sorted(Path(os.environ["FACEVAE_FACES"], "images").iterdir())[:32]:
            truth = torch.from_numpy(
                remap_labels(
                    np.asarray(Image.open(path.parent.parent / "labels" / f"{path.stem}.png")),
                    "celebamask-hq",
                )
            )[None]
            mine = parser(np.asarray(Image.open(path).convert("RGB"))[None]).cpu()
            a, b = (face_mask(each, soft=False).bool() for each in (truth, mine))
            overlaps.append(float((a & b).sum() / (a | b).sum()))
        assert np.mean(overlaps) > 0.9, overlaps
