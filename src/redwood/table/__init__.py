"""Successor tables (`algorithms.successors`) in files, each tied to the model that filled it.

Inside: `target` (identity of that model), `file` (the format), `keeping` (loads a table and saves
it at intervals), `folder` (a table for each API key of a server), `reading` (fills a table from
text). May import: errors, storage, tree, sampling, models, algorithms, datastore (the
identity of a tokenizer) and the protocol of backends. Knows no drafter and no engine. See
docs/table.md.
"""

from redwood.table.file import TableInfo, check_file, read_info, read_table, write_table
from redwood.table.folder import KeyTables
from redwood.table.keeping import KeptTable, keep_saving
from redwood.table.target import TargetId, target_id

__all__ = [
    "KeptTable",
    "KeyTables",
    "TableInfo",
    "TargetId",
    "check_file",
    "keep_saving",
    "read_info",
    "read_table",
    "target_id",
    "write_table",
]
