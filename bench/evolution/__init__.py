"""A laboratory of populations in one process: arms by name, seeds, intervals, bytes. `python -m bench.evolution`."""
