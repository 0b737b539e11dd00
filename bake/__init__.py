"""bake: a compiler from steering to weights."""

__all__ = ["__version__"]

__version__ = "0.1.0"
