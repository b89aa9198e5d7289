"""Weights of other libraries: `source.open_source`, `load.load` and `export.export`."""
