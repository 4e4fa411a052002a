"""Views are judged together, and each image by itself all the same."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from facevae.data.loader import Batches
from facevae.data.store import FaceStore
from facevae.metrics.image import compute_metrics, compute_view_metrics, load_lpips
from facevae.model.vae import FaceVAE, ModelConfig
from facevae.training.evaluation import evaluate, image_views

FREE = {
    "view",
    "_unsafe_view",
    "slice",
    "expand",
    "unsqueeze",
    "split",
    "permute",
    "t",
    "transpose",
    "select",
}
FREE |= {"alias", "detach", "unbind", "split_with_sizes", "as_strided", "empty", "new_zeros", "lift_fresh"}


class CountOperations(TorchDispatchMode):
    """Counts what would start work on a device: every operation but those that only look at a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().split("::")[1].split(".")[0] not in FREE
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def faces():
    """Originals (B, 3, H, W), reconstructions, masks (B, 1, H, W) and logits of predicted masks."""
    generator = torch.Generator().manual_seed(0)
    target = torch.nn.functional.avg_pool2d(torch.rand(5, 3, 77, 77, generator=generator), 6, 1)
    recon = (target + 0.05 * torch.randn(target.shape, generator=generator)).clamp(0, 1)
    mask, logits = (
        torch.rand(5, 1, 72, 72, generator=generator),
        torch.randn(5, 1, 72, 72, generator=generator),
    )
    return target, recon, mask, logits


def test_views_that_are_judged_together_get_the_numbers_that_each_gets_alone(faces):
    target, recon, mask, logits = faces
    views, lpips = image_views(target, recon, mask, logits), load_lpips()
    together = compute_view_metrics(views=views, target=target, lpips=lpips)
    for view, (pred, weight) in views.items():
        for row in range(len(target)):
            part = slice(row, row + 1)
            weights = None if weight is None else weight[part]
            alone = compute_metrics(pred=pred[part], target=target[part], weight=weights, lpips=lpips)
            for name, value in alone.items():
                torch.testing.assert_close(together[view][name][part], value, rtol=2e-5, atol=1e-6)


def test_four_views_cost_few_more_operations_than_one(faces):
    """On an accelerator, starting an operation is what takes the time."""
    target, recon, mask, logits = faces
    lpips, counts = load_lpips(), []
    views = image_views(target, recon, mask, logits)
    for some in ({"raw": views["raw"]}, views):
        with torch.no_grad(), CountOperations() as operations:
            compute_view_metrics(views=some, target=target, lpips=lpips)
        counts.append(operations.count)
    assert counts[1] < 1.5 * counts[0], counts


def test_rows_do_not_depend_on_how_the_faces_are_batched(store):
    torch.manual_seed(0)
    vae = FaceVAE(ModelConfig(size=36, width=0.125, latent_dim=8))
    faces, lpips = FaceStore(store), load_lpips()
    one, other = (
        evaluate(vae, Batches(faces, "test", batch_size=size), lpips=lpips) for size in (1, len(faces))
    )
    assert one[["image", "view"]].equals(other[["image", "view"]])
    assert list(one["image"]) == list(
        np.repeat(faces.index["name"][faces.rows("test")], one["view"].nunique())
    )
    columns = list(one.columns[2:])
    np.testing.assert_allclose(one[columns].astype(float), other[columns].astype(float), rtol=1e-4, atol=1e-6)
