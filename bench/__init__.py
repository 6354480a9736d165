"""Benchmarks: `pytest bench/` for a quick look, `python -m bench.run` for numbers to publish."""
