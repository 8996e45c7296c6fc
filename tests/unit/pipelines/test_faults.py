"""Words and timing become faults; secrets never come out."""

from urllib.parse import quote

import pytest

from pipelines.faults import (
    FAULTS,
    BadSource,
    Fault,
    _RtspClient,
    _video_of,
    classify,
    file_path,
    has_secret,
    redact,
    split_userinfo,
    with_userinfo,
)

PASSWORDS = ["canary", "p@ss", "a/b", "a:b@c/d", "50%", "ü ber", "q?x=1&y", "a+b", "w#r", "%41%20"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("encode", [str, quote, lambda text: quote(text, safe=""), lambda text: quote(text).lower()])
def test_a_known_password_never_comes_out(password, encode):
    text = f"Error opening rtsp://admin:{encode(password)}@cam:554/live: 401 for {encode(password)}!"
    clean = redact(text, [password])
    assert password not in clean
    assert encode(password) not in clean
    assert clean.endswith("401 for ***!")
    assert "cam:554/live" in clean


@pytest.mark.parametrize("password", [p for p in PASSWORDS if " " not in p])
def test_a_url_loses_its_userinfo_without_knowing_the_password(password):
    clean = redact(f"opening 'rtsp://admin:{password}@cam/live' failed")
    assert clean == "opening 'rtsp://***@cam/live' failed"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("rtsp://cam/live?user=me&password=canary&channel=1", "rtsp://cam/live?user=me&password=***&channel=1"),
        ("rtsp://cam/user=me_password=can_ary_channel=1.sdp", "rtsp://cam/user=me_password=***_channel=1.sdp"),
        ("GET x?PWD=canary", "GET x?PWD=***"),
        ("Authorization: Basic Y2FuYXJ5", "Authorization: ***"),
        ("rtsp://cam:554/live says 404", "rtsp://cam:554/live says 404"),
        ("mail to a@b is no URL", "mail to a@b is no URL"),
        ("rtsp://u:p@a/x and rtsps://v:q@b/y", "rtsp://***@a/x and rtsps://***@b/y"),
    ],
)
def test_redact(text, clean):
    assert redact(text) == clean
    assert redact(clean) == clean


@pytest.mark.parametrize("password", PASSWORDS)
def test_credentials_survive_the_way_into_an_address(password):
    secret = with_userinfo("rtsp://cam:8554/live", "me", password)
    assert has_secret(secret)
    assert split_userinfo(secret) == ("rtsp://cam:8554/live", "me", password)


def test_a_raw_at_sign_belongs_to_the_password():
    assert split_userinfo("rtsp://me:p@ss@cam/live") == ("rtsp://cam/live", "me", "p@ss")


@pytest.mark.parametrize(
    "uri",
    ["http://cam/x", "cam/live", "", "rtsp://", "rtsp:///live", "rtsp://cam:99999/", "rtsp://cam:port/", "-i file"],
)
def test_an_unusable_address_says_what_would_work(uri):
    with pytest.raises(BadSource, match="rtsp://"):
        split_userinfo(uri)


def test_a_bad_address_does_not_show_its_password():
    with pytest.raises(BadSource) as raised:
        split_userinfo("rtsp://me:canary@cam:port/live")
    assert "canary" not in str(raised.value)
    with pytest.raises(BadSource) as raised:
        split_userinfo("ftp://me:canary@cam/live")
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize("uri", ["file://host/x", "file:x", "file://", "file:///a%00b"])
def test_a_file_address_must_be_local_and_absolute(uri):
    with pytest.raises(BadSource):
        file_path(uri)


def test_a_file_address_is_decoded():
    assert file_path("file:///films/a%20b%23.mp4") == "/films/a b#.mp4"
    assert file_path("file://localhost/films/a.mp4") == "/films/a.mp4"


# what ffmpeg 5.1, ffmpeg 9.0 and our PyAV child were heard to say
@pytest.mark.parametrize(
    ("line", "elapsed_s", "code", "retry"),
    [
        ("[rtsp @ 0x1] [error] method DESCRIBE failed: 401 Unauthorized", 0.1, "STREAM_AUTH_FAILED", "slow"),
        ("[error] HTTPUnauthorizedError: Server returned 401 Unauthorized", 0.1, "STREAM_AUTH_FAILED", "slow"),
        ("[error] rtsp://cam/x: Server returned 403 Forbidden (access denied)", 0.1, "STREAM_AUTH_FAILED", "slow"),
        ("[rtsp @ 0x1] [error] method DESCRIBE failed: 404 Not Found", 0.1, "STREAM_NOT_FOUND", "slow"),
        ("[error] rtsp://cam/x: Server returned 5XX Server Error reply", 0.1, "STREAM_SERVER_BUSY", "soon"),
        ("[error] Server returned 4XX Client Error, but not one of 40{0,1,3,4}", 0.3, "STREAM_PROTOCOL", "soon"),
        ("[tcp @ 0x1] [error] Failed to resolve hostname cam: Name or service", 0.1, "STREAM_DNS_FAILED", "soon"),
        ("[error] rtsp://cam/x: Connection refused", 0.1, "STREAM_CONNECTION_FAILED", "soon"),
        ("[error] rtsp://cam/x: No route to host", 3.0, "STREAM_CONNECTION_FAILED", "soon"),
        ("[error] rtsp://cam/x: Connection timed out", 4.1, "STREAM_TIMEOUT", "soon"),
        ("[error] rtsp://cam/x: Invalid data found when processing input", 4.2, "STREAM_TIMEOUT", "soon"),
        ("[error] rtsp://cam/x: Invalid data found when processing input", 0.3, "STREAM_NOT_RTSP", "slow"),
        ("[error] InvalidDataError: Invalid data found", 0.3, "STREAM_NOT_RTSP", "slow"),
        ("[warning] Could not find codec parameters for stream 0", 8.3, "STREAM_NO_DATA", "soon"),
        ("[error] TimeoutError: Connection timed out", 8.3, "STREAM_NO_DATA", "soon"),
        ("[fatal] Decoder (codec none) not found for input stream #0:0", 9.0, "STREAM_CODEC_UNSUPPORTED", "slow"),
        ("[error] no decoder found for: none", 9.0, "STREAM_CODEC_UNSUPPORTED", "slow"),
        ("[fatal] Stream map '0:v:0' matches no streams.", 1.0, "STREAM_NO_VIDEO", "slow"),
        ("[tls @ 0x1] [error] certificate verify failed", 0.2, "STREAM_TLS_CERTIFICATE", "slow"),
        ("[tls] [error] Peer certificate failed verification", 0.2, "STREAM_TLS_CERTIFICATE", "slow"),
        (
            "[libav.tls] [error] The certificate's owner does not match hostname cam",
            0.2,
            "STREAM_TLS_CERTIFICATE",
            "slow",
        ),
        ("[rtsp @ 0x1] [info] Status 302: Redirecting to rtsp://10.0.0.9/x", 0.1, "STREAM_REDIRECTED", "slow"),
        ("[in#0] [error] Protocol 'rtsp' not on whitelist 'tcp,udp,rtp,tls'!", 0.1, "STREAM_REDIRECTED", "slow"),
        (
            "[IMGUTILS @ 0x1] [error] Picture size 320x320 exceeds specified max pixel count 9, see the documentation",
            0.5,
            "STREAM_TOO_LARGE",
            "slow",
        ),
        ("[error] no answer: Connection timed out", 9.0, "STREAM_TIMEOUT", "soon"),
        ("[error] no RTSP answer: Invalid data found", 9.0, "STREAM_NOT_RTSP", "slow"),
        ("something new", 0.2, "STREAM_DECODER_FAILED", "soon"),
    ],
)
def test_words_and_time_before_the_first_frame(line, elapsed_s, code, retry):
    fault = classify(["[info] Input", line], elapsed_s=elapsed_s, io_timeout_s=4.0, frames=0)
    assert (fault.code, fault.retry) == (code, retry)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([], "STREAM_DISCONNECTED"),
        (["[warning] End of file"], "STREAM_DISCONNECTED"),
        (["[warning] Connection timed out"], "STREAM_STALLED"),
        (["[error] TimeoutError: timed out"], "STREAM_STALLED"),
    ],
)
def test_after_the_first_frame_an_end_is_a_loss_whatever_the_exit_code(lines, code):
    assert classify(lines, elapsed_s=60.0, io_timeout_s=4.0, frames=100).code == code


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("[error] file:/x: No such file or directory", "STREAM_FILE_NOT_FOUND"),
        ("[error] file:/x: Permission denied", "STREAM_FILE_UNREADABLE"),
        ("[error] file:/x: Invalid data found when processing input", "STREAM_FILE_INVALID"),
        ("[fatal] Stream map '0:v:0' matches no streams.", "STREAM_FILE_INVALID"),
    ],
)
def test_a_bad_file_is_never_tried_again(line, code):
    fault = classify([line], elapsed_s=0.1, io_timeout_s=4.0, frames=0, is_file=True)
    assert (fault.code, fault.retry) == (code, "never")


def test_every_fault_says_what_happened_and_what_would_work():
    for code in FAULTS:
        fault = Fault.of(code, "detail")
        assert code.startswith("STREAM_")
        assert fault.message.endswith(": detail")
        assert fault.hint


def test_session_descriptions():
    sdp = "v=0\r\nm=audio 0 RTP/AVP 97\r\na=rtpmap:97 OPUS/48000\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
    assert _video_of(sdp + "a=framerate:25.0\r\n") == ("H264", 25.0)
    assert _video_of(sdp) == ("H264", None)
    assert _video_of("v=0\r\nm=video 0 RTP/AVP 26\r\n") == ("JPEG", None)


def test_digest_answers_as_rfc_2617_says(monkeypatch):
    # the example of RFC 2617 section 3.5, whose client nonce is fixed here
    client = _RtspClient(None, "/dir/index.html", "Mufasa", "Circle Of Life", 1.0)
    offered = 'Digest realm="testrealm@host.com", qop="auth", nonce="dcd98b7102dd2f0e8b11d0f600bfb0c093", opaque="5ccc"'
    assert client.answer_challenge({"www-authenticate": f'Basic realm="x"\n{offered}'}) == "digest MD5"
    monkeypatch.setattr("os.urandom", lambda n: bytes.fromhex("0a4f113b"))
    answer = client._authorization("GET")
    assert 'response="6629fae49393a05397450978507c4ef1"' in answer
    assert 'opaque="5ccc"' in answer
    assert "Circle" not in answer
