"""Benchmarks against what people use today, for pytest-benchmark: `make bench`, `pytest bench --benchmark-only`,
`fastalign bench`."""
