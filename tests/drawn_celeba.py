"""CelebA and CelebAMask-HQ in every layout in which they go about, made of drawn faces."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from facevae.data.labels import LABEL_CLASSES, LABEL_SCHEMES
from facevae.synthetic.render import draw_faces

ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair "
    "Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup "
    "High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose "
    "Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat "
    "Wearing_Lipstick "
    "Wearing_Necklace Wearing_Necktie Young"
).split()
RECORD = {"scheme": "face-parsing", "parser": "drawn", "weights_sha256": "00" * 32}


class Faces:
    """Drawn faces of 178 x 218 pixels that pass for images of CelebA.

    numbers: their names there, as many of each split (0 train, 1 val, 2 test), the first ones that it has.
    values: attributes, -1 or 1.
    """

    def __init__(self, of_each_split: int, seed: int = 0):
        self.numbers = [first + i for first in (1, 162_771, 182_638) for i in range(of_each_split)]
        self.splits = np.repeat([0, 1, 2], of_each_split)
        drawn = draw_faces(range(len(self.numbers)), seed=seed, size=218)
        self.images, self.labels = drawn.images.numpy()[:, :, 20:198], drawn.labels.numpy()[:, :, 20:198]
        self.values = np.random.default_rng(seed).choice([-1, 1], (len(self.numbers), 40))
        self.names = [f"{number:06d}.jpg" for number in self.numbers]


def list_text(names, values) -> str:
    """A list of attributes as the authors write it, with its two spaces before a 1."""
    rows = "".join(f"{name} {' '.join(f'{value:2d}' for value in row)}\n" for name, row in zip(names, values))
    return f"{len(names)}\n{' '.join(ATTRIBUTES)} \n{rows}"


def write_tables(faces: Faces, attributes: Path, partition: Path, order=None) -> None:
    """The two tables, as lists or as CSV files. order: of the rows."""
    order = range(len(faces.names)) if order is None else order
    names, values, splits = (
        [faces.names[i] for i in order],
        faces.values[list(order)],
        faces.splits[list(order)],
    )
    for path in (attributes, partition):
        path.parent.mkdir(parents=True, exist_ok=True)
    if attributes.suffix == ".csv":
        pd.DataFrame(values, columns=ATTRIBUTES).assign(image_id=names)[["image_id", *ATTRIBUTES]].to_csv(
            attributes, index=False
        )
        pd.DataFrame({"image_id": names, "partition": splits}).to_csv(partition, index=False)
    else:
        attributes.write_text(list_text(names, values))
        partition.write_text("".join(f"{name} {split}\n" for name, split in zip(names, splits)))


def write_images(faces: Faces, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, image in zip(faces.names, faces.images):
        Image.fromarray(image).save(folder / name, quality=90)


def write_labels(faces: Faces, folder: Path, record: dict | None = RECORD) -> Path:
    """Label maps as facevae parse-masks writes them, with their record."""
    folder.mkdir(parents=True)
    for name, labels in zip(faces.names, faces.labels):
        Image.fromarray(labels).save(folder / name.replace(".jpg", ".png"))
    if record:
        (folder / "parsing.json").write_text(json.dumps(record))
    return folder


def zip_images(folder: Path) -> None:
    """Turn a folder of images into the zip file that it came in."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{folder.name}/{path.name}")
            path.unlink()
    folder.rmdir()


def official(faces: Faces, root: Path, folder: str = "Img/img_align_celeba", **options) -> Path:
    write_images(faces, root / folder)
    write_tables(
        faces, root / "Anno" / "list_attr_celeba.txt", root / "Eval" / "list_eval_partition.txt", **options
    )
    return root


def official_zip(faces: Faces, root: Path) -> Path:
    official(faces, root)
    zip_images(root / "Img" / "img_align_celeba")
    return root


def official_twice_unpacked(faces: Faces, root: Path) -> Path:
    return official(faces, root, "Img/img_align_celeba/img_align_celeba")


def torchvision(faces: Faces, root: Path, folder: str = "celeba") -> Path:
    write_images(faces, root / folder / "img_align_celeba")
    write_tables(faces, root / folder / "list_attr_celeba.txt", root / folder / "list_eval_partition.txt")
    return root


def torchvision_folder(faces: Faces, root: Path) -> Path:
    """The folder inside torchvision's root."""
    return torchvision(faces, root, "")


def kaggle(faces: Faces, root: Path, folder: str = "img_align_celeba/img_align_celeba") -> Path:
    write_images(faces, root / folder)
    write_tables(faces, root / "list_attr_celeba.csv", root / "list_eval_partition.csv")
    return root


def kaggle_flat(faces: Faces, root: Path) -> Path:
    return kaggle(faces, root, "img_align_celeba")


CELEBA = {
    "official": official,
    "official, zip": official_zip,
    "official, twice unpacked": official_twice_unpacked,
    "torchvision": torchvision,
    "torchvision, inside": torchvision_folder,
    "kaggle": kaggle,
    "kaggle, flat": kaggle_flat,
}


def celebamask_hq(faces: Faces, root: Path, order) -> Path:
    """CelebAMask-HQ of square cuts of the faces, parts at half their size. order: of the faces."""
    base = root / "CelebAMask-HQ"
    for folder in ("CelebA-HQ-img", "CelebAMask-HQ-mask-anno/0"):
        (base / folder).mkdir(parents=True)
    for number, i in enumerate(order):
        Image.fromarray(faces.images[i, 20:198]).resize((356, 356)).save(
            base / "CelebA-HQ-img" / f"{number}.jpg", quality=90
        )
        for part in LABEL_SCHEMES["celebamask-hq"][1:]:
            if (inside := faces.labels[i, 20:198] == LABEL_CLASSES.index(part)).any():
                Image.fromarray(np.repeat(inside[..., None] * np.uint8(255), 3, 2)).save(
                    base / "CelebAMask-HQ-mask-anno" / "0" / f"{number:05d}_{part}.png"
                )
    (base / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx\t\torig_idx\torig_file\n"
        + "".join(
            f"{number:<12d}{faces.numbers[i] - 1:<10d}{faces.names[i]}\n" for number, i in enumerate(order)
        )
    )
    (base / "CelebAMask-HQ-attribute-anno.txt").write_text(
        list_text([f"{number}.jpg " for number in range(len(order))], faces.values[list(order)])
    )
    return root
