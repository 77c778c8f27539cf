"""The validation stage: files -> checked canonical rows, a report, and what had to be left out.

Import ``stage`` (run, key) or ``worker`` (main) by name.
"""

__all__: list[str] = []
