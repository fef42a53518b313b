"""What streaming sums say of features: scores, intervals, tests, and how many samples they need."""
