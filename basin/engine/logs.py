"""`open_log`: the log that fits a storage."""

from __future__ import annotations

from basin.engine.file_log import FileLog
from basin.engine.log import Log
from basin.engine.object_log import ObjectLog
from basin.engine.options import Options
from basin.format.record import FrameCipher
from basin.storage.protocol import Storage


def open_log(storage: Storage, cipher: FrameCipher, basin_id: bytes, options: Options) -> Log:
    """A log of objects where files are objects, else one of growing files."""
    if storage.objects is not None:
        return ObjectLog(storage.objects, cipher, options.request_policy(), storage.require_create_only)
    return FileLog(storage, cipher, basin_id, options.lock_timeout_s)
