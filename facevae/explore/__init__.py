"""The explorer: sliders over a latent space, as a widget and as a page."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "explore.explorer": "LatentExplorer",
        "explore.server": "open_explorer serve_explorer",
    },
)
