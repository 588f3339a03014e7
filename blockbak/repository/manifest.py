"""The manifest: the commit record of an image, readable by people and by jq.

Its last member is the SHA-256 of the file's own bytes with those 64 digits taken as zeros, so that no
byte of it can change unnoticed, white space included.
"""

from __future__ import annotations

import msgspec

from blockbak.errors import DamagedManifest, NewerFormat
from blockbak.model import selfdigest
from blockbak.model.chain import Image
from blockbak.model.facts import Closing, Opening

VERSION = 1


class _Version(msgspec.Struct):
    blockbak_manifest: int


class Manifest(msgspec.Struct):
    """The members of a manifest file, in their order."""

    blockbak_manifest: int
    image_file: str
    image_bytes: int
    closing_sha256: str
    sections: int
    opening: Opening
    closing: Closing
    sha256: str = selfdigest.BLANK


def encode(image: Image) -> bytes:
    """The manifest file of a sealed image."""
    manifest = Manifest(
        VERSION, image.file, image.image_bytes, image.closing_sha256, image.sections, image.opening, image.closing
    )
    members = {name: getattr(manifest, name) for name in Manifest.__struct_fields__}
    members["closing"] = image.closing.as_json()
    return selfdigest.encoded(members)


def decode(data: bytes, file: str) -> Image:
    """The image that a manifest file names. ``file`` is the manifest's own name.

    The digest is checked first: a flipped version byte is damage, not a newer program. Raises
    DamagedManifest or NewerFormat.
    """
    if reason := selfdigest.flaw(data):
        raise DamagedManifest(file=file, reason=reason)
    try:
        version = msgspec.json.decode(data, type=_Version).blockbak_manifest
        if version != VERSION:
            raise NewerFormat(what=f"The manifest {file}", detail=f"version {version}")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedManifest(file=file, reason=str(error)) from error
    if manifest.image_file != file.removesuffix(".json") + ".zst":
        raise DamagedManifest(file=file, reason=f"it names the image {manifest.image_file!r}")
    return Image(
        manifest.image_file, manifest.image_bytes, manifest.closing_sha256, manifest.opening, manifest.closing,
        manifest.sections,
    )  # fmt: skip
