"""The version, which everything that stamps a result reads."""

__version__ = "0.1.0"
