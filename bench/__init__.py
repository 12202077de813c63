"""Benchmarks of the gateway beside what a user would pick instead: `python -m bench` writes bench/RESULTS.md."""
