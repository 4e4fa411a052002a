"""CelebA and CelebAMask-HQ from every layout to a store; and what is said when something is wrong."""

import json
import os
import re
import resource
import shutil
import time
import tracemalloc
import zipfile
from unittest import mock

import drawn_celeba
import numpy as np
import pytest
import torch
from conftest import TINY, facevae, facevae_here, rewrite
from drawn_celeba import ATTRIBUTES, RECORD, Faces
from PIL import Image

from facevae.config import make_config
from facevae.core import FaceVAEError
from facevae.data import celeba_files as published_celeba
from facevae.data.celeba import CelebASource
from facevae.data.celeba_files import CELEBA_COUNT, LAST_OF_SPLIT
from facevae.data.packing import FaceBatch as Packed
from facevae.data.packing import pack
from facevae.data.store import FaceStore
from facevae.parsing.bisenet import BiSeNet
from facevae.training.run import RunDirectory

SIZE = 36


@pytest.fixture(scope="module")
def faces():
    return Faces(8)


@pytest.fixture(scope="module")
def labels(faces, tmp_path_factory):
    return drawn_celeba.write_labels(faces, tmp_path_factory.mktemp("made") / "labels")


@pytest.fixture(scope="module")
def packed(faces, labels, tmp_path_factory):
    """The store that every layout must give."""
    root = drawn_celeba.official(faces, tmp_path_factory.mktemp("packed") / "celeba")
    return pack(CelebASource(root, labels, SIZE, allow_subset=True), root.parent / "store", progress=False)


@pytest.fixture
def celeba(faces, labels, tmp_path):
    """CelebA as its authors lay it out, with labels of its own; both may be spoilt."""
    shutil.copytree(labels, tmp_path / "labels")
    return drawn_celeba.official(faces, tmp_path / "celeba")


def command(root, *options, labels=None):
    return [
        "pack",
        "celeba",
        "--root",
        root,
        "--labels",
        labels or root.parent / "labels",
        "--size",
        SIZE,
        "--out",
        root.parent / "store",
        *options,
    ]


def refused(*arguments) -> str:
    """What a command that must fail says, in one paragraph; it leaves no store."""
    done = facevae_here(*arguments)
    assert done.returncode and "facevae: " in done.stderr and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )
    out = arguments[[str(argument) for argument in arguments].index("--out") + 1]
    assert not out.exists() and not list(out.parent.glob(".store*"))
    return re.sub(r"\s+", " ", done.stderr)


@pytest.mark.parametrize("layout", drawn_celeba.CELEBA)
def test_every_layout_gives_the_same_store(layout, faces, labels, packed, tmp_path):
    root = drawn_celeba.CELEBA[layout](faces, tmp_path / "celeba")
    done = facevae_here(*command(root, "--allow-subset", labels=labels))
    assert done.returncode == 0, done.stderr
    assert (
        f"CelebA in the {layout.partition(',')[0]} layout" in done.stderr
        and "24 faces of 36 x 36 pixels (8 train, 8 val, 8 test)" in done.stdout
    )
    store = FaceStore(tmp_path / "store").verify()
    assert store.fingerprint == packed.fingerprint
    assert (
        store.manifest.source["layout"] == layout.partition(",")[0]
        and store.manifest.source["parsing"] == RECORD
    )


def test_a_store_is_what_the_faces_are(faces, packed):
    assert list(packed.index["name"]) == faces.names and list(packed.attributes) == ATTRIBUTES
    assert (packed.attributes.to_numpy() == (faces.values == 1)).all()
    assert (packed.index["split"] == np.array(["train", "val", "test"])[faces.splits]).all()
    small = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            for image in faces.images
        ]
    ).astype(int)
    assert np.abs(packed.images - small).mean() < 3
    rows, columns = (((np.arange(SIZE) + 0.5) * length / SIZE).astype(int) for length in (218, 178))
    assert (packed.labels == faces.labels[:, rows[:, None], columns]).all()


def test_rows_belong_to_names_not_to_places(faces, labels, packed, tmp_path):
    order = np.random.default_rng(1).permutation(len(faces.names)).tolist()
    root = drawn_celeba.official(faces, tmp_path / "celeba", order=order)
    assert (
        pack(
            CelebASource(root, labels, SIZE, allow_subset=True), tmp_path / "store", progress=False
        ).fingerprint
        == packed.fingerprint
    )


@pytest.mark.parametrize("below", ["img_align_celeba", "Img/img_align_celeba", "celeba/Img/img_align_celeba"])
def test_labels_of_a_folder_further_up(below, faces, packed, celeba):
    """parse-masks may have been given the whole of CelebA."""
    place = celeba.parent / "parsed" / below
    place.parent.mkdir(parents=True)
    shutil.move(celeba.parent / "labels", place)
    shutil.move(place / "parsing.json", celeba.parent / "parsed")
    store = pack(
        CelebASource(celeba, celeba.parent / "parsed", SIZE, allow_subset=True),
        celeba.parent / "store",
        progress=False,
    )
    assert store.fingerprint == packed.fingerprint


def test_the_parser_is_in_the_config_of_every_run(packed, tmp_path):
    """The manifest says who made the label maps, and so does the run; it goes on with a copy of it."""
    config = make_config("H9", overrides={"size": SIZE})
    with RunDirectory(tmp_path / "run").lock(config, packed) as run:
        record = json.loads((run.path / "config.json").read_text())
    assert (
        record["data_source"]["parsing"] == RECORD
        and record["label_scheme"] == "face-parsing"
        and record["data_source"]["kind"] == "celeba"
    )
    moved = shutil.copytree(packed.path, tmp_path / "moved")
    rewrite(moved / "manifest.json", source=packed.manifest.source | {"root": "/elsewhere"})
    with RunDirectory(tmp_path / "run").lock(config, FaceStore(moved)) as run:
        assert json.loads((run.path / "config.json").read_text())["data_source"]["root"] == "/elsewhere"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Anno/list_attr_celeba.txt", "lacks the attributes (looked for"),
        ("Eval/list_eval_partition.txt", "lacks the partition (looked for"),
        ("Img/img_align_celeba", "lacks the images (looked for"),
    ],
)
def test_a_missing_part(name, expected, celeba):
    (celeba / name).rename(celeba / "elsewhere")
    said = refused(*command(celeba, "--allow-subset"))
    assert (
        "looks like the official layout" in said
        and expected in said
        and str(celeba / name) in said
        and "--download" in said
    )


@pytest.mark.parametrize(
    "kept, expected",
    [
        (100_000, "cut short or damaged"),
        (0, "is not a whole zip file"),
        (None, "it is a web page, which a host sends when it refuses"),
    ],
)
def test_a_truncated_or_refused_zip(kept, expected, faces, celeba):
    drawn_celeba.zip_images(celeba / "Img" / "img_align_celeba")
    path = celeba / "Img" / "img_align_celeba.zip"
    path.write_bytes(
        b"<!DOCTYPE html><html>Quota exceeded</html>" if kept is None else path.read_bytes()[:kept]
    )
    said = refused(*command(celeba, "--allow-subset"))
    assert expected in said and "img_align_celeba.zip" in said and "Fetch it again" in said


def test_a_damaged_picture_in_a_zip_is_skipped_by_name(faces, celeba):
    drawn_celeba.zip_images(celeba / "Img" / "img_align_celeba")
    path = celeba / "Img" / "img_align_celeba.zip"
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("img_align_celeba/162771.jpg").header_offset
    data = bytearray(path.read_bytes())
    data[place + 200] ^= 0xFF
    path.write_bytes(data)
    done = facevae_here(*command(celeba, "--allow-subset", "--max-bad", 0.1))
    assert (
        done.returncode == 0
        and "162771.jpg: damaged in the zip file" in done.stderr
        and "23 faces" in done.stdout
    )


def test_masks_missing_or_of_the_wrong_size(celeba):
    labels = celeba.parent / "labels"
    (labels / "000003.png").unlink()
    Image.fromarray(np.zeros((218, 170), np.uint8)).save(labels / "182640.png")
    said = refused(*command(celeba, "--allow-subset"))
    assert (
        "000003.jpg: no label map: facevae parse-masks makes it in" in said
        and "goes on where it stopped" in said
    )
    assert (
        "182640.jpg: the label map has another size than its image: 170 x 218, and the image is 178 x 218"
        in said
        and "--max-bad" in said
    )
    assert "22 faces" in facevae_here(*command(celeba, "--allow-subset", "--max-bad", 0.1)).stdout
    source = json.loads((celeba.parent / "store" / "manifest.json").read_text())
    assert {skip["name"] for skip in source["skipped"]} == {"000003.jpg", "182640.jpg"}
    assert (
        "23 faces"
        in facevae_here(
            *command(celeba, "--allow-subset", "--max-bad", 0.1, "--rescale-labels", "--overwrite")
        ).stdout
    )


def test_no_labels_at_all(celeba):
    shutil.rmtree(celeba.parent / "labels")
    said = refused(*command(celeba, "--allow-subset"))
    assert (
        f"Make them with: facevae parse-masks --images '{celeba / 'Img' / 'img_align_celeba'}' "
        f"--out '{celeba.parent / 'labels'}'." in said
    )
    (celeba.parent / "labels").mkdir()
    drawn_celeba.zip_images(celeba / "Img" / "img_align_celeba")
    said = refused(*command(celeba, "--allow-subset"))
    assert "holds no label maps of CelebA" in said and f"--images '{celeba}/Img/img_align_celeba.zip'" in said


def test_labels_of_nobody_knows_which_scheme(celeba):
    record = celeba.parent / "labels" / "parsing.json"
    assert "says that the label maps are in face-parsing" in refused(
        *command(celeba, "--allow-subset", "--scheme", "celebamask-hq")
    )
    record.write_text('{"scheme": "bisenet", "parser": "x"}')
    assert "is not the record of a parser" in refused(*command(celeba, "--allow-subset"))
    record.unlink()
    assert "--scheme: how the label maps" in refused(*command(celeba, "--allow-subset"))
    assert facevae_here(*command(celeba, "--allow-subset", "--scheme", "face-parsing")).returncode == 0


def test_tables_that_lack_a_row_or_were_cut(faces, celeba):
    attributes, partition = (
        celeba / "Anno" / "list_attr_celeba.txt",
        celeba / "Eval" / "list_eval_partition.txt",
    )
    whole = attributes.read_text()
    attributes.write_text("".join(whole.splitlines(True)[:-2]))
    assert "promises 24 rows, and it has 22: it was cut short" in refused(*command(celeba, "--allow-subset"))
    attributes.write_text(whole[:-30])
    assert "list_attr_celeba.txt' cannot be read" in refused(*command(celeba, "--allow-subset"))
    attributes.write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    assert "it is a web page" in refused(*command(celeba, "--allow-subset"))
    attributes.write_text(whole)
    partition.write_text(
        "".join(line for line in partition.read_text().splitlines(True) if not line.startswith("182640"))
    )
    said = refused(*command(celeba, "--allow-subset"))
    assert "182640.jpg: no split: 'list_eval_partition.txt' has no row of this name" in said


def test_two_layouts_at_once(faces, celeba):
    drawn_celeba.kaggle(faces, celeba)
    said = refused(*command(celeba, "--allow-subset"))
    assert "more than once" in said and "--layout official" in said
    assert "kaggle layout" in facevae_here(*command(celeba, "--allow-subset", "--layout", "kaggle")).stderr
    shutil.rmtree(celeba.parent / "store")
    assert "Did you mean 'kaggle'" in refused(*command(celeba, "--allow-subset", "--layout", "kagle"))


def test_a_subset_must_be_asked_for(celeba):
    said = refused(*command(celeba))
    assert "holds 24 of CelebA's 202,599 images; missing: 000009.jpg" in said and "--allow-subset" in said


@pytest.fixture(scope="module")
def whole(faces, tmp_path_factory):
    """202,599 names of one image, the official partition, made-up attributes, and 1,000 label maps."""
    root = tmp_path_factory.mktemp("whole")
    images, labels = root / "img_align_celeba", root / "labels"
    for folder in (images, labels):
        folder.mkdir()
    for number in range(1, CELEBA_COUNT + 1):
        if number % 30_000 == 1:  # a file has only so many names
            one = root / f"{number}.jpg"
            Image.fromarray(faces.images[0]).save(one)
        os.link(one, images / f"{number:06d}.jpg")
    for number in range(1, 1001):
        Image.fromarray(faces.labels[0]).save(labels / f"{number:06d}.png", compress_level=1)
    (labels / "parsing.json").write_text(json.dumps(RECORD))
    numbers = np.arange(1, CELEBA_COUNT + 1)
    splits = np.searchsorted(list(LAST_OF_SPLIT.values()), numbers)
    with open(
        root / "list_eval_partition.txt", "w", newline="\r\n"
    ) as file:  # to the byte the file that was published
        file.writelines(f"{number:06d}.jpg {split}\n" for number, split in zip(numbers, splits))
    with open(root / "list_attr_celeba.txt", "w") as file:
        file.write(f"{CELEBA_COUNT}\n{' '.join(ATTRIBUTES)} \n")
        rows = [
            " ".join(f"{value:2d}" for value in np.random.default_rng(i).choice([-1, 1], 40))
            for i in range(64)
        ]
        file.writelines(f"{number:06d}.jpg {rows[number % 64]}\n" for number in numbers)
    yield root
    shutil.rmtree(root)


def test_the_whole_of_celeba(whole):
    """Counts and digests as published are accepted; one image fewer, or other attributes, are not."""
    partition = published_celeba.published_files()["list_eval_partition.txt"]
    with mock.patch.object(
        published_celeba, "published_files", lambda: {"list_eval_partition.txt": partition}
    ):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = CelebASource(whole, whole / "labels", SIZE)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB"
        assert len(source) == CELEBA_COUNT and source.layout.name == "torchvision"
        batch = next(item for item in source if isinstance(item, Packed))
        assert (
            batch.splits == ["train"] * 32
            and batch.attributes.shape == (32, 40)
            and batch.names[:2] == ["000001.jpg", "000002.jpg"]
        )
        with pytest.raises(
            FaceVAEError,
            match="None of the .* inputs can be packed, all for the same reason .no label map. so far. "
            "001001.jpg: no label map: facevae parse-masks",
        ):
            pack(source, whole / "store", progress=False)
        (whole / "img_align_celeba" / "123456.jpg").rename(whole / "spare.jpg")
        with pytest.raises(
            FaceVAEError, match="holds 202,598 of CelebA's 202,599 images; missing: 123456.jpg"
        ):
            CelebASource(whole, whole / "labels", SIZE)
        (whole / "spare.jpg").rename(whole / "img_align_celeba" / "123456.jpg")
    with pytest.raises(
        FaceVAEError,
        match="list_attr_celeba.txt' is not the file that was published: its MD5 digest is .* "
        "and should be 75e246fa4810816ffd6ee81facbd244c",
    ):
        CelebASource(whole, whole / "labels", SIZE)


def test_packing_is_fast_and_holds_few_images_at_a_time(whole):
    """In processor time, beside a plain loop that decodes the same files, and checks and writes nothing."""
    source = CelebASource(whole, whole / "labels", 144, allow_subset=True)
    source.present[1001:] = False
    begun = time.process_time()
    pack(source, whole / "store", progress=False)
    packed = time.process_time()
    for number in range(1, 1001):
        image = Image.open(whole / "img_align_celeba" / f"{number:06d}.jpg").convert("RGB")
        image.resize((144, 144), Image.Resampling.BILINEAR)
        Image.open(whole / "labels" / f"{number:06d}.png").resize((144, 144), Image.Resampling.NEAREST)
    assert packed - begun < 3 * (time.process_time() - packed), "seconds"
    peaks = []
    for count in (500, 1000):
        source = CelebASource(whole, whole / "labels", 72, allow_subset=True)
        source.present[count + 1 :] = False
        tracemalloc.start()
        try:
            pack(source, whole / "store", overwrite=True, progress=False)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2e6, "bytes, of the 10 MB that the store is larger"


def test_a_download_that_the_host_refuses(celeba, tmp_path):
    import torchvision.datasets.utils as downloader

    def host(key, folder, name, digest):
        (folder / name).write_text("<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
        raise RuntimeError("File not found or corrupted.")

    with mock.patch.object(downloader, "download_file_from_google_drive", host):
        said = refused(*command(tmp_path / "new", "--download"))
    assert (
        "web page instead of the file" in said
        and "img_align_celeba.zip from https://drive.google.com/uc?id=0B7EVK8r0v71pZjFTYXZWM3FlRnM" in said
    )
    assert f"into '{tmp_path / 'new' / 'celeba'}'" in said and not list((tmp_path / "new").rglob("*.zip"))


def test_a_download_without_gdown(tmp_path):
    with mock.patch.dict("sys.modules", {"gdown": None}):
        said = refused(*command(tmp_path / "new", "--download"))
    assert "pip install gdown" in said and "list_attr_celeba.txt from https://drive.google.com" in said


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.manual_seed(0)
    torch.save(BiSeNet().state_dict(), path)
    return path


@pytest.mark.parametrize(
    "layout, images",
    [
        ("official", "Img/img_align_celeba"),
        ("torchvision", "celeba/img_align_celeba"),
        ("kaggle", "img_align_celeba"),
        ("kaggle", ""),
    ],
)
def test_from_pictures_to_a_store_with_masks(layout, images, weights, tmp_path):
    """The first two commands of the README, with a parser of random weights, for any folder of CelebA."""
    root, labels = drawn_celeba.CELEBA[layout](Faces(1), tmp_path / "celeba"), tmp_path / "labels"
    done = facevae_here(
        "parse-masks", "--images", root / images, "--out", labels, "--weights", weights, "--any-weights"
    )
    assert done.returncode == 0, done.stderr
    done = facevae_here(*command(root, "--allow-subset"))
    assert done.returncode == 0 and "3 faces of 36 x 36 pixels (1 train, 1 val, 1 test)" in done.stdout, (
        done.stderr
    )
    store = FaceStore(tmp_path / "store").verify()
    record = json.loads((labels / "parsing.json").read_text())
    assert (
        store.manifest.source["parsing"] == record
        and store.manifest.scheme == record["scheme"] == "face-parsing"
        and record["parser"] == "bisenet"
    )
    found = {path.stem: np.asarray(Image.open(path)) for path in labels.rglob("*.png")}
    rows, columns = (((np.arange(SIZE) + 0.5) * length / SIZE).astype(int) for length in (218, 178))
    for name, packed_labels in zip(store.index["name"], store.labels):
        assert (packed_labels == found[name.removesuffix(".jpg")][rows[:, None], columns]).all()


@pytest.mark.slow
def test_from_celeba_to_the_study(celeba, weights):
    """The three commands of the README."""
    labels = celeba.parent / "parsed"
    facevae(
        "parse-masks",
        "--images",
        celeba / "Img" / "img_align_celeba",
        "--out",
        labels,
        "--weights",
        weights,
        "--any-weights",
    )
    facevae(*command(celeba, "--allow-subset", labels=labels))
    facevae(
        "ablate",
        "--data",
        celeba.parent / "store",
        "--out",
        celeba.parent / "sweep",
        "--hypotheses",
        "H9",
        *TINY,
    )
    record = json.loads((labels / "parsing.json").read_text())
    for path in ("sweep.json", "H9/seed0/config.json"):
        assert json.loads((celeba.parent / "sweep" / path).read_text())["data_source"]["parsing"] == record
    assert record["weights_sha256"] in (celeba.parent / "sweep" / "report.html").read_text()


def hq_command(root, *options):
    return [
        "pack",
        "celebamask-hq",
        "--root",
        root,
        "--size",
        SIZE,
        "--out",
        root.parent / "store",
        "--allow-subset",
        *options,
    ]


def test_celebamask_hq_keeps_test_faces_in_the_test_split(faces, packed, tmp_path):
    """A face is in the split that CelebA has it in, wherever it stands in CelebAMask-HQ."""
    order = np.random.default_rng(2).permutation(len(faces.names)).tolist()
    root = drawn_celeba.celebamask_hq(faces, tmp_path / "hq", order)
    assert "24 faces of 36 x 36 pixels (8 train, 8 val, 8 test)" in facevae_here(*hq_command(root)).stdout
    store = FaceStore(tmp_path / "store").verify()
    splits = packed.index.set_index("name")["split"]
    assert (
        list(store.index["split"]) == [splits[faces.names[i]] for i in order]
        and store.manifest.scheme == "celebamask-hq"
    )
    assert (store.attributes.to_numpy() == (faces.values[order] == 1)).all()
    places = ((np.arange(SIZE) + 0.5) * 178 / SIZE).astype(int)
    assert (store.labels == faces.labels[order][:, 20:198][:, places[:, None], places]).all()


def test_celebamask_hq_without_its_mapping_and_with_bad_masks(faces, tmp_path):
    root = drawn_celeba.celebamask_hq(faces, tmp_path / "hq", range(24))
    base = root / "CelebAMask-HQ"
    (base / "CelebA-HQ-to-CelebA-mapping.txt").rename(base / "mapping.txt")
    said = refused(*hq_command(root))
    assert "is not complete" in said and "CelebA-HQ-to-CelebA-mapping.txt" in said
    (base / "mapping.txt").rename(base / "CelebA-HQ-to-CelebA-mapping.txt")
    parts = base / "CelebAMask-HQ-mask-anno" / "0"
    Image.new("L", (178, 100)).save(parts / "00004_skin.png")
    for path in parts.glob("00007_*.png"):
        path.unlink()
    said = refused(*hq_command(root))
    assert (
        "7.jpg: no label map: there is no part of it" in said
        and "4.jpg: the parts have another size than their image: '00004_skin.png' is 178 x 100" in said
    )
    assert "22 faces" in facevae_here(*hq_command(root, "--max-bad", 0.1)).stdout
    shutil.rmtree(tmp_path / "store")
    arguments = [part for part in hq_command(root) if part != "--allow-subset"]
    assert "has 24 of CelebAMask-HQ's 30,000 faces" in refused(*arguments)
