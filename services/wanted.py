"""Which models the replicas are to hold: those of the settings, and what was loaded and unloaded since."""

from __future__ import annotations

import json
from collections.abc import Mapping

from services.settings import ModelSettings, Settings
from services.store import StateStore

WANTED = "models"  # documents: a model's name, and whether it is wanted
FAULTS = "model_faults"  # documents: why a model could not be loaded
FAULT_KEPT_S = 600.0


def wanted_models(settings: Settings, store: StateStore) -> dict[str, ModelSettings]:
    """Models by name, those of the settings first. Raises StoreDown."""
    return merged(settings, store.documents(WANTED))


def merged(settings: Settings, changes: Mapping[str, str]) -> dict[str, ModelSettings]:
    """The models of the settings, with what the documents say of them and of others."""
    found = {model.name: model for model in settings.engine.models}
    for name, text in changes.items():
        if not json.loads(text):
            found.pop(name, None)
        elif name not in found:
            found[name] = ModelSettings(name=name)
    return found


def want(store: StateStore, name: str, *, wanted: bool) -> None:
    """Have the replicas load a model, or let go of it. Raises StoreDown."""
    store.swap_document(FAULTS, name, store.document(FAULTS, name), None)
    store.put_document(WANTED, name, json.dumps(wanted))
