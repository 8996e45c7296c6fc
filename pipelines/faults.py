"""What went wrong with a source, told from its words and its timing; no password leaves this room.

`classify` turns what a decoder said and how long it took into a Fault: a stable code, how to try again, and a text
for people. `redact` takes the secrets out of any text first. The table of faults was measured, see docs/sources.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

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
        "install a certificate that this machine trusts, or use rtsp:// on a network you trust",
    ),
    "STREAM_TLS_HANDSHAKE": ("slow", "no encrypted connection could be agreed on", "check that the port speaks rtsps"),
    "STREAM_NO_VIDEO": ("slow", "there is no video in this stream", "choose a path that carries video"),
    "STREAM_CODEC_UNSUPPORTED": (
        "slow",
        "the video cannot be decoded",
        "set the camera to H.264, H.265 or MJPEG, or choose another of its streams",
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
    (r"401 Unauthorized|403 Forbidden|HTTPUnauthorizedError|HTTPForbiddenError", "STREAM_AUTH_FAILED"),
    (r"404 Not Found|HTTPNotFoundError", "STREAM_NOT_FOUND"),
    (r"5XX Server Error|HTTPServerError|\b50[0-9] \w+", "STREAM_SERVER_BUSY"),
    (r"4XX Client Error|HTTPOtherClientError|400 Bad Request|461 \w+", "STREAM_PROTOCOL"),
    (r"[Cc]ertificate (verify failed|.*(not trusted|expired|invalid))|certificate is not trusted",
     "STREAM_TLS_CERTIFICATE"),
    (r"TLS handshake|SSL_connect|ssl/tls|\[tls @.*(rror|ailed)|gnutls_handshake", "STREAM_TLS_HANDSHAKE"),
    (r"Failed to resolve hostname|Name or service not known", "STREAM_DNS_FAILED"),
    (r"Connection refused|No route to host|Network is unreachable|Host is unreachable", "STREAM_CONNECTION_FAILED"),
    (r"unknown codec|codec none|no decoder found|Decoder .* not found|DecoderNotFound", "STREAM_CODEC_UNSUPPORTED"),
    (r"matches no streams|no video stream", "STREAM_NO_VIDEO"),
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
            return re.sub(r"^(\[[^\]]*\]\s*)+", "", line).strip()[:200]
    return ""


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without secrets: `***` stands for userinfo in URLs, password-like parameters and each known secret.

    Known secrets are found as they are and percent-encoded, wholly or in part. In a URL everything up to the last
    "@" counts as userinfo, so that a password may hold "@" and "/"; a path with an "@" loses its host this way.
    """
    for secret in sorted({s for s in secrets if s}, key=len, reverse=True):
        text = re.sub("".join(map(_encodings, secret)), HIDDEN, text)
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)\S*@", rf"\1{HIDDEN}@", text)
    text = re.sub(r"(?i)\b(pass(?:word|wd)?|pwd|token|secret|api_?key)=[^&\s;\"'<>]+", rf"\1={HIDDEN}", text)
    return re.sub(r"(?i)\b(authorization:\s*)[^\r\n]+", rf"\1{HIDDEN}", text)


def _encodings(char: str) -> str:
    """A pattern for one character as it is or percent-encoded."""
    encoded = "".join(f"%{byte:02X}" for byte in char.encode())
    either = f"{re.escape(char)}|(?i:{encoded})"
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
