"""Conversations and what becomes of them: rows, chat templates, token ids, loss masks, the split.

Pure functions of values: no queue, no torch. ``chat`` and ``tokens`` need numpy and tokenizers and
are imported by name where they are used.
"""

from llamahome.conversations.bundled import sample_path
from llamahome.conversations.conversation import Conversation, dump, json_digest
from llamahome.conversations.lines import HEAD_BYTES, foreign_format, lines_of_range
from llamahome.conversations.rows import parse_row, shift_lines, shown_raw
from llamahome.conversations.rules import Limits
from llamahome.conversations.split import Split, split_rows, validation_groups

__all__ = [
    "HEAD_BYTES",
    "Conversation",
    "Limits",
    "Split",
    "dump",
    "foreign_format",
    "json_digest",
    "lines_of_range",
    "parse_row",
    "sample_path",
    "shift_lines",
    "shown_raw",
    "split_rows",
    "validation_groups",
]
