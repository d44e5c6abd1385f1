"""Shared by several test files: networks, data, kernels behind the operators, and runs on several ranks."""
