"""Open Inference Protocol v2 over gRPC: `inference.GRPCInferenceService` of open_inference.proto.

Its messages live in a descriptor pool of their own: public clients of the protocol bring a package of the same name,
and both can be imported into one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from services import oip
from services.inference import BadInput, Inference, InferReply, Parameter
from services.locks.tokens import Role
from services.rpc.server import Call, RpcService, refusal
from services.tensors import Array, datatype_of, from_raw, from_values, to_raw

SERVICE = "inference.GRPCInferenceService"
IN_FLIGHT = 64  # requests of one stream that are under way, and MiB that they hold, about
MIB = 1 << 20
CONTENTS = {  # where a tensor's elements are, by datatype
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
ROLES: dict[str, Role] = {
    "ServerLive": "viewer",
    "ServerReady": "viewer",
    "ModelReady": "viewer",
    "ServerMetadata": "viewer",
    "ModelMetadata": "viewer",
    "ModelConfig": "viewer",
    "ModelStatistics": "viewer",
    "RepositoryIndex": "viewer",
    "ModelInfer": "operator",
    "ModelStreamInfer": "operator",
    "RepositoryModelLoad": "admin",
    "RepositoryModelUnload": "admin",
}

POOL = descriptor_pool.DescriptorPool()
for _file in FileDescriptorSet.FromString((Path(__file__).parent / "open_inference.binpb").read_bytes()).file:
    POOL.Add(_file)


def _message(name: str) -> Any:
    kind = message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))
    kind.__module__ = __name__  # so that Ray can send one: it is found by this name
    return kind


ServerLiveRequest = _message("ServerLiveRequest")
ServerLiveResponse = _message("ServerLiveResponse")
ServerReadyRequest = _message("ServerReadyRequest")
ServerReadyResponse = _message("ServerReadyResponse")
ModelReadyRequest = _message("ModelReadyRequest")
ModelReadyResponse = _message("ModelReadyResponse")
ServerMetadataRequest = _message("ServerMetadataRequest")
ServerMetadataResponse = _message("ServerMetadataResponse")
ModelMetadataRequest = _message("ModelMetadataRequest")
ModelMetadataResponse = _message("ModelMetadataResponse")
ModelConfigRequest = _message("ModelConfigRequest")
ModelConfigResponse = _message("ModelConfigResponse")
ModelInferRequest = _message("ModelInferRequest")
ModelInferResponse = _message("ModelInferResponse")
ModelStreamInferResponse = _message("ModelStreamInferResponse")
ModelStatisticsRequest = _message("ModelStatisticsRequest")
ModelStatisticsResponse = _message("ModelStatisticsResponse")
RepositoryIndexRequest = _message("RepositoryIndexRequest")
RepositoryIndexResponse = _message("RepositoryIndexResponse")
RepositoryModelLoadRequest = _message("RepositoryModelLoadRequest")
RepositoryModelLoadResponse = _message("RepositoryModelLoadResponse")
RepositoryModelUnloadRequest = _message("RepositoryModelUnloadRequest")
RepositoryModelUnloadResponse = _message("RepositoryModelUnloadResponse")


def inference_service(inference: Inference) -> RpcService:
    """The service for the gRPC door."""
    return RpcService(POOL.FindServiceByName(SERVICE), InferenceServicer(inference), ROLES)


class InferenceServicer:
    """The methods of the protocol."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def ServerLive(self, request: Any, call: Call) -> Message:  # noqa: N802
        """The door answers."""
        return _filled(ServerLiveResponse, {"live": True})

    async def ServerReady(self, request: Any, call: Call) -> Message:  # noqa: N802
        """Whether a model can be asked."""
        return _filled(ServerReadyResponse, {"ready": any(one.ready for one in await self._inference.models())})

    async def ModelReady(self, request: Any, call: Call) -> Message:  # noqa: N802
        """Whether the model can be asked. Raises ModelNotFound."""
        ready = await oip.model_ready(self._inference, request.name, request.version)
        return _filled(ModelReadyResponse, {"ready": ready})

    async def ServerMetadata(self, request: Any, call: Call) -> Message:  # noqa: N802
        """Who answers, and with which extensions."""
        return _filled(ServerMetadataResponse, oip.server_metadata())

    async def ModelMetadata(self, request: Any, call: Call) -> Message:  # noqa: N802
        """A model's inputs and outputs. Raises ModelNotFound."""
        about = await oip.describe(self._inference, request.name, request.version)
        return _filled(ModelMetadataResponse, oip.model_metadata(about))

    async def ModelConfig(self, request: Any, call: Call) -> Message:  # noqa: N802
        """The model's configuration. Raises ModelNotFound."""
        about = await oip.describe(self._inference, request.name, request.version)
        return _filled(ModelConfigResponse, {"config": oip.model_config(about)})

    async def ModelStatistics(self, request: Any, call: Call) -> Message:  # noqa: N802
        """Counters of one model or of all. Raises ModelNotFound."""
        told = await oip.statistics_of(self._inference, request.name, request.version)
        return _filled(ModelStatisticsResponse, told)

    async def RepositoryIndex(self, request: Any, call: Call) -> Message:  # noqa: N802
        """The models that are loaded, or could be."""
        found = [one for one in await self._inference.index() if one.state == "READY" or not request.ready]
        told = [{"name": one.name, "version": one.version, "state": one.state, "reason": one.reason} for one in found]
        return _filled(RepositoryIndexResponse, {"models": told})

    async def RepositoryModelLoad(self, request: Any, call: Call) -> Message:  # noqa: N802
        """Load a model, on every replica. Raises as oip.load."""
        await oip.load(self._inference, request.model_name, request.parameters)
        return _filled(RepositoryModelLoadResponse, {})

    async def RepositoryModelUnload(self, request: Any, call: Call) -> Message:  # noqa: N802
        """Let go of a model, on every replica. Raises as oip.unload."""
        await oip.unload(self._inference, request.model_name)
        return _filled(RepositoryModelUnloadResponse, {})

    async def ModelInfer(self, request: Any, call: Call) -> Any:  # noqa: N802
        """The reply to one request; its tensors are raw unless those of the request were not. Raises as oip.infer."""
        asked = await oip.off_loop(request.ByteSize(), read_request, request)
        trace = call.metadata.get("traceparent")
        reply = await oip.infer(self._inference, asked, call.caller, trace if isinstance(trace, str) else None)
        typed = len(request.inputs) > 0 and not request.raw_input_contents
        return await oip.off_loop(oip.size_of(reply), write_reply, asked.id, reply, typed)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[Any], call: Call
    ) -> AsyncGenerator[Any, None]:
        """The replies to many requests; a request that fails has its error in its answer, and the stream goes on.

        Frames of one sequence are stepped and answered in their order. Sequences go on side by side, and so do
        requests without one, whose answers have the order of the requests, too.
        """
        answers: asyncio.Queue[tuple[Any, int] | None] = asyncio.Queue()
        room = asyncio.Semaphore(IN_FLIGHT)
        reader = asyncio.create_task(self._answer_all(requests, call, answers, room))
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (answered := await answers.get()) is not None:
                answer, units = answered
                yield answer
                for _ in range(units):
                    room.release()
            await reader
        finally:
            reader.cancel()
            await asyncio.wait([reader])

    async def _answer_all(
        self,
        requests: AsyncIterator[Any],
        call: Call,
        answers: asyncio.Queue[tuple[Any, int] | None],
        room: asyncio.Semaphore,
    ) -> None:
        last: dict[tuple[str, str], asyncio.Task[None]] = {}

        async def answer(request: Any, units: int, alone: bool, before: asyncio.Task[None] | None) -> None:
            if before and not alone:
                await asyncio.wait([before])
            told = await self._answer(request, call)
            if before:
                await asyncio.wait([before])
            answers.put_nowait((told, units))

        def forget(key: tuple[str, str], done: asyncio.Task[None]) -> None:
            if last.get(key) is done:
                del last[key]

        async with asyncio.TaskGroup() as group:
            async for request in requests:
                units = min(1 + request.ByteSize() // MIB, IN_FLIGHT)
                for _ in range(units):
                    await room.acquire()
                sequence = _sequence_of(request)
                key = (request.model_name, sequence)
                task = group.create_task(answer(request, units, not sequence, last.get(key)))
                last[key] = task
                task.add_done_callback(partial(forget, key))

    async def _answer(self, request: Any, call: Call) -> Any:
        try:
            reply = await self.ModelInfer(request, call)
        except Exception as error:  # noqa: BLE001  all are told in the answer
            return ModelStreamInferResponse(
                error_message=refusal(error)[1], infer_response=ModelInferResponse(id=request.id)
            )
        reply.parameters["triton_final_response"].bool_param = True  # as clients of streams expect: no other follows
        return ModelStreamInferResponse(infer_response=reply)


# ---- reading and writing


def read_request(request: Any) -> oip.Call:
    """The call. Raises BadInput."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadInput(f"there are {len(request.inputs)} inputs and {len(raw)} raw_input_contents")
    inputs: dict[str, Array] = {}
    for at, tensor in enumerate(request.inputs):
        if tensor.name in inputs:
            raise BadInput(f"input {tensor.name!r} came twice")
        if not raw:
            inputs[tensor.name] = _from_contents(tensor)
        elif tensor.HasField("contents"):
            raise BadInput(f"input {tensor.name!r} has contents, and there are raw_input_contents")
        else:
            inputs[tensor.name] = from_raw(tensor.name, tensor.datatype, tensor.shape, raw[at])
    outputs = [
        oip.WantedOutput(one.name, oip.classes_asked_for(one.name, _parameter(one.parameters["classification"])))
        if "classification" in one.parameters
        else oip.WantedOutput(one.name)
        for one in request.outputs
    ]
    parameters = read_parameters(request.parameters)
    return oip.Call(request.model_name, request.model_version, request.id, inputs, parameters, outputs)


def _from_contents(tensor: Any) -> Array:
    field = CONTENTS.get(tensor.datatype)
    if field is None:
        raise BadInput(f"input {tensor.name!r} is {tensor.datatype!r}, which only raw_input_contents can carry")
    return from_values(tensor.name, tensor.datatype, tensor.shape, list(getattr(tensor.contents, field)))


def read_parameters(parameters: Mapping[str, Any]) -> dict[str, Parameter]:
    """Parameters as Python has them. Raises BadInput for one without a value."""
    return {name: _parameter(value) for name, value in parameters.items()}


def _parameter(value: Any) -> Parameter:
    choice = value.WhichOneof("parameter_choice")
    if choice is None:
        raise BadInput("a parameter has no value")
    found: Parameter = getattr(value, choice)
    return found


def _sequence_of(request: Any) -> str:
    """The sequence that a request seems to be of; what is wrong with it is told when it is answered."""
    if "sequence_id" not in request.parameters:
        return ""
    value = request.parameters["sequence_id"]
    choice = value.WhichOneof("parameter_choice")
    return str(getattr(value, choice) or "") if choice else ""


def write_reply(request_id: str, reply: InferReply, typed: bool) -> Any:
    """The message; its tensors in lists of their type, or raw."""
    message = ModelInferResponse(model_name=reply.model, model_version=reply.version, id=request_id)
    for name, value in reply.parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param")
        setattr(message.parameters[name], kind, value)
    for name, array in reply.outputs.items():
        tensor = message.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        if typed:
            getattr(tensor.contents, CONTENTS[tensor.datatype]).extend(array.ravel().tolist())
        else:
            message.raw_output_contents.append(to_raw(array))
    return message


def _filled(kind: Any, told: dict[str, Any]) -> Message:
    message: Message = ParseDict(told, kind(), ignore_unknown_fields=True, descriptor_pool=POOL)
    return message
