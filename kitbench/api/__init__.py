"""kitbench from Python: attention layers, metrics on arrays, stored runs as tables, and runs."""
