"""benchmarks/: how each benchmark lies on disk; data.py has the table, samples.py what they become. Floor: data."""
