"""Benchmarks against what people use today: `fastalign bench`, or `make bench` in the repository."""
