"""The whole examination of a network at once, and what it means: ``consistency_ops.analysis.analyse``."""
