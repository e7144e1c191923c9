"""A volume group with many small kept disks, written into its metadata at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bed import host
from tests.bed.shell import run
from tests.bed.storage import new_id
from tests.bench.measure import MIB

CONFIG = Path("/etc/localdisk.yaml")
MANY, ASIDE = host.VOLUME_GROUP, "bench-aside"


@contextmanager
def many_disks(count: int) -> Iterator[None]:
    """The volume group is another one, with so many small kept disks, written into its metadata at once.

    There is no configuration: reading one costs the same with any number of disks.
    """
    CONFIG.unlink(missing_ok=True)
    run("vgchange", "-an", MANY)  # else vgcfgrestore takes its active pool for the other group's
    run("vgrename", MANY, ASIDE)
    file = host.SCRATCH / "many.pv"
    with open(file, "wb") as pv:
        pv.truncate((count + 100) * 4 * MIB)
    loop = run("losetup", "--find", "--show", str(file)).strip()
    run("vgcreate", "-y", "--setautoactivation", "n", "--metadatasize", "32m", MANY, loop)
    text = Path("/run/many")
    try:
        run("vgcfgbackup", "-f", str(text), MANY)
        text.write_text(with_disks(text.read_text(), count))
        run("vgcfgrestore", "-f", str(text), MANY)
        yield
    finally:
        run("vgremove", "-f", "-y", MANY)
        run("vgrename", ASIDE, MANY)
        run("vgchange", "-ay", MANY)
        run("losetup", "--detach", loop)
        file.unlink()


def with_disks(text: str, count: int) -> str:
    """LVM's metadata text of an empty group, with `count` kept disks of one extent each."""
    now, volumes = int(time.time()), []
    for number in range(count):
        tags = ("localdisk", f"VM_{new_id()}", f"IU_{new_id()}", f"SOURCE_{number:032x}", f"STOPPED_{now}")
        uuid = f"bench0-many-many-many-many-many-{number:06d}"
        listed = ", ".join(f'"{tag}"' for tag in tags)
        volumes.append(
            f"""{new_id()} {{
            id = "{uuid}"
            status = ["READ", "WRITE", "VISIBLE"]
            tags = [{listed}]
            creation_host = "bench"
            creation_time = {now}
            segment_count = 1
            segment1 {{
                start_extent = 0
                extent_count = 1
                type = "striped"
                stripe_count = 1
                stripes = ["pv0", {number}]
            }}
        }}
        """
        )
    end = text.rindex("\n}")
    return f"{text[:end]}\n    logical_volumes {{\n{''.join(volumes)}\n    }}{text[end:]}"


def metadata() -> str:
    """All that LVM knows of the group of many disks."""
    file = Path("/run/many-now")
    run("vgcfgbackup", "-f", str(file), MANY)
    return file.read_text().partition(f"{MANY} {{")[2]
