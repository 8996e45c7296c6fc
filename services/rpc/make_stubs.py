"""Writes what protoc makes of tsm/v1/streams.proto: messages, their types and the stubs, beside it.

`python -m services.rpc.make_stubs` writes, `--check` fails when they are out of date. Needs grpcio-tools.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "services/rpc/tsm/v1/streams.proto"


def make(folder: Path) -> list[Path]:
    """The generated files, below `folder` as they are below the repository."""
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *outputs, PROTO]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603  nothing of it comes from outside
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Write the files, or only compare with `--check`."""
    with tempfile.TemporaryDirectory() as name:
        for made in make(Path(name)):
            own = ROOT / made.relative_to(name)
            if own.is_file() and own.read_bytes() == made.read_bytes():
                continue
            if "--check" in sys.argv:
                raise SystemExit(f"{own.name} is out of date: run `make docs`")
            own.write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
