"""Label maps for photos, by a face parser."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "parsing.parser": "FaceParser",
        "parsing.label_folder": "load_parser parse_folder",
    },
)
