"""The preprocessing stage: canonical rows -> token ids and loss masks, split, ready to train on.

Import ``stage`` (run, key), ``worker`` (main) or ``inspection`` (inspect_rows) by name.
"""

__all__: list[str] = []
