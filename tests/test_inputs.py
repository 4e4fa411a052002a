"""Files of every encoding: pictures, tables and archives are read right, or refused by name, in few bytes.

Each test writes one thing in many ways, and asks for the same result of all of them.
"""

import io
import json
import re
import shutil
import struct
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import drawn_celeba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import facevae_here, let_manifest_agree, peak_growth
from drawn_celeba import Faces
from PIL import Image

from facevae.analysis.claims import sweep_claims
from facevae.analysis.results import read_log, read_run
from facevae.core import FaceVAEError
from facevae.data.attributes import read_attributes
from facevae.data.celeba import CelebAMaskHQSource, CelebASource
from facevae.data.decoding import MAX_DECODING_BYTES, MemoryBudget, UnusableInput
from facevae.data.images import (
    IMAGE_SUFFIXES,
    open_images,
    read_image,
    read_labels,
    read_whole_image,
)
from facevae.data.labels import LABEL_CLASSES
from facevae.data.packing import pack
from facevae.data.sources import FolderSource
from facevae.data.store import FaceStore
from facevae.editing.photos import find_photos, prepare_photo
from facevae.metrics.tables import load_metrics
from facevae.model.keras import read_reference_arrays
from facevae.model.tensors import read_tensors
from facevae.parsing.label_quality import label_name
from facevae.safe_io import read_object

SIZE = 36
SKIN = LABEL_CLASSES.index("skin")


@pytest.fixture(scope="module")
def faces():
    return Faces(2)


@pytest.fixture(scope="module")
def face(faces):
    return Image.fromarray(faces.images[0])


# Writing pictures as no library writes them


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(
    size, depth: int, colour: int, data: bytes, more: bytes = b"", interlaced: bool = False
) -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def packed_rows(array: np.ndarray, depth: int) -> list[bytes]:
    """The rows of an array, (H, W), in so many bits a number, the highest first."""
    bits = np.unpackbits(array.astype(">u2").view(np.uint8).reshape(*array.shape, 2), axis=2)
    return [row.tobytes() for row in np.packbits(bits[:, :, 16 - depth :].reshape(len(array), -1), axis=1)]


def png(array: np.ndarray, depth: int, palette: np.ndarray | None = None, more: bytes = b"") -> bytes:
    """A grey PNG of so many bits, or one with a palette, (N, 3)."""
    if palette is not None:
        more = chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + more
    data = b"".join(b"\0" + row for row in packed_rows(array, depth))
    return png_file(array.shape[::-1], depth, 0 if palette is None else 3, zlib.compress(data), more)


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def interlaced_png(array: np.ndarray, depth: int) -> bytes:
    passes = [array[top::down, left::right] for left, top, right, down in ADAM7]
    data = b"".join(b"\0" + row for part in passes if part.size for row in packed_rows(part, depth))
    return png_file(array.shape[::-1], depth, 0, zlib.compress(data), interlaced=True)


def tiff(array: np.ndarray, depth: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF. photometric: 0 when 0 is white; sample_format: 1 unsigned, 2 signed, 3 float."""
    if depth in (1, 2, 4, 12):
        data = b"".join(packed_rows(array, depth))
    else:
        data = array.astype({1: f"<u{depth // 8}", 2: f"<i{depth // 8}", 3: "<f4"}[sample_format]).tobytes()
    height, width = array.shape
    tags = {256: width, 257: height, 258: depth, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data += b"\0" * (len(data) % 2)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Label maps keep their class indices


def colourful(array: np.ndarray) -> Image.Image:
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette([value for i in range(256) for value in (37 * i % 256, 255 - i, 11 * i % 256)])
    return image


def label_files(labels: np.ndarray) -> dict[str, tuple[bytes, int]]:
    """Label maps in every encoding that keeps class indices: (file, how many classes it holds) by name."""
    few = {depth: labels % 2**depth for depth in (1, 2, 4)}
    palette = np.arange(48).reshape(16, 3) * 5
    files = {f"grey{depth}.png": (png(array, depth), 2**depth) for depth, array in few.items()}
    files |= {f"palette{depth}.png": (png(array, depth, palette), 2**depth) for depth, array in few.items()}
    files |= {f"woven{depth}.png": (interlaced_png(array, depth), 2**depth) for depth, array in few.items()}
    files |= {f"grey{depth}.tif": (tiff(array, depth), 2**depth) for depth, array in few.items()}
    clear = chunk(b"tRNS", b"\0\xff")
    used = np.unique(labels)
    greys = np.repeat(used[:, None], 3, 1)
    whole = {
        "grey8.png": png(labels, 8),
        "grey16.png": png(labels, 16),
        "woven16.png": interlaced_png(labels, 16),
        "palette8.png": saved(colourful(labels), "PNG"),
        "clear.png": png(labels, 8, np.arange(57).reshape(19, 3) * 4, clear),
        "optimised.png": png(np.searchsorted(used, labels), 8, greys),
        "grey8.tif": saved(Image.fromarray(labels), "TIFF", compression="tiff_lzw"),
        "grey16.tiff": tiff(labels, 16),
        "grey32.tiff": tiff(labels, 32),
        "palette8.tif": saved(colourful(labels), "TIFF"),
        "grey8.bmp": saved(Image.fromarray(labels), "BMP"),
        "palette8.bmp": saved(colourful(labels), "BMP"),
        "grey8.gif": saved(Image.fromarray(labels), "GIF"),
        "palette8.gif": saved(colourful(labels), "GIF", optimize=False),
        "SHOUTED.PNG": png(labels, 8),
    }
    return files | {name: (data, 19) for name, data in whole.items()}


def other_files(labels: np.ndarray) -> dict[str, tuple[bytes, str]]:
    """Label maps that cannot be used: (file, what is said) by name."""
    grey = Image.fromarray(labels)
    return {
        "lossy.jpg": (saved(grey, "JPEG"), "is JPEG, which may change the values"),
        "lossy.webp": (saved(grey.convert("RGB"), "WEBP"), "is WEBP, which may change the values"),
        "inside.tif": (saved(grey, "TIFF", compression="jpeg"), "is TIFF, which may change the values"),
        "colour.png": (saved(grey.convert("RGB"), "PNG"), "is a colour image"),
        "alpha.png": (saved(grey.convert("LA"), "PNG"), "is a colour image"),
        "rgba.png": (saved(colourful(labels).convert("RGBA"), "PNG"), "is a colour image"),
        "float.tif": (tiff(labels, 32, 1, 3), "is a colour image"),
        "negative1.tif": (tiff(labels % 2, 1, 0), "is a negative"),
        "negative4.tif": (tiff(labels % 16, 4, 0), "is a negative"),
        "negative8.tif": (tiff(labels, 8, 0), "is a negative"),
        "film.gif": (saved(grey, "GIF", save_all=True, append_images=[grey.rotate(90)]), "several pictures"),
        "pages.tif": (saved(grey, "TIFF", save_all=True, append_images=[grey]), "several pictures"),
        "mask.png": (png((labels > 0) * 255, 8), "values outside the scheme"),
    }


def test_label_maps_keep_their_class_indices(faces, tmp_path):
    """One label map in every encoding that keeps it, and in others: packed right, or skipped by name."""
    labels = faces.labels[0]
    good, bad = label_files(labels), other_files(labels)
    for place in ("images", "labels"):
        (tmp_path / place).mkdir()
    for file, (data, _) in (good | bad).items():
        (tmp_path / "labels" / f"{file.replace('.', '-')}{Path(file).suffix}").write_bytes(data)
        Image.fromarray(faces.images[0]).save(tmp_path / "images" / f"{file.replace('.', '-')}.jpg")
    arguments = ["--images", tmp_path / "images", "--labels", tmp_path / "labels", "--size", SIZE]
    options = ["--scheme", "face-parsing", "--max-bad", 1, "--out", tmp_path / "store"]
    done = facevae_here("pack", "folder", *arguments, *options)
    assert done.returncode == 0, done.stderr
    store = FaceStore(tmp_path / "store")
    rows, columns = (((np.arange(SIZE) + 0.5) * length / SIZE).astype(int) for length in labels.shape)
    packed = dict(zip(store.index["name"], store.labels))
    for file, (_, classes) in good.items():
        found = packed.pop(f"{file.replace('.', '-')}.jpg")
        assert (found == labels[rows[:, None], columns] % classes).all(), file
    assert not packed
    skipped = {one.name: one.reason for one in store.manifest.skipped}
    for file, (_, expected) in bad.items():
        assert expected in skipped.pop(f"{file.replace('.', '-')}.jpg"), file
    assert not skipped


# Parts keep their shape


def part_files(shape: np.ndarray) -> dict[str, bytes]:
    """The picture of a part in every encoding. shape: bool (H, W)."""
    white, some = Image.fromarray(shape * np.uint8(255)), shape * np.uint8(1)
    black, full = Image.new("L", white.size), Image.new("L", white.size, 255)
    two = np.array([[0, 0, 0], [255, 255, 255]])
    return {
        "255": saved(white, "PNG"),
        "colour": saved(white.convert("RGB"), "PNG"),
        "0 and 1": saved(Image.fromarray(some), "PNG"),
        "1 bit": png(some, 1),
        "2 bits": png(some * 3, 2),
        "2 bits, 0 and 1": png(some, 2),
        "4 bits, 0 and 1": png(some, 4),
        "16 bits": png(shape * 65535, 16),
        "16 bits, 0 and 1": png(some, 16),
        "palette": png(some, 1, two),
        "palette, white first": png(1 - some, 1, two[::-1]),
        "palette, nearly black": png(some, 2, two // 255),
        "palette, clear": png(some, 1, two, chunk(b"tRNS", b"\0\xff")),
        "opaque": saved(Image.merge("LA", (white, full)), "PNG"),
        "white on nothing": saved(Image.merge("LA", (white, white)), "PNG"),
        "nothing but alpha, white": saved(Image.merge("LA", (full, white)), "PNG"),
        "nothing but alpha, black": saved(Image.merge("RGBA", (black, black, black, white)), "PNG"),
        "bmp": saved(white, "BMP"),
        "tif": saved(white.convert("1"), "TIFF", compression="group4"),
        "tif, negative": tiff(1 - some, 1, 0),
        "gif": saved(white, "GIF"),
    }


def test_parts_keep_their_shape(faces, tmp_path):
    """CelebAMask-HQ with its parts in every encoding gives the store that it gives as it was published."""
    root = drawn_celeba.celebamask_hq(faces, tmp_path / "hq", range(3))
    parts = root / "CelebAMask-HQ" / "CelebAMask-HQ-mask-anno" / "0"
    plain = pack(CelebAMaskHQSource(root, SIZE, allow_subset=True), tmp_path / "plain", progress=False)
    for path in sorted(parts.glob("0000[12]_*.png")):
        path.with_suffix(".PNG").write_bytes(path.read_bytes())
        path.unlink()
    shape = np.asarray(Image.open(parts / "00000_skin.png"))[..., 0] > 0
    for kind, data in part_files(shape).items():
        (parts / "00000_skin.png").write_bytes(data)
        store = pack(
            CelebAMaskHQSource(root, SIZE, allow_subset=True),
            tmp_path / "other",
            overwrite=True,
            progress=False,
        )
        assert store.fingerprint == plain.fingerprint, kind
    (parts / "00000_skin.png").unlink()
    (parts / "00000_skin.jpg").write_bytes(saved(Image.fromarray(shape * np.uint8(255)), "JPEG"))
    store = pack(
        CelebAMaskHQSource(root, SIZE, allow_subset=True),
        *(tmp_path / "other", 0.5, True, False),
    )
    assert [one.name for one in store.manifest.skipped] == ["0.jpg"]
    assert "is JPEG" in store.manifest.skipped[0].reason


# Photos keep their brightness


def photo_files(face: Image.Image) -> dict[str, tuple[bytes, float]]:
    """A photo in grey in every encoding: (file, mean difference that its encoding may make) by name."""
    grey = face.convert("L")
    array = np.asarray(grey)
    full = Image.new("L", grey.size, 255)
    return {
        "grey.png": (saved(grey, "PNG"), 0.5),
        "4 bits.png": (png(array >> 4, 4), 6),
        "2 bits.png": (png(array >> 6, 2), 25),
        "palette.png": (saved(grey.quantize(64), "PNG"), 3),
        "clear palette.png": (
            png(array, 8, np.repeat(np.arange(256)[:, None], 3, 1), chunk(b"tRNS", b"\xff")),
            1,
        ),
        "16 bits.png": (png(array.astype(int) * 257, 16), 1),
        "16 bits, woven.png": (interlaced_png(array.astype(int) * 257, 16), 1),
        "alpha.png": (saved(Image.merge("LA", (grey, full)), "PNG"), 0.5),
        "rgba.webp": (saved(grey.convert("RGBA"), "WEBP", lossless=True), 0.5),
        "rgba.tif": (saved(grey.convert("RGBA"), "TIFF", compression="tiff_deflate"), 0.5),
        "12 bits.tif": (tiff(array.astype(int) * 4095 // 255, 12), 1),
        "16 bits.tif": (tiff(array.astype(int) * 257, 16), 1),
        "16 bits, negative.tif": (tiff(65535 - array.astype(int) * 257, 16, 0), 1),
        "8 bits, negative.tif": (tiff(255 - array, 8, 0), 0.5),
        "float.tif": (tiff(array / 255, 32, 1, 3), 1),
        "cmyk.jpg": (saved(grey.convert("RGB").convert("CMYK"), "JPEG", quality=95), 5),
        "cmyk.tif": (saved(grey.convert("RGB").convert("CMYK"), "TIFF"), 3),
        "progressive.jpg": (saved(grey, "JPEG", quality=95, progressive=True), 3),
        "film.gif": (saved(grey, "GIF"), 1),
        "plain.bmp": (saved(grey, "BMP"), 0.5),
        "plain.ppm": (saved(grey, "PPM"), 0.5),
        "camera.mpo": (saved(grey.convert("RGB"), "MPO", save_all=True, append_images=[face], quality=95), 3),
    }


def test_photos_keep_their_brightness(face, tmp_path):
    truth = np.asarray(face.convert("RGB").convert("L").convert("RGB").resize((SIZE, SIZE), Image.BILINEAR))
    for name, (data, tolerance) in photo_files(face).items():
        (tmp_path / name).write_bytes(data)
        small, size = read_image(tmp_path / name, SIZE)
        whole = read_whole_image(tmp_path / name)
        again = np.asarray(whole.resize((SIZE, SIZE), Image.BILINEAR))
        for found in (small, again):
            assert np.abs(found.astype(int) - truth).mean() < tolerance, name
        assert size == whole.size == face.size and whole.mode == "RGB", name


def test_photos_whose_brightness_cannot_be_told_are_refused(face, tmp_path):
    array = np.asarray(face.convert("L")).astype(int)
    for name, data in {
        "float": tiff(array, 32, 1, 3),
        "nan": tiff(np.where(array > 99, np.nan, 0.5), 32, 1, 3),
        "signed": tiff(array * 100, 16, 1, 2),
        "32 bits": tiff(array * 1000, 32),
    }.items():
        (tmp_path / f"{name}.tif").write_bytes(data)
        for read in (lambda path: read_image(path, SIZE), read_whole_image):
            with pytest.raises(UnusableInput, match="its brightness cannot be told"):
                read(tmp_path / f"{name}.tif")


def test_upright_in_every_format(face, tmp_path):
    """An image and its label map fit each other whatever the format says of turning."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = face.transpose(Image.Transpose.ROTATE_90)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        (tmp_path / kind).write_bytes(saved(wide, kind, exif=exif))
        assert read_image(tmp_path / kind, SIZE)[1] == read_whole_image(tmp_path / kind).size == face.size, (
            kind
        )


# A store of odd labels is doubted aloud


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda labels: np.where(labels == SKIN, LABEL_CLASSES.index("cloth"), labels), "hardly any skin"),
        (
            lambda labels: np.where(np.arange(len(labels))[:, None, None] < 3, 0, labels),
            "3 of 6 face masks are empty",
        ),
        (
            lambda labels: np.where(np.arange(len(labels))[:, None, None] < 2, SKIN, labels),
            "2 of 6 .* are full",
        ),
    ],
)
def test_odd_labels_are_doubted_aloud(change, expected, faces, tmp_path):
    for place in ("images", "labels"):
        (tmp_path / place).mkdir()
    for i, labels in enumerate(change(faces.labels)):
        Image.fromarray(faces.images[i]).save(tmp_path / "images" / f"{i}.jpg")
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    source = FolderSource(tmp_path / "images", tmp_path / "labels", "face-parsing", SIZE)
    with pytest.warns(UserWarning, match=expected):
        store = pack(source, tmp_path / "store", progress=False)
    assert re.search(expected, store.manifest.notes[0])
    with pytest.warns(UserWarning, match=expected):
        store.verify()


# Tables


def exports(text: str) -> dict[str, bytes]:
    """A table of commas as people and programs export it."""
    rows = [line.split(",") for line in text.splitlines()]

    def joined(mark, quote="", end="\n"):
        return end.join(mark.join(f"{quote}{field}{quote}" for field in row) for row in rows) + end

    return {
        "plain": text.encode(),
        "quoted": joined(",", '"').encode(),
        "quoted, Windows": joined(",", '"', "\r\n").encode(),
        "semicolons": joined(";").encode(),
        "semicolons, quoted, mark": joined(";", '"', "\r\n").encode("utf-8-sig"),
        "tabs": joined("\t").encode(),
        "tabs, UTF-16": joined("\t", "", "\r\n").encode("utf-16"),
        "UTF-16, big end": b"\xfe\xff" + joined(",").encode("utf-16-be"),
        "Excel's own line": b"sep=;\r\n" + joined(";", "", "\r\n").encode(),
        "spaces": joined(" , ").encode(),
        "Macintosh": joined(",", "", "\r").encode(),
        "blank lines": b"\n" + joined(",").encode() + b"\n  \n\n",
        "no last end": text.rstrip("\n").encode(),
    }


def test_attributes_of_every_export(tmp_path):
    text = "name,Wearing Hat,Grösse\nanna/é.jpg,1,-1\nb.jpg,0,TRUE\n"
    for kind, data in exports(text).items():
        (tmp_path / "a.csv").write_bytes(data)
        table = read_attributes(tmp_path / "a.csv")
        assert list(table) == ["Wearing Hat", "Grösse"] and list(table.index) == ["anna/é.jpg", "b.jpg"], kind
        assert table.to_numpy().tolist() == [[True, False], [False, True]], kind
    (tmp_path / "a.csv").write_text('name,Smiling\n"Bo, A.jpg",1\n"say ""x"".jpg",0\n')
    assert list(read_attributes(tmp_path / "a.csv").index) == ["Bo, A.jpg", 'say "x".jpg']


@pytest.mark.parametrize(
    "data, expected",
    [
        (text_of.encode(encoding), expected)
        for text_of, encoding, expected in (
            ("name,Grösse\na.jpg,1\n", "latin-1", "not written in UTF-8.* Save it as UTF-8"),
            ("name,A\na.jpg,1\n", "utf-16-le", "Save it as UTF-8"),
            ("image_id,A\na.jpg,1\n", "utf-8", "column 'name'"),
            ("a.jpg,1\nb.jpg,0\n", "utf-8", "column 'name' .*first line names"),
            ("name|A\na.jpg|1\n", "utf-8", "column 'name' .*first line names the columns name.A"),
            ("name,A\na.jpg,1,\nb.jpg,0,\n", "utf-8", "3 fields, and should have 2"),
            ("name,A\na.jpg,1\nb.jpg,0,7\n", "utf-8", "first line is 'name'"),
            ("name,A,B\na.jpg,1,0\nb.jpg,1\n", "utf-8", "'B' .* the value ''"),
            ("name,A,A\na.jpg,1,0\n", "utf-8", "'A' .*twice"),
            ("name,A\né.jpg,1\ne\u0301.jpg,1\n", "utf-8", "twice"),
        )
    ],
)
def test_other_attributes_are_refused_with_what_was_expected(data, expected, tmp_path):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(FaceVAEError, match=expected):
        read_attributes(tmp_path / "a.csv")


def test_celebas_lists_of_every_export(faces, tmp_path):
    """Kaggle's tables and the authors' lists, however they were saved again, give the same store."""
    labels = drawn_celeba.write_labels(faces, tmp_path / "labels")
    prints = set()

    def packed(root):
        source = CelebASource(root, labels, SIZE, allow_subset=True)
        store = pack(source, tmp_path / "store", overwrite=True, progress=False)
        assert list(store.attributes) == drawn_celeba.ATTRIBUTES
        prints.add(store.fingerprint)

    root = drawn_celeba.kaggle_flat(faces, tmp_path / "kaggle")
    tables = [root / "list_attr_celeba.csv", root / "list_eval_partition.csv"]
    written = [exports(path.read_text()) for path in tables]
    for kind in written[0]:
        for path, files in zip(tables, written):
            path.write_bytes(files[kind])
        packed(root)
    root = drawn_celeba.torchvision_folder(faces, tmp_path / "celeba")
    lists = [root / "list_attr_celeba.txt", root / "list_eval_partition.txt"]
    texts = [path.read_text() for path in lists]
    for change in (
        lambda text: text.encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: re.sub(" +", "\t", text.replace(" \n", "\n")).encode() + b"\n",
        lambda text: re.sub(" +", ";", text.replace(" \n", "\n")).encode(),
        lambda text: re.sub(r"(\S+)", r'"\1"', text).encode(),
    ):
        for path, text in zip(lists, texts):
            path.write_bytes(change(text))
        packed(root)
    assert len(prints) == 1


def test_the_mapping_of_celebamask_hq_of_every_export(faces, tmp_path):
    root = drawn_celeba.celebamask_hq(faces, tmp_path / "hq", range(6))
    mapping = root / "CelebAMask-HQ" / "CelebA-HQ-to-CelebA-mapping.txt"
    before = CelebAMaskHQSource(root, SIZE, allow_subset=True).partition
    commas = re.sub(r"[ \t]+", ",", mapping.read_text())
    for kind, data in exports(commas).items():
        mapping.write_bytes(data)
        assert (CelebAMaskHQSource(root, SIZE, allow_subset=True).partition == before).all(), kind


def test_claims_of_every_editor(tmp_path):
    text = '[[claim]]\nname = "é"\nquestion = "masks"\nstatement = "x"\nfirst = "H1"\nsecond = "H2"\n'
    text += 'metrics = ["ssim"]\n'
    sweep = type("SweepThere", (), {"path": tmp_path})
    for data in (
        text.encode(),
        text.replace("\n", "\r\n").encode("utf-8-sig"),
        text.encode("utf-16"),
    ):
        (tmp_path / "claims.toml").write_bytes(data)
        assert sweep_claims(sweep)[-1].name == "é"
    (tmp_path / "claims.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(FaceVAEError, match="claims.toml.* UTF-8"):
        sweep_claims(sweep)


# Nothing is passed over


def test_every_picture_that_pillow_opens_counts_as_one():
    Image.init()
    no_pictures = {"HDF5", "MPEG", "GRIB", "BUFR", "FITS", "IPTC", "FLI"}
    missing = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in no_pictures and suffix not in (*IMAGE_SUFFIXES, ".ps")
    }
    assert not missing
    assert {".heic", ".cr2", ".svg"} < set(IMAGE_SUFFIXES)


def folder_of(face, faces, folder: Path) -> int:
    """Pictures of every suffix, with label maps; returns how many there are."""
    pictures = {f"{i:02d}{suffix}": face for i, suffix in enumerate(IMAGE_SUFFIXES)}
    pictures |= {"loud.JPG": face, "Loud.JPeG": face, "two.parts.tif": face}
    for place in ("images", "labels"):
        (folder / place).mkdir(parents=True)
    kinds = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"}
    for name, image in pictures.items():
        kind = kinds.get(Path(name).suffix, "JPEG")
        data = saved(image, kind) if Path(name).suffix != ".heic" else b"\0\0\0\x18ftypheic" + bytes(100)
        (folder / "images" / name).write_bytes(data)
        Image.fromarray(faces.labels[0]).save(folder / "labels" / f"{name.rpartition('.')[0]}.png")
    for name in ("._00.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "images" / name).write_bytes(b"x")
    (folder / "images" / "notes.txt").write_text("x")
    return len(pictures)


def test_every_picture_is_used_or_listed(face, faces, tmp_path):
    count = folder_of(face, faces, tmp_path)
    source = FolderSource(tmp_path / "images", tmp_path / "labels", "face-parsing", SIZE)
    store = pack(source, tmp_path / "store", max_bad=1, progress=False)
    assert len(store) + len(store.manifest.skipped) == count == len(source)
    assert [one.name for one in store.manifest.skipped if ".heic" not in one.name] == []
    assert "save it as JPEG or PNG" in store.manifest.skipped[0].reason
    assert store.manifest.notes[0] == "Files not named as pictures are: 1, for example 'notes.txt'."
    assert len(find_photos([tmp_path / "images"], tmp_path / "out")) == count


def test_a_full_folder_is_not_called_empty(face, faces, tmp_path):
    for place in ("images", "labels", "odd"):
        (tmp_path / place).mkdir()
    face.save(tmp_path / "images" / "0.jpg")
    Image.fromarray(faces.labels[0]).save(tmp_path / "labels" / "0.png")
    for i in range(5):
        (tmp_path / "odd" / f"{i}").write_bytes((tmp_path / "images" / "0.jpg").read_bytes())
    for arguments in (("odd", "labels"), ("images", "odd")):
        with pytest.raises(FaceVAEError, match="Files not named as pictures are: 5, for example '0'"):
            FolderSource(*(tmp_path / name for name in arguments), "face-parsing", SIZE)
    with pytest.raises(FaceVAEError, match="Files not named as pictures are: 5"):
        find_photos([tmp_path / "odd"], tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.write(tmp_path / "images" / "0.jpg", "0")
    with pytest.raises(FaceVAEError, match="Files not named as pictures are: 1"):
        FolderSource(tmp_path / "odd.zip", tmp_path / "labels", "face-parsing", SIZE)


def test_a_file_of_a_zip_that_is_packed_otherwise_is_listed(face, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.jpg", saved(face, "JPEG"))
        archive.writestr("b.jpg", saved(face, "JPEG"), zipfile.ZIP_BZIP2)
        archive.writestr("__MACOSX/._a.jpg", b"x")
    images = open_images(tmp_path / "images.zip")
    assert images.names == ["a.jpg", "b.jpg"] and images.read("a.jpg", SIZE)[1] == face.size
    with pytest.raises(UnusableInput, match="packed by a method that is not known"):
        images.read("b.jpg", SIZE)


def test_accents_are_composed_in_two_ways(face, faces, tmp_path):
    """Names from a Mac and names from elsewhere belong together: image, label map, attributes and split."""
    stores = []
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / form
        for place in ("images", "labels"):
            (folder / place / unicodedata.normalize(form, "Zoë")).mkdir(parents=True)
        for i, name in enumerate(("é", "ñandú", "plain")):
            image = folder / "images" / unicodedata.normalize(form, f"Zoë/{name}.jpg")
            image.write_bytes(saved(Image.fromarray(faces.images[i]), "JPEG"))
            label = unicodedata.normalize(other, f"Zoë/{name}.png")
            (folder / "labels" / label).parent.mkdir(exist_ok=True)
            (folder / "labels" / label).write_bytes(saved(Image.fromarray(faces.labels[i]), "PNG"))
        rows = "".join(f"Zoë/{name}.jpg,1\n" for name in ("é", "ñandú", "plain"))
        (folder / "a.csv").write_text(unicodedata.normalize(other, "name,A\n" + rows))
        source = FolderSource(
            folder / "images", folder / "labels", "face-parsing", SIZE, attributes_csv=folder / "a.csv"
        )
        stores.append(pack(source, folder / "store", progress=False))
        assert unicodedata.normalize("NFC", "Zoë/é.png") in map(label_name, source.names)
    assert len(stores[0]) == 3 and stores[0].fingerprint == stores[1].fingerprint
    twice = tmp_path / "NFC" / "images" / unicodedata.normalize("NFD", "Zoë")
    twice.mkdir(exist_ok=True)
    (twice / unicodedata.normalize("NFD", "é.jpg")).write_bytes(saved(face, "JPEG"))
    source = FolderSource(tmp_path / "NFC" / "images", tmp_path / "NFC" / "labels", "face-parsing", SIZE)
    store = pack(source, tmp_path / "twice", max_bad=1, progress=False)
    assert len(store) == 2 and {one.reason.partition(":")[0] for one in store.manifest.skipped} == {
        "images share one label map"
    }


def test_two_files_of_one_name_are_refused_by_name(face, faces, tmp_path):
    for place in ("images", "labels"):
        (tmp_path / place).mkdir()
    for name in ("a.jpg", "a.png", "b.jpg", "c.jpg"):
        face.save(tmp_path / "images" / name)
    for name in ("a.png", "b.png", "b.tif", "c.png"):
        Image.fromarray(faces.labels[0]).save(tmp_path / "labels" / name)
    (tmp_path / "labels" / "c.jpg").write_bytes(b"a picture of the label map")
    source = FolderSource(tmp_path / "images", tmp_path / "labels", "face-parsing", SIZE)
    store = pack(source, tmp_path / "store", max_bad=1, progress=False)
    reasons = {one.name: one.reason for one in store.manifest.skipped}
    assert list(store.index["name"]) == ["c.jpg"] and set(reasons) == {"a.jpg", "a.png", "b.jpg"}
    assert "a.jpg and a.png" in reasons["a.jpg"] and "b.png and b.tif" in reasons["b.jpg"]


@pytest.mark.parametrize("folder", ["img_align_celeba", "img_align_celeba_png"])
def test_celeba_in_png(folder, faces, tmp_path):
    root, labels = drawn_celeba.kaggle_flat(faces, tmp_path / "celeba"), tmp_path / "labels"
    drawn_celeba.write_labels(faces, labels)
    (root / "img_align_celeba").rename(root / folder)
    for path in sorted((root / folder).iterdir()):
        Image.open(path).save(path.with_suffix(".PNG" if path.name == "000001.jpg" else ".png"))
        path.unlink()
    store = pack(CelebASource(root, labels, SIZE, allow_subset=True), tmp_path / "store", progress=False)
    assert list(store.index["name"]) == faces.names
    (root / folder / "000002.jpg").write_bytes(b"x")
    with pytest.raises(FaceVAEError, match="holds both '000002.jpg' and '000002.png'"):
        CelebASource(root, labels, SIZE, allow_subset=True)
    for path in (root / folder).iterdir():
        path.rename(path.with_name(f"face{path.name}"))
    with pytest.raises(FaceVAEError, match="lacks the images .*holds 7 files like 'face000001.PNG'"):
        CelebASource(root, labels, SIZE, allow_subset=True)


# Bombs


def timed_growth(function) -> tuple[int, float]:
    """`peak_growth` of a function, and the seconds that it took."""
    begun = time.perf_counter()
    return peak_growth(function), time.perf_counter() - begun


def zero_png(side: int, depth: int, colour: int, bands: int, more: bytes = b"") -> bytes:
    packer, row = zlib.compressobj(1), bytes(1 + (side * bands * depth + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png_file((side, side), depth, colour, data, more)


def zero_tiff(side: int, depth: int, sample_format: int) -> bytes:
    """A TIFF of zeros in strips, each of which is packed by itself."""
    rows = 500
    strip = zlib.compress(bytes(rows * side * depth // 8), 1)
    count = side // rows
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, depth), (259, 3, 1, 8), (262, 3, 1, 1)]
    tags += [(273, 4, count, 8), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, count, 8 + 4 * count)]
    tags += [(339, 3, 1, sample_format)]
    start = 8 + 8 * count
    offsets = struct.pack(f"<{count}I", *[start] * count) + struct.pack(f"<{count}I", *[len(strip)] * count)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    table = start + len(strip) + len(strip) % 2
    body = offsets + strip + b"\0" * (len(strip) % 2)
    return b"II*\0" + struct.pack("<I", table) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def picture_bombs():
    """Small files of many pixels, by what they are."""
    palette = chunk(b"PLTE", bytes(6))
    yield "16 bits", zero_png(9_999, 16, 0, 1)
    yield "transparency", zero_png(9_999, 8, 6, 4)
    yield "grey with transparency in 16 bits", zero_png(9_999, 16, 4, 2)
    yield "colour in 16 bits", zero_png(9_999, 16, 2, 3)
    yield "a clear palette of 1 bit", zero_png(9_999, 1, 3, 1, palette + chunk(b"tRNS", b"\0"))
    yield "colour, just so large that it is read", zero_png(7_100, 8, 2, 3)
    yield "grey, just so large that it is read", zero_png(6_300, 8, 0, 1)
    yield "floating point", zero_tiff(9_500, 32, 3)
    yield "TIFF, just so large that it is read", zero_tiff(5_500, 8, 1)
    grey = Image.new("L", (9_999, 9_999))
    yield "JPEG", saved(grey, "JPEG")
    yield "progressive JPEG", saved(grey.resize((9_000, 9_000)), "JPEG", progressive=True)
    yield "GIF", saved(Image.new("P", (9_000, 9_000)), "GIF")
    small = Image.new("RGB", (3_300, 3_300))
    yield "WebP, just so large that it is read", saved(small, "WEBP", lossless=True, method=0, quality=0)


def test_no_picture_takes_much_memory(tmp_path):
    """Each is read or refused, as an image, as a label map, in its own size and as a photo of a command."""
    for what, data in picture_bombs():
        assert len(data) < 3_000_000, what
        path = tmp_path / "bomb"
        path.write_bytes(data)
        for read in (
            lambda path: read_image(path, SIZE),
            lambda path: read_labels(path, "face-parsing", SIZE),
            read_whole_image,
            lambda path: prepare_photo(path, aligned=False),
        ):

            def attempt(read=read, path=path):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        read(path)
                    except (UnusableInput, FaceVAEError):
                        pass

            growth, seconds = timed_growth(attempt)
            assert growth < 330e6, f"{what}: {growth / 1e6:.0f} MB"
            assert seconds < 10, f"{what}: {seconds:.0f} s"


def test_threads_share_the_memory_for_decoding():
    budget, held, highest = MemoryBudget(100), [], []

    def decode(amount):
        with budget.taken(amount):
            held.append(amount)
            highest.append(sum(held))
            time.sleep(0.001)
            held.remove(amount)

    threads = [
        threading.Thread(target=decode, args=(amount,)) for amount in (100, 60, 30, 30, 90, 10, 50) * 5
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert 60 <= max(highest) <= 100 and budget.free == 100 and MAX_DECODING_BYTES < 300e6


def metrics_bomb(path: Path, rows: int, groups: int = 1) -> None:
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["raw"]))
    table = pa.table({"image": same, "view": same, "ssim": np.zeros(rows)})
    with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(groups):
            writer.write_table(table, row_group_size=rows)


def refused(function, *arguments) -> str:
    with pytest.raises(FaceVAEError) as caught:
        function(*arguments)
    return str(caught.value)


def test_tables_of_many_rows_are_refused_by_their_footer(tmp_path):
    """Against the images that were evaluated, or against memory when their number is not known."""
    path = tmp_path / "metrics.parquet"
    metrics_bomb(path, 2_000_000, 6)
    growth, seconds = timed_growth(lambda: refused(load_metrics, path))
    assert growth < 50e6 and seconds < 5 and path.stat().st_size < 200_000
    metrics_bomb(path, 40_000)
    assert len(load_metrics(path)) == 40_000
    assert "40,000 rows, and can have 400" in refused(load_metrics, path, 100)
    requested = {"hypothesis": "H1", "terms": "l1", "mask": False, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps({"test_images": 100, "size": 36}))
    (tmp_path / "status.json").write_text(json.dumps({"state": "done"}))
    fields, metrics, _ = read_run(tmp_path, requested)
    assert metrics is None and fields["state"] == "unusable" and "can have 400" in fields["error"]


def test_an_index_has_no_more_rows_than_its_store(tmp_path, store):
    shutil.copytree(store, tmp_path / "store")
    index = parquet.read_table(tmp_path / "store" / "index.parquet")
    parquet.write_table(pa.concat_tables([index, index]), tmp_path / "store" / "index.parquet")
    let_manifest_agree(tmp_path / "store", "index.parquet")
    assert "200 rows, and can have 100" in refused(lambda: FaceStore(tmp_path / "store").index)


def test_texts_of_a_hundred_megabytes_are_not_read(tmp_path):
    """JSON where a few kilobytes are right, TOML, CSV, headers and archives of arrays."""
    many = b'{"a": "' + b"x" * 100_000_000 + b'"}'
    (tmp_path / "status.json").write_bytes(many)
    (tmp_path / "claims.toml").write_bytes(many)
    (tmp_path / "a.csv").write_bytes(b"name,a\n" + b"x,1\n" * 25_000_000)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' + b" " * 50_000_000 + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (300_000_000,)}
            )
            for _ in range(30):
                file.write(bytes(10_000_000))
    sweep = type("SweepThere", (), {"path": tmp_path})
    for name, read in (
        ("status.json", lambda: read_object(tmp_path / "status.json")),
        ("claims.toml", lambda: sweep_claims(sweep)),
        ("a.csv", lambda: read_attributes(tmp_path / "a.csv")),
        (
            "model.safetensors",
            lambda: read_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, ""),
        ),
        ("arrays.npz", lambda: read_reference_arrays(tmp_path / "arrays.npz")),
    ):
        growth, seconds = timed_growth(lambda read=read, name=name: refused(read).index(name))
        assert growth < 150e6 and seconds < 5, f"{name}: {growth / 1e6:.0f} MB in {seconds:.0f} s"


def test_a_log_that_is_too_large_is_read_in_part(tmp_path, monkeypatch):
    """As one of a hundred megabytes is, with smaller limits: a part of training, all of validation."""
    monkeypatch.setattr("facevae.analysis.results.MAX_LOG_BYTES", 2**18)
    monkeypatch.setattr("facevae.analysis.results.MAX_LOG_ROWS", 9_000)
    line = '{"kind": "train", "step": %d, "loss": 1.0}\n'
    checked = '{"kind": "validation", "step": 7, "loss": 2.0}\n'
    (tmp_path / "log.jsonl").write_text("".join(line % i for i in range(60_000)) + checked)
    log = read_log(tmp_path / "log.jsonl")
    assert 5_000 < len(log) < 9_000 and log.query("kind == 'validation'").step.tolist() == [7]
    (tmp_path / "log.jsonl").write_text(checked * 10_000)
    assert "more values than a run can log" in refused(read_log, tmp_path / "log.jsonl")


def test_a_jpeg_of_many_scans_is_refused(face, tmp_path):
    whole = saved(face.convert("L"), "JPEG", progressive=True)
    start = whole.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(whole[:start] + whole[start:-2] * 300 + whole[-2:])
    with pytest.raises(UnusableInput, match="too many scans"):
        read_image(tmp_path / "a.jpg", SIZE)


def test_a_large_table_of_attributes_takes_memory_by_its_size(tmp_path):
    columns = [f"a{i}" for i in range(40)]
    row = ",1" * 40
    (tmp_path / "a.csv").write_text(
        f"name,{','.join(columns)}\n" + "".join(f"{i}.jpg{row}\n" for i in range(50_000))
    )
    growth = peak_growth(lambda: read_attributes(tmp_path / "a.csv"))
    assert growth < 150e6
