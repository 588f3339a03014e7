"""``blockbak init``."""

from __future__ import annotations

import click

from blockbak.cli import common, render


@click.command(
    epilog="Example: blockbak init /srv/backup",
)
@click.argument("path", type=common.PATH, metavar="REPO")
@common.json_option
def command(path: str, as_json: bool) -> None:
    """Make a repository in a new or empty directory.

    Only root, or whoever makes it, can read it: images hold everything that was ever on the disk.
    """
    from blockbak.flow.context import iso
    from blockbak.repository.local import Repository

    with common.world() as world:
        repository = Repository.create(path, repository_id=world.hex_id(32), created=iso(world.now()))
    if as_json:
        render.document({"repository": repository.path, "id": repository.id})
    else:
        render.line(f"Made the repository {repository.path}. RESTORE.txt in it tells how to restore without blockbak.")
