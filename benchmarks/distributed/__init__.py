"""Simulated costs on many ranks."""
