"""Times and memory of the operators and of the preconditioner, beside torch's own in the same run."""
