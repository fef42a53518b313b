"""One HTML page about runs, steerings and evaluations: what it shows, and how that is written."""
