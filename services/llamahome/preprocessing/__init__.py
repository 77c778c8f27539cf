"""The preprocessing stage: canonical rows -> token ids and loss masks, split, ready to train on.

Import ``stage`` (run, key) or ``worker`` (main) by name.
"""

__all__: list[str] = []
