"""What runs on a GPU: build, tests, sanitizers and timings in one call of device_run.sh."""
