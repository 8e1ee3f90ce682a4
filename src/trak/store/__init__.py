"""Features on disk or in memory: immutable shards under one manifest. Format: docs/format.md."""

from trak.store.encoding import StoredRows
from trak.store.header import FORMAT_VERSION, Header
from trak.store.layout import ranges_text
from trak.store.rows import Rows, RowSet
from trak.store.store import Store, load_store, open_store
from trak.store.verify import Damage, Gap, Report, verify
from trak.store.writer import Writer

__all__ = [
    "FORMAT_VERSION",
    "Damage",
    "Gap",
    "Header",
    "Report",
    "RowSet",
    "Rows",
    "Store",
    "StoredRows",
    "Writer",
    "load_store",
    "open_store",
    "ranges_text",
    "verify",
]
