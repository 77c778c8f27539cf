"""The validation stage: files -> checked canonical rows, a report, and what had to be left out.

``validate_files`` checks local files with neither fleet nor storage; ``report_page`` writes a
report for people. Import ``stage`` (run, key) or ``worker`` (main) by name.
"""

from llamahome.validation.files import validate_files
from llamahome.validation.page import report_page

__all__ = ["report_page", "validate_files"]
