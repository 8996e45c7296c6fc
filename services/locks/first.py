"""The first token of a service that wants tokens and has none that could make others."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from services.locks.callers import Locks
from services.settings import Settings
from services.store import StateStore
from tsm_core.errors import WorldError

FILE = "admin-token"


class TokenFileError(WorldError):
    """The file for the first token cannot be written."""

    reason = "token_file_error"


def first_admin_token(store: StateStore, settings: Settings) -> Path | None:
    """The file (0600, below `store.data_dir`) with an admin's token; None where none is wanted or others know one.

    A token is made when the store holds none that may do everything. Raises TokenFileError, StoreDown.
    """
    locks = Locks(store, settings)
    file = settings.store.data_dir / FILE
    if not locks.required or settings.auth.admin_token is not None:
        return None
    if any(token.role == "admin" and token.streams is None and not token.expires_at for token in locks.tokens.list()):
        return file if file.is_file() and locks.tokens.find(file.read_text().strip()) else None
    fresh = file.with_name(f"{FILE}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as written:
            _, text = locks.tokens.create(f"admin-{secrets.token_hex(2)}", "admin")
            written.write(f"{text}\n")
        fresh.replace(file)
    except OSError as error:
        raise TokenFileError(
            f"the first token cannot be written to {file} ({error.strerror}); set store.data_dir to a folder that can "
            "be written, or bring a token of your own in TSM_AUTH__ADMIN_TOKEN"
        ) from None
    return file
