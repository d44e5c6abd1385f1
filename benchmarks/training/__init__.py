"""Experiments of arXiv 1708.00631 and of the papers around it, run again."""
