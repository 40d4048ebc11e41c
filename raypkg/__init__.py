"""effray: gradient-based, data-efficient training on Ray."""

__version__ = "0.1.0"
