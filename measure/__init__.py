"""measure/: what models can do and leak: numbers, tables, figures. Floor: measuring. Read metrics.py first."""
