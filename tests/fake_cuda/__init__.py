"""A CUDA driver for machines without one: `libcuda.so.1` in C++, and the Python side that builds and steers it."""
