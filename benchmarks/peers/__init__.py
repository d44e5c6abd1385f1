"""Training with the preconditioner against other optimizers, their own published code, tuned with equal budgets.

    pip install -r requirements-peers.txt
    python -m benchmarks.peers TASK [--optimizers NAME ...] [--seeds 3] [--data-dir DIR]
    python -m benchmarks.peers.cost        step overhead and memory
    python -m benchmarks.peers.ablations   one setting changed at a time

Files: ``tasks`` (data, models, losses, targets), ``optimizers`` (how each peer is built, and its trials),
``references`` (FOOF and ISAAC), ``runs`` (one training, the JSON lines), ``tables`` (tables, plots).
"""
