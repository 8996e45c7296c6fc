import random
import struct

import pytest

from pipelines.rtp import ParameterSets, goodbye, is_key, payloads, rtp_packet, sdp, sender_report, split_nals


def rejoined(parts, codec):
    """NAL units from RTP payloads, by the RFCs' rules."""
    nals, open_unit = [], None
    for part in parts:
        kind = part[0] & 0x1F if codec == "h264" else (part[0] >> 1) & 0x3F
        if kind != (28 if codec == "h264" else 49):
            nals.append(part)
            continue
        head = 1 if codec == "h264" else 2
        flags = part[head]
        if flags & 0x80:
            first = (part[0] & 0xE0) | (flags & 0x1F) if codec == "h264" else (part[0] & 0x81) | (flags & 0x3F) << 1
            open_unit = bytes([first]) + part[1:head]
        assert open_unit is not None
        open_unit += part[head + 1 :]
        if flags & 0x40:
            nals.append(open_unit)
            open_unit = None
    assert open_unit is None
    return nals


@pytest.mark.parametrize("codec", ["h264", "h265"])
@pytest.mark.parametrize("size", [1, 2, 1399, 1400, 1401, 2796, 2797, 2798, 50_000])
def test_packets_rejoin_to_the_same_units(codec, size):
    dice = random.Random(size)
    head = bytes([0x65]) if codec == "h264" else bytes([19 << 1, 1])
    nals = [head + dice.randbytes(size) for _ in range(2)]
    parts = payloads(nals, codec)
    assert max(len(part) for part in parts) <= 1400
    assert rejoined(parts, codec) == nals


def test_units_of_a_byte_stream():
    stream = b"\x00\x00\x00\x01\x67abc\x00\x00\x01\x68d\x00\x00\x00\x00\x01\x65ef"
    nals = split_nals(stream)
    assert nals == [b"\x67abc", b"\x68d", b"\x65ef"]
    assert is_key(nals, "h264")
    assert not is_key([b"\x41"], "h264")
    assert is_key([bytes([19 << 1, 1])], "h265")
    assert not is_key([bytes([1 << 1, 1])], "h265")
    assert split_nals(b"nothing") == []


def test_packet_header():
    packet = rtp_packet(b"xyz", sequence=65_537, timestamp=90_000, ssrc=7, marker=True)
    assert struct.unpack(">BBHII", packet[:12]) == (0x80, 0x80 | 96, 1, 90_000, 7)
    assert packet[12:] == b"xyz"


def test_reports():
    report = sender_report(ssrc=7, unix_s=0.5, timestamp=3, packets=4, octets=5)
    fields = struct.unpack(">BBHIIIIII", report)
    assert fields == (0x80, 200, 6, 7, 2_208_988_800, 1 << 31, 3, 4, 5)
    assert struct.unpack(">BBHI", goodbye(7)) == (0x81, 203, 1, 7)


def test_session_descriptions():
    sets = ParameterSets.find([b"\x67\x42\xc0\x1e", b"\x68x", b"\x65y", b"\x67\x42\xc0\x1e"], "h264")
    text = sdp("door", sets, 15.0)
    assert "a=rtpmap:96 H264/90000\r\n" in text
    assert "profile-level-id=42C01E;sprop-parameter-sets=Z0LAHg==,aHg=\r\n" in text
    unknown = sdp("door", sets, 15.0, encoding="X-UNKNOWN")
    assert "X-UNKNOWN/90000" in unknown
    assert "fmtp" not in unknown
