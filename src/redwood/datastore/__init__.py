"""The datastore of SSSD (arXiv 2411.05894): tokenised text in suffix arrays, mapped from disk.

`create` and `add` write, `Datastore.open` reads, `Namespaces` keeps the finished answers of a
running server, for each API key apart. See docs/datastore.md.
"""

from redwood.datastore.build import Added, add, create
from redwood.datastore.folder import remove
from redwood.datastore.namespaces import Namespaces
from redwood.datastore.store import Datastore

__all__ = ["Added", "Datastore", "Namespaces", "add", "create", "remove"]
