"""What is measured of time and memory: `python -m benchmarks --help`."""
