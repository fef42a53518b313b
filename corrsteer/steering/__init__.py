"""The `Steering` artefact, and the hooks that add it to a model."""
