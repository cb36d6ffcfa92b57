"""measure/: what models can do and what they leak, in numbers, tables and figures. Floor: measuring. First: metrics."""
