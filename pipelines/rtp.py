"""Compressed pictures on the wire: NAL units, RTP payloads for H.264 (RFC 6184) and H.265 (RFC 7798), SDP."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Codec = Literal["h264", "h265"]

CLOCK_HZ = 90_000
PAYLOAD_TYPE = 96
MAX_PAYLOAD_BYTES = 1400
RTP_HEADER_BYTES = 12


def split_nals(stream: bytes) -> list[bytes]:
    """NAL units of an Annex B byte stream, without their start codes."""
    nals: list[bytes] = []
    start = stream.find(b"\x00\x00\x01")
    while start >= 0:
        after = stream.find(b"\x00\x00\x01", start + 3)
        nal = stream[start + 3 : after if after >= 0 else len(stream)].rstrip(b"\x00")
        if nal:
            nals.append(nal)
        start = after
    return nals


def nal_type(nal: bytes, codec: Codec) -> int:
    """The unit's type: 5 bits in H.264, 6 bits in H.265."""
    return nal[0] & 0x1F if codec == "h264" else (nal[0] >> 1) & 0x3F


def is_key(nals: Iterable[bytes], codec: Codec) -> bool:
    """True when decoding can begin at this access unit (IDR; in H.265 any IRAP)."""
    types = {nal_type(nal, codec) for nal in nals}
    return 5 in types if codec == "h264" else any(16 <= kind <= 23 for kind in types)


def payloads(nals: Iterable[bytes], codec: Codec, limit_bytes: int = MAX_PAYLOAD_BYTES) -> list[bytes]:
    """RTP payloads of one access unit, in order; units larger than `limit_bytes` go as FU-A (H.264) or FU (H.265)."""
    out: list[bytes] = []
    for nal in nals:
        if len(nal) <= limit_bytes:
            out.append(nal)
            continue
        if codec == "h264":
            head, kind, body = bytes([(nal[0] & 0xE0) | 28]), nal[0] & 0x1F, nal[1:]
        else:
            head, kind, body = bytes([(nal[0] & 0x81) | (49 << 1), nal[1]]), (nal[0] >> 1) & 0x3F, nal[2:]
        step = limit_bytes - len(head) - 1
        for at in range(0, len(body), step):
            flags = (0x80 if at == 0 else 0) | (0x40 if at + step >= len(body) else 0)
            out.append(head + bytes([flags | kind]) + body[at : at + step])
    return out


def rtp_packet(payload: bytes, *, sequence: int, timestamp: int, ssrc: int, marker: bool) -> bytes:
    """One RTP packet; the marker stands on the last packet of a picture."""
    return struct.pack(">BBHII", 0x80, PAYLOAD_TYPE | (marker << 7), sequence & 0xFFFF, timestamp, ssrc) + payload


def sender_report(*, ssrc: int, unix_s: float, timestamp: int, packets: int, octets: int) -> bytes:
    """An RTCP sender report: which wall-clock moment an RTP timestamp stands for."""
    seconds = unix_s + 2_208_988_800  # NTP counts from 1900
    return struct.pack(
        ">BBHIIIIII",
        0x80,
        200,
        6,
        ssrc,
        int(seconds) & 0xFFFFFFFF,
        int((seconds % 1) * (1 << 32)) & 0xFFFFFFFF,
        timestamp,
        packets & 0xFFFFFFFF,
        octets & 0xFFFFFFFF,
    )


def goodbye(ssrc: int) -> bytes:
    """An RTCP BYE."""
    return struct.pack(">BBHI", 0x81, 203, 1, ssrc)


@dataclass
class ParameterSets:
    """What a decoder must know before the first picture: VPS (H.265 alone), SPS and PPS."""

    codec: Codec
    vps: list[bytes] = field(default_factory=list)
    sps: list[bytes] = field(default_factory=list)
    pps: list[bytes] = field(default_factory=list)

    @classmethod
    def find(cls, nals: Iterable[bytes], codec: Codec) -> ParameterSets:
        """The parameter sets among `nals`."""
        found = cls(codec)
        kinds = {7: found.sps, 8: found.pps} if codec == "h264" else {32: found.vps, 33: found.sps, 34: found.pps}
        for nal in nals:
            if (kept := kinds.get(nal_type(nal, codec))) is not None and nal not in kept:
                kept.append(nal)
        return found

    def fmtp(self) -> str:
        """The parameters of SDP's `a=fmtp` line."""

        def text(nals: list[bytes]) -> str:
            return ",".join(base64.b64encode(nal).decode() for nal in nals)

        if self.codec == "h264":
            level = self.sps[0][1:4].hex().upper() if self.sps else "42C01E"
            sets = text(self.sps + self.pps)
            return f"packetization-mode=1;profile-level-id={level};sprop-parameter-sets={sets}"
        return f"sprop-vps={text(self.vps)};sprop-sps={text(self.sps)};sprop-pps={text(self.pps)}"


def sdp(name: str, sets: ParameterSets, fps: float, *, encoding: str | None = None) -> str:
    """A session description with one video track; `encoding` replaces the codec's name (to serve an unknown one)."""
    lines = [
        "v=0",
        "o=- 1 1 IN IP4 127.0.0.1",
        f"s={name}",
        "c=IN IP4 0.0.0.0",
        "t=0 0",
        "a=control:*",
        f"m=video 0 RTP/AVP {PAYLOAD_TYPE}",
        f"a=rtpmap:{PAYLOAD_TYPE} {encoding or sets.codec.upper()}/{CLOCK_HZ}",
        *([] if encoding else [f"a=fmtp:{PAYLOAD_TYPE} {sets.fmtp()}"]),
        f"a=framerate:{fps:g}",
        "a=control:trackID=0",
    ]
    return "\r\n".join(lines) + "\r\n"
