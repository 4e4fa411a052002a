"""A made-up sweep directory: the files a real sweep leaves, with invented numbers and no training.

Tables, figures and the report are tested on it, because only invented numbers have known answers.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

LOSSES = {
    "ssim+l1": ("H1", "H2"),
    "l1": ("H3", "H4"),
    "ssim": ("H5", "H6"),
    "l2": ("H7", "H8"),
    "ssim+l2": ("H10", "H9"),
}
HYPOTHESES = sorted(
    (
        {"name": name, "terms": terms, "mask": bool(mask)}
        for terms, pair in LOSSES.items()
        for mask, name in enumerate(pair)
    ),
    key=lambda h: int(h["name"][1:]),
)
WEIGHTS = {"ssim": 1.0, "l1": 4.0, "l2": 100.0, "kl": 1e-3, "mask_bce": 1.0, "mask_dice": 1.0}
ABSENT = {"lpips": "its backbone weights could not be downloaded (no network)"}


def image_metrics(terms: str, mask: bool, seed: int, images: int, lpips: bool) -> pd.DataFrame:
    """Metrics of `images` invented images: harder ones are harder for every loss, masks help on the face."""
    difficulty = np.random.default_rng(7).normal(0, 1, images)  # the same images for every hypothesis
    noise = np.random.default_rng([seed, len(terms), sum(map(ord, terms)), mask])
    parts = set(terms.split("+"))
    rows = []
    for view in ("raw", "composite", "face") + (("predicted",) if mask else ()):
        error = 0.060 + 0.004 * ("l1" not in parts) - 0.004 * ("l2" in parts) - 0.003 * (len(parts) > 1)
        error *= {"raw": 1.6 if mask else 1.1, "composite": 0.45, "face": 1.0, "predicted": 0.5}[view]
        error *= 0.9 if mask and view != "raw" else 1.0
        error = error * np.exp(0.12 * difficulty + 0.03 * noise.normal(size=images) + 0.01 * noise.normal())
        structure = (
            0.46
            - 0.07 * ("ssim" in parts)
            - 0.03 * (mask and view != "raw")
            + 0.12 * (mask and view == "raw")
        )
        structure = (
            structure
            * (0.45 if view in ("composite", "predicted") else 1)
            * np.exp(0.1 * difficulty + 0.03 * noise.normal(size=images))
        )
        l2 = 1.42 * error
        row = dict(
            image=[f"{i:06d}.jpg" for i in range(images)],
            view=view,
            ssim=1 - structure,
            ms_ssim=1 - 0.4 * structure,
            vif=0.2 + 0.3 * (1 - structure),
            l1=error,
            l2=l2,
            psnr=-20 * np.log10(l2),
            sharpness=0.35 + 0.3 * ("ssim" in parts) + 0.02 * noise.normal(size=images),
            delta_e=90 * error * (1.25 if parts == {"ssim"} else 1),
            mask_iou=0.9 - 0.02 * np.abs(difficulty) if view == "predicted" else np.nan,
        )
        if lpips:
            row["lpips"] = 0.5 * structure
        rows.append(pd.DataFrame(row))
    table = pd.concat(rows, ignore_index=True)
    table.attrs = {"ms_ssim": {"window": 5, "scales": 4}, "absent": {} if lpips else dict(ABSENT)}
    return table


def log_lines(terms: str, mask: bool, seed: int, steps: int) -> list[str]:
    """Invented train and validation lines of a log.jsonl."""
    noise = np.random.default_rng([seed, mask, sum(map(ord, terms))])
    names = terms.split("+") + ["kl"] + (["mask_bce", "mask_dice"] if mask else [])
    start = {"ssim": 1.9, "l1": 0.25, "l2": 0.09, "kl": 5.0, "mask_bce": 0.7, "mask_dice": 0.5}
    end = {"ssim": 1.35, "l1": 0.07, "l2": 0.011, "kl": 240.0, "mask_bce": 0.12, "mask_dice": 0.05}
    lines = []
    for step in range(10, steps + 1, 10):
        done = 1 - np.exp(-4 * step / steps)
        for kind in ("train", "validation")[: 2 if step % 50 == 0 else 1]:
            raw = {
                n: (start.get(n, 1) + (end.get(n, 0.2) - start.get(n, 1)) * done)
                * (1 + (0.03 if kind == "train" else 0.005) * noise.normal())
                for n in names
            }
            weighted = {n: WEIGHTS.get(n, 1.0) * v for n, v in raw.items()}
            line = {
                "kind": kind,
                "step": step,
                "loss": sum(weighted.values()),
                "raw": raw,
                "weighted": weighted,
            }
            if kind == "train":
                line["images_per_second"] = 95 + 5 * noise.normal()
            lines.append(json.dumps(line))
    return lines


def latents(terms: str, mask: bool, seed: int, dimensions: int = 64) -> pd.DataFrame:
    """Invented use of latent dimensions: sums of losses use more of them."""
    noise = np.random.default_rng([seed, mask, sum(map(ord, terms))])
    used = 18 + 9 * len(terms.split("+")) + 4 * mask
    variance = noise.permutation(
        1 / (1 + np.exp((np.arange(dimensions) - used + noise.normal()) / 2.5)) * 0.98 + 1e-5
    )
    return pd.DataFrame(
        {
            "dimension": np.arange(dimensions),
            "kl": -0.5 * np.log(1 - variance),
            "mean_variance": variance,
            "noise": 1 - variance,
            "active": (variance > 0.01).astype(np.int64),
        }
    )


def distances(mask: bool, seed: int) -> pd.DataFrame:
    """Invented distances of samples from real faces: the prior is furthest, other real faces are at none."""
    noise = np.random.default_rng([seed, mask])
    kid = {"prior": 1.3, "gaussian": 0.45, "posterior": 0.42, "reconstruction": 0.41, "real": 0.0}
    table = pd.DataFrame({"source": list(kid), "view": "face" if mask else "raw"})
    table["kid"] = np.array(list(kid.values())) + 0.005 * noise.normal(size=len(kid))
    return table.assign(standard_error=0.01, count=24, test_faces=24)


def write_run(
    folder: Path,
    name: str,
    terms: str,
    mask: bool,
    seed: int,
    images: int = 24,
    steps: int = 400,
    lpips: bool = False,
    size: int = 72,
) -> Path:
    """A finished run's directory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "hypothesis": name,
        "terms": terms,
        "mask": mask,
        "seed": seed,
        "size": size,
        "width": 0.25,
        "batch_size": 16,
        "steps": steps,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "status.json").write_text(
        json.dumps(
            {
                "state": "done",
                "step": steps,
                "steps": steps,
                "seconds": 40.0 + seed,
                "device": "CPU, 2 threads",
                "versions": {"facevae": "0.1.0", "torch": "2.11.0"},
            }
        )
    )
    (folder / "log.jsonl").write_text("\n".join(log_lines(terms, mask, seed, steps)) + "\n")
    image_metrics(terms, mask, seed, images, lpips).to_parquet(folder / "metrics.parquet")
    latents(terms, mask, seed).to_parquet(folder / "latents.parquet", index=False)
    distances(mask, seed).to_parquet(folder / "distances.parquet", index=False)
    return folder


def make_sweep(
    path: Path,
    hypotheses: list[dict] = HYPOTHESES,
    seeds=(0, 1),
    failed=("H4", 1),
    missing=("H7", 1),
    **options,
) -> Path:
    """A sweep directory with every hypothesis and seed; one run failed, and one was never started."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "sweep.json").write_text(
        json.dumps(
            {
                "hypotheses": list(hypotheses),
                "seeds": list(seeds),
                "preset": "quick",
                "data": "stores/madeup",
                "settings": {"steps": 400, "width": 0.25},
                "data_source": {"kind": "synthetic", "count": 240, "seed": 0, "size": 72},
            }
        )
    )
    for requested in hypotheses:
        for seed in seeds:
            folder = path / requested["name"] / f"seed{seed}"
            if (requested["name"], seed) == missing:
                continue
            write_run(folder, requested["name"], requested["terms"], requested["mask"], seed, **options)
            if (requested["name"], seed) == failed:
                (folder / "metrics.parquet").unlink()
                (folder / "status.json").write_text(
                    json.dumps(
                        {
                            "state": "failed",
                            "step": 130,
                            "steps": 400,
                            "seconds": 14.0,
                            "error": "The loss term 'l1' became nan at step 130. Lower the learning rate.",
                        }
                    )
                )
    return path


def made_up_samples(runs: pd.DataFrame, count: int = 2, side: int = 36) -> dict:
    """Discs for faces, as every finished hypothesis would draw them: what `visual_comparison` takes."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij"), -1)
    mask = np.stack(
        [
            1
            / (
                1
                + np.exp(
                    20 * (np.hypot(*((grid - rng.normal(0, 0.1, 2)) / (0.8, 0.6)).transpose(2, 0, 1)) - 1)
                )
            )
            for _ in range(count)
        ]
    )
    faces = rng.uniform(0.4, 0.9, (count, 1, 1, 3)) * (1 - 0.3 * grid[None, ..., :1])
    original = (
        mask[..., None] * faces
        + (1 - mask[..., None])
        * (0.5 + 0.4 * np.sin(9 * grid.sum(-1) * rng.uniform(0.5, 1, (count, 1, 1))))[..., None]
    )
    original = original.clip(0, 1)
    samples = {"original": original, "mask": mask, "recon": {}, "predicted": {}, "predicted_mask": {}}
    for row in runs[runs.state == "done"].drop_duplicates("hypothesis").itertuples():
        blur = np.clip(faces * mask[..., None] + 0.5 * (1 - mask[..., None]), 0, 1)
        samples["recon"][row.hypothesis] = blur
        if row.mask:
            soft = mask**0.8
            samples["predicted_mask"][row.hypothesis] = soft
            samples["predicted"][row.hypothesis] = np.clip(
                blur * soft[..., None] + original * (1 - soft[..., None]), 0, 1
            )
    return samples
