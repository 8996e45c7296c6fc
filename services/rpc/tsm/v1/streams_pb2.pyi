import datetime

from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM_STATE_UNSPECIFIED: _ClassVar[StreamState]
    STREAM_STATE_STARTING: _ClassVar[StreamState]
    STREAM_STATE_RUNNING: _ClassVar[StreamState]
    STREAM_STATE_RESTARTING: _ClassVar[StreamState]
    STREAM_STATE_STOPPING: _ClassVar[StreamState]
    STREAM_STATE_STOPPED: _ClassVar[StreamState]
    STREAM_STATE_FAILED: _ClassVar[StreamState]
    STREAM_STATE_ENDED: _ClassVar[StreamState]
    STREAM_STATE_PAUSED: _ClassVar[StreamState]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_TCP: _ClassVar[Transport]
    TRANSPORT_UDP: _ClassVar[Transport]
STREAM_STATE_UNSPECIFIED: StreamState
STREAM_STATE_STARTING: StreamState
STREAM_STATE_RUNNING: StreamState
STREAM_STATE_RESTARTING: StreamState
STREAM_STATE_STOPPING: StreamState
STREAM_STATE_STOPPED: StreamState
STREAM_STATE_FAILED: StreamState
STREAM_STATE_ENDED: StreamState
STREAM_STATE_PAUSED: StreamState
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_TCP: Transport
TRANSPORT_UDP: Transport

class Source(_message.Message):
    __slots__ = ("uri", "username", "password", "rtsp_transport", "decoder", "loop")
    URI_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    RTSP_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    LOOP_FIELD_NUMBER: _ClassVar[int]
    uri: str
    username: str
    password: str
    rtsp_transport: Transport
    decoder: str
    loop: bool
    def __init__(self, uri: _Optional[str] = ..., username: _Optional[str] = ..., password: _Optional[str] = ..., rtsp_transport: _Optional[_Union[Transport, str]] = ..., decoder: _Optional[str] = ..., loop: _Optional[bool] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("x", "y")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("region", "box")
    REGION_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    region: str
    box: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, region: _Optional[str] = ..., box: _Optional[_Iterable[float]] = ...) -> None: ...

class ObjectsOf(_message.Message):
    __slots__ = ("objects_of", "labels", "margin")
    OBJECTS_OF_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    objects_of: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    margin: float
    def __init__(self, objects_of: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., margin: _Optional[float] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("min_score", "threshold", "min_area", "max_area", "min_ratio", "max_ratio")
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MIN_AREA_FIELD_NUMBER: _ClassVar[int]
    MAX_AREA_FIELD_NUMBER: _ClassVar[int]
    MIN_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_RATIO_FIELD_NUMBER: _ClassVar[int]
    min_score: float
    threshold: float
    min_area: float
    max_area: float
    min_ratio: float
    max_ratio: float
    def __init__(self, min_score: _Optional[float] = ..., threshold: _Optional[float] = ..., min_area: _Optional[float] = ..., max_area: _Optional[float] = ..., min_ratio: _Optional[float] = ..., max_ratio: _Optional[float] = ...) -> None: ...

class Zone(_message.Message):
    __slots__ = ("name", "points", "kind", "objects", "inertia", "loitering_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    INERTIA_FIELD_NUMBER: _ClassVar[int]
    LOITERING_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    points: _containers.RepeatedCompositeFieldContainer[Point]
    kind: str
    objects: _containers.RepeatedScalarFieldContainer[str]
    inertia: int
    loitering_s: float
    def __init__(self, name: _Optional[str] = ..., points: _Optional[_Iterable[_Union[Point, _Mapping]]] = ..., kind: _Optional[str] = ..., objects: _Optional[_Iterable[str]] = ..., inertia: _Optional[int] = ..., loitering_s: _Optional[float] = ...) -> None: ...

class Line(_message.Message):
    __slots__ = ("name", "a", "b", "objects", "inertia")
    NAME_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    INERTIA_FIELD_NUMBER: _ClassVar[int]
    name: str
    a: Point
    b: Point
    objects: _containers.RepeatedScalarFieldContainer[str]
    inertia: int
    def __init__(self, name: _Optional[str] = ..., a: _Optional[_Union[Point, _Mapping]] = ..., b: _Optional[_Union[Point, _Mapping]] = ..., objects: _Optional[_Iterable[str]] = ..., inertia: _Optional[int] = ...) -> None: ...

class StreamModel(_message.Message):
    __slots__ = ("name", "threshold", "region", "objects_of", "off_threshold", "window_s", "stride_s", "smoother", "labels", "min_score", "filters", "zones", "lines", "required_zones")
    class FiltersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Filter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Filter, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_OF_FIELD_NUMBER: _ClassVar[int]
    OFF_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    STRIDE_S_FIELD_NUMBER: _ClassVar[int]
    SMOOTHER_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    ZONES_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_ZONES_FIELD_NUMBER: _ClassVar[int]
    name: str
    threshold: float
    region: Region
    objects_of: ObjectsOf
    off_threshold: float
    window_s: float
    stride_s: float
    smoother: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    min_score: float
    filters: _containers.MessageMap[str, Filter]
    zones: _containers.RepeatedCompositeFieldContainer[Zone]
    lines: _containers.RepeatedCompositeFieldContainer[Line]
    required_zones: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., threshold: _Optional[float] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., objects_of: _Optional[_Union[ObjectsOf, _Mapping]] = ..., off_threshold: _Optional[float] = ..., window_s: _Optional[float] = ..., stride_s: _Optional[float] = ..., smoother: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., min_score: _Optional[float] = ..., filters: _Optional[_Mapping[str, Filter]] = ..., zones: _Optional[_Iterable[_Union[Zone, _Mapping]]] = ..., lines: _Optional[_Iterable[_Union[Line, _Mapping]]] = ..., required_zones: _Optional[_Iterable[str]] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("p50", "p95", "p99")
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    p50: float
    p95: float
    p99: float
    def __init__(self, p50: _Optional[float] = ..., p95: _Optional[float] = ..., p99: _Optional[float] = ...) -> None: ...

class Restored(_message.Message):
    __slots__ = ("mode", "frame_number", "blob_bytes", "blob_sha256")
    MODE_FIELD_NUMBER: _ClassVar[int]
    FRAME_NUMBER_FIELD_NUMBER: _ClassVar[int]
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOB_SHA256_FIELD_NUMBER: _ClassVar[int]
    mode: str
    frame_number: int
    blob_bytes: int
    blob_sha256: str
    def __init__(self, mode: _Optional[str] = ..., frame_number: _Optional[int] = ..., blob_bytes: _Optional[int] = ..., blob_sha256: _Optional[str] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "task", "mode", "frames_per_result", "window_s", "stride_s", "region", "objects_of", "objects", "without_slot", "results", "skipped", "result_cost_ms")
    class ObjectsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_RESULT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    STRIDE_S_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_OF_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_SLOT_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    RESULT_COST_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    task: str
    mode: str
    frames_per_result: int
    window_s: float
    stride_s: float
    region: str
    objects_of: str
    objects: _containers.ScalarMap[str, int]
    without_slot: int
    results: int
    skipped: int
    result_cost_ms: float
    def __init__(self, name: _Optional[str] = ..., task: _Optional[str] = ..., mode: _Optional[str] = ..., frames_per_result: _Optional[int] = ..., window_s: _Optional[float] = ..., stride_s: _Optional[float] = ..., region: _Optional[str] = ..., objects_of: _Optional[str] = ..., objects: _Optional[_Mapping[str, int]] = ..., without_slot: _Optional[int] = ..., results: _Optional[int] = ..., skipped: _Optional[int] = ..., result_cost_ms: _Optional[float] = ...) -> None: ...

class StreamStatus(_message.Message):
    __slots__ = ("state", "status_message", "error_code", "since", "worker", "epoch", "fps", "processed_fps", "received", "processed", "dropped", "latency_ms", "reconnects", "retry_at", "last_frame_time", "clock", "source_size", "label", "score", "warmup", "checkpoint_age_s", "restored", "models", "updated_at")
    class DroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATUS_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FPS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_FRAME_TIME_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    state: StreamState
    status_message: str
    error_code: str
    since: float
    worker: str
    epoch: int
    fps: float
    processed_fps: float
    received: int
    processed: int
    dropped: _containers.ScalarMap[str, int]
    latency_ms: Latency
    reconnects: int
    retry_at: float
    last_frame_time: float
    clock: str
    source_size: _containers.RepeatedScalarFieldContainer[int]
    label: str
    score: float
    warmup: str
    checkpoint_age_s: float
    restored: Restored
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    updated_at: float
    def __init__(self, state: _Optional[_Union[StreamState, str]] = ..., status_message: _Optional[str] = ..., error_code: _Optional[str] = ..., since: _Optional[float] = ..., worker: _Optional[str] = ..., epoch: _Optional[int] = ..., fps: _Optional[float] = ..., processed_fps: _Optional[float] = ..., received: _Optional[int] = ..., processed: _Optional[int] = ..., dropped: _Optional[_Mapping[str, int]] = ..., latency_ms: _Optional[_Union[Latency, _Mapping]] = ..., reconnects: _Optional[int] = ..., retry_at: _Optional[float] = ..., last_frame_time: _Optional[float] = ..., clock: _Optional[str] = ..., source_size: _Optional[_Iterable[int]] = ..., label: _Optional[str] = ..., score: _Optional[float] = ..., warmup: _Optional[str] = ..., checkpoint_age_s: _Optional[float] = ..., restored: _Optional[_Union[Restored, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., updated_at: _Optional[float] = ...) -> None: ...

class Stream(_message.Message):
    __slots__ = ("id", "name", "enabled", "source", "models", "max_fps", "tags", "created_at", "revision", "edition", "etag", "status", "paused", "restarts")
    class TagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_FPS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    EDITION_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    enabled: bool
    source: Source
    models: _containers.RepeatedCompositeFieldContainer[StreamModel]
    max_fps: float
    tags: _containers.ScalarMap[str, str]
    created_at: _timestamp_pb2.Timestamp
    revision: int
    edition: int
    etag: str
    status: StreamStatus
    paused: bool
    restarts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., enabled: _Optional[bool] = ..., source: _Optional[_Union[Source, _Mapping]] = ..., models: _Optional[_Iterable[_Union[StreamModel, _Mapping]]] = ..., max_fps: _Optional[float] = ..., tags: _Optional[_Mapping[str, str]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., revision: _Optional[int] = ..., edition: _Optional[int] = ..., etag: _Optional[str] = ..., status: _Optional[_Union[StreamStatus, _Mapping]] = ..., paused: _Optional[bool] = ..., restarts: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateStreamRequest(_message.Message):
    __slots__ = ("stream", "probe")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    stream: Stream
    probe: bool
    def __init__(self, stream: _Optional[_Union[Stream, _Mapping]] = ..., probe: _Optional[bool] = ...) -> None: ...

class GetStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class ListStreamsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "states", "tags")
    class TagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[StreamState]
    tags: _containers.ScalarMap[str, str]
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[StreamState, str]]] = ..., tags: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ListStreamsResponse(_message.Message):
    __slots__ = ("streams", "next_page_token")
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    streams: _containers.RepeatedCompositeFieldContainer[Stream]
    next_page_token: str
    def __init__(self, streams: _Optional[_Iterable[_Union[Stream, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateStreamRequest(_message.Message):
    __slots__ = ("stream", "update_mask", "probe", "etag")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    stream: Stream
    update_mask: _field_mask_pb2.FieldMask
    probe: bool
    etag: str
    def __init__(self, stream: _Optional[_Union[Stream, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., probe: _Optional[bool] = ..., etag: _Optional[str] = ...) -> None: ...

class DeleteStreamRequest(_message.Message):
    __slots__ = ("stream_id", "etag")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    etag: str
    def __init__(self, stream_id: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class StartStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class StopStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class PauseStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class ResumeStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class RestartStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("time",)
    TIME_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class WatchStreamsRequest(_message.Message):
    __slots__ = ("stream_ids",)
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, stream_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchStreamsResponse(_message.Message):
    __slots__ = ("stream", "deleted", "heartbeat")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    stream: Stream
    deleted: str
    heartbeat: Heartbeat
    def __init__(self, stream: _Optional[_Union[Stream, _Mapping]] = ..., deleted: _Optional[str] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("id", "source", "specversion", "type", "subject", "time", "datacontenttype", "partitionkey", "sequence", "published_s", "data")
    ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SPECVERSION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DATACONTENTTYPE_FIELD_NUMBER: _ClassVar[int]
    PARTITIONKEY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_S_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    source: str
    specversion: str
    type: str
    subject: str
    time: _timestamp_pb2.Timestamp
    datacontenttype: str
    partitionkey: str
    sequence: int
    published_s: float
    data: _struct_pb2.Struct
    def __init__(self, id: _Optional[str] = ..., source: _Optional[str] = ..., specversion: _Optional[str] = ..., type: _Optional[str] = ..., subject: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., datacontenttype: _Optional[str] = ..., partitionkey: _Optional[str] = ..., sequence: _Optional[int] = ..., published_s: _Optional[float] = ..., data: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ReceiveEventsRequest(_message.Message):
    __slots__ = ("stream_ids", "after", "earliest")
    class AfterEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    EARLIEST_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[str]
    after: _containers.ScalarMap[str, int]
    earliest: bool
    def __init__(self, stream_ids: _Optional[_Iterable[str]] = ..., after: _Optional[_Mapping[str, int]] = ..., earliest: _Optional[bool] = ...) -> None: ...

class ReceiveEventsResponse(_message.Message):
    __slots__ = ("event", "gone", "heartbeat")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    event: Event
    gone: str
    heartbeat: Heartbeat
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ..., gone: _Optional[str] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...
