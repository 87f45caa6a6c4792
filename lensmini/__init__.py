"""The Lens text-to-image recipe (arXiv 2605.21573) as small pieces: model, objectives, samplers, data and rewards.

Importing this package does nothing and imports nothing; take each piece from its own module, for example
``from lensmini.nn import LensTransformer``.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
