"""One script per question; each runs by ``python -m benchmarks.<name>`` and runs tiny in the tests."""
