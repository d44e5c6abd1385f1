"""The commands ``train``, ``analyse`` and ``verify``, and what they need; nothing in the library imports it."""
