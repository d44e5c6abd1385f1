"""Times and memory of the operators and of the preconditioner, beside torch's own in the same run."""

MODULES = (  # those whose GROUPS are small enough to be timed one after another
    "modulus",
    "step",
    "precondition",
    "scaling",
    "decorrelation",
    "orthogonal",
    "roa",
    "portable",
    "same_input",
    "host",
    "linalg",
)
