"""The command as a newcomer meets it: help, mistypes, bad input.

One paragraph, an exit code that is not 0, no traceback, nothing left behind.
"""

import json
import re

import numpy as np
import pytest
from conftest import TINY, facevae, facevae_here
from PIL import Image


def refused(*arguments):
    """Run a command that must fail; returns its message with line breaks folded."""
    done = facevae_here(*arguments)
    assert done.returncode, done.stdout
    return re.sub(r"\s+", " ", done.stderr)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["pack"],
        ["pack", "synthetic"],
        ["pack", "folder"],
        ["pack", "celeba"],
        ["pack", "celebamask-hq"],
        ["verify"],
        ["train"],
        ["ablate"],
        ["status"],
        ["report"],
    ],
)
def test_help(command):
    done = facevae_here(*command, "--help")
    assert done.returncode == 0 and "Usage: facevae" in done.stdout and len(done.stdout.splitlines()) > 5


def test_mistyped_commands_and_options_suggest():
    assert "train" in refused("trian")
    assert "--data" in refused("train", "--dta", "x")
    assert "--out" in refused("train", "--hypothesis", "H9", "--data", "x")


def test_errors_show_a_traceback_only_when_asked(tmp_path):
    done = facevae("verify", tmp_path / "nothing", check=False)
    assert done.returncode == 1 and done.stderr.startswith("facevae: ") and "Traceback" not in done.stderr
    done = facevae("--debug", "verify", tmp_path / "nothing", check=False)
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--hypothesis", "H11"], "Unknown hypothesis 'H11'"),
        (["--hypothesis", "ssim+huber"], "'huber'"),
        (["--hypothesis", "H9", "--preset", "fast"], "Choose from: paper, quick, modern"),
        (["--hypothesis", "H9", "--set", "stepps=10"], "Did you mean 'steps'?"),
        (["--hypothesis", "H9", "--set", "steps=many"], "'steps' cannot be 'many'"),
        (["--hypothesis", "H9", "--set", "steps=2.5"], "'steps' cannot be 2.5"),
        (["--hypothesis", "H9", "--set", "size=100"], "'size' cannot be 100"),
        (["--hypothesis", "H9", "--set", "mask=false"], "'mask' cannot be overridden"),
        (["--hypothesis", "H9", "--set", "steps"], "key=value"),
        (["--hypothesis", "H9", "--set", "size=72"], "holds 36 px"),
        (["--hypothesis", "H9", "--seed", "-1"], "'seed' cannot be -1"),
    ],
)
def test_settings_are_checked_before_anything_starts(store, tmp_path, options, expected):
    assert expected in refused("train", "--data", store, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--hypotheses", "H5,H99"], "'H99'"),
        (["--seeds", "0,x"], "'0,x' is not a list of seeds"),
        (["--workers", "0"], "--workers"),
        (["--set", "size=72"], "holds 36 px"),
    ],
)
def test_a_sweep_is_checked_before_anything_starts(store, tmp_path, options, expected):
    assert expected in refused("ablate", "--data", store, "--out", tmp_path / "sweep", *TINY, *options)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["verify"],
        ["train", "--hypothesis", "H9", "--out", "OUT", "--data"],
        ["ablate", "--out", "OUT", "--data"],
    ],
)
def test_missing_and_half_written_stores(store, tmp_path, command):
    command = [str(tmp_path / "run") if part == "OUT" else part for part in command]
    assert "nowhere" in refused(*command, tmp_path / "nowhere")
    half = tmp_path / "half"
    half.mkdir()
    (half / "images.npy").write_bytes((store / "images.npy").read_bytes()[:1000])
    assert "half" in refused(*command, half)
    assert not (tmp_path / "run").exists()


def test_report_of_something_else(tmp_path, store):
    assert "is not a sweep" in refused("report", store)


def folder(tmp_path, count=200, size=40):
    """Images and label maps in a scheme where every class appears."""
    generator = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    labels = np.repeat(np.arange(40)[:, None] % 19, 40, 1).astype(np.uint8)
    for index in range(count):
        Image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{index:03d}.jpg"
        )
        Image.fromarray(labels).save(tmp_path / "labels" / f"{index:03d}.png")
    return [
        "--images",
        tmp_path / "images",
        "--labels",
        tmp_path / "labels",
        "--scheme",
        "celebamask-hq",
        "--size",
        36,
        "--out",
        tmp_path / "store",
    ]


def test_a_bad_image_is_skipped_by_name(tmp_path):
    arguments = folder(tmp_path)
    (tmp_path / "images" / "007.jpg").write_bytes(b"")
    done = facevae_here("pack", "folder", *arguments)
    assert "007.jpg" in done.stdout + done.stderr and "199 faces" in done.stdout
    assert [
        skip["name"] for skip in json.loads((tmp_path / "store" / "manifest.json").read_text())["skipped"]
    ] == ["007.jpg"]
    assert facevae_here("verify", tmp_path / "store").returncode == 0


def test_too_many_bad_images_fail_unless_allowed(tmp_path):
    arguments = folder(tmp_path, count=20)
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "labels" / "003.png")
    message = refused("pack", "folder", *arguments)
    assert "003.jpg" in message and "--max-bad" in message and "20 x 20" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "labels"], (
        "something half-written is left behind"
    )
    assert "19 faces" in facevae_here("pack", "folder", *arguments, "--max-bad", 0.1).stdout


def test_unusual_but_good_images_are_taken(tmp_path):
    arguments = folder(tmp_path, count=20)
    image = Image.open(tmp_path / "images" / "000.jpg")
    image.convert("L").save(tmp_path / "images" / "000.jpg")
    image.convert("CMYK").save(tmp_path / "images" / "001.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "images" / "002.jpg", exif=turned)
    assert "20 faces" in facevae_here("pack", "folder", *arguments).stdout


def test_packing_checks_its_arguments(tmp_path):
    arguments = folder(tmp_path, count=20)
    assert "Unknown label scheme" in refused("pack", "folder", *arguments, "--scheme", "celeba-hq")
    assert "size" in refused("pack", "folder", *arguments, "--size", 100)
    assert "size" in refused("pack", "synthetic", "--count", 3, "--size", 50, "--out", tmp_path / "s")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("mine")
    assert "already exists" in refused("pack", "folder", *arguments)
    assert (tmp_path / "store" / "mine.txt").exists()
