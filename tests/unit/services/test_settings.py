"""Settings: file, environment and command line, in this order of strength; mistakes are named."""

from pathlib import Path

import pytest

from pipelines.media_limits import MediaLimits
from services.settings import Settings, SettingsError, load_settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_each_source_beats_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_settings().server.port == 8000
    file = tmp_path / "tsm.yaml"
    file.write_text("server: {port: 1}\nengine: {slots: 7}\n")
    assert load_settings().server.port == 1, "tsm.yaml in the working directory is read by itself"
    monkeypatch.setenv("TSM_SERVER__PORT", "2")
    assert load_settings(file).server.port == 2
    settings = load_settings(file, {"server.port": 3})
    assert (settings.server.port, settings.engine.slots) == (3, 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("engine: {slot: 3}", r"engine\.slot"),
        ("engines: {}", "engines"),
        ("engine: {slots: 0}", r"engine\.slots: .*greater than 0"),
        ("- a list", "sections"),
        ("engine: {", "not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, says: str):
    (tmp_path / "tsm.yaml").write_text(text)
    with pytest.raises(SettingsError, match=says):
        load_settings()


def test_a_missing_file_and_a_misspelt_variable_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SettingsError, match=r"none\.yaml does not exist"):
        load_settings(tmp_path / "none.yaml")
    monkeypatch.setenv("TSM_ENGIN__SLOTS", "3")
    with pytest.raises(SettingsError, match="TSM_ENGIN__SLOTS"):
        load_settings()


def test_the_store_address_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TSM_STORE__URL", "redis://:canary@db:6379/0")
    settings = load_settings()
    assert "canary" not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()


def test_the_example_loads():
    settings = load_settings(ROOT / "examples" / "tsm.yaml")
    assert settings.engine.slots == 32
    assert settings.source.file_roots == (Path("/srv/recordings"),)


def test_every_knob_has_a_meaning():
    for name, section in Settings.model_fields.items():
        for knob, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{name}.{knob}"


def test_the_limits_of_media_are_those_of_the_decoders():
    assert MediaLimits(**load_settings().limits.model_dump()) == MediaLimits()
