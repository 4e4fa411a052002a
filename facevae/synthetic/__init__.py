"""Faces drawn from parameters, with exact label maps: the data of the demo and the tests."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "synthetic.parameters": "sample_parameters",
        "synthetic.render": "SyntheticSource draw_faces draw_from_parameters",
    },
)
