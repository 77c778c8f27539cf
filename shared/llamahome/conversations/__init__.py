"""Conversations and what becomes of them: rows, chat templates, token ids, loss masks, the split.

Pure functions of values: no queue, no torch. ``checker``, ``chat`` and ``tokens`` need numpy or
tokenizers and are imported by name where they are used.
"""

from llamahome.conversations.bundled import sample_path
from llamahome.conversations.conversation import Conversation, dump, json_digest
from llamahome.conversations.formats import FORMATS
from llamahome.conversations.lines import foreign_format, lines_of_range
from llamahome.conversations.read import read_conversations
from llamahome.conversations.records import Record, Source, batches, examine, records
from llamahome.conversations.rows import parse_record, parse_row, shift_lines, shown_raw
from llamahome.conversations.rules import Limits
from llamahome.conversations.split import Split, split_rows, validation_groups
from llamahome.conversations.strict_json import Refused

__all__ = [
    "FORMATS",
    "Conversation",
    "Limits",
    "Record",
    "Refused",
    "Source",
    "Split",
    "batches",
    "dump",
    "examine",
    "foreign_format",
    "json_digest",
    "lines_of_range",
    "parse_record",
    "parse_row",
    "read_conversations",
    "records",
    "sample_path",
    "shift_lines",
    "shown_raw",
    "split_rows",
    "validation_groups",
]
