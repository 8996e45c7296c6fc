"""The models of a stream as the doors take them: what each looks at, and what is worth telling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipelines import zones
from pipelines.object_rules import WEAK_SCORE, ObjectFilter, ObjectRules
from pipelines.zones import ZoneKind
from services.wire import Wire, list_of
from tsm_core.errors import CallerError
from tsm_core.recipes import SmootherName

Name = Annotated[str, Field(min_length=1, max_length=64, examples=["yard"])]
Label = Annotated[str, Field(min_length=1, max_length=128)]
Share = Annotated[float, Field(ge=0, le=1)]
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
Point = Annotated[tuple[Share, Share], list_of(2, **SHARE)]


class Region(Wire):
    """A part of every picture, under a name."""

    region: Name
    box: Annotated[tuple[Share, Share, Share, Share], list_of(4, **SHARE)] = Field(
        description="left, top, right and bottom as shares of the picture", examples=[[0.5, 0.0, 1.0, 1.0]]
    )

    @model_validator(mode="after")
    def check_box(self) -> Region:
        """A region has an inside."""
        left, top, right, bottom = self.box
        if right - left < 0.01 or bottom - top < 0.01:
            raise ValueError(f"region {self.region!r} must be at least 0.01 wide and high, got {self.box}")
        return self


class ObjectsOf(Wire):
    """The surroundings of each object that a detector of the same stream follows; each has a state of its own."""

    objects_of: Label = Field(description="a detector among the stream's models")
    labels: tuple[Label, ...] = Field((), max_length=100, description="objects of these labels only; empty: all")
    margin: float = Field(0.1, ge=0, le=2, description="room around the box, as a share of its longer side")


class Filter(Wire):
    """Which boxes of one label count; what is left out is as for the others."""

    min_score: float | None = Field(None, ge=WEAK_SCORE, le=1)
    threshold: float | None = Field(None, ge=WEAK_SCORE, le=1)
    min_area: float | None = Field(None, ge=0, le=1, description="least area of a box, as a share of the picture")
    max_area: float | None = Field(None, gt=0, le=1, description="largest area of a box, as a share of the picture")
    min_ratio: float | None = Field(None, gt=0, le=1000, description="least width : height of a box")
    max_ratio: float | None = Field(None, gt=0, le=1000, description="largest width : height of a box")


class Zone(Wire):
    """A polygon in the picture; an object is where the middle of its lower edge is."""

    name: Name
    points: tuple[Point, ...] = Field(
        min_length=3, max_length=64, description="corners x, y as shares of the picture, once round"
    )
    kind: ZoneKind = Field("include", description="exclude: boxes in it are not looked at")
    objects: tuple[Label, ...] = Field((), max_length=100, description="labels that it is for; empty: all")
    inertia: int = Field(3, ge=1, le=100, description="frames on end before an object has entered or left")
    loitering_s: float | None = Field(None, gt=0, le=86_400, description="seconds inside that are too long")

    @model_validator(mode="after")
    def check_polygon(self) -> Zone:
        """A polygon that crosses itself has no inside."""
        self.place()
        return self

    def place(self) -> zones.Zone:
        """The zone as the tracker knows it."""
        with _as_value_errors():
            return zones.Zone(self.name, self.points, self.kind, self.objects, self.inertia, self.loitering_s)


class Line(Wire):
    """A line that objects go over; who walks from a to b has `in` at the right hand."""

    name: Name
    a: Point = Field(description="x, y as shares of the picture")
    b: Point
    objects: tuple[Label, ...] = Field((), max_length=100, description="labels that it is for; empty: all")
    inertia: int = Field(2, ge=1, le=100, description="frames on end at the other side before it was crossed")

    @model_validator(mode="after")
    def check_ends(self) -> Line:
        """A line has two ends."""
        self.place()
        return self

    def place(self) -> zones.Line:
        """The line as the tracker knows it."""
        with _as_value_errors():
            return zones.Line(self.name, self.a, self.b, self.objects, self.inertia)


@contextmanager
def _as_value_errors() -> Iterator[None]:
    try:
        yield
    except CallerError as error:
        raise ValueError(str(error)) from None


RECOGNISER_OPTIONS = ("off_threshold", "window_s", "stride_s", "smoother", "where")
DETECTOR_OPTIONS = ("labels", "min_score", "filters", "zones", "lines", "required_zones")


class StreamModel(Wire):
    """One model on a stream: a recogniser, whose scores become actions, or a detector, whose boxes become objects."""

    name: str = Field(min_length=1, max_length=128, examples=["motion9"])
    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="score that begins an action, or median of an object's scores that makes it worth telling; "
        "default: the model's, 0.6 for objects",
    )
    # recognisers
    where: Literal["frame"] | Region | ObjectsOf = Field(
        "frame", description="recognisers: the whole frame, a region of it, or each object that a detector follows"
    )
    off_threshold: float | None = Field(
        None, ge=0, le=1, description="recognisers: score that ends an action; default: the model's"
    )
    window_s: float | None = Field(None, gt=0, le=600, description="window mode: seconds of video one result sees")
    stride_s: float | None = Field(None, gt=0, le=600, description="window mode: seconds between two results")
    smoother: SmootherName | None = Field(
        None,
        description="exponential, or gesture: mit-han-lab's rules for the online Jester labels; default: the model's",
    )
    # detectors
    labels: tuple[Label, ...] = Field((), max_length=100, description="detectors: these objects only; empty: all")
    min_score: float | None = Field(
        None,
        ge=WEAK_SCORE,
        le=1,
        description="detectors: score of a box with which an object can begin; default 0.5",
    )
    filters: dict[Label, Filter] = Field(
        default_factory=dict, max_length=100, description="detectors: what is different for one label"
    )
    zones: tuple[Zone, ...] = Field((), max_length=32, description="detectors: where objects are told to be")
    lines: tuple[Line, ...] = Field((), max_length=32, description="detectors: lines whose crossing is told")
    required_zones: tuple[Name, ...] = Field(
        (), max_length=32, description="detectors: an object is told once it has entered one of these zones"
    )

    @model_validator(mode="after")
    def check_thresholds(self) -> StreamModel:
        """An action must not end above the score that begins it."""
        if self.threshold is not None and self.off_threshold is not None and self.off_threshold > self.threshold:
            raise ValueError(f"off_threshold {self.off_threshold} is above threshold {self.threshold}")
        return self

    @model_validator(mode="after")
    def check_rules(self) -> StreamModel:
        """The rules for objects can be kept."""
        if self.given(DETECTOR_OPTIONS):
            with _as_value_errors():
                self.object_rules()
        return self

    def object_rules(self) -> ObjectRules:
        """What a detector is to follow and tell. Raises ObjectRulesError, ZoneError."""
        common = _without_none(min_score=self.min_score, threshold=self.threshold)
        return ObjectRules(
            labels=self.labels,
            filter=ObjectFilter(**common),
            filters={
                label: ObjectFilter(**{**common, **_without_none(**each.model_dump())})
                for label, each in self.filters.items()
            },
            zones=tuple(zone.place() for zone in self.zones),
            lines=tuple(line.place() for line in self.lines),
            required_zones=self.required_zones,
        )

    @property
    def of_objects(self) -> ObjectsOf | None:
        """Whose objects it looks at; None when it looks at the picture."""
        return self.where if isinstance(self.where, ObjectsOf) else None

    @property
    def object_labels(self) -> tuple[str, ...]:
        """Every label that the options of a detector name."""
        of_zones = (label for zone in self.zones for label in zone.objects)
        of_lines = (label for line in self.lines for label in line.objects)
        return (*self.labels, *self.filters, *of_zones, *of_lines)

    def given(self, names: Sequence[str]) -> list[str]:
        """Those of the options that are not left at their defaults."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default(call_default_factory=True)]


def _without_none(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def check_models(models: tuple[StreamModel, ...]) -> tuple[StreamModel, ...]:
    """A stream runs each model once, and objects belong to a detector that it runs."""
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            raise ValueError(f"model {model.name!r} is named twice; a stream runs each model once")
        if model.of_objects and model.of_objects.objects_of not in set(names) - {model.name}:
            raise ValueError(
                f"model {model.name!r} looks at the objects of {model.of_objects.objects_of!r}, which the stream does "
                "not run; name that detector among its models"
            )
    return models


StreamModels = Annotated[
    tuple[StreamModel, ...],
    Field(max_length=8, description="empty: the service's default model"),
    AfterValidator(check_models),
]
