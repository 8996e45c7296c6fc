"""Between the messages of tsm.v1 and the JSON that they mirror: same names, and three things that JSON says otherwise.

A point is [x, y] in JSON; what a model looks at is one key `where`; states and transports are names without the enum's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ValidationError

from services.rpc.tsm.v1.streams_pb2 import Point, Source, StreamModel
from tsm_core.errors import CallerError

M = TypeVar("M", bound=Message)
B = TypeVar("B", bound=BaseModel)


class InvalidMessage(CallerError):
    """A message that cannot be used; the text has its fields and what is wrong with them, never their values."""

    reason = "invalid_request"


def checked(kind: type[B], data: Mapping[str, Any]) -> B:
    """The data as what HTTP takes. Raises InvalidMessage."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, one['loc'])) or 'message'}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors(include_input=False, include_url=False)
        ]
        raise InvalidMessage("; ".join(found[:3])) from None


def to_json(message: Message) -> dict[str, Any]:
    """What is set in a message, as JSON has it."""
    data = {field.name: _value_out(field, value) for field, value in message.ListFields()}
    if isinstance(message, StreamModel) and (where := message.WhichOneof("where")):
        data["where"] = data.pop(where)
    return data


def _value_out(field: Any, value: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"]
        return {key: _single_out(inner, one) for key, one in value.items()}
    if field.is_repeated:
        return [_single_out(field, one) for one in value]
    return _single_out(field, value)


def _single_out(field: Any, value: Any) -> Any:
    if isinstance(value, Point):
        return [value.x, value.y]
    if isinstance(value, Message):
        return to_json(value)
    if field.enum_type is not None:
        return enum_name(field.enum_type, value).lower()
    return value


def fill(message: M, data: Mapping[str, Any]) -> M:
    """The message with the fields of `data` that it knows; null is left out, and so are passwords."""
    for field in message.DESCRIPTOR.fields:
        value = data.get(field.name)
        if value is None or (isinstance(message, Source) and field.name == "password"):
            continue
        kind = field.message_type
        there = getattr(message, field.name)
        if kind is not None and kind.GetOptions().map_entry:
            for key, one in value.items():
                if kind.fields_by_name["value"].message_type is not None:
                    fill(there[key], one)
                else:
                    there[key] = one
        elif field.is_repeated and kind is not None:
            for one in value:
                _fill_single(there.add(), one)
        elif field.is_repeated:
            there.extend(value)
        elif kind is not None:
            _fill_single(there, value)
        elif field.enum_type is not None:
            setattr(message, field.name, enum_number(field.enum_type, value))
        else:
            setattr(message, field.name, value)
    if isinstance(message, StreamModel) and isinstance(where := data.get("where"), Mapping):
        fill(message.region if "region" in where else message.objects_of, where)
    return message


def _fill_single(message: Message, value: Any) -> None:
    message.SetInParent()
    if isinstance(message, Timestamp):
        message.FromJsonString(value)
    elif isinstance(message, Struct):
        message.update(value)
    elif isinstance(message, Point):
        message.x, message.y = value
    else:
        fill(message, value)


def enum_name(kind: Any, number: int) -> str:
    """`RUNNING` of the enum's number. Raises InvalidMessage for a number without a name."""
    value = kind.values_by_number.get(number)
    if value is None:
        raise InvalidMessage(f"{kind.name} has no value {number}; its values are {', '.join(kind.values_by_name)}")
    return str(value.name.removeprefix(_prefix(kind)))


def enum_number(kind: Any, name: str) -> int:
    """The number of `RUNNING`, in whatever case."""
    return int(kind.values_by_name[_prefix(kind) + name.upper()].number)


def _prefix(kind: Any) -> str:
    return str(kind.values_by_number[0].name.removesuffix("UNSPECIFIED"))
