"""The reasons for which the hook does not use the template cache for a disk, although the cache is on.

The hook sends the reason to the helper, which logs and counts it.  If the helper finds a reason itself, it
counts it by the name of its error (`cache_full`).
"""

from __future__ import annotations

NO_TEMPLATE = "no_template"
NO_METADATA = "no_metadata"
METADATA_UNCLEAR = "metadata_unclear"
NOT_LEGAL = "not_legal"
NOT_IN_TEMPLATE = "not_in_template"
SMALLER_LAYER = "smaller_layer"
OTHER_LAYOUT = "other_layout"
SPOILED = "spoiled"

REASONS = {
    NO_TEMPLATE: "the image's base volume is its own, not a template's",
    NO_METADATA: "no .meta file beside the image's base volume can be read",
    METADATA_UNCLEAR: "the .meta file of the image's base volume is cut off, or has a key twice",
    NOT_LEGAL: "the .meta file of the image's base volume does not have LEGALITY=LEGAL",
    NOT_IN_TEMPLATE: "the image that IMAGE in the .meta file names does not have this base volume",
    SMALLER_LAYER: "a layer of the image is smaller than the layer below it",
    OTHER_LAYOUT: "the image's base volume is in no volume group of a storage domain",
    SPOILED: "the template LV was made, and had changed when the disk was to be made from it",
}
