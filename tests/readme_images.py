"""Makes the small images of README.md: a strip of drawn faces, and what the five notebooks open with.

Run as a program after the five notebooks were executed. Only drawn faces are shown.
"""

import base64
import io
from pathlib import Path

from check_code import ROOT, read
from PIL import Image

IMAGES = ROOT / "nbs" / "images"
FIVE = {
    "store": "03_data/02_store",
    "vae": "08_model/04_vae",
    "losses": "08_model/05_losses",
    "trainer": "09_training/04_trainer",
    "statistics": "11_analysis/01_statistics",
}


def first_image(notebook: Path) -> Image.Image:
    """The first image among the outputs of a notebook."""
    for cell in read(notebook)["cells"]:
        for output in cell.get("outputs", ()):
            for kind in ("image/jpeg", "image/png"):
                if kind in output.get("data", {}):
                    data = base64.b64decode("".join(output["data"][kind]))
                    return Image.open(io.BytesIO(data)).convert("RGB")
    raise SystemExit(f"{notebook.name} shows no image: execute it first")


def strip(count: int = 8, size: int = 144) -> Image.Image:
    """Drawn faces above, below them pasted by the masks that the small model of the package predicts."""
    from facevae import FaceVAE, draw_faces

    faces = draw_faces(range(100, 100 + count), size=size).images.numpy()
    model = FaceVAE.from_pretrained("drawn-faces")
    originals = [Image.fromarray(face) for face in faces]
    pasted = [model.reconstruct(face).predicted for face in originals]
    sheet = Image.new("RGB", (count * size, 2 * size))
    for row, images in enumerate((originals, pasted)):
        for column, image in enumerate(images):
            sheet.paste(image.resize((size, size)), (column * size, row * size))
    return sheet


if __name__ == "__main__":
    strip().save(IMAGES / "strip.jpg", quality=85)
    for name, notebook in FIVE.items():
        image = first_image(ROOT / "nbs" / f"{notebook}.ipynb")
        image.thumbnail((480, 480), Image.Resampling.LANCZOS)
        image.save(IMAGES / f"{name}.jpg", quality=80)
