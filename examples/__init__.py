"""Examples that run: each is a package with a command of its own."""
