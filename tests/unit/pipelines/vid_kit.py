"""ImageNet VID and DET in their official layout, a few small films long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (160, 120)
AIRPLANE, DOG, LAMP = "n02691156", "n02084071", "n03636649"  # the last is no class of VID's
COLOURS = {AIRPLANE: (230, 60, 60), DOG: (60, 60, 230), LAMP: (60, 230, 60)}

Thing = tuple[str, int, tuple[float, float, float, float]]  # wnid, track, xyxy


def write_frame(home: Path, kind: str, name: str, things: Sequence[Thing]) -> None:
    """One picture and its XML, as the official ones are written."""
    width, height = SIZE
    pixels = np.full((height, width, 3), 120, np.uint8)
    objects = ""
    for wnid, track, box in things:
        x1, y1, x2, y2 = (max(0, round(side)) for side in box) if np.isfinite(box).all() else (0, 0, 0, 0)
        pixels[y1:y2, x1:x2] = COLOURS[wnid]
        sides = "".join(
            f"<{side}>{value:g}</{side}>"
            for side, value in zip(("xmax", "xmin", "ymax", "ymin"), np.array(box)[[2, 0, 3, 1]], strict=True)
        )
        more = f"<trackid>{track}</trackid>" if kind == "VID" else ""
        objects += (
            f"<object>{more}<name>{wnid}</name><bndbox>{sides}</bndbox><occluded>0</occluded>"
            "<generated>1</generated></object>"
        )
    xml, picture = home / "Annotations" / kind / f"{name}.xml", home / "Data" / kind / f"{name}.JPEG"
    for file in (xml, picture):
        file.parent.mkdir(parents=True, exist_ok=True)
    folder, _, stem = name.rpartition("/")
    xml.write_text(
        f"<annotation><folder>{folder}</folder><filename>{stem}</filename><source><database>ILSVRC_2015</database>"
        f"</source><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"
    )
    Image.fromarray(pixels).save(picture, "JPEG", quality=90)


def make_vid(root: Path) -> Path:
    """root/imagenet_vid with two training snippets, two others, three still images and their list; its folder."""
    home = root / "imagenet_vid"
    place = home / "ILSVRC2015"
    for snippet in range(2):
        for frame in range(18 if snippet else 4):
            x = 10 + 3 * frame
            things: list[Thing] = [(AIRPLANE, 0, (x, 20, x + 40, 60)), (DOG, 1, (100, 70, 140, 110))]
            if snippet == 0:
                things = [[], [*things, (LAMP, 2, (0, 0, 20, 20))], [(DOG, 1, (-20, 70, 30, 400))], things][frame]
            name = f"train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_0000000{snippet}/{frame:06}"
            write_frame(place, "VID", name, things)
    for snippet in range(2):
        for frame in range(6):
            x = 20 + 8 * snippet * frame
            things = [(DOG, 0, (x, 30, x + 50, 80))]
            write_frame(place, "VID", f"val/ILSVRC2015_val_0000000{snippet}/{frame:06}", things)
    listed = []
    for number, wnid in enumerate((AIRPLANE, DOG, DOG)):
        name = f"train/ILSVRC2013_train/{wnid}/{wnid}_{number}"
        write_frame(place, "DET", name, [(wnid, 0, (30, 30, 90, 90))])
        listed.append(f"{name} 1\n")
    (place / "ImageSets").mkdir()
    (place / "ImageSets" / "DET_train_30classes.txt").write_text("".join(listed))
    return home
