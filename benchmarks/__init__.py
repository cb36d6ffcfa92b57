"""benchmarks/: how each benchmark lies on disk; data.py has the table of them. Floor: data. Read samples.py first."""
