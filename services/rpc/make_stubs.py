"""Writes what protoc makes of tsm/v1/streams.proto: messages, their types and the stubs, beside it.

Of open_inference.proto it writes the descriptors alone, for a pool of their own.

`python -m services.rpc.make_stubs` writes, `--check` fails when they are out of date. Needs grpcio-tools.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "services/rpc/tsm/v1/streams.proto"
APART = Path("services/rpc/open_inference.proto")


def make(folder: Path) -> list[Path]:
    """The generated files, below `folder` as they are below the repository."""
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    descriptors = folder / APART.with_suffix(".binpb")
    descriptors.parent.mkdir(parents=True, exist_ok=True)
    _protoc(*outputs, PROTO)
    _protoc(f"--descriptor_set_out={descriptors}", str(APART))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _protoc(*arguments: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *arguments]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603  nothing of it comes from outside


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
