"""The demo: a small model with a hidden variable, SAEs for it, and the main job run on them."""

from corrsteer.demo.run import load
from corrsteer.demo.sums import splits

__all__ = ["load", "splits"]
