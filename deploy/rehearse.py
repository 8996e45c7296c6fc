"""Carries out `deploy/Dockerfile` in a fresh Debian root: no container engine, but the very instructions.

    sudo python deploy/rehearse.py /var/tmp/root [-- COMMAND...]

Needs root, `debootstrap`, and the package registries that the Dockerfile's own commands need. A folder that holds a
root already goes on behind its last finished instruction. At the end COMMAND (default: `tsm doctor`) runs as the
image's user. What this cannot prove: the base image itself, layers, the NVIDIA runtime, the engine's isolation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
MOUNTS = ("proc", "sys", "dev", "dev/shm")
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"  # whom this machine trusts
TRUSTED = "var/machine-certificates.crt"  # the same in the root, where no package overwrites it


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, continuations joined."""

    word: str
    rest: str


@dataclass
class Image:
    """What the instructions have set so far."""

    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    user: str = "0:0"
    command: list[str] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile. Raises ValueError for a line that is none."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for line in re.sub(r"\\\n", " ", kept).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if not re.fullmatch(r"[A-Z]+", word):
            raise ValueError(f"not an instruction: {line!r}")
        found.append(Instruction(word, rest.strip()))
    return found


def debian_release(image: str) -> str:
    """The release that `debootstrap` makes for a base image such as `debian:bookworm-slim`."""
    found = re.fullmatch(r"debian:([a-z]+)-slim", image)
    if not found:
        raise ValueError(f"cannot make {image!r}: only debian:RELEASE-slim is rehearsed")
    return found[1]


def carry_out(one: Instruction, image: Image, root: Path) -> None:
    """Change `image` and `root` as the instruction says."""
    if one.word == "ENV":
        for pair in shlex.split(one.rest):
            name, _, value = pair.partition("=")
            image.environment[name] = Template(value).substitute(image.environment)
    elif one.word == "SHELL":
        image.shell = json.loads(one.rest)
    elif one.word == "WORKDIR":
        image.folder = one.rest
        inside(root, one.rest).mkdir(parents=True, exist_ok=True)
    elif one.word == "USER":
        image.user = one.rest
    elif one.word == "COPY":
        *sources, target = one.rest.split()
        for source in sources:
            copy(ROOT / source, inside(root, str(Path(image.folder, target))), into=target.endswith("/"))
    elif one.word == "RUN":
        run(root, image, [*image.shell, one.rest])
    elif one.word == "CMD":
        image.command = json.loads(one.rest)
    elif one.word not in ("EXPOSE", "FROM"):
        raise ValueError(f"{one.word} is not rehearsed")


def inside(root: Path, path: str) -> Path:
    """Where an absolute path of the image lies."""
    return root / path.lstrip("/")


def copy(source: Path, target: Path, *, into: bool) -> None:
    """As COPY: a file goes into a folder, a folder's contents become the target's."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True) if into else None
        shutil.copy2(source, target)


def run(root: Path, image: Image, command: Sequence[str]) -> None:
    """One command in the root, with the image's environment and user. Raises CalledProcessError."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if (root / TRUSTED).exists():
        passed["PIP_CERT"] = f"/{TRUSTED}"
    home = {"HOME": "/root" if image.user.startswith("0") else "/home/tsm"}
    words = [f"{name}={value}" for name, value in (home | passed | image.environment).items()]
    there = f"cd {shlex.quote(image.folder)} && exec {shlex.join(command)}"
    subprocess.run(
        ["chroot", f"--userspec={image.user}", str(root), "/usr/bin/env", "-i", *words, "/bin/sh", "-c", there],
        check=True,
    )


@contextlib.contextmanager
def mounted(root: Path) -> Iterator[None]:
    """The kernel's file systems inside the root, and the machine's name servers and certificates."""
    for name, there in (("etc/resolv.conf", "etc/resolv.conf"), (CERTIFICATES, TRUSTED)):
        if Path("/", name).exists():
            shutil.copy(Path("/", name), root / there)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # as an engine does
    with contextlib.ExitStack() as stack:
        for name in MOUNTS:
            subprocess.run(["mount", "--bind", f"/{name}", str(root / name)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(root / name)], check=False)
        yield


def rehearse(root: Path, command: Sequence[str]) -> None:
    """All instructions of the Dockerfile's first target in `root`, then `command` as the image's user."""
    instructions = parse(DOCKERFILE.read_text())
    last = next((at for at, one in enumerate(instructions) if at and one.word == "FROM"), len(instructions))
    base, *steps = instructions[:last]
    done = root / ".rehearsed"
    if not (root / "bin").exists():
        release = debian_release(base.rest.split()[0])
        subprocess.run(["debootstrap", "--variant=minbase", release, str(root)], check=True)
        done.write_text("0")
    finished = int(done.read_text())
    image = Image()
    with mounted(root):
        for at, step in enumerate(steps, 1):
            if at <= finished and step.word in ("RUN", "COPY"):
                continue
            print(f"[{at}/{len(steps)}] {step.word} {step.rest[:100]}", flush=True)
            carry_out(step, image, root)
            done.write_text(str(max(at, finished)))
        print(f"the image would run: {shlex.join(image.command)}", flush=True)
        run(root, image, command)


def main() -> None:
    """The command line."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("root", type=Path, help="folder for the root; made when it is not there")
    words.add_argument("command", nargs="*", default=["tsm", "doctor"], help="what to run at the end")
    given = words.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    rehearse(given.root.resolve(), given.command)


if __name__ == "__main__":
    main()
