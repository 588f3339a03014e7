"""Images as values, without files: what the algorithms over chains work on."""

from __future__ import annotations

from hypothesis import strategies as st

from blockbak.model.chain import Image
from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL, Closing, Opening
from blockbak.model.identity import Identity


def point_name(number: int) -> str:
    """The id of the n-th point: one a day."""
    return f"202605{number % 28 + 1:02d}T000000Z-{number:04x}"


def image(
    number: int,
    parent: int | None = None,
    kind: str | None = None,
    *,
    volume: str = "vol",
    synthetic: bool = False,
    copy: int = 1,
    root: str | None = None,
    parent_root: str | None = None,
    image_bytes: int = 1000,
    created: str | None = None,
) -> Image:
    """An image of the n-th point; ``root`` is one of the point's own unless it is given."""
    kind = kind or (FULL if parent is None else INCREMENTAL)
    opening = Opening(
        repository="0" * 32, image=f"{number:032x}", volume=volume, point=point_name(number), sequence=number,
        kind=kind, synthetic=synthetic, parent=None if parent is None else point_name(parent),
        parent_root=None if parent is None else parent_root or f"root {parent}",
        identity=Identity("file", f"/{volume}"), device_bytes=1 << 20, block_bytes=4096, window_bytes=1 << 18,
        logical_sector=512, physical_sector=4096, created=created or f"2026-05-{number % 28 + 1:02d}T00:00:00.000Z",
    )  # fmt: skip
    closing = Closing(
        root=root or f"root {number}", mode="cold", consistency="cold", change_source="scan", read_bytes=0,
        changed_bytes=0, data_bytes=0, zero_bytes=0, hole_bytes=0, bad_bytes=0, frames=0,
        started="", finished=f"{copy:03d}", seconds=0.0, program="test",
    )  # fmt: skip
    file = f"{opening.point}.{kind}{f'.{copy}' if copy > 1 else ''}.zst"
    return Image(file, image_bytes, "0" * 64, opening, closing, 1)


@st.composite
def histories(draw, most=10):
    """The images of one volume after some runs: fulls, deltas, and synthetic ones beside them."""
    images = [image(1)]
    fulls = [1]
    for number in range(2, draw(st.integers(1, most)) + 1):
        step = draw(st.sampled_from([FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL, DIFFERENTIAL, "synthesize"]))
        match step:
            case "full":
                images.append(image(number))
                fulls.append(number)
            case "incremental":
                newest = max(one.opening.sequence for one in images)
                images.append(image(number, newest))
            case "differential":
                images.append(image(number, max(fulls), DIFFERENTIAL))
            case "synthesize":
                at = draw(st.sampled_from(sorted({one.opening.sequence for one in images})))
                copy = 1 + sum(one.opening.sequence == at for one in images)
                if at not in fulls:
                    images.append(image(at, synthetic=True, copy=copy, image_bytes=500))
                    fulls.append(at)
                elif below := [full for full in fulls if full < at]:
                    images.append(image(at, below[-1], DIFFERENTIAL, synthetic=True, copy=copy))
    return images
