"""The main job: train one network with several optimizers side by side and report honestly who won.

``python -m consistency_ops train --help`` is the way in; nothing here is imported by the library itself.
"""
