"""What several test files share: networks, data, kernels behind the operators, and runs on several ranks."""
