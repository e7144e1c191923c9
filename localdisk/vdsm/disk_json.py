"""Reads the JSON of one disk, as vdsm passes it to after_disk_prepare, and puts a local path into it.

The text is a `str`, as `hook_call.read_data` returns it; nobody has checked it yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

from localdisk.errors import BadDiskData
from localdisk.vdsm.disks import (
    Disk,
    RefusedError,
    check_can_be_local,
    check_disk,
    check_size,
    fit_path,
    image_and_volume,
    known_device,
    known_shared,
    refuse_twice,
    refused_as,
    uuid_or_nothing,
    volumes_of,
)

DIGITS = 4300  # the most digits of a number in JSON: the limit of newer Pythons themselves (3.9.14, 3.11)


@refused_as(BadDiskData)
def read_disk(text: str) -> Disk:
    """The disk in the JSON of `after_disk_prepare`.

    The JSON object is the disk itself, as vdsm sends it, or has a single key `disk` whose value is the disk,
    as vdsm's manual page describes.  Raises BadDiskData for text that is not one JSON object, has a key
    twice, nests too deeply, or has a number that is not finite or has more than DIGITS digits; for values of
    the wrong type; for IDs that are no UUIDs (upper case is accepted); and for the ambiguities that
    `disks.py` lists.
    """
    return _disk_from_json(_disk_object(_load(text)))


@refused_as(BadDiskData)
def localize_disk(text: str, path: str) -> str:
    """`text` with the disk changed into the raw block device `path`, which one VM uses exclusively.

    `path`, `format`, `diskType` and `shared` get new values; all other keys, their values and their order are
    kept, and so is the outer object, if there is one.  `shared` becomes "exclusive": if the volumes of such a
    disk have leases, vdsm refuses live snapshots, live storage migration and unplugging (vdsm,
    vmdevices/storage.py, `Drive.hasVolumeLeases`).  Each of these would move the running VM away from its
    local disk.

    The text is written as vdsm writes it (`json.dumps`), so white space is not kept.  Raises BadDiskData as
    `read_disk`, and if the device cannot be made local: it is no disk, or is neither file nor block.
    """
    data = _load(text)
    inner = _disk_object(data)
    check_can_be_local(_disk_from_json(inner), path)
    inner.update(path=path, format="raw", diskType="block", shared="exclusive")
    return json.dumps(data)


def _load(text: str) -> dict[str, object]:
    check_size(text)
    try:
        data = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except json.JSONDecodeError as error:
        raise RefusedError(f"not JSON, {error}") from None
    if not isinstance(data, dict):
        raise RefusedError("it is not a JSON object")
    return data


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        refuse_twice("key", (key for key, _ in pairs))
    return data


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise RefusedError(f"it holds a number of more than {DIGITS} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise RefusedError(f"it holds the number {number}")
    return value


def _disk_object(data: dict[str, object]) -> dict[str, object]:
    inner = data.get("disk")
    if not isinstance(inner, dict):
        return data
    if len(data) > 1:
        raise RefusedError("it holds other keys beside an object 'disk'")
    return inner


def _disk_from_json(data: Mapping[str, object]) -> Disk:
    image_id, volume_id = image_and_volume(
        _string(data, "imageID"), _string(data, "volumeID"), _string(data, "GUID")
    )
    disk = Disk(
        name=_string(data, "name"),
        device=known_device(_string(data, "device")),
        path=fit_path(_string(data, "path")),
        format=_string(data, "format"),
        disk_type=_string(data, "diskType"),
        image_id=image_id,
        volume_id=volume_id,
        shared=known_shared(data.get("shared", "none")),
        volumes=volumes_of(_volume_strings(data.get("volumeChain", []))),
        domain_id=uuid_or_nothing("domainID", _string(data, "domainID")),
        storage_type=_storage_type(data.get("volumeInfo")),
    )
    check_disk(disk, _string(data, "serial"))
    return disk


def _storage_type(volume_info: object) -> str:
    return _string(volume_info, "type") if isinstance(volume_info, dict) else ""


def _string(data: Mapping[str, object], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise RefusedError(f"{key} is of type {type(value).__name__}, not a string")
    return value


def _volume_strings(chain: object) -> Iterator[tuple[str, str]]:
    if not isinstance(chain, list):
        raise RefusedError("volumeChain is not a list")
    for volume in chain:
        if not isinstance(volume, dict):
            raise RefusedError("volumeChain holds something that is not an object")
        yield _string(volume, "volumeID"), _string(volume, "path")
