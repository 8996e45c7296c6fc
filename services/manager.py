"""The verbs on streams that every door shares: create, list, start, stop, look, remove."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import Field

from pipelines.addresses import AddressNotAllowed, AddressNotFound, check_url
from pipelines.faults import ProbeReport, file_path, has_secret, probe, redact
from services.event_query import EventFilter, Page, Place, find_event, find_events
from services.schemas import Latency, ReplicaInfo, SourceSpec, StreamSpec, StreamState, StreamStatus
from services.settings import Settings
from services.store import StateStore, StreamChanged, StreamExists
from services.stream_models import DETECTOR_OPTIONS, RECOGNISER_OPTIONS, StreamModel
from services.wanted import WANTED
from services.wire import Wire
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.errors import CallerError, WorldError
from tsm_core.model_file import read_card
from tsm_core.postprocess import GestureSmoother
from tsm_core.recipes import Recipe, SmootherName
from tsm_core.zoo import UnknownModel, find_model

RESTARTING = ("source", "models", "max_fps", "enabled")
"""Fields of a specification whose change begins the source anew."""


class ModelOptionError(CallerError):
    """An option that the stream's model does not have."""

    reason = "model_option"


class SourceNotAllowed(CallerError):
    """The service's policy does not let this source be opened."""

    reason = "source_not_allowed"


class SourceNotFound(CallerError):
    """A file:// source that does not exist."""

    reason = "source_not_found"


class SourceRejected(CallerError):
    """The camera answered the probe with something that waiting will not mend; `reason` is its error code."""

    reason = "stream_rejected"


class SourceUnreachable(WorldError):
    """The camera did not answer the probe as it should; `reason` is its error code."""

    reason = "stream_unreachable"


class NoCapacity(WorldError):
    """Every slot of every replica is taken."""

    reason = "no_capacity"


class NotServed(CallerError):
    """The stream is not one that is served, so there is nothing to pause or to restart."""

    reason = "stream_not_served"


class NoPicture(CallerError):
    """The stream has no picture yet."""

    reason = "no_picture"


class StreamView(StreamSpec):
    """A stream as the doors show it: what should be, and what is."""

    status: StreamStatus


class ChangedStream(StreamView):
    """A stream after a change."""

    restarts: tuple[str, ...] = Field(
        (), description="fields of this change that begin the source anew: source, models, max_fps or enabled"
    )


class StreamStats(Wire):
    """The counters of one stream."""

    stream_id: str
    state: StreamState
    received: int
    processed: int
    dropped: dict[str, int]
    fps: float
    processed_fps: float
    latency_ms: Latency | None
    reconnects: int
    events: int = Field(description="sequence of the newest event")


class ServiceStats(Wire):
    """The counters of the whole service."""

    streams: int
    running: int
    by_state: dict[str, int]
    waiting: int = Field(0, description="streams that should be served and that no replica serves")
    received: int
    processed: int
    dropped: dict[str, int]
    replicas: int
    slots_total: int
    slots_used: int


class ServedModel(Wire):
    """One model that streams can name."""

    name: str = Field(examples=["motion9"])
    task: Literal["recognition", "detection"] = Field(
        "recognition", description="recognition: scores become actions; detection: boxes become objects"
    )
    labels: tuple[str, ...]
    background: tuple[str, ...] = Field((), description="labels that are no action, such as `still`")
    mode: Literal["step", "window"] = Field(description="step: one result a frame; window: one every stride_s")
    shift: Literal["uni", "bi", "none"] = Field(
        "uni", description="whether it sees the past (uni), the future too (bi), or each frame by itself (none)"
    )
    input_px: int = Field(description="longer side of its input")
    window_s: float | None = Field(None, description="window mode: seconds of video one result sees")
    stride_s: float | None = Field(None, description="window mode: seconds between two results")
    frames_per_result: int = Field(1, description="frames that go through the network for one result")
    gmac_per_result: float | None = Field(
        None, description="thousand million multiply-adds of one result; null until a replica holds it"
    )
    smoother: SmootherName = "exponential"
    default: bool = Field(False, description="used by streams that name no model")


Probe = Callable[..., ProbeReport]


def served_models(settings: Settings) -> tuple[ServedModel, ...]:
    """The models of `engine.models`, described by their files; the first is the default.

    Raises UnknownModel, ModelFileError.
    """
    found = []
    for index, model in enumerate(settings.engine.models):
        found.append(_described(model.name, model.path, settings, default=index == 0))
    return tuple(found)


def _described(name: str, path: Path | None, settings: Settings, *, default: bool = False) -> ServedModel:
    recipe, _ = read_card(find_model(name, path, [settings.models.folder]))
    return describe(name, recipe, default=default)


def describe(name: str, recipe: Recipe | DetectorRecipe, *, default: bool = False) -> ServedModel:
    """A model as the doors show it; what a result of it costs is told by the replicas that hold it."""
    about: dict[str, Any]
    if isinstance(recipe, DetectorRecipe):
        about = {"task": "detection", "mode": "step", "input_px": max(recipe.input_size)}
    else:
        about = {
            "background": recipe.background,
            "mode": "step" if recipe.steppable else "window",
            "input_px": recipe.preprocess.input_px,
            "frames_per_result": 1 if recipe.steppable else recipe.frames,
            "smoother": recipe.smoother,
        }
        if not recipe.steppable:
            about |= {"window_s": recipe.window_s, "stride_s": recipe.window_stride_s}
    return ServedModel(
        name=name,
        labels=recipe.labels,
        shift=recipe.shift,
        default=default,
        **about,
    )


class StreamManager:
    """What the doors may do with streams, over a store; keeps nothing itself, so any number may run.

    Raises CallerError and WorldError families only; their texts hold no password.
    """

    def __init__(
        self,
        store: StateStore,
        settings: Settings | None = None,
        *,
        models: Sequence[ServedModel] | None = None,
        probe_source: Probe = probe,
    ) -> None:
        self.store = store
        self.settings = settings or Settings()
        self._models = tuple(models if models is not None else served_models(self.settings))
        self._probe = probe_source

    # what should be

    def create(self, spec: StreamSpec, *, check: bool = True) -> StreamView:
        """The stream, registered; with `check` its source has answered a probe first.

        Raises StreamExists, UnknownModel, SourceNotAllowed, SourceNotFound, NoCapacity, and SourceRejected or
        SourceUnreachable when the probe fails.
        """
        spec = spec.model_copy(update={"models": self._known(spec.models)})
        allowed = self.allowed(spec.source)
        if spec.id in {other.id for other in self.store.list_streams()}:
            raise StreamExists(f"stream {spec.id!r} exists already; choose another id, or delete it first")
        if spec.enabled:
            self._fits(1)
        spec = spec.model_copy(update={"source": self._checked_source(allowed, check)})
        self.store.put_stream(spec, create=True)
        return self.get(spec.id)

    def get(self, stream_id: str) -> StreamView:
        """One stream. Raises StreamNotFound."""
        spec = self.store.get_stream(stream_id)
        return self._view(spec, self.store.status(stream_id), self._alive())

    def streams(self, *, sequences: bool = False) -> list[StreamView]:
        """All streams, ordered by id; sequences, whose frames are pushed, only when they are asked for."""
        alive, statuses = self._alive(), self.store.statuses()
        return [
            self._view(spec, statuses.get(spec.id), alive)
            for spec in self.store.list_streams()
            if sequences or not spec.source.is_pushed
        ]

    def update(
        self, stream_id: str, changes: Mapping[str, Any], *, check: bool = True, if_match: str | None = None
    ) -> ChangedStream:
        """The stream with some fields of its specification replaced; with `check` a new source answers a probe first.

        A source is replaced whole, password included: an old password is never sent to a new address. A new source,
        model or rate begins the source anew, on the same shift state where it still fits; a name or tags do not.
        if_match: entity tags as in the header of this name; without it the change is made to whatever the stream is.
        Raises StreamNotFound, StreamChanged and what `create` raises.
        """
        _match(self.store.get_stream(stream_id), if_match)
        checked = dict(changes)
        if "models" in checked:
            checked["models"] = self._known(checked["models"])
        if "source" in checked:
            checked["source"] = self._checked_source(checked["source"], check)
        restarts: list[str] = []

        def change(spec: StreamSpec) -> StreamSpec:
            changed = spec.model_copy(update=checked)
            if changed.enabled and not spec.enabled:
                self._fits(1)
            if not changed.enabled:
                changed = changed.model_copy(update={"paused": False})
            restarts[:] = [name for name in RESTARTING if getattr(changed, name) != getattr(spec, name)]
            return changed.model_copy(update={"revision": spec.revision + bool(restarts)})

        view = self._view(self._change(stream_id, change, if_match), self.store.status(stream_id), self._alive())
        return ChangedStream.model_construct(**dict(view), restarts=tuple(restarts))

    def delete(self, stream_id: str, *, if_match: str | None = None) -> None:
        """Forget the stream; its replica lets go of it. if_match as in `update`.

        Raises StreamNotFound, StreamChanged.
        """
        spec = self.store.get_stream(stream_id)
        _match(spec, if_match)
        self.store.delete_stream(stream_id, before=spec if if_match is not None else None)

    def start(self, stream_id: str) -> StreamView:
        """Want the stream served and not paused; what ended or failed begins anew.

        Raises StreamNotFound, NoCapacity.
        """
        return self._enable(stream_id, True)

    def stop(self, stream_id: str) -> StreamView:
        """Want the stream registered but not served. Raises StreamNotFound."""
        return self._enable(stream_id, False)

    def pause(self, stream_id: str) -> StreamView:
        """Want the stream's source closed; it keeps its place and its shift state. Raises StreamNotFound, NotServed."""
        return self._served(stream_id, "pause", lambda spec: {"paused": True})

    def resume(self, stream_id: str) -> StreamView:
        """Want a paused stream's source open again; it goes on as after any gap. Raises StreamNotFound, NotServed."""
        return self._served(stream_id, "resume", lambda spec: {"paused": False})

    def restart(self, stream_id: str) -> StreamView:
        """Want the source closed and opened anew, on the same shift state. Raises StreamNotFound, NotServed."""
        return self._served(stream_id, "restart", lambda spec: {"paused": False, "revision": spec.revision + 1})

    # what is

    def status(self, stream_id: str) -> StreamStatus:
        """What the owning replica last said of the stream. Raises StreamNotFound."""
        return self.get(stream_id).status

    def stats(self, stream_id: str) -> StreamStats:
        """The stream's counters. Raises StreamNotFound."""
        status = self.status(stream_id)
        return StreamStats(
            stream_id=stream_id,
            state=status.state,
            received=status.received,
            processed=status.processed,
            dropped=status.dropped,
            fps=status.fps,
            processed_fps=status.processed_fps,
            latency_ms=status.latency_ms,
            reconnects=status.reconnects,
            events=self.store.latest_sequence(stream_id),
        )

    def service_stats(self, sees: Callable[[str], bool] = lambda _: True) -> ServiceStats:
        """The sum over all replicas, and over the streams whose ids `sees` accepts."""
        views, replicas = [view for view in self.streams() if sees(view.id)], self.store.replicas()
        alive = {replica.id for replica in replicas}
        dropped: Counter[str] = Counter()
        for view in views:
            dropped.update(view.status.dropped)
        states = Counter(view.status.state for view in views)
        return ServiceStats(
            streams=len(views),
            running=states["RUNNING"],
            by_state=dict(states),
            waiting=sum(_waits(view, alive) for view in views),
            received=sum(view.status.received for view in views),
            processed=sum(view.status.processed for view in views),
            dropped=dict(dropped),
            replicas=len(replicas),
            slots_total=sum(replica.slots_total for replica in replicas),
            slots_used=sum(replica.slots_used for replica in replicas),
        )

    def models(self) -> tuple[ServedModel, ...]:
        """The models that streams can name; the default first. Raises StoreDown."""
        changes = {name: bool(json.loads(text)) for name, text in self.store.documents(WANTED).items()}
        kept = [model for model in self._models if changes.get(model.name, True)]
        known = {model.name for model in self._models}
        more = sorted(name for name, wanted in changes.items() if wanted and name not in known)
        found = (*kept, *(_described(name, None, self.settings) for name in more))
        costs = {name: cost for replica in self.store.replicas() for name, cost in replica.gmac_per_result.items()}
        return tuple(model.model_copy(update={"gmac_per_result": costs.get(model.name)}) for model in found)

    def replicas(self) -> list[ReplicaInfo]:
        """The engine replicas that are alive, ordered by id."""
        return self.store.replicas()

    def preview(self, stream_id: str, *, watch_s: float = 5.0) -> tuple[int, bytes]:
        """The stream's newest picture: (frame number, JPEG). Looking keeps more coming for `watch_s`.

        Raises StreamNotFound, NoPicture.
        """
        self.store.get_stream(stream_id)
        self.store.watch(stream_id, watch_s)
        picture = self.store.preview(stream_id)
        if picture is None:
            raise NoPicture(f"stream {stream_id!r} has no picture yet; it comes with the first decoded frame")
        return picture

    def events(self, stream_id: str, after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """Up to `limit` events with a sequence above `after`, oldest first. Raises StreamNotFound."""
        self.store.get_stream(stream_id)
        return self.store.events(stream_id, after, limit)

    def find_events(
        self,
        wanted: EventFilter,
        limit: int = 100,
        *,
        streams: Iterable[str] | None = None,
        behind: Place | None = None,
    ) -> Page:
        """Events of these streams, or of all, newest first; `behind` is where the page before ended."""
        ids = [spec.id for spec in self.store.list_streams()] if streams is None else streams
        return find_events(self.store, ids, wanted, limit, behind)

    def event(self, event_id: str) -> dict[str, Any]:
        """One event that is still kept. Raises EventNotFound."""
        return find_event(self.store, event_id)

    def scores(self, stream_id: str, limit: int = 600) -> list[dict[str, Any]]:
        """Up to `limit` of the stream's newest score records, oldest first. Raises StreamNotFound."""
        self.store.get_stream(stream_id)
        return self.store.scores(stream_id, limit=limit)

    def probe(self, source: SourceSpec) -> ProbeReport:
        """What happens when the source is opened, stage by stage, with a picture when it can be had.

        Raises SourceNotAllowed, SourceNotFound.
        """
        return self._run_probe(self.allowed(source), "decode")

    # policy

    def allowed(self, source: SourceSpec) -> SourceSpec:
        """The source as it may be opened: a file with its symlinks resolved, a secret kept off command lines.

        Raises SourceNotAllowed, SourceNotFound.
        """
        if source.is_pushed:
            raise SourceNotAllowed(
                "a stream of source push: begins with its first frame: send that as an inference request with a "
                "sequence_id"
            )
        if source.is_file:
            path = self._allowed_file(file_path(source.uri))
            return source.model_copy(update={"uri": "file://" + quote(str(path))})
        try:
            check_url(source.uri, schemes=("rtsp", "rtsps"), networks=self.settings.source.networks)
        except AddressNotAllowed as error:
            raise SourceNotAllowed(str(error)) from None
        except AddressNotFound:
            pass  # the probe has words for it
        if source.password is not None or has_secret(source.uri):
            if source.decoder == "ffmpeg":
                raise SourceNotAllowed(
                    "decoder 'ffmpeg' would show this source's password in the process list; use 'auto' or 'pyav'"
                )
            return source.model_copy(update={"decoder": "pyav"})
        return source

    def _checked_source(self, source: SourceSpec, check: bool) -> SourceSpec:
        source = self.allowed(source)
        if check and not source.is_file:
            report = self._run_probe(source, "describe")
            if not report.ok:
                raise _source_error(source, report)
        return source

    def _allowed_file(self, given: str) -> Path:
        roots = [root.resolve() for root in self.settings.source.file_roots]
        if not roots:
            raise SourceNotAllowed(
                f"file {given} is not allowed: this service reads no files; set source.file_roots to the folders it may"
            )
        path = Path(given).resolve()
        if not any(path.is_relative_to(root) for root in roots):
            listed = ", ".join(str(root) for root in roots)
            raise SourceNotAllowed(f"file {given} is not allowed: files below {listed} are (source.file_roots)")
        if not path.is_file():
            raise SourceNotFound(f"file {given} does not exist or is no regular file")
        return path

    def _known(self, wanted: Sequence[StreamModel]) -> tuple[StreamModel, ...]:
        models = self.models()
        served = {model.name: model for model in models}
        for model in wanted:
            for name in (model.name, *([model.of_objects.objects_of] if model.of_objects else [])):
                if name not in served:
                    raise UnknownModel(
                        f"model {name!r} is not served; served: {', '.join(sorted(served))}; "
                        "engine.models names what every replica loads"
                    )
            self._check_task(model, served)
            timing = [name for name in ("window_s", "stride_s") if getattr(model, name) is not None]
            if timing and served[model.name].mode == "step":
                raise ModelOptionError(
                    f"{' and '.join(timing)} of model {model.name!r} mean nothing: it is stepped frame by frame and "
                    "has a result for each; leave them out, or lower max_fps"
                )
            if (model.smoother or served[model.name].smoother) == "gesture":
                GestureSmoother(served[model.name].labels)
        if wanted:
            return tuple(wanted)
        return (StreamModel(name=next((m.name for m in models if m.default), models[0].name)),)

    @staticmethod
    def _check_task(model: StreamModel, served: Mapping[str, ServedModel]) -> None:
        """Raise ModelOptionError for options of the other kind of model, and for labels that it does not have."""
        own = served[model.name]
        detects = own.task == "detection"
        if wrong := model.given(RECOGNISER_OPTIONS if detects else DETECTOR_OPTIONS):
            kind = "detector" if detects else "recogniser"
            raise ModelOptionError(
                f"{' and '.join(wrong)} of model {model.name!r} mean nothing: it is a {kind}; leave them out"
            )
        if detects:
            model.object_rules()
        source, labels = own, model.object_labels
        if model.of_objects:
            source, labels = served[model.of_objects.objects_of], model.of_objects.labels
            if source.task != "detection":
                raise ModelOptionError(
                    f"model {model.name!r} looks at the objects of {source.name!r}, which is a recogniser and finds "
                    "none; name a detector"
                )
        if unknown := sorted(set(labels) - set(source.labels)):
            raise ModelOptionError(
                f"{source.name!r} has no label {', '.join(unknown)}; its labels are {', '.join(source.labels)}"
            )

    def _fits(self, more: int) -> None:
        live = [replica for replica in self.store.replicas() if not replica.draining]
        total = sum(replica.slots_total for replica in live)
        if not live:
            return  # starting up: the registry accepts, the controller places as soon as it can
        wanted = sum(1 for spec in self.store.list_streams() if spec.enabled)
        if wanted + more > total:
            raise NoCapacity(
                f"{wanted} streams fill the {total} slots of {len(live)} replicas; stop or delete one, "
                "or serve with more engine.slots or engine.replicas"
            )

    # helpers

    def _run_probe(self, source: SourceSpec, depth: str) -> ProbeReport:
        return self._probe(
            source.uri,
            username=source.username,
            password=source.password.get_secret_value() if source.password else None,
            transport=source.rtsp_transport,
            timeout_s=self.settings.source.probe_timeout_s,
            depth=depth,
            networks=self.settings.source.networks,
            max_pixels=self.settings.limits.pixels,
        )

    def _enable(self, stream_id: str, enabled: bool) -> StreamView:
        def change(spec: StreamSpec) -> StreamSpec:
            status = self.store.status(stream_id) if enabled and spec.enabled else None
            if spec.enabled == enabled and not (status and status.state in ("ENDED", "FAILED")):
                return spec.model_copy(update={"paused": False})
            if not spec.enabled:
                self._fits(1)
            return spec.model_copy(update={"enabled": enabled, "paused": False, "revision": spec.revision + 1})

        self._change(stream_id, change)
        return self.get(stream_id)

    def _served(self, stream_id: str, verb: str, changes: Callable[[StreamSpec], dict[str, Any]]) -> StreamView:
        def change(spec: StreamSpec) -> StreamSpec:
            status = self.store.status(stream_id)
            if not spec.enabled or (status and status.state == "ENDED"):
                state = status.state if status else "STOPPED"
                raise NotServed(f"stream {stream_id!r} is {state}: there is nothing to {verb}; start it")
            return spec.model_copy(update=changes(spec))

        self._change(stream_id, change)
        return self.get(stream_id)

    def _change(
        self, stream_id: str, change: Callable[[StreamSpec], StreamSpec], if_match: str | None = None
    ) -> StreamSpec:
        """Make of a stream's specification what `change` says; begins again when another was quicker."""
        while True:
            spec = self.store.get_stream(stream_id)
            _match(spec, if_match)
            changed = change(spec)
            if changed == spec:
                return spec
            changed = changed.model_copy(update={"edition": spec.edition + 1})
            with contextlib.suppress(StreamChanged):
                self.store.put_stream(changed, create=False, before=spec)
                return changed

    def _alive(self) -> set[str]:
        return {replica.id for replica in self.store.replicas()}

    def _view(self, spec: StreamSpec, status: StreamStatus | None, alive: set[str]) -> StreamView:
        fields = {name: getattr(spec, name) for name in StreamSpec.model_fields}
        fields["source"] = spec.source.model_copy(update={"uri": redact(spec.source.uri)})
        return StreamView.model_construct(**fields, status=_shown(spec, status, alive))


def _match(spec: StreamSpec, if_match: str | None) -> None:
    """Raise StreamChanged when the stream is none of those that the header If-Match names."""
    if if_match is None or if_match.strip() == "*" or spec.etag in (tag.strip() for tag in if_match.split(",")):
        return
    raise StreamChanged(
        f"stream {spec.id!r} is now {spec.etag}, not {if_match[:100]}; read it again and repeat the change on what it "
        "is now, or leave If-Match out"
    )


def _waits(view: StreamView, alive: set[str]) -> bool:
    """True for a stream that should be served and is by no replica that lives."""
    return view.enabled and view.status.state != "ENDED" and view.status.worker not in alive


def _shown(spec: StreamSpec, status: StreamStatus | None, alive: set[str]) -> StreamStatus:
    """The status as last written, corrected for a replica that is no longer there to write."""
    if status is None:
        state: StreamState = "STARTING" if spec.enabled else "STOPPED"
        message = "waiting for a replica" if spec.enabled else ""
        return StreamStatus(state=state, status_message=message, since=spec.created_at.timestamp())
    if status.worker is None or status.worker in alive or status.state in ("STOPPED", "ENDED"):
        if spec.enabled and (status.state == "STOPPED" or (status.state == "PAUSED" and not spec.paused)):
            return status.model_copy(update={"state": "STARTING", "status_message": "waiting for a replica"})
        if not spec.enabled and status.state not in ("STOPPED", "ENDED", "FAILED"):
            return status.model_copy(update={"state": "STOPPING", "status_message": ""})
        return status
    if not spec.enabled:
        return status.model_copy(update={"state": "STOPPED", "status_message": "", "fps": 0.0, "processed_fps": 0.0})
    lost = f"replica {status.worker} is gone; waiting for another"
    return status.model_copy(
        update={
            "state": "RESTARTING",
            "status_message": lost,
            "fps": 0.0,
            "processed_fps": 0.0,
            "since": status.updated_at,
        }
    )


def _source_error(source: SourceSpec, report: ProbeReport) -> CallerError | WorldError:
    fault = report.fault
    reason = fault.code.lower() if fault else "stream_rejected"
    text = f"{redact(source.uri)}: {fault.message if fault else 'the probe failed'}"
    if fault and fault.hint:
        text += f"; {fault.hint}"
    text += " (?probe=false or --no-probe registers it anyway)"
    if fault is None or fault.retry in ("slow", "never") or fault.code == "STREAM_DNS_FAILED":
        return SourceRejected(text, reason=reason)
    return SourceUnreachable(text, reason=reason)
