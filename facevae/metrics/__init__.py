"""Per-image metrics, masked or not, and the tables that an evaluation writes."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "metrics.tables": "METRICS VIEWS load_metrics load_latents",
        "metrics.image": "compute_metrics compute_view_metrics ssim ms_ssim vif l1 l2 psnr sharpness delta_e mask_iou load_lpips",
    },
)
