"""Passwords at rest: sealed under their stream's id, opened by the right key alone."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr, ValidationError

from services.app import cluster_application
from services.locks.vault import NoEncryptionKey, SealBroken, Vault, open_spec, seal_spec, vault_of, with_key
from services.schemas import SourceSpec, StreamSpec
from services.settings import SettingsError, StoreSettings, load_settings
from services.store import RedisStore

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
CANARY = "canary-p@ss/wörd"


def text(key: bytes) -> SecretStr:
    return SecretStr(base64.b64encode(key).decode())


def spec(stream_id: str = "door", uri: str = "rtsp://cam/live", password: str | None = CANARY) -> StreamSpec:
    return StreamSpec(id=stream_id, source=SourceSpec(uri=uri, username="eye", password=password))


def test_what_was_sealed_comes_back_and_never_looks_alike() -> None:
    vault = Vault(KEY)
    first, second = seal_spec(spec(), vault), seal_spec(spec(), vault)
    assert open_spec(first, vault).source == open_spec(second, Vault(KEY)).source == spec().source
    assert first != second
    assert "canary" not in first
    assert '"eye"' not in first


@pytest.mark.parametrize("uri", ["rtsp://cam/x?user=eye&password=canary", "rtsp://cam/user=eye_password=canary_ch=1"])
def test_a_password_in_the_path_is_sealed_too(uri: str) -> None:
    sealed = seal_spec(spec(uri=uri, password=None), Vault(KEY))
    assert "canary" not in sealed
    assert open_spec(sealed, Vault(KEY)).source.uri == uri


def test_what_has_no_secret_needs_no_key() -> None:
    plain = StreamSpec(id="door", source=SourceSpec(uri="rtsp://cam/live"))
    assert open_spec(seal_spec(plain, None), None) == plain
    with pytest.raises(NoEncryptionKey, match="openssl rand"):
        seal_spec(spec(), None)


def test_another_key_is_named_and_gives_no_garbage() -> None:
    sealed = seal_spec(spec(), Vault(KEY))
    with pytest.raises(SealBroken, match=r"sealed with key '[0-9a-f]{8}'.*encryption_keys_old"):
        open_spec(sealed, Vault(OTHER))
    with pytest.raises(SealBroken, match=r"set store\.encryption_key"):
        open_spec(sealed, None)


def test_an_older_key_still_opens_and_the_newest_seals() -> None:
    turned = Vault(OTHER, [KEY])
    opened = open_spec(seal_spec(spec(), Vault(KEY)), turned)
    assert opened.source == spec().source
    assert open_spec(seal_spec(opened, turned), Vault(OTHER)).source == spec().source


def test_a_secret_cannot_be_moved_to_another_stream_or_changed() -> None:
    vault = Vault(KEY)
    data = json.loads(seal_spec(spec("door"), vault))
    for change in ({"id": "gate"}, {"source": {**data["source"], "sealed": data["source"]["sealed"][:-4] + "AAA="}}):
        with pytest.raises(SealBroken, match="changed in the store"):
            open_spec(json.dumps({**data, **change}), vault)
    with pytest.raises(SealBroken):
        open_spec(json.dumps({**data, "source": {**data["source"], "sealed": "v9"}}), vault)


def test_a_specification_in_clear_is_read_and_sealed_at_the_next_write(valkey_url: str, tmp_path: Path) -> None:
    settings = StoreSettings(url=SecretStr(valkey_url), prefix=f"{tmp_path.name}:", encryption_key=text(KEY))
    store, raw = RedisStore(settings), redis.Redis.from_url(valkey_url)
    clear = spec().model_dump(mode="json")
    clear["source"]["password"] = CANARY
    raw.hset(f"{tmp_path.name}:specs", "door", json.dumps(clear))
    try:
        old = store.get_stream("door")
        assert old.source == spec().source
        store.put_stream(old.model_copy(update={"name": "front"}), create=False)
        assert b"canary" not in raw.hget(f"{tmp_path.name}:specs", "door")
        assert store.get_stream("door").source == spec().source
        assert [one.source for one in store.list_streams()] == [spec().source]
        with pytest.raises(SealBroken):
            RedisStore(settings.model_copy(update={"encryption_key": text(OTHER)})).survey()
    finally:
        store.close()
        raw.close()


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    given = StoreSettings(data_dir=tmp_path / "data")
    assert vault_of(given) is None
    first = with_key(given)
    assert with_key(given).encryption_key == first.encryption_key is not None
    assert stat.S_IMODE((tmp_path / "data" / "secret.key").stat().st_mode) == 0o600
    assert "encryption_key=SecretStr('**********')" in repr(first)
    (tmp_path / "data" / "secret.key").write_text("half")
    with pytest.raises(SettingsError, match=r"secret\.key is damaged"):
        with_key(given)


def test_a_key_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "key"
    given = StoreSettings(encryption_key_file=file)
    assert with_key(given) == given
    with pytest.raises(SettingsError, match="cannot be read"):
        vault_of(given)
    file.write_text(text(KEY).get_secret_value() + "\n")
    vault = vault_of(given)
    assert vault is not None
    assert open_spec(seal_spec(spec(), Vault(KEY)), vault).source == spec().source


@pytest.mark.parametrize("bad", ["hunter2-canary", base64.b64encode(b"short canary").decode()])
def test_a_bad_key_is_refused_without_being_shown(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSM_STORE__ENCRYPTION_KEY", bad)
    with pytest.raises(SettingsError, match=r"store\.encryption_key.*openssl rand") as refused:
        load_settings()
    assert bad not in str(refused.value)
    with pytest.raises(ValidationError):
        StoreSettings(encryption_keys_old=(SecretStr(bad),))


def test_a_cluster_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSM_STORE__URL", "redis://127.0.0.1:1/0")
    with pytest.raises(SettingsError, match="TSM_STORE__ENCRYPTION_KEY"):
        cluster_application({})
