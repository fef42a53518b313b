"""The language model: its hook points, which tokens a pass reads, capture of the residual stream, and generation."""
