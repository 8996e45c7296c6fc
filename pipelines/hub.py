"""Public weights: download, verify, keep, and import as models of ours."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import httpx

from tsm_core.checkpoints import import_checkpoint, save_model
from tsm_core.detector_recipes import DetectorRecipe, find_any_recipe
from tsm_core.errors import CallerError, WorldError
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.recipes import Checkpoint, Recipe

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known

# ImageNet weights that the page's rows were begun with, by backbone: torchvision's first, and mmcls's.
IMAGENET = {
    "resnet50": Checkpoint("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),
    "resnet101": Checkpoint("https://download.pytorch.org/models/resnet101-63fe2227.pth", "63fe2227"),
    "mobilenet_v2": Checkpoint(
        "https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/"
        "mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth",
        "3b2dc3af",
    ),
}

CHECKPOINTS = "checkpoints"  # folder of the files as they were published, in the folder of models
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
BACKOFF_S = (0.5, 1.0, 2.0)  # between tries that brought nothing new
TIMEOUT = httpx.Timeout(10.0, read=30.0)


class DownloadFailed(WorldError):
    """A file cannot be had from where it should be."""

    reason = "download_failed"


class BadAddress(CallerError):
    """An address that is not fetched from."""

    reason = "bad_address"


class NothingPublished(CallerError):
    """Nobody published weights for this recipe."""

    reason = "nothing_published"


class _BrokenOff(Exception):
    """A try ended early; another may bring the rest."""


def pull(name: str, models_dir: Path | str, on_progress: Progress | None = None) -> Path:
    """`pull_model` of the recipe of this name; of a backbone's name the file of its ImageNet weights, for training.

    Raises UnknownRecipe, and what pull_model raises.
    """
    if name in IMAGENET:
        weights = IMAGENET[name]
        folder = Path(models_dir) / CHECKPOINTS
        return fetch(weights.url, folder, weights.sha256, on_progress, again=f"tsm models pull {name}")
    return pull_model(find_any_recipe(name), models_dir, on_progress)


def pull_model(recipe: Recipe | DetectorRecipe, models_dir: Path | str, on_progress: Progress | None = None) -> Path:
    """The model file `<recipe>.safetensors` in `models_dir`, made from its published checkpoint.

    The checkpoint stays in `checkpoints/`; where it was put there by hand, nothing is fetched. A model that is there
    already, from this checkpoint and recipe, stays. Its card says under `source` whether a published hash was checked.
    Raises NothingPublished, DownloadFailed, ModelFileError.
    """
    published, models = recipe.checkpoint, Path(models_dir)
    if published is None:
        raise NothingPublished(
            f"no weights are published for {recipe.name}; train it, or import a file of yours "
            f"(tsm models import FILE --recipe {recipe.name})"
        )
    target = models / f"{recipe.name}.safetensors"
    if _made_from(target, recipe):
        return target
    again = f"tsm models pull {recipe.name}"
    file = fetch(published.url, models / CHECKPOINTS, published.sha256, on_progress, again=again)
    model = import_checkpoint(file, recipe)
    checked = f"sha256 begins with {published.sha256}" if published.sha256 else "no hash is published"
    model.source |= {"url": published.url, "checked": checked}
    save_model(target, model)
    return target


def fetch(
    url: str,
    target_dir: Path | str,
    sha256_prefix: str | None = None,
    on_progress: Progress | None = None,
    *,
    again: str = "the same call",
) -> Path:
    """The file behind an https address, in `target_dir`; its name there means that it is whole and verified.

    Until then it is called `.part`; a later call goes on where an earlier one ended. Without a published hash only the
    length is checked, and a part from an earlier call begins anew, as nothing could tell a mixture. One process
    fetches, others wait. again: what to do once the file was put there by hand, for the message. Raises DownloadFailed,
    BadAddress.
    """
    address = _checked(url)
    name = address.path.rpartition("/")[2]
    if not name or name.startswith("."):
        raise BadAddress(f"{url} names no file")
    target = Path(target_dir) / name
    part = target.with_name(f"{name}.part")
    by_hand = f"Where there is a network, fetch it and put it to {target}; {again} then goes on from there"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not _whole(target, sha256_prefix):
            there = f" (there is one of another sha256, {_sha256(target)})" if target.is_file() else ""
            with part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0, os.SEEK_END)  # another process may have written until now
                if not _is(part, file):  # another process finished while this one waited
                    continue
                if _whole(target, sha256_prefix):
                    part.unlink()
                    break
                try:
                    _download_all(address, file, part, sha256_prefix, on_progress, by_hand + there)
                    _verify(url, part, sha256_prefix)
                    part.replace(target)
                finally:
                    if _is(part, file) and file.tell() == 0:
                        part.unlink()
    except OSError as error:
        raise DownloadFailed(f"{url} cannot be kept in {target.parent}: {error}", reason="cannot_write") from None
    return target


def _made_from(target: Path, recipe: Recipe | DetectorRecipe) -> bool:
    assert recipe.checkpoint is not None
    try:
        made_of, card = read_card(target)
    except ModelFileError:
        return False
    source = card.get("source", {})
    same_file = source.get("sha256", "").startswith(recipe.checkpoint.sha256 or "")
    return made_of == recipe and source.get("url") == recipe.checkpoint.url and same_file


def _whole(target: Path, sha256_prefix: str | None) -> bool:
    return target.is_file() and (sha256_prefix is None or _sha256(target).startswith(sha256_prefix.lower()))


def _is(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(url: httpx.URL | str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BadAddress(f"{url!r} is no address: {error}") from None
    if address.scheme != "https" and not (address.scheme == "http" and address.host in LOOPBACK):
        raise BadAddress(f"{address} is not fetched from: use https (http only on this machine)")
    return address


def _check_redirect(request: httpx.Request) -> None:
    _checked(request.url)


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _download_all(
    address: httpx.URL,
    file: BinaryIO,
    part: Path,
    sha256_prefix: str | None,
    on_progress: Progress | None,
    by_hand: str,
) -> None:
    if sha256_prefix is None:
        _empty(file)
    resumed = file.tell() > 0
    _download(address, file, on_progress, by_hand)
    if resumed and not _whole(part, sha256_prefix):  # the file over there has changed meanwhile
        _empty(file)
        _download(address, file, on_progress, by_hand)


def _download(address: httpx.URL, file: BinaryIO, on_progress: Progress | None, by_hand: str) -> None:
    """Append to `file` until all is there; tries again while it grows, and a few times when it does not."""
    hooks = {"request": [_check_redirect]}
    proxies = address.host not in LOOPBACK
    tries = 0
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, event_hooks=hooks, trust_env=proxies) as client:
        while True:
            before = file.tell()
            try:
                _try(client, address, file, on_progress)
                return
            except (httpx.TransportError, _BrokenOff) as error:
                tries = 0 if file.tell() > before else tries + 1
                if tries > len(BACKOFF_S):
                    raise DownloadFailed(
                        f"{address} cannot be fetched: {error or type(error).__name__}. {by_hand}"
                    ) from None
                time.sleep(BACKOFF_S[max(tries - 1, 0)])
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                raise DownloadFailed(f"{address} answers {status} {error.response.reason_phrase}. {by_hand}") from None


def _try(client: httpx.Client, address: httpx.URL, file: BinaryIO, on_progress: Progress | None) -> None:
    """One request for what is missing. Raises httpx.HTTPStatusError when asking again is of no use."""
    begin = file.tell()
    headers = {"accept-encoding": "identity", **({"range": f"bytes={begin}-"} if begin else {})}
    with client.stream("GET", address, headers=headers) as answer:
        total = _total(answer)
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if total == begin:
                return
            _empty(file)
            raise _BrokenOff(f"the part of {begin} bytes does not fit the file of {total}")
        if answer.status_code in TRANSIENT:
            raise _BrokenOff(f"it answers {answer.status_code} {answer.reason_phrase}")
        answer.raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            _empty(file)  # it sends all from the beginning
        elif not answer.headers.get("content-range", "").startswith(f"bytes {begin}-"):
            _empty(file)
            raise _BrokenOff(f"asked from byte {begin} on, it sends {answer.headers.get('content-range')}")
        for chunk in answer.iter_raw():
            file.write(chunk)
            if on_progress:
                on_progress(file.tell(), total)
    file.flush()


def _total(answer: httpx.Response) -> int | None:
    """Bytes of the whole file, as far as the answer says."""
    said = answer.headers.get("content-range", "").rpartition("/")[2] or answer.headers.get("content-length", "")
    return int(said) if said.isdigit() else None


def _verify(url: str, part: Path, sha256_prefix: str | None) -> None:
    """Raises DownloadFailed, and deletes the part, when it is not what it should be."""
    if sha256_prefix is None:
        with part.open("rb") as file:
            head = file.read(40)
        if head.strip() and head.lstrip()[:1] != b"<":
            return
        part.unlink()
        raise DownloadFailed(f"{url} gives no file but a page: it begins {head!r}", reason="wrong_content")
    digest = _sha256(part)
    if not digest.startswith(sha256_prefix.lower()):
        part.unlink()
        raise DownloadFailed(
            f"{url} gives another file than was published: its sha256 is {digest}, published is {sha256_prefix}...; "
            "the copy was deleted",
            reason="wrong_hash",
        )
