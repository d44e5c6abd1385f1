"""The commands ``train`` and ``analyse``, and what they need; nothing in the library imports it."""
