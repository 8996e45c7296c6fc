"""An RTSP server for simulated cameras: TCP and UDP, passwords, faults, and a control channel for tests.

GET_PARAMETER and SET_PARAMETER with a JSON body on a mount's URL read the camera's truth and turn its knobs; no knob
touches these requests. They take basic authorization with the camera's credentials, whatever scheme it uses itself.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from pipelines.camera import AccessUnit, Camera, CameraError, LogEntry, SessionInfo
from pipelines.rtp import RTP_HEADER_BYTES, goodbye, rtp_packet, sdp, sender_report

REALM = "simulator"
CONTROL_TYPE = "application/json"
SESSION_TIMEOUT_S = 60
SENDER_REPORT_S = 5.0
UNREAD_BYTES = 2 << 20  # a TCP client this far behind is skipped until its next key frame
LINGER_S = 1.0
LOG_PAGE = 5_000  # entries in one reply: the loop must keep time
LARGEST_HEAD_BYTES = 64 << 10
LARGEST_BODY_BYTES = 1 << 20
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    454: "Session Not Found",
    455: "Method Not Valid in This State",
    461: "Unsupported Transport",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}


@dataclass
class Request:
    """One RTSP request; header names in lower case."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def mount(self) -> str:
        """The path without slashes at its ends and without the track."""
        path = unquote(urlsplit(self.url).path).strip("/")
        return re.sub(r"/?trackID=\d+$", "", path)

    @property
    def control(self) -> bool:
        """True for the simulator's own JSON requests, which no knob touches."""
        return self.method.endswith("_PARAMETER") and self.headers.get("content-type", "") == CONTROL_TYPE


@dataclass
class Reply:
    """One RTSP reply."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def wire(self, cseq: str) -> bytes:
        """The bytes to send."""
        reason = REASONS.get(self.status, "Error")
        lines = [f"RTSP/1.0 {self.status} {reason}", f"CSeq: {cseq}", "Server: tsm-live simulator"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.body:
            lines.append(f"Content-Length: {len(self.body)}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + self.body


class _Play:
    """One client's play of one camera: numbers the packets, breaks them as the knobs say, writes the log."""

    def __init__(self, camera: Camera, link: _Link, channel: int, peer: tuple[str, int, int] | None) -> None:
        self.camera, self.link = camera, link
        self.id = secrets.token_hex(6)
        self.dice = random.Random(camera.seed)
        self.ssrc = self.dice.getrandbits(32)
        self.sequence = self.dice.getrandbits(15)
        self.channel = channel
        self.peer = peer
        self.udp: tuple[asyncio.DatagramTransport, asyncio.DatagramTransport] | None = None
        self.playing = False
        self.info: SessionInfo | None = None
        self._key_needed = True
        self._report_at = 0.0
        self._packets = self._octets = 0

    # -- the camera's side

    def post(self, unit: AccessUnit, *, gap: bool) -> None:
        """Take one picture from the camera's thread."""
        with suppress(RuntimeError):  # the loop has just ended
            self.link.loop.call_soon_threadsafe(self._send, unit, gap)

    def play(self, user_agent: str) -> None:
        """Begin, from a key frame on."""
        if self.playing:
            return
        self.playing, self._key_needed = True, True
        transport = "udp" if self.peer else "tcp"
        self.info = SessionInfo(self.id, user_agent, transport, time.time())
        self.camera.began(self.info)
        self.camera.join(self)

    def pause(self) -> None:
        """Send no more; a new play is a new session in the log."""
        if self.playing and self.info:
            self.playing = False
            self.camera.leave(self)
            self.info.ended_unix_s = time.time()

    def close(self, *, bye: bool) -> None:
        """End, with a BYE where the goodbye is orderly."""
        was_playing = self.playing
        self.pause()
        if bye and was_playing:
            self._write_control(goodbye(self.ssrc))
        for transport in self.udp or ():
            transport.close()

    # -- the loop's side

    def _send(self, unit: AccessUnit, gap: bool) -> None:
        info = self.info
        if not self.playing or info is None:
            return
        if not self.peer and self.link.unread_bytes() > UNREAD_BYTES:
            gap = True
        self._key_needed = (self._key_needed or gap) and not (unit.key and not gap)
        if self._key_needed:
            if info.frames:
                info.skipped += 1
            if gap:
                self.camera.want_key()
            return
        packets = self._packets_of(unit, info)
        if packets:
            self._write(b"".join(packets[:-1]) if not self.peer else packets[:-1])
        entry = LogEntry(unit.number, time.time(), self.id, info.user_agent)
        if packets:
            self._write(packets[-1:] if self.peer else packets[-1])
        self.camera.sent(entry)
        if info.first_frame is None:
            info.first_frame = unit.number
        info.last_frame = unit.number
        info.frames += 1
        now = time.monotonic()
        if self.camera.knobs.sender_reports and now >= self._report_at:
            self._report_at = now + SENDER_REPORT_S
            report = sender_report(
                ssrc=self.ssrc,
                unix_s=entry.sent_unix_s,
                timestamp=unit.timestamp,
                packets=self._packets,
                octets=self._octets,
            )
            self._write_control(report)

    def _packets_of(self, unit: AccessUnit, info: SessionInfo) -> list[bytes]:
        knobs = self.camera.knobs
        out: list[bytes] = []
        last = len(unit.payloads) - 1
        for i, payload in enumerate(unit.payloads):
            sequence = self.sequence
            self.sequence = (self.sequence + 1) & 0xFFFF
            if knobs.loss_rate and self.dice.random() < knobs.loss_rate:
                info.packets_lost += 1
                continue
            if knobs.garbage:
                payload = self.dice.randbytes(len(payload))
            elif knobs.bit_flip_rate and self.dice.random() < knobs.bit_flip_rate:
                flipped = bytearray(payload)
                flipped[self.dice.randrange(len(flipped))] ^= 1 << self.dice.randrange(8)
                payload = bytes(flipped)
            packet = rtp_packet(payload, sequence=sequence, timestamp=unit.timestamp, ssrc=self.ssrc, marker=i == last)
            self._packets += 1
            self._octets += len(packet) - RTP_HEADER_BYTES
            out.append(packet if self.peer else struct.pack(">cBH", b"$", self.channel, len(packet)) + packet)
        return out

    def _write(self, data: bytes | list[bytes]) -> None:
        if isinstance(data, bytes):
            self.link.write(data)
        elif self.peer and self.udp:
            for packet in data:
                self.udp[0].sendto(packet, (self.peer[0], self.peer[1]))

    def _write_control(self, packet: bytes) -> None:
        if self.peer and self.udp:
            self.udp[1].sendto(packet, (self.peer[0], self.peer[2]))
        elif not self.peer:
            self.link.write(struct.pack(">cBH", b"$", self.channel + 1, len(packet)) + packet)


class _Link:
    """One RTSP connection."""

    def __init__(self, server: RtspServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.loop = asyncio.get_running_loop()
        self.nonce = secrets.token_hex(16)
        self.play: _Play | None = None
        self.ended = False  # FIN was sent: what comes in is read, nothing more goes out

    # -- bytes

    def write(self, data: bytes) -> None:
        """Queue bytes, unless the connection is going away."""
        if data and not self.ended and not self.writer.transport.is_closing():
            self.writer.write(data)

    def unread_bytes(self) -> int:
        """Bytes that the client has not taken yet."""
        return self.writer.transport.get_write_buffer_size()

    async def _read(self) -> Request | None:
        """The next request; None for something that is no RTSP."""
        while (first := await self.reader.readexactly(1)) in (b"$", b"\r", b"\n"):
            if first == b"$":  # the client's receiver reports
                _, length = struct.unpack(">BH", await self.reader.readexactly(3))
                await self.reader.readexactly(length)
        head = (first + await self.reader.readuntil(b"\r\n\r\n")).decode("utf-8", "replace")
        first_line, *lines = head.split("\r\n")
        match = re.fullmatch(r"([A-Z_]+) (\S+) RTSP/1\.\d", first_line)
        if not match:
            return None
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                headers[name.strip().lower()] = value.strip()
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY_BYTES:
            return None
        return Request(match[1], match[2], headers, await self.reader.readexactly(int(length)))

    async def serve(self) -> None:
        """Answer until the client leaves."""
        try:
            while request := await self._read():
                await self._answer(request)
            self.write(Reply(400).wire("0"))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass
        finally:
            if self.play:
                self.play.close(bye=False)
            self.writer.close()

    def hang_up(self, *, reset: bool) -> None:
        """End the connection: FIN after all that was sent, or RST at once."""
        if self.play:
            self.play.close(bye=not reset)
        transport = self.writer.transport
        if transport.is_closing():
            return
        if reset:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        elif not self.ended:
            self.ended = True
            self.writer.write_eof()  # the rest is read until the client closes: closing now could reset
            self.loop.call_later(LINGER_S, transport.abort)

    # -- requests

    async def _answer(self, request: Request) -> None:
        camera = self.server.cameras.get(request.mount)
        if camera and not request.control:
            knobs = camera.knobs
            if knobs.never_answer:
                return
            await asyncio.sleep(knobs.reply_delay_s)
        reply = await self._reply(request, camera)
        if self.play:
            reply.headers.setdefault("Session", f"{self.play.id};timeout={SESSION_TIMEOUT_S}")
        self.write(reply.wire(request.headers.get("cseq", "0")))
        if request.method == "PLAY" and reply.status == 200 and self.play:
            self.play.play(request.headers.get("user-agent", ""))
        if request.method == "TEARDOWN" and reply.status == 200 and self.play:
            self.play.close(bye=False)
            self.play = None

    async def _reply(self, request: Request, camera: Camera | None) -> Reply:
        if request.method == "OPTIONS":
            methods = "OPTIONS, DESCRIBE, SETUP, PLAY, PAUSE, TEARDOWN, GET_PARAMETER, SET_PARAMETER"
            return Reply(headers={"Public": methods})
        if camera is None:
            return Reply(404)
        if request.control:
            return self._control(request, camera)
        if camera.knobs.status is not None:
            return self._challenge(camera, Reply(camera.knobs.status))
        if not self._authorized(request, camera):
            return self._challenge(camera, Reply(401))
        match request.method:
            case "DESCRIBE":
                return await self._describe(request, camera)
            case "SETUP":
                return await self._setup(request, camera)
            case "PLAY" | "PAUSE" | "TEARDOWN" if self.play is None:
                return Reply(454)
            case "PLAY" if self.play:
                # no Range: the announced timestamp stands for the camera's time 0
                url = f"{request.url.rstrip('/')}/trackID=0"
                info = f"url={url};seq={self.play.sequence};rtptime={camera.rtp_base}"
                return Reply(headers={"RTP-Info": info})
            case "PAUSE" if self.play:
                self.play.pause()
                return Reply()
            case "TEARDOWN" | "GET_PARAMETER" | "SET_PARAMETER":
                return Reply()
        return Reply(405)

    async def _describe(self, request: Request, camera: Camera) -> Reply:
        sets = await self.loop.run_in_executor(None, camera.parameter_sets)
        encoding = "X-UNKNOWN" if camera.knobs.unknown_codec else None
        body = sdp(request.mount, sets, camera.fps, encoding=encoding).encode()
        return Reply(
            headers={"Content-Type": "application/sdp", "Content-Base": request.url.rstrip("/") + "/"}, body=body
        )

    async def _setup(self, request: Request, camera: Camera) -> Reply:
        for offer in request.headers.get("transport", "").split(","):
            parts = [part.strip() for part in offer.split(";")]
            if "multicast" in parts:
                continue
            pairs = {
                key: [int(n) for n in re.findall(r"\d+", value)] for key, _, value in (p.partition("=") for p in parts)
            }
            if parts[0] == "RTP/AVP/TCP" and "tcp" in camera.transports:
                self._replace(_Play(camera, self, (pairs.get("interleaved") or [0])[0], None))
                assert self.play
                answer = f"RTP/AVP/TCP;unicast;interleaved={self.play.channel}-{self.play.channel + 1}"
            elif parts[0] in ("RTP/AVP", "RTP/AVP/UDP") and "udp" in camera.transports and pairs.get("client_port"):
                ports = pairs["client_port"]
                host = self.writer.get_extra_info("peername")[0]
                play = _Play(camera, self, 0, (host, ports[0], ports[1] if len(ports) > 1 else ports[0] + 1))
                play.udp, server_port = await _udp_pair(self.writer.get_extra_info("sockname")[0])
                self._replace(play)
                answer = (
                    f"RTP/AVP;unicast;client_port={ports[0]}-{ports[-1]};server_port={server_port}-{server_port + 1}"
                )
            else:
                continue
            assert self.play
            return Reply(headers={"Transport": f"{answer};ssrc={self.play.ssrc:08X}"})
        return Reply(461)

    def _replace(self, play: _Play) -> None:
        if self.play:
            self.play.close(bye=False)
        self.play = play

    # -- passwords

    def _challenge(self, camera: Camera, reply: Reply) -> Reply:
        if reply.status == 401:
            if camera.auth == "digest":
                reply.headers["WWW-Authenticate"] = f'Digest realm="{REALM}", nonce="{self.nonce}"'
            else:
                reply.headers["WWW-Authenticate"] = f'Basic realm="{REALM}"'
        return reply

    def _authorized(self, request: Request, camera: Camera) -> bool:
        if camera.auth == "none":
            return True
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic" and camera.auth == "basic":
            return _basic_ok(value, camera)
        if scheme.lower() != "digest" or camera.auth != "digest":
            return False
        given = {key: quoted or bare for key, quoted, bare in re.findall(r'(\w+)=(?:"([^"]*)"|([^\s,]+))', value)}
        username, password = camera.credentials()

        def md5(text: str) -> str:
            return hashlib.md5(text.encode()).hexdigest()  # noqa: S324

        login, action = md5(f"{username}:{REALM}:{password}"), md5(f"{request.method}:{given.get('uri', '')}")
        expected = md5(f"{login}:{self.nonce}:{action}")
        return given.get("username") == username and secrets.compare_digest(given.get("response", ""), expected)

    # -- the simulator's own requests

    def _control(self, request: Request, camera: Camera) -> Reply:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if camera.auth != "none" and not (scheme.lower() == "basic" and _basic_ok(value, camera)):
            return Reply(401)
        try:
            asked = json.loads(request.body or b"{}")
            if not isinstance(asked, dict):
                raise CameraError("the body must be a JSON object")
            if request.method == "GET_PARAMETER":
                answer = self.server.read_parameters(camera, asked)
            else:
                answer = self.server.set_parameters(camera, asked)
        except (CameraError, ValueError, TypeError) as error:
            return Reply(400, {"Content-Type": CONTROL_TYPE}, json.dumps({"error": str(error)}).encode())
        return Reply(200, {"Content-Type": CONTROL_TYPE}, json.dumps(answer).encode())


def _basic_ok(value: str, camera: Camera) -> bool:
    with suppress(ValueError):
        username, _, password = base64.b64decode(value).decode().partition(":")
        return camera.check_password(username, password)
    return False


async def _udp_pair(host: str) -> tuple[tuple[asyncio.DatagramTransport, asyncio.DatagramTransport], int]:
    """Two sockets on neighbouring ports, the first even: RTP and RTCP."""
    loop = asyncio.get_running_loop()
    for _ in range(100):
        first, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=(host, 0))
        port = first.get_extra_info("sockname")[1]
        if port % 2 == 0:
            with suppress(OSError):
                second, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=(host, port + 1))
                return (first, second), port
        first.close()
    raise OSError("no two neighbouring UDP ports are free")


class RtspServer:
    """An RTSP server for simulated cameras, in a thread of its own.

    `start` listens (port 0: a free one, kept for later starts) and raises OSError when the port is taken; `stop` ends
    every connection in order, so that clients get all that was sent; `abort` resets them. Both free the port until the
    next `start`. The cameras' clocks go on meanwhile.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.port = host, port
        self.cameras: dict[str, Camera] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: asyncio.Server | None = None
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._end: asyncio.Event | None = None
        self._reset = False
        self._pause: asyncio.Task[None] | None = None

    def add(self, mount: str, camera: Camera) -> str:
        """Serve a camera below `mount`; returns its URL, which is complete once the server listens."""
        name = mount.strip("/")
        if not name or name in self.cameras:
            raise CameraError(f"mount {mount!r} is {'taken' if name else 'empty'}: give each camera a name of its own")
        self.cameras[name] = camera
        if self._loop:
            camera.open()
        return self.url(mount)

    def url(self, mount: str) -> str:
        """The address of a mount, without any password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"rtsp://{host}:{self.port}/{mount.strip('/')}"

    def urls(self) -> list[str]:
        """The addresses of all mounts."""
        return [self.url(mount) for mount in self.cameras]

    # -- start and stop

    def start(self) -> Self:
        """Listen; returns when clients can connect."""
        if self._thread is not None:
            return self
        ready = threading.Event()
        failed: list[OSError] = []

        def run() -> None:
            try:
                asyncio.run(self._main(ready))
            except OSError as error:
                failed.append(error)
                ready.set()

        self._thread = threading.Thread(target=run, name="rtsp-server", daemon=True)
        self._thread.start()
        ready.wait()
        if failed:
            self._thread = None
            raise failed[0]
        return self

    def stop(self) -> None:
        """End every connection with a FIN after all that was sent, and listen no more."""
        self._finish(reset=False)

    def abort(self) -> None:
        """Reset every connection, and listen no more."""
        self._finish(reset=True)

    def _finish(self, *, reset: bool) -> None:
        thread, loop, end = self._thread, self._loop, self._end
        if thread is None or loop is None or end is None:
            return
        self._reset = reset
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(end.set)
        thread.join()
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _main(self, ready: threading.Event) -> None:
        self._end = asyncio.Event()
        await self._listen()
        self._loop = asyncio.get_running_loop()
        for camera in self.cameras.values():
            camera.open()
        ready.set()
        await self._end.wait()
        if self._pause:
            self._pause.cancel()
        self._loop = None
        await self._hang_up(reset=self._reset)
        for camera in self.cameras.values():
            await asyncio.get_running_loop().run_in_executor(None, camera.close)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._connected, self.host, self.port, limit=LARGEST_HEAD_BYTES, backlog=64
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, reader, writer)
        task = asyncio.current_task()
        assert task
        self._links[link] = task
        try:
            await link.serve()
        finally:
            del self._links[link]

    async def _hang_up(self, *, reset: bool, camera: Camera | None = None) -> None:
        """End all connections, or those that play one camera."""
        if camera is None and self._listener:
            self._listener.close()
            self._listener = None
        ending = {
            link: task
            for link, task in self._links.items()
            if camera is None or (link.play and link.play.camera is camera)
        }
        for link in ending:
            link.hang_up(reset=reset)
        if ending:
            await asyncio.wait(ending.values(), timeout=2 * LINGER_S)

    async def _away(self, seconds: float, *, reset: bool) -> None:
        await self._hang_up(reset=reset)
        await asyncio.sleep(seconds)
        await self._listen()

    # -- from another process

    def read_parameters(self, camera: Camera, asked: dict[str, Any]) -> dict[str, Any]:
        """What GET_PARAMETER gives: the named ones of script, log, sessions, knobs and camera."""
        readers: dict[str, Callable[[], Any]] = {
            "script": lambda: camera.script(asked.get("until_frame")),
            "log": lambda: camera.log(int(asked.get("after", 0)), LOG_PAGE),
            "sessions": lambda: [asdict(info) for info in camera.sessions()],
            "knobs": camera.knob_values,
            "camera": lambda: {
                "fps": camera.fps,
                "codec": camera.codec,
                "now": camera.now(),
                "rtp_base": camera.rtp_base,
            },
        }
        names = asked.get("names", [])
        if unknown := [name for name in names if name not in readers]:
            raise CameraError(f"nothing named {unknown[0]!r} to read; there are {', '.join(readers)}")
        return {name: readers[name]() for name in names}

    def set_parameters(self, camera: Camera, asked: dict[str, Any]) -> dict[str, Any]:
        """What SET_PARAMETER does; returns all knobs.

        Knobs are turned; `source` switches; `disconnect` ("fin" or "rst") ends the camera's connections; `away_s` takes
        the whole server away for so long (with `reset`: by RST).
        """
        knobs = dict(asked)
        source, disconnect = knobs.pop("source", None), knobs.pop("disconnect", None)
        away_s, reset = knobs.pop("away_s", None), bool(knobs.pop("reset", False))
        loop = asyncio.get_running_loop()
        if disconnect not in (None, "fin", "rst"):
            raise CameraError(f"disconnect is {disconnect!r}: give fin or rst")
        camera.set(**knobs)
        if source is not None:
            if not str(source).startswith("scene:"):  # nobody shall read files from afar
                raise CameraError(f"source is {source!r}: over the network only scene:SEED can be chosen")
            camera.switch(str(source))
        if disconnect:
            self._pause = loop.create_task(self._hang_up(reset=disconnect == "rst", camera=camera))
        if away_s is not None:
            self._pause = loop.create_task(self._away(float(away_s), reset=reset))
        return camera.knob_values()
