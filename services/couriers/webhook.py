"""Events by HTTP POST: CloudEvents in JSON, signed as Standard Webhooks has it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from pipelines.addresses import NETWORKS, AddressNotAllowed, AddressNotFound, Network
from services.couriers.sink import Event, EventRefused, Memo, Sink, SinkUnavailable, encode, structured
from services.outbound import JudgedTransport
from services.settings import SettingsError, WebhookSettings

PREFIX = "whsec_"
KEY_BYTES = range(24, 65)
ANSWER_BYTES = 1 << 16  # more of an answer is not read
LATER = {408, 425, 429}  # the client errors that pass with time


class WebhookSink(Sink):
    """One receiver. A batch of one is a CloudEvent in structured mode, a larger one is in batch mode.

    The answer decides: 2xx is taken; 408, 425, 429 and 5xx mean later; anything else, redirects included, is a
    refusal. Only addresses in `networks` are reached. Raises SettingsError when a secret cannot be used.
    """

    def __init__(self, settings: WebhookSettings, timeout_s: float, networks: Sequence[Network] = NETWORKS) -> None:
        self.name = settings.name
        self.batch = settings.batch
        self._url = settings.url.get_secret_value()
        self._keys = signing_keys(settings)
        self._timeout_s = timeout_s
        self._networks = networks
        self._client: httpx.Client | None = None

    def deliver(self, events: Sequence[Event]) -> None:
        """POST the events in one request. Raises SinkUnavailable, EventRefused."""
        if self.batch == 1:
            # a dot divides what is signed
            message_id, kind = str(events[0]["id"]).replace(".", "_"), "application/cloudevents+json"
            body = encode(structured(events[0]))
        else:
            ids = " ".join(str(event["id"]) for event in events)
            message_id = f"batch-{hashlib.sha256(ids.encode()).hexdigest()[:32]}"
            kind = "application/cloudevents-batch+json"
            body = encode([structured(event) for event in events])
        status, retry_after = self._post(
            body, {**signed(self._keys, message_id, time.time(), body), "Content-Type": kind}
        )
        if 200 <= status < 300:
            return
        if status in LATER or status >= 500:
            raise SinkUnavailable(
                f"{self.target} answers {status}", retry_after_s=seconds_of(retry_after), answered=True
            )
        if 300 <= status < 400:
            raise EventRefused(f"{self.target} answers {status}: redirects are not followed, give its final URL")
        raise EventRefused(f"{self.target} answers {status}")

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """Status and Retry-After of the answer, whose text is read only to use the connection again."""
        if self._client is None:
            self._client = httpx.Client(
                transport=JudgedTransport(self._networks),
                timeout=self._timeout_s,
                follow_redirects=False,
                headers={"User-Agent": "tsm-live", "Accept": "*/*"},
            )
        until = time.monotonic() + self._timeout_s
        try:
            with self._client.stream("POST", self._url, content=body, headers=headers) as answer:
                size = 0
                for part in answer.iter_raw():
                    size += len(part)
                    if size > ANSWER_BYTES or time.monotonic() > until:
                        break
                return answer.status_code, answer.headers.get("retry-after", "")
        except (AddressNotAllowed, AddressNotFound) as error:
            raise SinkUnavailable(f"{error} (webhooks.networks)") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise SinkUnavailable(f"{self.target} does not answer: {type(error).__name__}") from None

    @property
    def target(self) -> str:
        """The receiver without what may be a secret of its URL."""
        return shown(self._url)

    def idle(self) -> None:
        """Nothing to do."""

    def forget(self, stream_id: str) -> None:
        """Nothing to do."""

    def memo(self) -> Memo:
        """Nothing is learned."""
        return {}

    def recall(self, memo: Memo) -> None:
        """Nothing to remember."""

    def close(self) -> None:
        """End the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None


def shown(url: str) -> str:
    """Scheme, host and port of a URL: its path, query and user may be secrets of the receiver."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def signing_keys(settings: WebhookSettings) -> list[bytes]:
    """The keys of the webhook, the newest first. Raises SettingsError."""
    texts = [secret.get_secret_value() for secret in settings.secrets]
    if settings.secret_file is not None:
        texts += secrets_of_file(settings.secret_file, f"webhook {settings.name}")
    if not 1 <= len(texts) <= 2:
        raise SettingsError(
            f"webhook {settings.name} has {len(texts)} secrets: give one, or two while it changes "
            "(webhooks.sinks.secrets, or secret_file with one a line)"
        )
    keys = []
    for text in texts:
        try:
            key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not text.startswith(PREFIX) or len(key) not in KEY_BYTES:
            raise SettingsError(
                f"a secret of webhook {settings.name} is not {PREFIX} and 24 to 64 bytes in base64; make one with: "
                'python3 -c "import base64,secrets; '
                f"print('{PREFIX}'+base64.b64encode(secrets.token_bytes(32)).decode())\""
            )
        keys.append(key)
    return keys


def secrets_of_file(path: Path, whose: str) -> list[str]:
    """The lines of a file of secrets. Raises SettingsError that names the file alone."""
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the secret file {path} of {whose} cannot be read ({type(error).__name__})") from None


def signed(keys: Sequence[bytes], message_id: str, at_s: float, body: bytes) -> dict[str, str]:
    """The headers of a message: one signature per key, so that a receiver may know either."""
    stamp = str(int(at_s))
    content = f"{message_id}.{stamp}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(key, content, "sha256")).decode() for key in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def seconds_of(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; 0 when it says neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
