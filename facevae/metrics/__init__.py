"""Per-image metrics, masked or not, and the tables that an evaluation writes."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "metrics.tables": "METRICS VIEWS load_distances load_latents load_metrics",
        "metrics.maps": "metric",
        "metrics.features": "kernel_distance load_features",
        "metrics.image": "compute_metrics compute_view_metrics delta_e l1 l2 load_lpips mask_iou ms_ssim psnr sharpness ssim vif",
    },
)
