"""A race of language models for equal time, with equal parameters, on equal bytes. `python -m bench.race`."""
