"""What went wrong with a source, told from its words and its timing; no password leaves this room.

`classify` turns what a decoder said and how long it took into a Fault: a stable code, how to try again, and a text
for people. `redact` takes the secrets out of any text first. The table of faults was measured, see docs/sources.md.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from pipelines.addresses import NETWORKS, AddressNotAllowed, AddressNotFound, Network, judge
from tsm_core.errors import CallerError

Retry = Literal["now", "soon", "slow", "never"]
SCHEMES = ("rtsp", "rtsps", "file")
HIDDEN = "***"

# code -> (how to try again, what happened, what would work)
FAULTS: dict[str, tuple[Retry, str, str]] = {
    "STREAM_ADDRESS_INVALID": (
        "never",
        "the address cannot be used",
        "use rtsp://HOST[:PORT]/PATH, rtsps://HOST[:PORT]/PATH or file:///PATH",
    ),
    "STREAM_ADDRESS_FORBIDDEN": (
        "slow",
        "the address is not allowed",
        "use the camera's own address; source.networks names the networks that may be opened",
    ),
    "STREAM_DNS_FAILED": ("soon", "the host name cannot be resolved", "check the host name, or use the IP address"),
    "STREAM_CONNECTION_FAILED": (
        "soon",
        "no connection to the camera",
        "check address and port, that the camera is on, and the firewall",
    ),
    "STREAM_TIMEOUT": (
        "soon",
        "the camera does not answer",
        "check address and port; a camera that answers this way may need a restart",
    ),
    "STREAM_NOT_RTSP": ("slow", "what answers there does not speak RTSP", "check the port; RTSP is usually on 554"),
    "STREAM_REDIRECTED": (
        "slow",
        "the camera sends us to another address",
        "use the address that it names, if you trust it",
    ),
    "STREAM_AUTH_FAILED": ("slow", "the camera refuses the user name or the password", "check user name and password"),
    "STREAM_NOT_FOUND": ("slow", "the camera does not know this path", "check the path of the address"),
    "STREAM_SERVER_BUSY": (
        "soon",
        "the camera reports an error of its own",
        "it may serve too many viewers already: close some, or restart it",
    ),
    "STREAM_PROTOCOL": ("soon", "the camera refuses the request", "try the other rtsp_transport (tcp or udp)"),
    "STREAM_TLS_CERTIFICATE": (
        "slow",
        "the camera's certificate is not trusted",
        "name its authority in SSL_CERT_FILE, or use rtsp:// on a network you trust",
    ),
    "STREAM_TLS_HANDSHAKE": ("slow", "no encrypted connection could be agreed on", "check that the port speaks rtsps"),
    "STREAM_NO_VIDEO": ("slow", "there is no video in this stream", "choose a path that carries video"),
    "STREAM_CODEC_UNSUPPORTED": (
        "slow",
        "the video cannot be decoded",
        "set the camera to H.264, H.265 or MJPEG, or choose another of its streams",
    ),
    "STREAM_TOO_LARGE": (
        "slow",
        "the picture is larger than allowed",
        "lower the camera's resolution, or raise limits.pixels",
    ),
    "STREAM_NO_DATA": (
        "soon",
        "the camera agreed to play but sends no video",
        "with udp a firewall may drop it: use rtsp_transport tcp; else restart the camera",
    ),
    "STREAM_STALLED": ("soon", "the camera went silent", "check power and network of the camera"),
    "STREAM_DISCONNECTED": ("soon", "the camera closed the connection", "check power and network of the camera"),
    "STREAM_RECONFIGURED": ("now", "the camera changed the shape of its picture", "nothing to do: it is opened anew"),
    "STREAM_FILE_NOT_FOUND": ("never", "the file does not exist", "check the path"),
    "STREAM_FILE_UNREADABLE": ("never", "the file cannot be read", "give the service's user the right to read it"),
    "STREAM_FILE_INVALID": ("never", "the file holds no video that can be decoded", "use a video file such as MP4"),
    "STREAM_DECODER_FAILED": ("soon", "the decoder failed", "see the message; `tsm doctor` checks ffmpeg"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a source gives no frames: `code` for programs, `message` and `hint` for people, without secrets.

    retry: `now` at once, `soon` with backoff, `slow` about once a minute (a person must change something), `never`.
    """

    code: str
    retry: Retry
    message: str
    hint: str

    @classmethod
    def of(cls, code: str, detail: str = "") -> Fault:
        """The fault of the table with this code; `detail` is appended to its message."""
        retry, message, hint = FAULTS[code]
        return cls(code, retry, f"{message}: {detail}" if detail else message, hint)


class BadSource(CallerError):
    """The address names no source that can be opened."""

    reason = "bad_source"


# what the decoders say -> code; the first row that matches wins
_WORDS: tuple[tuple[str, str], ...] = (
    (r"Redirecting to|Protocol '\w+' not on whitelist", "STREAM_REDIRECTED"),
    (r"Picture size \d+x\d+ (is invalid|exceeds)", "STREAM_TOO_LARGE"),
    (r"401 Unauthorized|403 Forbidden|HTTPUnauthorizedError|HTTPForbiddenError", "STREAM_AUTH_FAILED"),
    (r"404 Not Found|HTTPNotFoundError", "STREAM_NOT_FOUND"),
    (r"5XX Server Error|HTTPServerError|\b50[0-9] \w+", "STREAM_SERVER_BUSY"),
    (r"4XX Client Error|HTTPOtherClientError|400 Bad Request|461 \w+", "STREAM_PROTOCOL"),
    (r"[Cc]ertificate (verify failed|failed verification|.*(not trusted|expired|invalid))|certificate's owner does not",
     "STREAM_TLS_CERTIFICATE"),
    (r"TLS handshake|SSL_connect|ssl/tls|\[tls @.*(rror|ailed)|gnutls_handshake", "STREAM_TLS_HANDSHAKE"),
    (r"Failed to resolve hostname|Name or service not known", "STREAM_DNS_FAILED"),
    (r"Connection refused|No route to host|Network is unreachable|Host is unreachable", "STREAM_CONNECTION_FAILED"),
    (r"unknown codec|codec none|no decoder found|Decoder .* not found|DecoderNotFound", "STREAM_CODEC_UNSUPPORTED"),
    (r"matches no streams|no video stream", "STREAM_NO_VIDEO"),
    (r"no RTSP answer", "STREAM_NOT_RTSP"),
    (r"no answer: ", "STREAM_TIMEOUT"),
    (r"Could not find codec parameters", "STREAM_NO_DATA"),
)  # fmt: skip
_FILE_WORDS: tuple[tuple[str, str], ...] = (
    (r"No such file or directory|Is a directory", "STREAM_FILE_NOT_FOUND"),
    (r"Permission denied|Operation not permitted", "STREAM_FILE_UNREADABLE"),
    (r"Invalid data found|matches no streams|no video stream|does not contain any stream|codec|Decoder|demuxer",
     "STREAM_FILE_INVALID"),
)  # fmt: skip


def classify(
    lines: Sequence[str], *, elapsed_s: float, io_timeout_s: float, frames: int, is_file: bool = False
) -> Fault:
    """The fault of a decoder that ended by itself.

    lines: its redacted stderr. elapsed_s: from start to end. io_timeout_s: the limit it had for one answer.
    frames: how many it gave; after the first one, an end without words is a lost connection.
    """
    text = "\n".join(lines)
    if is_file:
        for pattern, code in _FILE_WORDS:
            if re.search(pattern, text):
                return Fault.of(code, _last_words(lines))
        return Fault.of("STREAM_FILE_INVALID" if not frames else "STREAM_DECODER_FAILED", _last_words(lines))
    if frames:
        if re.search(r"Connection timed out|TimeoutError|Operation timed out", text):
            return Fault.of("STREAM_STALLED")
        return Fault.of("STREAM_DISCONNECTED")
    for pattern, code in _WORDS:
        if re.search(pattern, text):
            return Fault.of(code, _last_words(lines, pattern))
    if re.search(r"Invalid data found|InvalidDataError|End of file|EOFError", text):
        # the same words for silence and for nonsense: only the clock tells them apart
        return Fault.of("STREAM_TIMEOUT" if elapsed_s >= 0.9 * io_timeout_s else "STREAM_NOT_RTSP")
    if re.search(r"timed out|TimeoutError", text):
        return Fault.of("STREAM_TIMEOUT" if elapsed_s < 1.5 * io_timeout_s else "STREAM_NO_DATA")
    if re.search(r"Connection reset|Broken pipe|Input/output error", text):
        return Fault.of("STREAM_CONNECTION_FAILED", _last_words(lines))
    return Fault.of("STREAM_DECODER_FAILED", _last_words(lines))


def _last_words(lines: Sequence[str], pattern: str = r"\[(error|fatal|panic)\]") -> str:
    """The newest line that matches, without ffmpeg's tags and addresses in memory."""
    for line in reversed(lines):
        if re.search(pattern, line):
            break
    else:
        line = lines[-1] if lines else ""
    return re.sub(r"^(\[[^\]]*\]\s*)+", "", line).strip()[:200]


# some cameras join the parameters in their paths by underscores: user=admin_password=secret_channel=1
_PARAMETER = re.compile(
    r"(?i)(?<![a-z])(pass(?:word|wd)?|pwd|token|secret|api_?key)=[^&\s;\"'<>]+?(?=_[a-z]+=|[&\s;\"'<>]|$)"
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without secrets: `***` stands for userinfo in URLs, password-like parameters and each known secret.

    Known secrets are found as they are and percent-encoded, wholly or in part. In a URL everything up to the last
    "@" counts as userinfo, so that a password may hold "@" and "/"; a path with an "@" loses its host this way.
    """
    for secret in sorted({s for s in secrets if s}, key=len, reverse=True):
        text = re.sub("".join(map(_encodings, secret)), HIDDEN, text)
    if "@" in text:
        text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)\S*@", rf"\1{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\1={HIDDEN}", text)
    return re.sub(r"(?i)\b(authorization:\s*)[^\r\n]+", rf"\1{HIDDEN}", text)


def _encodings(char: str) -> str:
    """A pattern for one character as it is or percent-encoded."""
    encoded = "".join(f"%{byte:02X}" for byte in char.encode())
    either = f"(?i:{encoded})|{re.escape(char)}"
    return f"(?:{either}|\\+)" if char == " " else f"(?:{either})"


def has_secret(uri: str) -> bool:
    """True when the address itself carries userinfo or a password-like parameter."""
    return redact(uri) != uri


def split_userinfo(uri: str) -> tuple[str, str | None, str | None]:
    """(address without userinfo, user name, password); the last two are None when absent.

    The last "@" before the path ends the userinfo. Raises BadSource for a scheme or host that cannot be used.
    """
    scheme, found, rest = uri.partition("://")
    if not found or scheme.lower() not in SCHEMES:
        named = redact(scheme if found else uri.split(":")[0])[:40]
        raise BadSource(f"scheme {named!r} is not supported: use rtsp://, rtsps:// or file://")
    if scheme.lower() == "file":
        return f"file://{rest}", None, None
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    userinfo, _, host = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    clean = f"{scheme.lower()}://{host}{tail}"
    try:
        parts = urlsplit(clean)
        if not parts.hostname or parts.port == 0:
            raise ValueError("no host")
    except ValueError:
        raise BadSource(f"{redact(clean)!r} has no usable host and port: use {scheme}://HOST[:PORT]/PATH") from None
    return clean, unquote(user) or None, unquote(password) or None


def with_userinfo(uri: str, username: str | None, password: str | None) -> str:
    """The address with its credentials, percent-encoded. Never to be logged or put on a command line."""
    if username is None and password is None:
        return uri
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{quote(username or '', safe='')}:{quote(password or '', safe='')}@{rest}"


def file_path(uri: str) -> str:
    """The path of a file:// address. Raises BadSource when it names another host or no absolute path."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise BadSource(f"{redact(uri)!r} is no file address: use file:///PATH")
    path = unquote(uri.split("://", 1)[1].removeprefix("localhost"))
    if "\0" in path:
        raise BadSource("a file address must not hold a zero byte")
    return path


# --- the staged probe ------------------------------------------------------------------------------------------------

Depth = Literal["describe", "decode"]
CODECS = {"H264", "H265", "JPEG", "MP4V-ES", "MPV", "VP8", "VP9", "AV1"}
STATIC_CODECS = {"26": "JPEG", "32": "MPV"}
LARGEST_REPLY_BYTES = 64 << 10
PROBE_PICTURES = 5


@dataclass(frozen=True, slots=True)
class ProbeStage:
    """One step of a probe. hint says what would work when ok is False."""

    name: str
    ok: bool
    ms: float
    detail: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a probe found, in order; it ends with the first stage that failed, whose fault is `fault`."""

    ok: bool
    stages: tuple[ProbeStage, ...]
    fault: Fault | None = None
    snapshot_jpeg: bytes | None = None
    width: int | None = None
    height: int | None = None
    codec: str | None = None
    fps: float | None = None


class _Failed(Exception):
    """A stage failed; internal to the probe."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code)
        self.fault = Fault.of(code, detail)


class _Probe:
    """Runs stages until one fails and keeps what they find."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self.secrets = secrets
        self.stages: list[ProbeStage] = []
        self.fault: Fault | None = None
        self.snapshot: bytes | None = None
        self.size: tuple[int, int] | None = None
        self.codec: str | None = None
        self.fps: float | None = None

    def stage(self, name: str, run: Callable[[], str]) -> bool:
        """Run one stage; False when it failed, and then no other may follow."""
        began = time.monotonic()
        try:
            detail = run()
        except _Failed as failed:
            self.fault = replace(failed.fault, message=redact(failed.fault.message, self.secrets))
        except TimeoutError:
            self.fault = Fault.of("STREAM_TIMEOUT")
        except OSError as error:
            self.fault = Fault.of("STREAM_CONNECTION_FAILED", redact(str(error.strerror or error), self.secrets))
        ms = round(1000 * (time.monotonic() - began), 1)
        if self.fault:
            self.stages.append(ProbeStage(name, False, ms, self.fault.message, self.fault.hint))
            return False
        self.stages.append(ProbeStage(name, True, ms, redact(detail, self.secrets)))
        return True

    def report(self) -> ProbeReport:
        width, height = self.size or (None, None)
        return ProbeReport(
            self.fault is None,
            tuple(self.stages),
            self.fault,
            self.snapshot,
            width,
            height,
            self.codec,
            self.fps,
        )


def probe(
    uri: str,
    username: str | None = None,
    password: str | None = None,
    transport: Literal["tcp", "udp"] = "tcp",
    timeout_s: float = 4.0,
    depth: Depth = "decode",
    networks: Sequence[Network] = NETWORKS,
    max_pixels: int = 40_000_000,
) -> ProbeReport:
    """Look at a source step by step and say which step fails, why, and what would work.

    Stages of a camera: address, dns, tcp, tls (rtsps), rtsp, auth, sdp; depth `decode` adds key_frame and decode with
    a snapshot. Stages of a file: address, file, key_frame, decode. Each stage ends within timeout_s, key_frame within
    three times that, because a camera may send key frames seconds apart. A camera outside the networks is not connected
    to, a redirect is not followed. Never raises for a faulty source.
    """
    probing = _Probe(tuple(filter(None, (password,))))
    clean = uri

    def address() -> str:
        nonlocal clean, username, password
        try:
            clean, found_user, found_password = split_userinfo(uri)
            username, password = username or found_user, password or found_password
            probing.secrets = tuple(filter(None, (password,)))
            if clean.startswith("file:"):
                file_path(clean)
        except BadSource as error:
            raise _Failed("STREAM_ADDRESS_INVALID", str(error)) from None
        return clean

    if not probing.stage("address", address):
        return probing.report()
    if clean.startswith("file:"):
        if not probing.stage("file", lambda: _probe_file(file_path(clean))):
            return probing.report()
        depth = "decode"
    elif not _probe_camera(probing, clean, username, password, timeout_s, networks):
        return probing.report()
    if depth == "decode":
        _probe_picture(probing, clean, username, password, transport, timeout_s, tuple(networks), max_pixels)
    return probing.report()


def _probe_file(path: str) -> str:
    if not os.path.exists(path):
        raise _Failed("STREAM_FILE_NOT_FOUND", path)
    if not os.path.isfile(path):
        raise _Failed("STREAM_FILE_INVALID", f"{path} is no regular file")
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise _Failed("STREAM_FILE_UNREADABLE", f"{path}: {error.strerror}") from None
    return f"{os.path.getsize(path)} bytes"


def _probe_camera(
    probing: _Probe,
    uri: str,
    username: str | None,
    password: str | None,
    timeout_s: float,
    networks: Sequence[Network],
) -> bool:
    """Everything up to the session description, by a socket of our own."""
    parts = urlsplit(uri)
    host, secure = parts.hostname or "", parts.scheme == "rtsps"
    port = parts.port or (322 if secure else 554)
    addresses: list[str] = []
    client: _RtspClient | None = None
    link: list[socket.socket] = []

    def dns() -> str:
        try:
            addresses.extend(judge(host, port, networks, timeout_s=timeout_s))
        except AddressNotAllowed as error:
            raise _Failed("STREAM_ADDRESS_FORBIDDEN", str(error)) from None
        except AddressNotFound as error:
            raise _Failed("STREAM_DNS_FAILED", str(error)) from None
        return ", ".join(addresses)

    def tcp() -> str:
        deadline = time.monotonic() + timeout_s
        for place, address in enumerate(addresses, 1):
            try:
                link.append(socket.create_connection((address, port), max(0.1, deadline - time.monotonic())))
                break
            except OSError:
                if place == len(addresses):
                    raise
        return f"{addresses[0]}:{port}"

    def tls() -> str:
        try:
            link[0] = ssl.create_default_context().wrap_socket(link[0], server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise _Failed("STREAM_TLS_CERTIFICATE", error.verify_message) from None
        except TimeoutError:
            raise
        except OSError as error:
            raise _Failed("STREAM_TLS_HANDSHAKE", str(error.strerror or error)) from None
        return str(link[0].version())  # type: ignore[attr-defined]

    def options() -> str:
        nonlocal client
        client = _RtspClient(link[0], uri, username, password, timeout_s)
        status, headers, _ = client.ask("OPTIONS")
        _stays(status, headers)
        return f"{status}; {headers.get('server', 'server unnamed')}"[:120]

    described: tuple[int, dict[str, str], str] = (0, {}, "")

    def auth() -> str:
        nonlocal described
        assert client is not None
        described = client.ask("DESCRIBE")
        if described[0] == 401:
            how = client.answer_challenge(described[1])
            if username is None and password is None:
                raise _Failed("STREAM_AUTH_FAILED", "it asks for a user name and a password")
            described = client.ask("DESCRIBE")
            if described[0] == 401:
                raise _Failed("STREAM_AUTH_FAILED", "401 Unauthorized")
        else:
            how = "none asked for"
        _stays(*described[:2])
        if described[0] == 403:
            raise _Failed("STREAM_AUTH_FAILED", "403 Forbidden")
        return how

    def session() -> str:
        status, _, body = described
        if status == 404:
            raise _Failed("STREAM_NOT_FOUND", f"{parts.path or '/'}: 404 Not Found")
        if status >= 500:
            raise _Failed("STREAM_SERVER_BUSY", f"status {status}")
        if status != 200:
            raise _Failed("STREAM_PROTOCOL", f"status {status}")
        probing.codec, probing.fps = _video_of(body)
        return probing.codec + (f", {probing.fps:g} fps" if probing.fps else "")

    stages: list[tuple[str, Callable[[], str]]] = [("dns", dns), ("tcp", tcp)]
    stages += [("tls", tls)] if secure else []
    stages += [("rtsp", options), ("auth", auth), ("sdp", session)]
    try:
        return all(probing.stage(name, run) for name, run in stages)
    finally:
        for sock in link:
            sock.close()


def _stays(status: int, headers: dict[str, str]) -> None:
    if 300 <= status < 400:
        raise _Failed("STREAM_REDIRECTED", headers.get("location", f"status {status}")[:200])


class _RtspClient:
    """Enough RTSP to ask for a session description; each reply within timeout_s."""

    def __init__(
        self, sock: socket.socket, uri: str, username: str | None, password: str | None, timeout_s: float
    ) -> None:
        self.sock, self.uri, self.timeout_s = sock, uri, timeout_s
        self.username, self.password = username or "", password or ""
        self.number = 0
        self.challenge: dict[str, str] | None = None

    def ask(self, method: str) -> tuple[int, dict[str, str], str]:
        """(status, headers with names in lower case, body)."""
        self.number += 1
        lines = [f"{method} {self.uri} RTSP/1.0", f"CSeq: {self.number}", "User-Agent: tsm-live probe"]
        if method == "DESCRIBE":
            lines.append("Accept: application/sdp")
        if self.challenge is not None:
            lines.append(f"Authorization: {self._authorization(method)}")
        self.sock.settimeout(self.timeout_s)
        self.sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        deadline = time.monotonic() + self.timeout_s
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more(len(data), deadline)
            if not data.startswith(b"RTSP/"[: len(data)]):
                raise _Failed("STREAM_NOT_RTSP", f"it says {data[:60].decode('ascii', 'replace')!r}")
        head, _, body = data.partition(b"\r\n\r\n")
        first, *rest = head.decode("utf-8", "replace").split("\r\n")
        match = re.match(r"RTSP/\d\.\d (\d{3})", first)
        if not match:
            raise _Failed("STREAM_NOT_RTSP", f"it says {first[:60]!r}")
        headers: dict[str, str] = {}
        for name, _, value in (line.partition(":") for line in rest):
            key = name.strip().lower()
            # a camera may offer several ways to log in, one per line
            headers[key] = f"{headers[key]}\n{value.strip()}" if key in headers else value.strip()
        length = headers.get("content-length", "0")
        while length.isdecimal() and len(body) < min(int(length), LARGEST_REPLY_BYTES):
            body += self._more(len(body), deadline)
        return int(match[1]), headers, body.decode("utf-8", "replace")

    def _more(self, held: int, deadline: float) -> bytes:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.sock.settimeout(left_s)
        more = self.sock.recv(4096)
        if not more:
            raise _Failed("STREAM_NOT_RTSP", "it closes the connection instead of answering")
        if held > LARGEST_REPLY_BYTES:
            raise _Failed("STREAM_NOT_RTSP", "its reply does not end")
        return more

    def answer_challenge(self, headers: dict[str, str]) -> str:
        """Take up what a 401 offers, the strongest first; returns its name."""
        offers: dict[str, dict[str, str]] = {}
        for line in headers.get("www-authenticate", "").split("\n"):
            scheme, _, rest = line.partition(" ")
            found = {k.lower(): a or b for k, a, b in re.findall(r'(\w+)=(?:"([^"]*)"|([^\s,]+))', rest)}
            offers[f"{scheme.lower()} {found.get('algorithm', 'MD5').upper()}"] = {"scheme": scheme.lower(), **found}
        for name in ("digest SHA-256", "digest MD5"):
            if name in offers:
                self.challenge = offers[name]
                return name
        basic = next((offer for offer in offers.values() if offer["scheme"] == "basic"), None)
        if basic is None:
            raise _Failed("STREAM_PROTOCOL", f"it asks for a login of an unknown kind ({', '.join(offers)[:60]})")
        self.challenge = basic
        return "basic"

    def _authorization(self, method: str) -> str:
        asked = self.challenge or {}
        if asked["scheme"] == "basic":
            return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        sha = asked.get("algorithm", "MD5").upper() == "SHA-256"

        def digest(text: str) -> str:
            return hashlib.new("sha256" if sha else "md5", text.encode(), usedforsecurity=False).hexdigest()

        realm, nonce = asked.get("realm", ""), asked.get("nonce", "")
        identity = digest(f"{self.username}:{realm}:{self.password}")
        action = digest(f"{method}:{self.uri}")
        fields = {"username": self.username, "realm": realm, "nonce": nonce, "uri": self.uri}
        bare = ""
        if "auth" in asked.get("qop", "").split(","):
            own = os.urandom(8).hex()
            fields["response"] = digest(f"{identity}:{nonce}:00000001:{own}:auth:{action}")
            fields["cnonce"] = own
            bare = ", qop=auth, nc=00000001"
        else:
            fields["response"] = digest(f"{identity}:{nonce}:{action}")
        if "opaque" in asked:
            fields["opaque"] = asked["opaque"]
        if "algorithm" in asked:
            bare += f", algorithm={asked['algorithm']}"
        return "Digest " + ", ".join(f'{name}="{value}"' for name, value in fields.items()) + bare


def _video_of(sdp: str) -> tuple[str, float | None]:
    """(codec, frames a second if told) of the first video in a session description."""
    section = re.search(r"^m=video \d+\S* \S+ (\d+)(.*?)(?=^m=|\Z)", sdp, re.MULTILINE | re.DOTALL)
    if section is None:
        raise _Failed("STREAM_NO_VIDEO")
    named = re.search(rf"^a=rtpmap:{section[1]} ([\w.-]+)/", section[2], re.MULTILINE)
    codec = named[1].upper() if named else STATIC_CODECS.get(section[1], f"payload type {section[1]}")
    if codec not in CODECS:
        raise _Failed("STREAM_CODEC_UNSUPPORTED", f"the camera sends {codec[:40]}")
    rate = re.search(r"^a=framerate:\s*([\d.]+)", section[2], re.MULTILINE)
    return codec, float(rate[1]) if rate and rate[1].count(".") < 2 and float(rate[1]) > 0 else None


def _probe_picture(
    probing: _Probe,
    uri: str,
    username: str | None,
    password: str | None,
    transport: Literal["tcp", "udp"],
    timeout_s: float,
    networks: tuple[Network, ...],
    max_pixels: int,
) -> None:
    """The first pictures, by the decoder child."""
    from pipelines.sources import Decoder, SourceConfig  # that room imports this one

    config = SourceConfig(
        "probe",
        uri,
        username,
        password,
        rtsp_transport=transport,
        decoder="pyav",
        min_side_px=360,
        io_timeout_s=timeout_s,
        networks=networks,
        max_pixels=max_pixels,
    )
    try:
        decoder = Decoder(config)
    except (AddressNotAllowed, AddressNotFound) as error:  # the name has another address by now
        words = str(error)

        def refuse() -> str:
            raise _Failed("STREAM_ADDRESS_FORBIDDEN", words)

        probing.stage("key_frame", refuse)
        return
    pictures: list[tuple[Any, float, float]] = []
    news = threading.Condition()
    over = threading.Event()

    def read() -> None:
        for picture in decoder.frames():
            with news:
                if len(pictures) < PROBE_PICTURES:
                    pictures.append(picture)
                news.notify_all()
        over.set()
        with news:
            news.notify_all()

    def wait(count: int, limit_s: float) -> None:
        with news:
            news.wait_for(lambda: len(pictures) >= count or over.is_set(), limit_s)

    def key_frame() -> str:
        wait(1, 3 * timeout_s)
        if not pictures:
            if not over.is_set():
                raise _Failed("STREAM_NO_DATA", f"no picture within {3 * timeout_s:g} s")
            elapsed_s = time.monotonic() - decoder.started_s
            found = classify(
                decoder.ended(), elapsed_s=elapsed_s, io_timeout_s=timeout_s, frames=0, is_file=config.is_file
            )
            raise _Failed(found.code, found.message.partition(": ")[2])
        probing.size = decoder.size()
        return f"{probing.size[0]}x{probing.size[1]} px" if probing.size else ""

    def decode() -> str:
        from PIL import Image  # the decoder child, which needs this module too, starts quicker without

        wait(PROBE_PICTURES, timeout_s)
        last = pictures[-1][0]
        picture = io.BytesIO()
        Image.fromarray(last.permute(1, 2, 0).numpy()).save(picture, "JPEG", quality=80)
        probing.snapshot = picture.getvalue()
        steps = sorted(b[1] - a[1] for a, b in itertools.pairwise(pictures) if b[1] > a[1])
        if probing.fps is None and steps:
            probing.fps = round(1 / steps[len(steps) // 2], 2)
        return f"{len(pictures)} pictures" + (f", {decoder.corrupt} damaged" if decoder.corrupt else "")

    reader = threading.Thread(target=read, name="probe-reader", daemon=True)
    reader.start()
    try:
        if probing.stage("key_frame", key_frame):
            probing.stage("decode", decode)
    finally:
        decoder.close(reader)
