"""corrsteer from end to end on a real language model, SmolLM2-135M-Instruct: `python -m examples.smollm2 --help`."""
