"""Other libraries' weights, in and out: `load.inspect`, `load.load`, and `out.export`."""
