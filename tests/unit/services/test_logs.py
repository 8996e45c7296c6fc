import io
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from services.logs import RELAY_VARIABLE, Relay, set_up
from services.settings import LoggerSettings, Settings, StoreSettings
from services.tracing import request_span

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
STORE = SecretStr("redis://:st0re-pa55@127.0.0.1:6379/0")
NAMES = ("", "ray", "ray.serve", "uvicorn", "uvicorn.error")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The loggers' own state comes back."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)


def settings(how: str, level: str = "INFO") -> Settings:
    return Settings(
        logger=LoggerSettings.model_validate({"format": how, "level": level}), store=StoreSettings(url=STORE)
    )


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_record_is_one_line_of_json_with_what_is_known(capsys):
    set_up(settings("json"), "engine-1")
    log = logging.getLogger("services.engine")
    with request_span("request", CALLER):
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            log.exception("%s: step\nfailed", "door", extra={"stream": "door"})
    log.info("plain")
    log.debug("not shown")
    failed, plain = map(json.loads, lines(capsys))
    assert failed["level"], failed["logger"] == ("ERROR", "services.engine")
    assert failed["message"] == "door: step\nfailed"
    assert (failed["replica"], failed["stream"]) == ("engine-1", "door")
    assert (failed["trace_id"], failed["span_id"]) == tuple(CALLER.split("-")[1:3])
    assert "ValueError: first\nsecond" in failed["exception"]
    assert "Traceback" in failed["exception"]
    assert set(plain) == {"time", "level", "logger", "message", "replica"}
    assert plain["time"].endswith("+00:00")


def test_text_for_people_is_one_line_too(capsys):
    set_up(settings("text"), "engine-1")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("services.engine").exception("step\nfailed")
    (line,) = lines(capsys)
    assert "ERROR engine-1 services.engine: step | failed | Traceback" in line


SECRETS = [
    ("opening %s", ("rtsp://me:canary@cam/live",)),
    ("opening rtsp://cam/live?password=canary", ()),
    ("Authorization: Bearer canary", ()),
    ("token tsm_ab12_canarycanarycanary was refused", ()),
    ("Error connecting to redis at st0re-pa55 (canary left out)".replace("canary ", ""), ()),
]


@pytest.mark.parametrize("how", ["json", "text"])
@pytest.mark.parametrize(("message", "args"), SECRETS)
def test_no_secret_comes_out_whoever_logs_it(capsys, how, message, args):
    set_up(settings(how), "engine-1")
    logging.getLogger("redis.connection").warning(message, *args)
    try:
        raise RuntimeError(message % args)
    except RuntimeError:
        logging.getLogger("some.library").exception("failed")
    said = capsys.readouterr().err
    assert "canary" not in said
    assert "st0re-pa55" not in said
    assert said.count("***") >= 2


def test_what_uvicorn_and_ray_say_comes_out_once(capsys):
    ray = logging.getLogger("ray.serve")
    ray.propagate = False  # as Ray has it
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.propagate = True  # as it is without a configuration of its own
    uvicorn.setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    set_up(settings("json"), "gateway-1")
    set_up(settings("json"), "gateway-1")
    ray.error("from ray")
    logging.getLogger("uvicorn.error").error("from uvicorn")
    said = [json.loads(line)["message"] for line in lines(capsys)]
    assert said == ["from ray", "from uvicorn"]


ACTOR = """
import logging, sys
from services.logs import set_up
from services.settings import LoggerSettings, Settings
set_up(Settings(logger=LoggerSettings(format="json")), sys.argv[1])
for number in range(200):
    logging.getLogger("actor").info("%d %s", number, "x" * 5000)
"""


def test_actors_lines_come_out_of_the_service_whole_and_in_order(monkeypatch):
    out = io.BytesIO()
    relay = Relay(out)
    monkeypatch.setenv(RELAY_VARIABLE, relay.path)
    try:
        actors = [
            subprocess.Popen([sys.executable, "-c", ACTOR, name], stderr=subprocess.PIPE) for name in ("one", "two")
        ]
        assert [actor.communicate()[1] for actor in actors] == [b"", b""]
        until = time.monotonic() + 20
        while out.getvalue().count(b"\n") < 400 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        relay.stop()
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    for name in ("one", "two"):
        mine = [line["message"].split()[0] for line in said if line["replica"] == name]
        assert mine == [str(number) for number in range(200)]


def test_a_relay_that_takes_nothing_holds_nobody_up(monkeypatch, tmp_path, capsys):
    path = str(tmp_path / "deaf")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen(1)
        monkeypatch.setenv(RELAY_VARIABLE, path)
        set_up(settings("json"), "engine-1")
        began = time.monotonic()
        for number in range(30):
            logging.getLogger("actor").info("%d %s", number, "x" * 20_000)
        assert time.monotonic() - began < 5
    assert json.loads(lines(capsys)[-1])["message"].startswith("29 ")


def test_a_logger_in_the_place_of_stderr_is_not_written_to(monkeypatch):
    class LogsWhatIsWritten:  # as Serve has it in its replicas
        written: list[str] = []

        def write(self, text: str) -> None:
            self.written.append(text)

    monkeypatch.setattr(sys, "stderr", LogsWhatIsWritten())
    set_up(settings("json"), "engine-1")
    logging.getLogger("services.engine").warning("once")
    assert LogsWhatIsWritten.written == []
