"""measure/: what models can do and what they leak, as numbers, tables and figures. Floor: measuring. metrics.py first."""
