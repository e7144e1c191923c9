from __future__ import annotations

import sys

from tests.bench import cache, here, starts, storm

PARTS = {"here": here.main, "bed": starts.main, "cache": cache.main, "storm": storm.main}

if __name__ == "__main__":
    PARTS[sys.argv[1]](sys.argv[2:])
