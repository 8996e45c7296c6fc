"""Secrets at rest: AES-256-GCM over what a stream's specification holds of its camera's password."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from pipelines.faults import has_secret, redact
from services.schemas import StreamSpec
from services.settings import SettingsError, StoreSettings, key_bytes
from tsm_core.errors import CallerError, WorldError

VERSION = "v1"
KEY_BYTES, NONCE_BYTES = 32, 12
KEY_FILE = "secret.key"
HOW = "`openssl rand -base64 32` makes one"


class NoEncryptionKey(CallerError):
    """A password was to be kept, and there is no key to seal it with."""

    reason = "no_encryption_key"


class SealBroken(WorldError):
    """A sealed secret cannot be opened: another key, or what is in the store was changed."""

    reason = "secret_sealed"


class Vault:
    """Seals small texts with one key, and opens what it or an older one sealed. Keys have 32 bytes."""

    def __init__(self, key: bytes, old: Sequence[bytes] = ()) -> None:
        self._id = _key_id(key)
        self._keys = {_key_id(each): AESGCM(each) for each in (*old, key)}

    def seal(self, text: str, about: str) -> str:
        """VERSION.KEY.BASE64 of the text; only `open` with the same `about` gives it back."""
        nonce = os.urandom(NONCE_BYTES)
        closed = self._keys[self._id].encrypt(nonce, text.encode(), f"{VERSION}:{about}".encode())
        return f"{VERSION}.{self._id}.{base64.b64encode(nonce + closed).decode()}"

    def open(self, sealed: str, about: str) -> str:
        """The text that was sealed. Raises SealBroken."""
        version, key_id, text = [*sealed.split("."), "", ""][:3]
        if version != VERSION or key_id not in self._keys:
            raise SealBroken(
                f"the secret of {about!r} was sealed with key {key_id[:8]!r}, this service has "
                f"{', '.join(sorted(self._keys))}: add that key to store.encryption_keys_old, or give the source anew"
            )
        try:
            data = base64.b64decode(text, validate=True)
            return (
                self._keys[key_id]
                .decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], f"{VERSION}:{about}".encode())
                .decode()
            )
        except (binascii.Error, InvalidTag, ValueError):
            raise SealBroken(
                f"the sealed secret of {about!r} was changed in the store, or is another stream's: give the source anew"
            ) from None


def _key_id(key: bytes) -> str:
    """A name for the key that tells nothing of it."""
    return hashlib.sha256(b"tsm key id" + key).hexdigest()[:8]


def vault_of(settings: StoreSettings) -> Vault | None:
    """The vault with the keys of the settings; None where they name none. Raises SettingsError."""
    key = settings.encryption_key
    if key is None and settings.encryption_key_file is not None:
        key = _read_key(settings.encryption_key_file)
    if key is None:
        return None
    return Vault(key_bytes(key), [key_bytes(old) for old in settings.encryption_keys_old])


def with_key(settings: StoreSettings) -> StoreSettings:
    """The settings with a key: theirs, or that of `data_dir`/secret.key, which is made if it is not there.

    For a service on one machine. Raises SettingsError.
    """
    if settings.encryption_key is not None or settings.encryption_key_file is not None:
        return settings
    file = settings.data_dir / KEY_FILE
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as out:
            out.write(base64.b64encode(os.urandom(KEY_BYTES)).decode() + "\n")
            out.flush()
            os.fsync(fd)
    return settings.model_copy(update={"encryption_key": _read_key(file)})


def _read_key(file: Path) -> SecretStr:
    try:
        key = SecretStr(file.read_text().strip())
        key_bytes(key)
    except OSError as error:
        raise SettingsError(f"the key file {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"the key file {file} is damaged: {error}") from None
    return key


def seal_spec(spec: StreamSpec, vault: Vault | None) -> str:
    """JSON for the store: what is secret of the source is sealed under the stream's id.

    Raises NoEncryptionKey when there is a secret and no vault.
    """
    data = spec.model_dump(mode="json")
    source, given = data["source"], spec.source
    secret = {"username": given.username, "password": given.password.get_secret_value() if given.password else None}
    if has_secret(given.uri):  # some cameras want the password in the path
        secret["uri"], source["uri"] = given.uri, redact(given.uri)
    source["username"] = source["password"] = None
    if any(secret.values()):
        if vault is None:
            raise NoEncryptionKey(
                f"stream {spec.id!r} has a password and the store has no key to seal it with: set store.encryption_key "
                f"to 32 bytes in base64; {HOW}"
            )
        source["sealed"] = vault.seal(json.dumps(secret), spec.id)
    return json.dumps(data, separators=(",", ":"))


def open_spec(raw: str | bytes, vault: Vault | None) -> StreamSpec:
    """The specification that `seal_spec` wrote, or one in clear from before there was a vault. Raises SealBroken."""
    data = json.loads(raw)
    sealed = data["source"].pop("sealed", None)
    if sealed is not None:
        if vault is None:
            raise SealBroken(
                f"the secret of stream {data['id']!r} is sealed and this store has no key: set store.encryption_key"
            )
        data["source"] |= json.loads(vault.open(sealed, data["id"]))
    return StreamSpec.model_validate(data)
