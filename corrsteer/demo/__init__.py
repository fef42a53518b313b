"""The demo: a small model with a hidden variable, SAEs for it, and the main job run on them."""

from corrsteer.demo.run import load, tasks

__all__ = ["load", "tasks"]
