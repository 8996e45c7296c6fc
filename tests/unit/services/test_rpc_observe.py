import grpc
import pytest

from services.feed import Hub
from services.manager import StreamManager
from services.rpc.streams import stream_service
from services.rpc.tsm.v1 import streams_pb2
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub
from services.settings import Settings
from services.store import MemoryStore
from services.telemetry import DoorTelemetry
from tests.unit.services.engine_kit import spec, wait
from tests.unit.services.http_kit import MODELS
from tests.unit.services.rpc_kit import rpc_door
from tests.unit.services.test_telemetry import samples


def calls(telemetry: DoorTelemetry) -> dict[tuple[str, str], float]:
    """Calls that there were, by method and code."""
    return {
        (dict(labels)["method"].rpartition("/")[2], dict(labels)["code"]): value
        for (name, labels), value in samples(telemetry.text()).items()
        if name == "grpc_requests_total" and value
    }


def test_calls_are_counted_by_method_and_code():
    telemetry = DoorTelemetry("gateway")
    store = MemoryStore()
    store.put_stream(spec("door"), create=True)
    manager = StreamManager(store, Settings(), models=MODELS)
    with rpc_door(manager, services=[stream_service(manager, Hub(manager))], telemetry=telemetry) as channel:
        assert "grpc_requests_total" in telemetry.text()  # at once, as 0
        stub = StreamServiceStub(channel)
        stub.GetStream(streams_pb2.GetStreamRequest(stream_id="door"))
        for number in range(3):
            with pytest.raises(grpc.RpcError):
                stub.GetStream(streams_pb2.GetStreamRequest(stream_id=f"none-{number}"))
        states = stub.WatchStreams(streams_pb2.WatchStreamsRequest(), timeout=20)
        next(states)
        states.cancel()
        wait(lambda: ("WatchStreams", "CANCELLED") in calls(telemetry), 10)
    assert calls(telemetry) == {
        ("GetStream", "OK"): 1, ("GetStream", "NOT_FOUND"): 3, ("WatchStreams", "CANCELLED"): 1
    }  # fmt: skip
    assert "none-" not in telemetry.text()
