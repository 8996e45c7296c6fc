"""Open Inference Protocol v2 over HTTP: JSON, and tensors as bytes behind it; errors are `{"error": ...}`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import oip
from services.http.problems import BodyTooLarge
from services.inference import BadInput, Inference, InferReply, ModelNotReady, Parameter
from services.locks.callers import Caller
from services.tensors import Array, datatype_of, from_json, from_raw, to_json, to_raw

PREFIX = "/v2"
INFER_PATH = rf"{PREFIX}/models/[^/]+(/versions/[^/]+)?/infer"
JSON_LENGTH = "Inference-Header-Content-Length"
MAX_JSON_BYTES = 16 << 20  # as objects in memory it is many times as large; bytes behind it are not
LEAST_COMPRESSED_BYTES = 1024
WINDOW_BITS = {"gzip": 31, "deflate": 15}  # what zlib calls the two


# ---- what travels


class Told(BaseModel):
    """Base of what a client sends: types are exact, what is not known is left alone."""

    model_config = ConfigDict(strict=True)


def _unicode(text: str) -> str:
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_unicode)]  # JSON can write halves of characters, which are no text


class InputTensor(Told):
    """An input: its elements in `data`, flat or nested, or behind the JSON in `binary_data_size` bytes."""

    name: Text
    shape: list[int]
    datatype: Text = Field(examples=["FP32", "UINT8", "BYTES"])
    parameters: dict[str, Parameter] = Field(default_factory=dict)
    data: list[Any] | None = None


class RequestedOutput(Told):
    """An output that is asked for; `classification` asks for its best classes, `binary_data` for bytes."""

    name: Text
    parameters: dict[str, Parameter] = Field(default_factory=dict)


class InferenceRequest(Told):
    """One request.

    Parameters: sequence_id, sequence_start, sequence_end, timestamp (s), frame_number, timeout (us), priority,
    binary_data_output.
    """

    id: Text = ""
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] = Field(default_factory=list)
    parameters: dict[str, Parameter] = Field(default_factory=dict)


class OutputTensor(BaseModel):
    """An output: its elements in `data`, or behind the JSON in `binary_data_size` bytes."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] | None = None
    data: list[Any] | None = None


class InferenceResponse(BaseModel):
    """What came of a request."""

    id: str | None = None
    model_name: str
    model_version: str
    parameters: dict[str, Parameter]
    outputs: list[OutputTensor]


class IndexRequest(Told):
    """Which models to list."""

    ready: bool = Field(False, description="only those that are ready")


class RepositoryRequest(Told):
    """Parameters of loading and unloading; `config` and files of the caller are refused."""

    parameters: dict[str, Parameter] = Field(default_factory=dict)


class ServerLive(BaseModel):
    """The door answers."""

    live: bool = True


class ServerReady(BaseModel):
    """A model can be asked."""

    ready: bool = True


class ModelReady(BaseModel):
    """The model can be asked."""

    name: str
    ready: bool = True


class ServerMetadata(BaseModel):
    """Who answers."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """One tensor of a model; -1 is a dimension of any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model's tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class IndexEntry(BaseModel):
    """A model that is loaded, or could be."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class InferenceError(BaseModel):
    """What went wrong."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": InferenceError, "description": "The request cannot be served"},
    "5XX": {"model": InferenceError, "description": "The service cannot answer now; try again"},
}
# ---- reading and writing


Wanted = TypeVar("Wanted", bound=Told)


def read_object(body: bytes | memoryview, kind: type[Wanted]) -> Wanted:
    """The JSON object, checked; an empty body is an empty object. Raises BadInput, BodyTooLarge."""
    if len(body) > MAX_JSON_BYTES:
        raise BodyTooLarge(f"JSON may have {MAX_JSON_BYTES} bytes, got {len(body)}; send tensors as binary data")
    try:
        return kind.model_validate(json.loads(bytes(body).decode() or "{}", parse_constant=_no_number))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise BadInput(f"the request does not fit: {told.encode('ascii', 'backslashreplace').decode()}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the body is not JSON: {error}") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """The body as it was before `Content-Encoding`.

    Raises BadInput, and BodyTooLarge before more than `limit` bytes are taken.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise BadInput(f"Content-Encoding {encoding!a} is not read here; gzip and deflate are")
    inflater = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadInput(f"the body is not {encoding}: {error}") from None
    if len(inflated) > limit:
        raise BodyTooLarge(f"the body is larger than {limit} bytes when it is unpacked (server.max_infer_bytes)")
    if not inflater.eof or inflater.unused_data:
        raise BadInput(f"the body is not {encoding} from its first byte to its last")
    return inflated


def read_request(
    model: str, version: str, body: bytes, json_length: str | None
) -> tuple[oip.Call, Callable[[str], bool]]:
    """(call, whether an output of that name is to be bytes). Raises BadInput, BodyTooLarge."""
    view = memoryview(body)
    length = len(body)
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdigit()) or int(json_length[:20]) > length:
            raise BadInput(f"{JSON_LENGTH} must be the JSON's length, at most the body's {length}")
        length = int(json_length)
    request = read_object(view[:length], InferenceRequest)
    rest = view[length:]
    inputs: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in inputs:
            raise BadInput(f"input {tensor.name!a} came twice")
        inputs[tensor.name], rest = _read_input(tensor, rest)
    if len(rest):
        raise BadInput(f"{len(rest)} bytes behind the JSON belong to no input (binary_data_size)")
    outputs = [
        oip.WantedOutput(one.name, oip.classes_asked_for(one.name, one.parameters["classification"]))
        if "classification" in one.parameters
        else oip.WantedOutput(one.name)
        for one in request.outputs
    ]
    all_binary = oip.flag(request.parameters, "binary_data_output")
    binary = {one.name: oip.flag(one.parameters, "binary_data", all_binary) for one in request.outputs}
    call = oip.Call(model, version, request.id, inputs, request.parameters, outputs)
    return call, lambda name: binary.get(name, all_binary)


def _read_input(tensor: InputTensor, rest: memoryview) -> tuple[Array, memoryview]:
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if tensor.data is None:
            raise BadInput(
                f"input {tensor.name!a} has neither data nor binary_data_size (shared memory is not offered)"
            )
        return from_json(tensor.name, tensor.datatype, tensor.shape, tensor.data), rest
    if tensor.data is not None:
        raise BadInput(f"input {tensor.name!a} has data and binary_data_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
        raise BadInput(f"binary_data_size of input {tensor.name!a} is not within the {len(rest)} bytes that are left")
    return from_raw(tensor.name, tensor.datatype, tensor.shape, rest[:size]), rest[size:]


def write_reply(call: oip.Call, reply: InferReply, binary: Callable[[str], bool]) -> tuple[bytes, dict[str, str]]:
    """(body, headers). Raises NotJson."""
    outputs, behind = [], []
    for name, array in reply.outputs.items():
        told: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if binary(name):
            behind.append(to_raw(array))
            told["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            told["data"] = to_json(name, array)
        outputs.append(told)
    head = json.dumps(
        {
            **({"id": call.id} if call.id else {}),
            "model_name": reply.model,
            "model_version": reply.version,
            "parameters": reply.parameters,
            "outputs": outputs,
        },
        allow_nan=False,
    ).encode()
    if not behind:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *behind]), {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(head))}


def compressed(body: bytes, accepted: str) -> tuple[bytes, dict[str, str]]:
    """The body as the caller's `Accept-Encoding` likes it, and the header that says so."""
    names = {part.split(";")[0].strip() for part in accepted.lower().split(",") if not part.strip().endswith(";q=0")}
    for name, bits in WINDOW_BITS.items():
        if name in names and len(body) >= LEAST_COMPRESSED_BYTES:
            packer = zlib.compressobj(1, wbits=bits)
            return packer.compress(body) + packer.flush(), {"Content-Encoding": name}
    return body, {}


# ---- routes


@dataclass(frozen=True, slots=True)
class Target:
    """The model that an address names."""

    model: str
    version: str = ""


ModelInPath = Annotated[str, Path(json_schema_extra={"not": {"const": "stats"}})]  # `/models/stats` is of all models


def any_version(model: ModelInPath) -> Target:
    """From `/models/{model}`."""
    return Target(model)


def one_version(model: str, version: str) -> Target:
    """From `/models/{model}/versions/{version}`."""
    return Target(model, version)


def open_inference_router(inference: Inference, max_bytes: int) -> APIRouter:
    """The routes below /v2. max_bytes: largest request when it is unpacked."""
    router = APIRouter(prefix=PREFIX, tags=["inference"], responses=ERRORS)
    _service_routes(router, inference)
    _model_routes(router, inference, max_bytes, "/models/{model}", any_version)
    _model_routes(router, inference, max_bytes, "/models/{model}/versions/{version}", one_version)
    return router


def _service_routes(router: APIRouter, inference: Inference) -> None:
    public, viewer, admin = ({"x-tsm-role": role} for role in ("public", "viewer", "admin"))

    @router.get("", summary="Who answers, and with which extensions")
    def server_metadata() -> ServerMetadata:
        return ServerMetadata(**oip.server_metadata())

    @router.get("/health/live", summary="The door answers", openapi_extra=public)
    def live() -> ServerLive:
        return ServerLive()

    @router.get("/health/ready", summary="A model can be asked", openapi_extra=public)
    async def ready() -> ServerReady:
        await oip.check_ready(inference)
        return ServerReady()

    @router.get("/models/stats", summary="Counters of all models")
    async def all_statistics() -> dict[str, Any]:
        return await oip.statistics_of(inference, "", "")

    @router.post(
        "/repository/index",
        summary="The models that are loaded, or could be",
        openapi_extra={**viewer, **_body(IndexRequest)},
    )
    async def index(request: Request) -> list[IndexEntry]:
        asked = read_object(await request.body(), IndexRequest)
        found = [one for one in await inference.index() if one.state == "READY" or not asked.ready]
        return [IndexEntry(name=one.name, version=one.version, state=one.state, reason=one.reason) for one in found]

    @router.post(
        "/repository/models/{model}/load",
        summary="Load a model, on every replica",
        openapi_extra={**admin, **_body(RepositoryRequest)},
    )
    async def load(model: str, request: Request) -> dict[str, Any]:
        await oip.load(inference, model, read_object(await request.body(), RepositoryRequest).parameters)
        return {}

    @router.post(
        "/repository/models/{model}/unload",
        summary="Let go of a model, on every replica",
        openapi_extra={**admin, **_body(RepositoryRequest)},
    )
    async def unload(model: str, request: Request) -> dict[str, Any]:
        read_object(await request.body(), RepositoryRequest)
        await oip.unload(inference, model)
        return {}


def _model_routes(
    router: APIRouter, inference: Inference, max_bytes: int, path: str, target: Callable[..., Target]
) -> None:
    named: Target = Depends(target)

    @router.get(path, summary="A model's inputs and outputs")
    async def metadata(at: Target = named) -> ModelMetadata:
        return ModelMetadata(**oip.model_metadata(await oip.describe(inference, at.model, at.version)))

    @router.get(f"{path}/ready", summary="Whether the model can be asked")
    async def ready(at: Target = named) -> ModelReady:
        if not await oip.model_ready(inference, at.model, at.version):
            raise ModelNotReady(f"model {at.model!r} is not ready: no replica holds it now; try again")
        return ModelReady(name=at.model)

    @router.get(f"{path}/config", summary="The model's configuration")
    async def config(at: Target = named) -> dict[str, Any]:
        return oip.model_config(await oip.describe(inference, at.model, at.version))

    @router.get(f"{path}/stats", summary="The model's counters")
    async def statistics(at: Target = named) -> dict[str, Any]:
        return await oip.statistics_of(inference, at.model, at.version)

    @router.post(
        f"{path}/infer",
        summary="Infer",
        response_model=InferenceResponse,
        responses={
            200: {"content": {"application/octet-stream": {}}, "description": "JSON, or JSON with bytes behind"}
        },
        openapi_extra=_body(InferenceRequest, "application/octet-stream"),
    )
    async def infer(
        request: Request,
        at: Target = named,
        json_length: Annotated[
            str | None, Header(alias=JSON_LENGTH, description="length of the JSON, where bytes follow")
        ] = None,
        traceparent: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        body, encoding = await request.body(), request.headers.get("content-encoding", "")

        def read() -> tuple[oip.Call, Callable[[str], bool]]:
            return read_request(at.model, at.version, inflate(body, encoding, max_bytes), json_length)

        call, binary = await oip.off_loop(max_bytes if encoding else len(body), read)
        caller: Caller = request.state.caller
        reply = await oip.infer(inference, call, caller, traceparent)
        accepted = request.headers.get("accept-encoding", "")
        return await oip.off_loop(oip.size_of(reply), _respond, call, reply, binary, accepted)


def _respond(call: oip.Call, reply: InferReply, binary: Callable[[str], bool], accepted: str) -> Response:
    body, headers = write_reply(call, reply, binary)
    body, encoded = compressed(body, accepted)
    return Response(body, headers={**headers, **encoded, "Vary": "Accept-Encoding"})


def _body(kind: type[BaseModel], *others: str) -> dict[str, Any]:
    """The OpenAPI of a body that the route reads by itself."""
    content: dict[str, Any] = {"application/json": {"schema": _inlined(kind.model_json_schema())}}
    content.update({other: {"schema": {"type": "string", "format": "binary"}} for other in others})
    return {"requestBody": {"content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without references: they would point into a document that is not there."""
    text = json.dumps(schema)
    for name, own in schema.get("$defs", {}).items():
        text = text.replace(f'{{"$ref": "#/$defs/{name}"}}', json.dumps(own))
    found: dict[str, Any] = json.loads(text)
    found.pop("$defs", None)
    return found


class InferenceErrors:
    """ASGI middleware: below /v2 a problem becomes `{"error": ...}`, with 400 for what cannot be understood.

    Its reason is in the header `Tsm-Reason`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{PREFIX}/"):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def translate(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                if not _is_problem(message):
                    await send(message)
            elif start is None or not _is_problem(start):
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _tell(json.loads(body or "{}"), start, send)

        try:
            await self._app(scope, receive, translate)
        except Exception:
            if start is None:
                told = {"detail": "an error of the service; its log says more", "reason": "internal_error"}
                await _tell(told, {"type": "http.response.start", "status": 500, "headers": []}, send)
            raise


def _is_problem(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type") == "application/problem+json"


async def _tell(problem: dict[str, Any], start: Message, send: Send) -> None:
    body = json.dumps({"error": problem.get("detail", "")}).encode()
    start = {**start, "status": 400 if start["status"] == 422 else start["status"]}
    headers = MutableHeaders(scope=start)
    headers["Content-Type"] = "application/json"
    headers["Content-Length"] = str(len(body))
    headers["Tsm-Reason"] = problem.get("reason", "")
    await send(start)
    await send({"type": "http.response.body", "body": body})
