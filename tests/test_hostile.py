"""Files that a stranger made: nothing in them runs, leads out, fills the memory or ends in a traceback.

Planted payloads, claims of petabytes, names that climb, links that lead away, flipped bits in every file.
"""

import gzip
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import facevae_here, let_manifest_agree, peak_growth, rewrite
from madeup import HYPOTHESES, make_sweep, write_run
from PIL import Image
from safetensors.torch import save_file

from facevae.analysis.claims import SweepAnalysis, sweep_claims
from facevae.analysis.figures import study_figures
from facevae.analysis.report import (
    reproduction_commands,
    sweep_facts,
    write_figures,
    write_report,
    write_tables,
)
from facevae.analysis.results import load_sweep, mean_over_images, mean_over_seeds
from facevae.config import make_config, parse_settings
from facevae.core import FaceVAEError, file_digest
from facevae.data.attributes import read_attributes
from facevae.data.images import UnusableInput, read_image, read_labels
from facevae.data.labels import LABEL_CLASSES
from facevae.data.packing import FaceBatch, pack
from facevae.data.sources import FolderSource
from facevae.data.store import FaceStore
from facevae.editing.photos import reconstruct_files
from facevae.metrics.tables import load_distances, load_latents, load_metrics
from facevae.model.keras import keras_names, load_keras
from facevae.model.vae import FaceVAE, ModelConfig
from facevae.sweep.runner import execute_notebook
from facevae.synthetic.render import SyntheticSource
from facevae.training.checkpoint import BEST_FILE, load_best, load_checkpoint, save_best, save_checkpoint
from facevae.training.optimizer import ClippedAdam
from facevae.training.run import RunDirectory
from facevae.training.trainer import train

SMALL = ModelConfig(size=36, width=0.1, latent_dim=8)


class Payload:
    """A pickle that makes a directory when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(path: Path, how: str, marker: Path) -> None:
    """Put a payload where a file should be."""
    path.unlink(missing_ok=True)
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    elif how == "torch":
        torch.save({"weights": Payload(marker)}, path)
    elif how == "objects":
        with open(path, "wb") as file:
            np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    elif how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", pickle.dumps(Payload(marker)))
    elif how == "python":
        path.write_text(f"__import__('os').mkdir({str(marker)!r})")


PLANTED = ("pickle", "torch", "objects", "zip", "python")


def refused(function, *arguments, **options) -> str:
    """The text of the FaceVAEError that a call must end in."""
    with pytest.raises(FaceVAEError) as caught:
        function(*arguments, **options)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 4100
    return said


def refused_command(*arguments) -> str:
    """What a command that must fail says: one paragraph, no traceback, nothing that a terminal would obey."""
    done = facevae_here(*arguments)
    assert done.returncode and "Traceback" not in done.stderr and "facevae: " in done.stderr, done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
    return done.stderr


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One of each thing that is passed on: store, model, checkpoint, sweep, images with labels."""
    folder = tmp_path_factory.mktemp("originals")
    pack(SyntheticSource(count=16, seed=3, size=36), folder / "store", progress=False)
    torch.manual_seed(0)
    vae = FaceVAE(SMALL)
    optimizer = ClippedAdam(vae.parameters())
    for step in (1, 2, 3):
        optimizer.zero_grad()
        vae(torch.rand(2, 3, 36, 36)).recon.mean().backward()
        for parameter in vae.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        if step == 1:
            save_best(folder / "checkpoint", step, vae)
        save_checkpoint(folder / "checkpoint", step, vae, optimizer, {"best_loss": 0.5, "best_step": 1})
    vae.eval().save_pretrained(folder / "model")
    sweep = make_sweep(folder / "sweep", hypotheses=HYPOTHESES[:2], seeds=(0,), failed=None, missing=None)
    for run in sweep.glob("H*/seed0"):
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(
            json.dumps(status | {"metrics_sha256": file_digest(run / "metrics.parquet")})
        )
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    store = FaceStore(folder / "store")
    for row in range(8):
        Image.fromarray(store.images[row]).save(folder / "images" / f"{row}.{'jpg' if row % 2 else 'png'}")
        Image.fromarray(store.labels[row]).save(folder / "labels" / f"{row}.png")
    (folder / "attributes.csv").write_text(
        "name,Smiling,Young\n"
        + "".join(f"{row}.{'jpg' if row % 2 else 'png'},{row % 2},1\n" for row in range(8))
    )
    return folder


@pytest.fixture
def things(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "things")
    return tmp_path / "things"


# Nothing runs


@pytest.mark.parametrize("how", PLANTED)
def test_payload_in_a_store(things, tmp_path, how):
    for name in ("images.npy", "labels.npy", "index.parquet", "manifest.json"):
        whole = (things / "store" / name).read_bytes()
        plant(things / "store" / name, how, tmp_path / "executed")
        assert name in refused_command("verify", things / "store")
        assert name in refused(lambda: FaceStore(things / "store").index)
        (things / "store" / name).write_bytes(whole)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", PLANTED)
def test_payload_in_a_model(things, tmp_path, how):
    photograph, out = things / "images" / "0.png", tmp_path / "out"
    plant(things / "model" / "pytorch_model.bin", how, tmp_path / "executed")
    facevae_here("reconstruct", things / "model", photograph, "--out", tmp_path / "fine")
    assert (tmp_path / "fine" / "0.png").exists()
    for name in ("model.safetensors", "config.json"):
        whole = (things / "model" / name).read_bytes()
        plant(things / "model" / name, how, tmp_path / "executed")
        assert name in refused_command("reconstruct", things / "model", photograph, "--out", out)
        (things / "model" / name).unlink()
        assert f"lacks {name}" in refused_command("reconstruct", things / "model", photograph, "--out", out)
        (things / "model" / name).write_bytes(whole)
    assert not (tmp_path / "executed").exists() and not out.exists()


def test_payload_in_a_model_of_the_hub(things, tmp_path, monkeypatch):
    """huggingface_hub falls back to pytorch_model.bin without a model.safetensors; FaceVAE does not."""
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo, name, **_):
        asked.append(name)
        if name == "model.safetensors":
            raise EntryNotFoundError("404: no such file")
        return str(things / "model" / name)

    plant(things / "model" / "pytorch_model.bin", "pickle", tmp_path / "executed")
    monkeypatch.setattr("facevae.model.pretrained.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    assert "fetched from the hub" in refused(FaceVAE.from_pretrained, "somebody/model")
    assert asked == ["config.json", "model.safetensors"] and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", PLANTED)
def test_payload_in_a_checkpoint(things, tmp_path, how):
    folder = things / "checkpoint"
    vae = FaceVAE(SMALL)
    optimizer = ClippedAdam(vae.parameters())
    plant(folder / "step-00000003.safetensors", how, tmp_path / "executed")
    with pytest.warns(UserWarning, match="step-00000003.safetensors' is passed over"):
        assert load_checkpoint(folder, vae, optimizer)["step"] == 2
    plant(folder / BEST_FILE, how, tmp_path / "executed")
    assert "Start the run again" in refused(load_best, folder, vae)
    with pytest.warns(UserWarning, match=BEST_FILE):
        assert load_checkpoint(folder, vae, optimizer) is None
    assert not (tmp_path / "executed").exists()


def test_payload_in_a_run_that_goes_on(things, tmp_path):
    """Training passes over what was planted, says so, and ends as it would have."""
    config = make_config(
        "H9",
        overrides=parse_settings(
            [
                "size=36",
                "width=0.1",
                "latent_dim=8",
                "steps=4",
                "batch_size=4",
                "checkpoint_every=2",
                "validate_every=2",
                "flip=false",
            ]
        ),
    )
    train(config, things / "store", tmp_path / "undisturbed", progress=False)
    train(config, things / "store", tmp_path / "run", progress=False)
    for number, path in enumerate(sorted((tmp_path / "run" / "checkpoint").iterdir())):
        plant(path, PLANTED[number % 5], tmp_path / "executed")
    with pytest.warns(UserWarning, match="passed over"):
        train(config, things / "store", tmp_path / "run", progress=False)
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "undisturbed")
    ]
    assert weights[0] == weights[1] and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", PLANTED)
def test_payload_in_a_sweep(things, tmp_path, how):
    run = things / "sweep" / "H1" / "seed0"
    beside = ("log.jsonl", "latents.parquet", "distances.parquet")
    for name in ("metrics.parquet", "status.json", "config.json", *beside):
        whole = (run / name).read_bytes()
        plant(run / name, how, tmp_path / "executed")
        sweep = load_sweep(things / "sweep")
        state, error = sweep.runs.set_index("hypothesis").loc["H1", ["state", "error"]]
        assert state == "done" if name in beside else state == "unusable" and name in error
        (run / name).write_bytes(whole)
    plant(run / "metrics.parquet", how, tmp_path / "executed")
    assert "metrics.parquet" in refused(load_metrics, run / "metrics.parquet")
    plant(run / "latents.parquet", how, tmp_path / "executed")
    assert "latents.parquet" in refused(load_latents, run / "latents.parquet")
    plant(run / "distances.parquet", how, tmp_path / "executed")
    assert "distances.parquet" in refused(load_distances, run / "distances.parquet")
    plant(run / "claims.toml", how, tmp_path / "executed")
    assert "claims.toml" in refused(sweep_claims, SimpleNamespace(path=run))
    plant(run / "config.json", how, tmp_path / "executed")
    assert "config.json" in refused(lambda: RunDirectory(run).config)
    plant(things / "sweep" / "sweep.json", how, tmp_path / "executed")
    assert "is not a sweep" in refused(load_sweep, things / "sweep")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", PLANTED)
def test_payload_in_what_is_packed(things, tmp_path, how):
    for name in ("images/1.jpg", "labels/1.png", "attributes.csv"):
        whole = (things / name).read_bytes()
        plant(things / name, how, tmp_path / "executed")
        said = refused_command(
            "pack",
            "folder",
            "--images",
            things / "images",
            "--labels",
            things / "labels",
            "--scheme",
            "face-parsing",
            "--size",
            36,
            "--attributes",
            things / "attributes.csv",
            "--out",
            tmp_path / "packed",
        )
        assert Path(name).name in said
        (things / name).write_bytes(whole)
    plant(tmp_path / "weights.h5", how, tmp_path / "executed")
    assert "weights.h5" in refused_command(
        "import-original", tmp_path / "weights.h5", "--out", tmp_path / "model"
    )
    plant(tmp_path / "photo.jpg", how, tmp_path / "executed")
    assert "photo.jpg" in refused_command(
        "reconstruct", things / "model", tmp_path / "photo.jpg", "--out", tmp_path / "out"
    )
    assert not any((tmp_path / name).exists() for name in ("executed", "packed", "model", "out"))


def test_settings_and_paths_are_no_code(things, tmp_path, monkeypatch):
    """Papermill writes parameters into a cell; a path that would end the string there does not."""
    monkeypatch.chdir(tmp_path)
    sweep = things / 'x"); open("executed", "w") #\'); open("executed", "w")\\\n"""{{1+1}}'
    make_sweep(sweep, hypotheses=HYPOTHESES[:1], seeds=(0,), failed=None, missing=None)
    execute_notebook("figures", tmp_path / "figures.ipynb", {"sweep": str(sweep)})
    assert (sweep / "report.html").exists() and not (tmp_path / "executed").exists()
    for settings in (
        'steps="); open("executed", "w") #',
        "steps=__import__('os').mkdir('executed')",
        "steps={open('executed','w')}",
    ):
        assert "steps" in refused(make_config, "H9", overrides=parse_settings([settings]))
    for hypothesis in (
        'H9"); open("executed", "w") #',
        "H9\n!touch executed",
        "l1+__import__('os')",
        "../../l1",
    ):
        refused_command(
            "train", "--hypothesis", hypothesis, "--data", things / "store", "--out", tmp_path / "run"
        )
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


# Nothing claims more than there is


def sparse(path: Path, header: bytes, size: int) -> None:
    """A file that says it is long and takes no space."""
    path.write_bytes(header)
    os.truncate(path, size)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def claims(folder: Path):
    """Files that claim more than there is: (what, a function that must refuse it)."""
    yield from claims_of_a_model(folder / "model")
    yield from claims_of_a_store(folder)
    yield from claims_of_an_index(folder)
    yield from claims_of_texts(folder)
    yield from claims_of_images(folder)
    yield from claims_of_keras_files(folder, keras_links(folder))
    yield from claims_of_keras_files(folder, keras_shapes())
    yield from claims_of_attributes(folder)


def claims_of_a_model(model: Path):
    def header(text):
        return len(text).to_bytes(8, "little") + text.encode()

    def weights(data: bytes, size: int | None = None):
        def read():
            (model / "model.safetensors").write_bytes(data)
            if size:
                os.truncate(model / "model.safetensors", size)
            assert "model.safetensors" in refused(FaceVAE.from_pretrained, model)

        return read

    yield "safetensors header of petabytes", weights((2**60).to_bytes(8, "little"), 2**40)
    yield "safetensors header of a gigabyte", weights((2**30).to_bytes(8, "little"), 2**31)
    facts = {"dtype": "F32", "shape": [1073741824, 1048576], "data_offsets": [0, 4503599627370496]}
    tensor = json.dumps({"hidden.0.weight": facts})
    yield "safetensors tensor of petabytes", weights(header(tensor), 2**42)
    yield "safetensors header without end", weights(header('{"a":' * 50_000))

    def config(**changes):
        def read():
            (model / "config.json").write_text(json.dumps(changes))
            assert "model" in refused(FaceVAE.from_pretrained, model)

        return read

    yield "a network of gigabytes", config(size=288, width=8, latent_dim=65536)
    yield "a width that is no number", config(size=36, width=float("nan"))
    yield "a width without end", config(size=36, width=1e308)
    yield "a negative latent", config(size=36, latent_dim=-(2**63))


def claims_of_a_store(folder: Path):
    def manifest(**changes):
        def read():
            path = folder / "store" / "manifest.json"
            text = path.read_text()
            rewrite(path, **changes)
            assert "store" in refused(lambda: FaceStore(folder / "store").verify())
            path.write_text(text)

        return read

    counts = (2**62, 10**30, -16, 0, 15, 17, 99_999_999, 16.5, float("nan"), float("inf"), "16", None, [16])
    for count in counts:
        yield f"a store of {count} faces", manifest(count=count)
    for size in (2**40, -36, 0, 72, float("nan")):
        yield f"a store of {size} pixels", manifest(size=size)

    def array(shape):
        def read():
            path = folder / "store" / "images.npy"
            whole = path.read_bytes()
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
            assert "images.npy" in refused(FaceStore, folder / "store")
            path.write_bytes(whole)

        return read

    for shape in ((2**50, 36, 36, 3), (-16, 36, 36, 3), (16, 36, 36, 3), (), (2**62, 2**62)):
        yield f"an array of {shape}", array(shape)

    yield "a store full of holes", lambda: everything_petabytes(folder)


def everything_petabytes(folder: Path):
    """Manifest and arrays that agree on more faces than there are, in files full of holes."""
    store, count = folder / "holes", 99_999_999
    shutil.copytree(folder / "store", store)
    rewrite(store / "manifest.json", count=count)
    for name, shape in (("images.npy", (count, 36, 36, 3)), ("labels.npy", (count, 36, 36))):
        with open(store / name, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            file.truncate(file.tell() + int(np.prod(shape)))
    assert "index.parquet" in refused(lambda: FaceStore(store).index)


def claims_of_an_index(folder: Path):
    def index(table, **options):
        def read():
            path = folder / "store" / "index.parquet"
            whole = path.read_bytes()
            parquet.write_table(pa.table(table), path, **options)
            let_manifest_agree(folder / "store", "index.parquet")
            assert "index.parquet" in refused(lambda: FaceStore(folder / "store").index)
            path.write_bytes(whole)
            let_manifest_agree(folder / "store", "index.parquet")

        return read

    long = pa.DictionaryArray.from_arrays(pa.array([0] * 10**5, pa.int32()), pa.array(["x" * 10**6]))
    yield "a name that unfolds to 100 GB", index({"name": long, "split": ["train"] * 10**5})
    yield (
        "a table of a billion cells",
        index(
            {"name": ["a"] * 10**5, "split": ["train"] * 10**5}
            | {f"a{i}": pa.array(np.zeros(10**5, bool)) for i in range(100)}
        ),
    )
    yield (
        "a thousand columns of the same",
        index({"name": ["a"] * 16, "split": ["train"] * 16} | {"\x1b[2J": [True] * 16}),
    )


def claims_of_texts(folder: Path):
    model = folder / "model"

    def text(path: Path, content: bytes, read):
        def attempt():
            whole = path.read_bytes()
            path.write_bytes(content)
            refused(read)
            path.write_bytes(whole)

        return attempt

    for name, content in (
        ("deep", b'{"a":' * 200_000),
        ("deep list", b"[" * 10**6),
        ("a number of digits", b'{"format": ' + b"9" * 10**5 + b"}"),
        ("no UTF-8", b'{"a": "\xff"}'),
    ):
        for path, read in (
            (folder / "store" / "manifest.json", lambda: FaceStore(folder / "store")),
            (model / "config.json", lambda: FaceVAE.from_pretrained(model)),
            (folder / "sweep" / "sweep.json", lambda: load_sweep(folder / "sweep")),
        ):
            yield f"{path.name} that is {name}", text(path, content, read)


def claims_of_images(folder: Path):
    def image_case(data: bytes, read=read_image, *arguments):
        def attempt():
            (folder / "bomb.png").write_bytes(data)
            with pytest.raises(UnusableInput), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder / "bomb.png", *(arguments or (72,)))

        return attempt

    for width, height in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (10_001, 10_001), (2**31 - 1, 1)):
        yield f"an image of {width} x {height}", image_case(png(width, height))
        yield (
            f"a label map of {width} x {height}",
            image_case(png(width, height), read_labels, "face-parsing", 72),
        )
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    yield "a comment of 200 MB", image_case(png(36, 36, chunk(b"zTXt", b"Comment\0\0" + bomb)))
    yield "a colour profile of 200 MB", image_case(png(36, 36, chunk(b"iCCP", b"icc\0\0" + bomb)))


def claims_of_keras_files(folder: Path, makers):
    def hdf5(make):
        def attempt():
            with h5py.File(folder / "weights.h5", "w") as file:
                make(file)
            assert "weights.h5" in refused(load_keras, folder / "weights.h5")

        return attempt

    for make in makers:
        yield f"weights that are {make.__name__}", hdf5(make)


def keras_links(folder: Path):
    """Functions that fill a file with what lies elsewhere."""
    (folder / "secret.bin").write_bytes(bytes(2**20))
    with h5py.File(folder / "other.h5", "w") as file:
        file["secret"] = np.zeros((3, 3), np.float32)

    def virtual(file):
        layout = h5py.VirtualLayout((3, 3), np.float32)
        layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (3, 3))
        file.create_group("conv2d").create_virtual_dataset("kernel:0", layout)

    def external(file):
        file.create_group("conv2d").create_dataset(
            "kernel:0", (9,), np.float32, external=[(str(folder / "secret.bin"), 0, 36)]
        )

    def linked(file):
        file["conv2d"] = h5py.ExternalLink(str(folder / "other.h5"), "/")

    def soft(file):
        file["conv2d"] = h5py.SoftLink("/conv2d")

    return virtual, external, linked, soft


def keras_shapes():
    """Functions that fill a file with what is too much, or nothing."""

    def huge(file):
        file.create_group("conv2d").create_dataset("kernel:0", (2**40, 2**10), np.float32, chunks=(64, 64))

    def many(file):
        for i in range(300):
            file.create_group(f"layer{i}").create_dataset(
                "kernel:0", (10**5, 100), np.float32, chunks=(64, 64)
            )

    def objects(file):
        file.create_group("conv2d").create_dataset("kernel:0", (3,), h5py.string_dtype())

    def cycle(file):
        group = file.create_group("conv2d")
        group["again"] = group
        group["once more"] = file["/"]

    def deep(file):
        file.create_group("/".join("a" * 500))

    def infinite(file):
        file.create_group("conv2d")["kernel:0"] = np.full((3, 3), np.nan, np.float32)

    def scalar(file):
        file["kernel"] = np.float32(1)

    def nothing(file):
        file.create_group("conv2d")["kernel:0"] = h5py.Empty("f")

    return huge, many, objects, cycle, deep, infinite, scalar, nothing


def claims_of_attributes(folder: Path):
    def attributes(data: bytes, name: str = "a.csv"):
        def attempt():
            (folder / name).write_bytes(data)
            refused(read_attributes, folder / name)

        return attempt

    packed = gzip.compress(b"name,a\n" + b"x,1\n" * 10**6)
    yield "a table packed a thousand times", attributes(packed, "a.csv.gz")
    yield "a table of a million columns", attributes(b"name" + b",a" * 10**6 + b"\n")
    yield "a table that is one line", attributes(b'"' + b"x" * 10**7)
    yield "a table of escape sequences", attributes(b"name,\x1b[2J\nx,1\n")
    yield "a table that is binary", attributes(bytes(range(256)) * 100)
    os.mkfifo(folder / "pipe")
    for read in (read_attributes, FaceVAE.from_pretrained, FaceStore, load_keras, load_metrics):
        yield f"a pipe for {read.__qualname__}", lambda read=read: refused(read, folder / "pipe")


def test_claims_are_refused_before_memory_is_taken(things):
    count, highest = 0, 0
    for what, attempt in claims(things):
        signal.alarm(30)
        growth = peak_growth(attempt)
        signal.alarm(0)
        assert growth < 250e6, f"{what} took {growth / 1e6:.0f} MB"
        count, highest = count + 1, max(highest, growth)
    print(f"{count} claims refused; the most that one took was {highest / 1e6:.0f} MB")


# Names and links stay inside

NAMES = (
    "../../x",
    "/etc/x",
    "a\0b",
    "C:\\x",
    "..",
    ".",
    "",
    "a\nb",
    "\x1b]0;owned\x07",
    "a/../../b",
    "x" * 5000,
    "\u202egpj.exe",
    "a//b",
    "\\\\host\\share",
)


def test_names_of_a_store(things, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    index = pd.read_parquet(things / "store" / "index.parquet")
    for name in NAMES:
        index.assign(name=[name, *index["name"][1:]]).to_parquet(tmp_path / "index.parquet", index=False)
        shutil.copy(tmp_path / "index.parquet", things / "store" / "index.parquet")
        let_manifest_agree(things / "store", "index.parquet")
        assert "index.parquet' is not" in refused(lambda: FaceStore(things / "store").index), name
    assert set(tmp_path.rglob("*")) == {*before, tmp_path / "index.parquet"}


def test_names_that_are_packed(tmp_path):
    class Named:
        size, scheme, notes = 36, "face-parsing", []

        def __len__(self):
            return len(NAMES) + 3

        def describe(self):
            return {"kind": "named", "note": "\x1b[2J"}

        def __iter__(self):
            for name in (*NAMES, "\udcff", "CON", "good.png"):
                yield FaceBatch([name], np.zeros((1, 36, 36, 3), np.uint8), np.zeros((1, 36, 36), np.uint8))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = pack(Named(), tmp_path / "store", max_bad=1, progress=False)
    assert list(store.index["name"]) == ["CON", "good.png"] and len(store.manifest.skipped) == len(NAMES) + 1
    assert all(skipped.name.isprintable() for skipped in store.manifest.skipped)
    assert {path.name for path in tmp_path.rglob("*")} == {
        "store",
        "images.npy",
        "labels.npy",
        "index.parquet",
        "manifest.json",
    }


def test_names_of_hypotheses(things, tmp_path):
    path = things / "sweep" / "sweep.json"
    about = json.loads(path.read_text())
    write_run(tmp_path / "evil" / "seed0", "H1", "ssim+l1", False, 0)
    for name in (*NAMES, "../../evil", str(tmp_path / "evil"), None, 9, ["H1"], {"a": 1}):
        path.write_text(
            json.dumps(about | {"hypotheses": [{"name": name, "terms": "ssim+l1", "mask": False}]})
        )
        assert "is not a sweep" in refused(load_sweep, things / "sweep"), name
        assert "is not a sweep" in refused_command(
            "ablate", "--data", things / "store", "--out", things / "sweep", "--hypotheses", "H1"
        )


def test_names_of_images(things, tmp_path):
    vae = FaceVAE.from_pretrained(things / "model")
    names = ["a\nb", "\x1b[2J\x1b]0;owned\x07", "..x", "x" * 250, "C:\\x", "CON", "\udcff", "$x_{", "<b>"]
    for name in names:
        shutil.copy(things / "images" / "0.png", tmp_path / f"{name}.png")
    written = reconstruct_files(vae, [tmp_path / f"{name}.png" for name in names], tmp_path / "out")
    assert len(written) == len(names) and {path.parent for path in written} == {tmp_path / "out"}
    done = facevae_here(
        "reconstruct",
        things / "model",
        *[tmp_path / f"{name}.png" for name in names if "\udcff" not in name],
        "--no-align",
        "--out",
        tmp_path / "again",
    )
    assert (
        done.returncode == 0
        and all(line.isprintable() for line in done.stdout.splitlines())
        and "\\x1b[2J" in done.stdout
    )
    assert len(list((tmp_path / "again").iterdir())) == len(names) - 1


def test_terminals_are_not_obeyed(things, tmp_path):
    """Whoever names a file after an escape sequence sees it printed, by every command."""
    evil = tmp_path / "\x1b[2J\x1b]0;owned\x07\u202e"
    shutil.copytree(things / "store", evil)
    (evil / "labels.npy").unlink()
    for command in (
        ["verify", evil],
        ["report", evil],
        ["reconstruct", evil, evil, "--no-align", "--out", tmp_path],
        ["import-original", evil, "--out", tmp_path / "x"],
        ["train", "--hypothesis", "H9", "--data", evil, "--out", tmp_path / "run"],
    ):
        assert "\\x1b" in refused_command(*command)


def test_links_lead_nowhere(things, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("years of work")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / "log.jsonl").symlink_to(outside / "precious")
    (run.path / "samples").symlink_to(outside)
    (run.path / "checkpoint").symlink_to(outside)
    (run.path / "status.json").symlink_to(outside / "precious")
    assert "leads out of" in refused(run.log, "train", 1, {}, {})
    assert "leads out of" in refused(run.save_samples, 1, Image.new("RGB", (4, 4)))
    vae = FaceVAE(SMALL)
    assert "leads out of" in refused(
        save_checkpoint, run.checkpoints, 1, vae, ClippedAdam(vae.parameters()), {}
    )
    assert "leads out of" in refused(save_best, run.checkpoints, 1, vae)
    run.update(state="pending")
    assert not (run.path / "status.json").is_symlink()
    (things / "sweep" / "figures").symlink_to(outside)
    sweep = load_sweep(things / "sweep")
    assert "leads out of" in refused(write_figures, sweep, {"bars": SimpleNamespace(figure=None, png=b"")})
    (things / "sweep" / "report.html").symlink_to(outside / "precious")
    write_report(SweepAnalysis(sweep, [], resamples=10), {})
    (things / "sweep" / "tables").symlink_to(outside)
    assert "leads out of" in refused(write_tables, SweepAnalysis(sweep, [], resamples=10))
    assert (outside / "precious").read_text() == "years of work" and len(list(outside.iterdir())) == 1


def test_overwriting_removes_the_link_and_not_what_it_leads_to(things, tmp_path):
    (tmp_path / "link").symlink_to(things / "model")
    load_keras_to = tmp_path / "link"
    assert "already exists" in refused_command(
        "pack", "synthetic", "--count", 4, "--size", 36, "--out", things / "model"
    )
    from facevae.atomic_io import atomic_directory

    with atomic_directory(load_keras_to, overwrite=True) as partial:
        (partial / "new").write_text("")
    assert (things / "model" / "model.safetensors").exists() and (tmp_path / "link" / "new").exists()


# What a report shows


def hostile_sweep(path: Path) -> Path:
    """A sweep with every text that a stranger can choose, at once."""
    bad = "<script>alert(1)<|script>$x_{frac"
    hypotheses = [
        {"name": bad, "terms": "l1", "mask": True},
        {"name": "$undefined{", "terms": "l1", "mask": False},
        {"name": "{{ 7*7 }}", "terms": "ssim+huber", "mask": False},
    ]
    sweep = make_sweep(path, hypotheses=hypotheses, seeds=(0, 1), failed=(bad, 1), missing=None)
    html = "</pre></script><img src=x onerror=alert(2)>{{ config }}"
    about = json.loads((sweep / "sweep.json").read_text())
    commands = {"count": "1; touch executed #", "seed": "$(touch executed)"}
    about |= {
        "data": html + "\x1b[201~; touch executed\r",
        "preset": html,
        "settings": {html: html},
        "facevae_version": html,
        "data_source": {"kind": "synthetic", html: html} | commands,
    }
    (sweep / "sweep.json").write_text(json.dumps(about))
    (sweep / bad / "seed1" / "status.json").write_text(
        json.dumps({"state": "failed", "error": html + "\x1b[2J"})
    )
    run = sweep / bad / "seed0"
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(
        json.dumps(status | {"device": html, "versions": {html: html, "b": [html], "c": "\ud800\x1b[2J"}})
    )
    metrics = pd.read_parquet(run / "metrics.parquet")
    metrics["image"] = [f"{html}$\\x{i % 24}" for i in range(len(metrics))]
    metrics["weird$_{"] = 1.0
    metrics.attrs = {"absent": {"lpips": html, html: html}, "ms_ssim": {html: html}}
    metrics.to_parquet(run / "metrics.parquet", index=False)
    with open(run / "log.jsonl", "a") as log:
        log.write(
            '{"kind": "validation", "step": 9, "loss": 1e300, "raw": {"$x_{": 1e308, "l1": -1e308}, '
            '"weighted": {"l1": 1e999}}\n'
            '{"kind": "validation", "step": 1e400, "loss": 1}\n'
            '{"kind": ["a"], "step": 3, "loss": 1}\n'
            '{"kind": "train", "step": 4, "loss": 1, "images_per_second": "fast"}\n'
            + '{"a":' * 100_000
            + "\n"
        )
    claim = {
        "name": html[:70],
        "question": html,
        "statement": html + "\\input{/etc/passwd}",
        "first": bad,
        "second": "$undefined{",
        "metrics": ["l1"],
        "expect": "better",
    }
    (sweep / "claims.toml").write_text(
        "[[claim]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in claim.items())
    )
    return sweep


def test_a_report_of_a_hostile_sweep(tmp_path):
    study = SweepAnalysis(load_sweep(hostile_sweep(tmp_path / "sweep")), resamples=50)
    page = write_report(study, study_figures(study)).read_text()
    plain = re.sub(r"base64,[^\"]*", "", page)
    assert not {tag for tag in ("<script", "<img src=x", "onerror=alert(2)>") if tag in plain}
    assert "&lt;img src=x onerror" in plain
    assert "{{ config }}" in plain and "{{ 7*7 }}" in plain, "a name is no template"
    assert "\x1b" not in page and "\r" not in page
    for table in write_tables(study):
        text = table.read_text()
        assert "\x1b" not in text
        if table.suffix == ".tex":
            assert "\\input{" not in text, "no command in LaTeX"
        else:
            assert not re.search(r"(?<!\\)<", text), "no tag in Markdown"
    line = reproduction_commands(study.sweep)
    assert "'1; touch executed #'" in line and "'$(touch executed)'" in line
    assert "\x1b" not in line and "\r" not in line


@pytest.mark.parametrize(
    "value", ["x", [1], {"a": 1}, True, float("nan"), float("inf"), -1e300, 10**400, "\x1b[2J", None]
)
def test_every_field_of_a_run(things, value):
    """Whatever stands in a field of status.json or config.json, the sweep is read and its tables are made."""
    run = things / "sweep" / "H1" / "seed0"
    for name in ("status.json", "config.json"):
        whole = json.loads((run / name).read_text())
        for field in (*whole, "seconds_left", "loss", "pid", "notes", "face_parts"):
            text = (
                json.dumps(whole | {field: value})
                if value != 10**400
                else json.dumps(whole | {field: "DIGITS"}).replace('"DIGITS"', "9" * 400)
            )
            (run / name).write_text(text)
            study = load_sweep(things / "sweep")
            cell = study.runs.set_index("hypothesis").loc["H1"]
            assert cell.state in ("done", value, repr(value)[1:-1]) or cell.error, (name, field)
            if name == "status.json" and field == "step" and value is not None:
                assert cell.state == "unusable" and "step is" in cell.error
            summary = mean_over_seeds(mean_over_images(study.metrics))
            assert sweep_facts(study) and len(summary)
            assert RunDirectory(run).status["state"]
            RunDirectory(run).update()
        (run / name).write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"hypotheses": 3},
        {"hypotheses": [3]},
        {"hypotheses": [{}]},
        {"hypotheses": None},
        {"seeds": "0"},
        {"seeds": [None]},
        {"seeds": [0.5]},
        {"seeds": list(range(10**5))},
        {"hypotheses": [{"name": "a", "terms": "+".join(["l1"] * 1000), "mask": True}]},
        {"settings": [1]},
        {"data": {"a": 1}},
        {"preset": None, "seeds": None},
        {"data_source": "x"},
    ],
)
def test_every_field_of_a_sweep(things, change):
    path = things / "sweep" / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "is not a sweep" in refused(load_sweep, things / "sweep")
    assert "is not a sweep" in refused_command(
        "ablate", "--data", things / "store", "--out", things / "sweep", "--hypotheses", "H1"
    )


# Every file, flipped and cut


def spoil(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one thing wrong."""
    how, place = rng.randrange(6), rng.randrange(max(1, len(data)))
    if how < 2:
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if how == 2:
        return data[:place]
    if how == 3:
        return data[:place] + bytes(min(len(data) - place, rng.randrange(1, 64))) + data[place + 64 :]
    if how == 4:
        return data[:place] + rng.randbytes(rng.randrange(1, 32)) + data[place:]
    return data[:place] + b"\xff" * 8 + data[place + 8 :]


def state_digest(tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def content_of_store(path: Path):
    store = FaceStore(path).verify()
    repr(store)
    return store.fingerprint, store.index.to_csv()


def content_of_model(path: Path):
    vae = FaceVAE.from_pretrained(path)
    return vae.config, state_digest(vae.state_dict())


def content_of_checkpoint(path: Path):
    """What is restored; None stands for a training that starts from the beginning."""
    torch.manual_seed(0)
    vae = FaceVAE(SMALL)
    optimizer = ClippedAdam(vae.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = load_checkpoint(path, vae, optimizer)
    if numbers is None:
        return None
    load_best(path, FaceVAE(SMALL))
    return tuple(numbers.items()), state_digest(vae.state_dict()), len(optimizer.state_dict()["state"])


def content_of_sweep(path: Path):
    """The metrics of each run that is done; tables and facts are made, because they must never fail."""
    study = load_sweep(path)
    if not study.metrics.empty:
        mean_over_seeds(mean_over_images(study.metrics))
    if len(study.runs):
        sweep_facts(study), reproduction_commands(study)
    return {
        name: table.drop(columns=["terms", "mask", "seed"]).to_csv(index=False)
        for name, table in study.metrics.groupby("hypothesis")
    }


def content_of_images(path: Path):
    """Images have no digest; what is read may differ, and nothing but UnusableInput may be raised."""
    source = FolderSource(
        path / "images", path / "labels", "face-parsing", 36, path / "attributes.csv", workers=1
    )
    return len([source.read(name) for name in source.names])


def fuzz(things: Path, rounds: int, seed: int) -> dict[str, list[int]]:
    """Spoil each file of each thing `rounds` times; returns by thing: files, cases, refused."""
    kinds = {
        "store": content_of_store,
        "model": content_of_model,
        "checkpoint": content_of_checkpoint,
        "sweep": content_of_sweep,
        "images": content_of_images,
    }
    counts = {}
    for kind, content in kinds.items():
        folder = things if kind == "images" else things / kind
        whole = content(folder)
        good = {"store": [whole], "model": [whole], "images": [whole]}.get(kind)
        if kind == "checkpoint":
            newest = folder / "step-00000003.safetensors"
            data = newest.read_bytes()
            newest.unlink()
            good = [whole, content(folder), None]
            newest.write_bytes(data)
        files = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and path.suffix not in (".md", ".ipynb")
            and (
                kind != "images" or path.parent.name in ("images", "labels") or path.name == "attributes.csv"
            )
        ]
        counts[kind] = [len(files), 0, 0]
        for number, path in enumerate(files):
            data = path.read_bytes()
            for case in range(rounds):
                rng = random.Random(f"{seed} {kind} {number} {case}")
                spoiled = spoil(data, rng)
                path.write_bytes(spoiled)
                if spoiled == data:
                    continue
                counts[kind][1] += 1
                signal.alarm(30)
                try:
                    found = content(folder)
                except FaceVAEError:
                    counts[kind][2] += 1
                except BaseException as error:
                    raise AssertionError(
                        f"{kind}, {path.relative_to(folder)}, round {case}: {type(error).__name__}: {error}"
                    ) from error
                else:
                    if kind == "sweep":
                        same = all(whole.get(name) == table for name, table in found.items())
                    else:
                        same = any(found == one for one in good)
                    assert same, f"{kind}, {path.relative_to(folder)}, round {case}: read as something else"
                finally:
                    signal.alarm(0)
            path.write_bytes(data)
    return counts


@pytest.fixture(autouse=True)
def no_hanging():
    def hanging(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hanging)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_spoiled_files(things):
    """Success with equal data, or a FaceVAEError, and nothing else."""
    counts = fuzz(things, rounds=8, seed=0)
    print({kind: dict(zip(("files", "cases", "refused"), count)) for kind, count in counts.items()})
    assert sum(cases for _, cases, _ in counts.values()) > 250


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_spoiled_files(things, seed):
    counts = fuzz(things, rounds=150, seed=seed)
    print({kind: dict(zip(("files", "cases", "refused"), count)) for kind, count in counts.items()})


def keras_file(path: Path) -> None:
    """The weights of a new network as Keras lays them out."""
    vae = FaceVAE(ModelConfig())
    modules = dict(vae.named_modules())
    with h5py.File(path, "w") as file:
        for name, keras in keras_names(vae).items():
            for own, theirs in (
                ("weight", "kernel"),
                ("bias", "bias"),
                ("running_mean", "moving_mean"),
                ("running_var", "moving_variance"),
            ):
                tensor = getattr(modules[name], own, None)
                if tensor is None:
                    continue
                normal = isinstance(modules[name], torch.nn.BatchNorm2d)
                theirs = {"kernel": "gamma", "bias": "beta"}.get(theirs, theirs) if normal else theirs
                array = tensor.detach().numpy()
                if array.ndim > 1:
                    array = array.transpose((1, 0) if array.ndim == 2 else (2, 3, 1, 0))
                file.create_group(f"{keras}/{keras}/{theirs}").parent.__delitem__(theirs)
                file[f"{keras}/{keras}/{theirs}:0"] = array


def test_spoiled_keras_file(tmp_path):
    """Its numbers have no digest, so a flipped one is a number; everything else is refused."""
    path = tmp_path / "weights.h5"
    keras_file(path)
    data = path.read_bytes()
    whole = load_keras(path)
    assert whole.config.mask_decoder
    structure = [
        place
        for place in range(0, len(data), 64)
        if any(
            word in data[place : place + 64]
            for word in (b"TREE", b"SNOD", b"HEAP", b"kernel", b"conv2d", b"HDF")
        )
    ]
    for case in range(25):
        rng = random.Random(case)
        place = rng.choice(structure) + rng.randrange(64) if case % 3 else rng.randrange(len(data))
        path.write_bytes(
            data[:place]
            if case % 8 == 7
            else data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        )
        signal.alarm(30)
        try:
            load_keras(path)
        except FaceVAEError as error:
            assert "weights.h5" in str(error)
        signal.alarm(0)


def test_label_values_and_foreign_weights(things):
    """Digests that fit do not make values right: labels that are no class, weights of another program."""
    labels = things / "store" / "labels.npy"
    data = bytearray(labels.read_bytes())
    data[200] = 255
    labels.write_bytes(data)
    let_manifest_agree(things / "store", "labels.npy")
    assert f"label 255, but classes end at {len(LABEL_CLASSES) - 1}" in refused(
        lambda: FaceStore(things / "store").verify()
    )
    FaceStore(things / "store").image_grid(range(4), labels=True)
    state = FaceVAE.from_pretrained(things / "model").state_dict()
    save_file(state, things / "model" / "model.safetensors")
    assert FaceVAE.from_pretrained(things / "model").config == SMALL
    save_file(state | {"extra": torch.zeros(1)}, things / "model" / "model.safetensors")
    assert "'extra' is not expected" in refused(FaceVAE.from_pretrained, things / "model")
