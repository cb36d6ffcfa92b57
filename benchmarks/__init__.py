"""benchmarks/: how each benchmark lies on disk. Floor: data. data.py has their table; samples.py is what they become."""
