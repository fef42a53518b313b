"""What runs a model steered in one way or another, and compares: selection, scaling, evaluation."""
