"""The page's login in a real browser, on a door that wants tokens."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from services.locks.tokens import Tokens
from services.manager import StreamManager
from services.settings import AuthSettings, Settings, StoreSettings
from services.store import MemoryStore
from tests.integration.test_page import BROWSERS, FLAGS
from tests.unit.services.http_kit import MODELS, serving


def test_a_token_opens_the_page_until_it_is_revoked() -> None:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser on this machine: install one of {', '.join(BROWSERS)}")
    store = MemoryStore(StoreSettings())
    tokens = Tokens(store)
    _, text = tokens.create("looker", "viewer")
    settings = Settings(auth=AuthSettings(required="always"))
    with serving(StreamManager(store, settings, models=MODELS)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        page = browser.new_page()
        page.goto(f"{url}/")
        login = page.locator("#login")
        expect(login).to_be_visible(timeout=30_000)
        page.fill("#login-token", "tsm_wrong")
        page.click("#login-submit")
        expect(page.locator("#login-error")).to_contain_text("unknown, revoked or expired", timeout=30_000)
        page.fill("#login-token", text)
        page.click("#login-submit")
        expect(login).to_be_hidden(timeout=30_000)
        expect(page.locator("#empty")).to_be_visible(timeout=30_000)
        expect(page.locator("#open-add")).to_be_hidden()  # a viewer adds nothing
        assert page.evaluate("document.cookie") == "", "scripts cannot read the login"
        page.reload()
        expect(page.locator("#log-out")).to_be_visible(timeout=30_000)
        page.click("#log-out")
        expect(login).to_be_visible(timeout=30_000)
        page.fill("#login-token", text)
        page.click("#login-submit")
        expect(login).to_be_hidden(timeout=30_000)
        tokens.revoke("looker")
        page.reload()
        expect(login).to_be_visible(timeout=30_000)
        browser.close()
