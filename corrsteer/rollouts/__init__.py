"""Completions of a task, graded."""
