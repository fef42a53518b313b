"""The benchmarks that are known by name, a file each."""
