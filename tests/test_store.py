"""Stores under fire: packs that are killed, disks that are full, files that are damaged or hostile."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import facevae_here, rewrite
from PIL import Image

import facevae.data.packing
from facevae.core import FaceVAEError
from facevae.data.card import store_card
from facevae.data.labels import LABEL_CLASSES
from facevae.data.packing import SPLIT_SHARES, FaceBatch, Skipped, identity_splits, pack
from facevae.data.sources import FolderSource
from facevae.data.store import FaceStore

SIZE = 36


def layout() -> np.ndarray:
    """A label map with every part in its place, uint8 (36, 36)."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for name, top, bottom, left, right in (
        ("hair", 4, 12, 8, 28),
        ("skin", 10, 32, 8, 28),
        ("l_brow", 13, 14, 11, 16),
        ("r_brow", 13, 14, 20, 25),
        ("l_eye", 15, 17, 11, 16),
        ("r_eye", 15, 17, 20, 25),
        ("nose", 17, 23, 16, 20),
        ("u_lip", 25, 27, 14, 22),
    ):
        labels[top:bottom, left:right] = LABEL_CLASSES.index(name)
    return labels


class Plain:
    """Faces without any drawing: fast, and the same bytes for the same count."""

    size, scheme, notes = SIZE, "face-parsing", []

    def __init__(self, count: int = 64, hook=lambda number: None):
        self.count, self.hook = count, hook

    def __len__(self):
        return self.count

    def describe(self):
        return {"kind": "plain", "count": self.count}

    def __iter__(self):
        for start in range(0, self.count, 8):
            self.hook(start // 8)
            numbers = range(start, min(start + 8, self.count))
            images = np.stack(
                [np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8) for i in numbers]
            )
            yield FaceBatch([f"{i}.png" for i in numbers], images, np.stack([layout()] * len(numbers)))


def message(function, *args, **options) -> str:
    """The text of the error that a user reads: one paragraph."""
    with pytest.raises(FaceVAEError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def store(tmp_path):
    return pack(Plain(), tmp_path / "store", progress=False)


# Imports take seconds, so one process imports and every pack is a fork of it.
FORKS = """
    import os, sys, time
    sys.path.insert(0, sys.argv[1])
    import facevae.atomic_io, facevae.data.packing as packing
    from test_store import Plain

    def run(moment, out):
        def hang(*_):
            os.write(1, f"ready {os.getpid()} {out}\\n".encode())
            time.sleep(120)

        if moment == "checksums": packing.file_digest = hang
        if moment == "manifest": packing.write_object = hang
        if moment == "rename":
            replace = os.replace
            facevae.atomic_io.os.replace = (
                lambda source, target: hang() if str(target) == out else replace(source, target)
            )
        batch = int(moment) if moment.isdigit() else -1
        try:
            packing.pack(Plain(hook=lambda number: hang() if number == batch else None), out, progress=False)
        except KeyboardInterrupt:
            return 130
        except SystemExit as stopped:
            return stopped.code
        return 0

    cases = list(zip(sys.argv[2::2], sys.argv[3::2]))
    for moment, out in cases:
        if os.fork() == 0:
            code = 1
            try: code = run(moment, out)
            finally: os._exit(code)
    for _ in cases:
        pid, status = os.wait()
        os.write(1, f"ended {pid} {os.waitstatus_to_exitcode(status)}\\n".encode())
"""


def test_killed_interrupted_and_terminated_packs(tmp_path):
    """A pack that dies at any moment leaves no store; the next one works and removes what it left."""
    whole = pack(Plain(), tmp_path / "whole", progress=False)
    cases = [(moment, signal.SIGKILL) for moment in ("0", "5", "checksums", "manifest", "rename")] + [
        ("3", signal.SIGINT),
        ("3", signal.SIGTERM),
    ]
    outs = [tmp_path / f"{moment}-{how.name}" / "store" for moment, how in cases]
    for out in outs:
        out.parent.mkdir()
    arguments = [str(argument) for (moment, _), out in zip(cases, outs) for argument in (moment, out)]
    forks = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FORKS), str(Path(__file__).parent), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    ready = [forks.stdout.readline().split() for _ in cases]
    assert {line[0] for line in ready} == {"ready"}
    pids = {out: int(pid) for _, pid, out in ready}
    for (moment, how), out in zip(cases, outs):
        living = list(out.parent.iterdir())
        assert (
            len(living) == 1 and living[0].name.startswith(".store.") and living[0].name.endswith(".partial")
        )
        with pytest.raises(FaceVAEError, match="is not a store"):
            FaceStore(living[0])
        if moment == "5":
            pack(Plain(8), out, progress=False)
            assert living[0] in out.parent.iterdir(), "the directory of a living pack is left alone"
            shutil.rmtree(out)
        os.kill(pids[str(out)], how)
        code = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how]
        assert forks.stdout.readline().split() == ["ended", str(pids[str(out)]), str(code)]
        assert list(out.parent.iterdir()) == (living if how == signal.SIGKILL else []), (
            f"{how.name} at {moment}"
        )
        assert "There is no store" in message(FaceStore, out)
        again = pack(Plain(), out, progress=False).verify()
        assert list(out.parent.iterdir()) == [out], "the leftovers are gone"
        assert again.fingerprint == whole.fingerprint
    assert forks.wait(20) == 0


def test_leftovers_of_others_are_left_alone(tmp_path):
    for name in (".store.x.partial", ".store2.x.partial", ".storex.partial", ".other.x.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images.npy").write_text("")
    (tmp_path / ".store.fresh.partial").mkdir()
    (tmp_path / ".store.link.partial").symlink_to(tmp_path / ".other.x.partial")
    pack(Plain(8), tmp_path / "store", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".other.x.partial",
        ".store.fresh.partial",
        ".store.link.partial",
        ".store2.x.partial",
        ".storex.partial",
        "store",
    ]
    assert (tmp_path / ".other.x.partial" / "images.npy").exists()


def test_failed_pack_keeps_the_old_store(store, tmp_path):
    def stop(number):
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(Plain(hook=stop), store.path, overwrite=True, progress=False)
    assert list(tmp_path.iterdir()) == [store.path]
    assert FaceStore(store.path).verify().fingerprint == store.fingerprint


def test_threads_can_pack(tmp_path):
    """Signal handlers belong to the main thread; packing does not."""
    thread = threading.Thread(target=pack, args=(Plain(8), tmp_path / "store"), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert len(FaceStore(tmp_path / "store")) == 8


def test_disk_full_is_foreseen(tmp_path):
    class Huge(Plain):
        def __len__(self):
            return 10**12

    said = message(pack, Huge(), tmp_path / "store", progress=False)
    assert "not enough space" in said and "MB are needed" in said and "MB are free" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["append", "header", "index", "manifest"])
def test_disk_full_while_writing(tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    target, name = {
        "append": (facevae.data.packing.ArrayWriter, "append"),
        "header": (facevae.data.packing.ArrayWriter, "__exit__"),
        "index": (facevae.data.packing.pd.DataFrame, "to_parquet"),
        "manifest": (facevae.data.packing, "write_object"),
    }[where]
    monkeypatch.setattr(target, name, full)
    assert "not enough space" in message(pack, Plain(), tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [16, 200, 328])
def test_really_full_disk(tmp_path, monkeypatch, kilobytes):
    """64 faces need 324 KB and some more for the index and the manifest."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        usage = shutil.disk_usage(disk)
        monkeypatch.setattr(
            facevae.data.packing.shutil, "disk_usage", lambda path: usage._replace(free=10**12)
        )
        assert "not enough space" in message(pack, Plain(), disk / "store", progress=False)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "index.parquet"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_verify_finds_a_flipped_bit(store, name, place):
    path = store.path / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    assert name in message(lambda: FaceStore(store.path).verify())


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("length", [0, 5, 127, 128, 5000, -1])
def test_truncated_arrays_do_not_open(store, name, length):
    path = store.path / name
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    assert name in message(FaceStore, store.path)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "index.parquet", "manifest.json"])
def test_missing_files(store, name):
    (store.path / name).unlink()
    assert name in message(FaceStore, store.path)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "index.parquet", "manifest.json"])
@pytest.mark.parametrize("kind", ["pickle", "objects", "npz"])
def test_planted_payload_never_runs(store, tmp_path, name, kind):
    executed, path = tmp_path / "executed", store.path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(executed)))
    elif kind == "objects":
        array = np.empty((64, SIZE, SIZE, 3) if name == "images.npy" else (64, SIZE, SIZE), dtype=object)
        array[:] = (
            [[[Payload(executed)] * array.shape[2]] * SIZE] * 64 if array.ndim == 3 else Payload(executed)
        )
        with open(path, "wb") as file:
            np.save(file, array, allow_pickle=True)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", pickle.dumps(Payload(executed)))
    assert name in message(lambda: FaceStore(store.path).index)
    message(lambda: FaceStore(store.path).verify())
    assert not executed.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 1e308},
        {"count": 2**63},
        {"count": -1},
        {"format": 99},
        {"source": {"kind": ["a"]}, "extra": 1},
        {"sha256": {"/etc/passwd": "0" * 64}},
        {"skipped": "all"},
    ],
)
def test_hostile_manifest(store, change):
    rewrite(store.path / "manifest.json", **change)
    assert "is not a manifest" in message(FaceStore, store.path)


def test_manifest_that_is_no_json(store):
    for text in ("", "null", "[]", "{" * 10_000, "\x00", '{"format": 1'):
        (store.path / "manifest.json").write_text(text)
        assert "is not a manifest" in message(FaceStore, store.path)


@pytest.fixture
def folders(tmp_path):
    """Forty images with label maps, and the way to spoil them."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)).resize((72, 72)).save(
            images / f"{i:02d}.jpg"
        )
        Image.fromarray(layout()).resize((72, 72), Image.Resampling.NEAREST).save(labels / f"{i:02d}.png")
    return images, labels


def spoil(images: Path, labels: Path, how: str) -> None:
    image, label = images / "07.jpg", labels / "07.png"
    if how == "empty image":
        image.write_bytes(b"")
    if how == "truncated image":
        os.truncate(image, image.stat().st_size // 2)
    if how == "text":
        image.write_text("<html>quota exceeded</html>")
    if how == "broken link":
        image.unlink()
        image.symlink_to("nowhere.jpg")
    if how == "folder":
        image.unlink()
        image.mkdir()
        (image / "inside.txt").write_text("")
    if how == "no label":
        label.unlink()
    if how == "empty label":
        label.write_bytes(b"")
    if how == "truncated label":
        os.truncate(label, 60)
    if how == "label size":
        Image.open(label).resize((36, 36), Image.Resampling.NEAREST).save(label)
    if how == "colour label":
        Image.open(label).convert("RGB").save(label)
    if how == "grey values":
        Image.fromarray(layout() * 10).resize((72, 72), Image.Resampling.NEAREST).save(label)
    if how == "two suffixes":
        shutil.copy(image, images / "07.jpeg")
    if how == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (72, 40)).save(image, exif=exif)
        Image.fromarray(layout()).resize((72, 40), Image.Resampling.NEAREST).save(label)


@pytest.mark.parametrize(
    "how, reason",
    [
        ("empty image", "'07.jpg' has 0 bytes"),
        ("truncated image", "image file is truncated"),
        ("text", "not a JPEG/PNG/WEBP/BMP"),
        ("broken link", "No such file"),
        ("no label", "expected was '07.png'"),
        ("empty label", "'07.png' has 0 bytes"),
        ("truncated label", "'07.png'"),
        ("label size", "36 x 36, and the image is 72 x 72"),
        ("colour label", "has the mode RGB"),
        ("grey values", "outside the scheme 'face-parsing'"),
        ("two suffixes", "07.jpeg and 07.jpg"),
        ("turned", "72 x 40, and the image is 40 x 72"),
    ],
)
def test_bad_inputs_are_named(folders, tmp_path, capsys, how, reason):
    spoil(*folders, how)
    source = FolderSource(*folders, scheme="face-parsing", size=SIZE)
    said = message(pack, source, tmp_path / "store", progress=False)
    assert "07.jp" in said and reason in said and "--max-bad 0.0" in said
    assert not (tmp_path / "store").exists() and not list(tmp_path.glob(".*"))
    store = pack(source, tmp_path / "store", max_bad=0.05).verify()
    assert len(store) == 39 and reason in store.manifest.skipped[0].reason
    assert reason in capsys.readouterr().err, "what was skipped is printed"


def test_rescaled_labels(folders, tmp_path):
    spoil(*folders, "label size")
    assert (
        len(
            pack(
                FolderSource(*folders, "face-parsing", SIZE, rescale_labels=True),
                tmp_path / "store",
                progress=False,
            )
        )
        == 40
    )


def test_one_in_ten_is_too_many_and_one_in_a_hundred_is_not(tmp_path):
    class Some(Plain):
        def __iter__(self):
            for number, faces in enumerate(super().__iter__()):
                yield Skipped("bad.png", "empty file") if number == 1 else faces

        def __len__(self):
            return self.count - 7

    assert "--max-bad 0.1 " in message(pack, Some(17), tmp_path / "store", progress=False)
    assert len(pack(Some(107), tmp_path / "store", progress=False)) == 99


def test_names_stay_inside(folders, tmp_path):
    """Linked folders are not followed, and linked files keep the name they have inside."""
    images, labels = folders
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(images / "00.jpg", outside / "secret.jpg")
    (images / "loop").symlink_to(images)
    (images / "out").symlink_to(outside)
    (images / "01.jpg").unlink()
    (images / "01.jpg").symlink_to(outside / "secret.jpg")
    store = pack(FolderSource(images, labels, "face-parsing", SIZE), tmp_path / "store", progress=False)
    assert list(store.index["name"]) == [f"{i:02d}.jpg" for i in range(40)]


def packed_people(folders, tmp_path, rows: dict[str, list], out: str = "store"):
    """The command on forty faces and a table of these columns: the command, and the store if any."""
    table = pd.DataFrame({"name": [f"{i:02d}.jpg" for i in range(40)], **rows})
    table.to_csv(tmp_path / "people.csv", index=False)
    arguments = ["--images", folders[0], "--labels", folders[1], "--attributes", tmp_path / "people.csv"]
    options = ["--scheme", "face-parsing", "--size", SIZE, "--out", tmp_path / out]
    done = facevae_here("pack", "folder", *arguments, *options)
    return done, None if done.returncode else FaceStore(tmp_path / out)


def test_the_splits_of_a_table(folders, tmp_path):
    splits = ["test", "train", "VAL", "train"] * 10
    done, store = packed_people(folders, tmp_path, {"split": splits, "Hat": [1, 0] * 20})
    assert list(store.index["split"]) == [split.lower() for split in splits] and list(store.attributes) == [
        "Hat"
    ]
    assert "column 'split'" in done.stderr and "column 'split'" in " ".join(store.manifest.notes)
    for word in ("valid", "0", ""):
        done, _ = packed_people(folders, tmp_path, {"split": [word, *splits[1:]]}, "other")
        assert done.returncode == 1 and "The split of '00.jpg'" in done.stderr
        assert "train, val, test" in done.stderr and not (tmp_path / "other").exists()


def test_nobody_is_in_two_splits(folders, tmp_path):
    people = [f"{i // 4:03d}" for i in range(40)]
    done, store = packed_people(folders, tmp_path, {"identity": people})
    index = store.index.assign(person=people)
    assert (index.groupby("person")["split"].nunique() == 1).all() and not len(store.attributes.columns)
    assert index["split"].value_counts().to_dict() == {"train": 32, "val": 4, "test": 4}
    assert "in two splits" in done.stderr and "in two splits" in store_card(store)
    again = packed_people(folders, tmp_path, {"identity": people}, "again")[1]
    assert again.fingerprint == store.fingerprint
    splits = [("train", "test")[int(person) % 2] for person in people]
    _, both = packed_people(folders, tmp_path, {"identity": people, "split": splits}, "both")
    assert list(both.index["split"]) == splits
    torn = {"identity": people, "split": ["train"] * 5 + ["val"] + ["test"] * 34}
    done, _ = packed_people(folders, tmp_path, torn, "torn")
    assert done.returncode == 1 and "'001'" in done.stderr and not (tmp_path / "torn").exists()
    done, _ = packed_people(folders, tmp_path, {"identity": ["", *people[1:]]}, "torn")
    assert done.returncode == 1 and "The identity of '00.jpg'" in done.stderr


def test_a_face_without_a_row_is_left_out_by_name(folders, tmp_path):
    people = [f"{i // 4}" for i in range(40)]
    for folder, suffix in zip(folders, ("jpg", "png")):
        shutil.copy(folder / f"00.{suffix}", folder / f"99.{suffix}")
    done, _ = packed_people(folders, tmp_path, {"identity": people})
    assert done.returncode == 1 and "99.jpg: no attributes: the table of attributes has no row" in done.stderr


@pytest.mark.parametrize("seed", range(20))
def test_whole_people_are_split_near_the_shares(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rng.integers(2, 40), rng.integers(20, 300))
    people = rng.permutation(np.repeat([f"person {i}" for i in range(len(sizes))], sizes)).tolist()
    splits = identity_splits(people)
    assert len(set(zip(people, splits))) == len(sizes), "nobody is in two splits"
    for split, share in SPLIT_SHARES.items():
        assert abs(splits.count(split) - share * len(people)) <= max(1, sizes.max() / 2), split
    moved = rng.permutation(len(people))
    assert identity_splits([people[i] for i in moved]) == [splits[i] for i in moved], "in any order"
