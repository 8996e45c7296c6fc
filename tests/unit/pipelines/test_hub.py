import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision

from pipelines import hub
from pipelines.hub import BadAddress, DownloadFailed, NothingPublished, fetch, pull, pull_model
from tsm_core.checkpoints import load_model
from tsm_core.model import build
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import Checkpoint, UnknownRecipe, generic

BODY = bytes(range(256)) * 2000  # 512 KB
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Host:
    """A web server whose misbehaviour a test may set; remembers what was asked."""

    url: str = ""
    body: bytes = BODY
    ranges: bool = True  # whether it heeds Range
    break_after: list[int] = field(default_factory=list)  # bytes after which it hangs up, one entry per request
    statuses: list[int] = field(default_factory=list)  # answered first, one per request
    location: str | None = None
    wait_s: float = 0.0
    asked: list[str | None] = field(default_factory=list)  # the Range of every request


@pytest.fixture
def host() -> Iterator[Host]:
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.headers["Range"])
            time.sleep(state.wait_s)
            if state.statuses:
                self.send_response(state.statuses.pop(0))
                if state.location:
                    self.send_header("Location", state.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers["Range"] else 0
            begin = begin if state.ranges else 0
            rest = state.body[begin:]
            if begin and not rest:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.body)}")
                rest = b""
            elif begin:
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(state.body) - 1}/{len(state.body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: state.break_after.pop(0)] if state.break_after else rest)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/files/weights.pth"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BACKOFF_S", (0.0, 0.0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_once(host: Host, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(host.url, tmp_path / "new" / "folder", SHA256[:8], lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "new" / "folder" / "weights.pth"
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["weights.pth"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY))
    assert fetch(host.url, path.parent, SHA256[:8].upper()) == path
    assert len(host.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_it_goes_on_where_it_was_cut_off(host: Host, tmp_path: Path, ranges: bool) -> None:
    host.ranges = ranges
    host.break_after = [100_000, 200_000] if ranges else [100_000]
    assert fetch(host.url, tmp_path, SHA256[:8]).read_bytes() == BODY
    assert host.asked[0] is None
    assert host.asked[1:] == (["bytes=100000-", "bytes=300000-"] if ranges else ["bytes=100000-"])
    assert names(tmp_path) == ["weights.pth"]


def test_a_later_call_goes_on_too(host: Host, tmp_path: Path) -> None:
    host.break_after, host.statuses = [100_000], []
    host.break_after += [0, 0, 0]
    with pytest.raises(DownloadFailed, match="cannot be fetched"):
        fetch(host.url, tmp_path, SHA256[:8])
    assert (tmp_path / "weights.pth.part").read_bytes() == BODY[:100_000]
    assert names(tmp_path) == ["weights.pth.part"]
    host.asked.clear()
    assert fetch(host.url, tmp_path, SHA256[:8]).read_bytes() == BODY
    assert host.asked == ["bytes=100000-"]
    assert names(tmp_path) == ["weights.pth"]


def test_without_a_hash_a_part_of_unknown_origin_is_not_trusted(host: Host, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(b"another file's beginning")
    host.break_after = [100_000]
    assert fetch(host.url, tmp_path).read_bytes() == BODY
    assert host.asked == [None, "bytes=100000-"]  # within a call it is one file


@pytest.mark.parametrize("part", [b"x" * 100, b"x" * len(BODY), b"x" * (len(BODY) + 1)])
def test_a_part_of_another_file_begins_anew(host: Host, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "weights.pth.part").write_bytes(part)
    assert fetch(host.url, tmp_path, SHA256[:8]).read_bytes() == BODY
    assert names(tmp_path) == ["weights.pth"]


def test_a_wrong_hash_leaves_nothing(host: Host, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match=rf"its sha256 is {SHA256}, published is 0123abcd") as caught:
        fetch(host.url, tmp_path, "0123abcd")
    assert caught.value.reason == "wrong_hash"
    assert names(tmp_path) == []


def test_a_page_is_no_file(host: Host, tmp_path: Path) -> None:
    for body in (b" <html>log in, please</html>", b""):
        host.body = body
        with pytest.raises(DownloadFailed, match="gives no file but a page"):
            fetch(host.url, tmp_path)
        assert names(tmp_path) == []


def test_a_damaged_file_is_replaced_once_the_new_one_is_whole(host: Host, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"damaged")
    host.statuses = [404]
    with pytest.raises(DownloadFailed, match=r"404 Not Found.*one of another sha256, 41f0"):
        fetch(host.url, tmp_path, SHA256[:8])
    assert (tmp_path / "weights.pth").read_bytes() == b"damaged"
    assert fetch(host.url, tmp_path, SHA256[:8]).read_bytes() == BODY


def test_busy_servers_are_asked_again_and_refusals_are_not(host: Host, tmp_path: Path) -> None:
    host.statuses = [503, 429]
    assert fetch(host.url, tmp_path, SHA256[:8]).read_bytes() == BODY
    host.statuses, host.asked = [404], []
    with pytest.raises(DownloadFailed, match="answers 404 Not Found"):
        fetch(host.url.replace("weights", "others"), tmp_path, SHA256[:8])
    assert len(host.asked) == 1
    host.statuses = [500] * 9
    with pytest.raises(DownloadFailed, match="answers 500"):
        fetch(host.url.replace("weights", "others"), tmp_path, SHA256[:8])
    assert len(host.asked) == 4


def test_without_a_network_it_says_what_to_put_where(tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    with pytest.raises(DownloadFailed) as caught:
        fetch("http://127.0.0.1:1/weights.pth", tmp_path, "0123abcd", again="tsm models pull this")
    assert caught.value.reason == "download_failed"
    for part in ("http://127.0.0.1:1/weights.pth", f"put it to {target}; tsm models pull this then goes on"):
        assert part in str(caught.value)
    assert names(tmp_path) == []


def test_only_safe_addresses(host: Host, tmp_path: Path) -> None:
    for url in (
        "http://example.com/a.pth",
        "ftp://example.com/a.pth",
        "file:///etc/passwd",
        "a.pth",
        "https://host:port/a",
    ):
        with pytest.raises(BadAddress):
            fetch(url, tmp_path)
    for url in ("https://example.com/", "https://example.com/.bashrc"):
        with pytest.raises(BadAddress, match="names no file"):
            fetch(url, tmp_path)
    host.statuses, host.location = [302], "http://example.com/weights.pth"
    with pytest.raises(BadAddress, match=r"http://example\.com/weights\.pth is not fetched from"):
        fetch(host.url, tmp_path)
    host.statuses, host.location = [302], "/elsewhere"
    assert fetch(host.url, tmp_path, SHA256[:8]).read_bytes() == BODY


def test_a_folder_that_cannot_be_written(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadFailed, match="cannot be kept in") as caught:
        fetch(host.url, tmp_path / "file" / "folder")
    assert caught.value.reason == "cannot_write"


def test_two_at_once_fetch_once(host: Host, tmp_path: Path) -> None:
    host.wait_s = 0.3
    got: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: got.append(fetch(host.url, tmp_path, SHA256[:8]).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [BODY] * 4
    assert len(host.asked) == 1
    assert names(tmp_path) == ["weights.pth"]


def test_pulling_makes_a_model(host: Host, tmp_path: Path) -> None:
    labels = tuple("abc")
    spec = PreprocessSpec(input_px=64, resize="exact")
    plain = generic("resnet_small", "uni", labels, preprocess=spec)
    original = build(plain).eval()
    torch.save(original.net.state_dict(), tmp_path / "made.pth")
    host.body = (tmp_path / "made.pth").read_bytes()
    digest = hashlib.sha256(host.body).hexdigest()
    for prefix, checked in ((digest[:8], f"sha256 begins with {digest[:8]}"), (None, "no hash is published")):
        recipe = generic(
            "resnet_small", "uni", labels, preprocess=spec, name=f"r{prefix}", checkpoint=Checkpoint(host.url, prefix)
        )
        models = tmp_path / f"models-{prefix}"
        host.asked.clear()
        path = pull_model(recipe, models)
        assert path == models / f"r{prefix}.safetensors"
        assert names(models) == ["checkpoints", path.name]
        assert names(models / "checkpoints") == ["weights.pth"]
        model = load_model(path)
        clip = torch.randn(1, 4, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(model(clip), original(clip), atol=1e-6)
        stored, card = read_card(path)
        assert stored == recipe
        assert card["source"] == {
            "file": "weights.pth", "sha256": digest, "layout": "torchvision", "url": host.url, "checked": checked,
        }  # fmt: skip
        written = path.stat().st_mtime_ns
        (models / "checkpoints" / "weights.pth").unlink()
        assert pull_model(recipe, models) == path
        assert (path.stat().st_mtime_ns, len(host.asked)) == (written, 1)


def test_pulling_what_does_not_fit_leaves_no_model(host: Host, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 128)}, tmp_path / "made.pth")
    host.body = (tmp_path / "made.pth").read_bytes()
    recipe = generic("resnet_small", "uni", tuple("abc"), checkpoint=Checkpoint(host.url))
    with pytest.raises(ModelFileError, match="holds no network known here"):
        pull_model(recipe, tmp_path / "models")
    assert names(tmp_path / "models") == ["checkpoints"]


def test_weights_to_begin_with_are_kept_as_they_came(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for weights in hub.IMAGENET.values():
        assert weights.url.startswith("https://")
        assert weights.url.endswith(f"-{weights.sha256}.pth")
    for name, backbone in (("ResNet50", "resnet50"), ("ResNet101", "resnet101")):
        assert getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V1.url == hub.IMAGENET[backbone].url
    monkeypatch.setitem(hub.IMAGENET, "resnet50", Checkpoint(host.url, SHA256[:8]))
    assert pull("resnet50", tmp_path) == tmp_path / "checkpoints" / "weights.pth"
    assert (tmp_path / "checkpoints" / "weights.pth").read_bytes() == BODY


def test_what_cannot_be_pulled_by_name(tmp_path: Path) -> None:
    with pytest.raises(NothingPublished, match="no weights are published for motion9_none; train it"):
        pull("motion9_none", tmp_path)
    with pytest.raises(UnknownRecipe):
        pull("nothing", tmp_path)
