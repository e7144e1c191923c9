"""`python -m localdisk`, for development; the zipapp starts with front.py."""

import sys

from localdisk.cli import main

sys.exit(main())
