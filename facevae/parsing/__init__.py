"""Label maps for photographs, by a face parser."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "parsing.label_folder": "parse_folder load_parser",
    },
)
