"""`python -m localdisk`, for development; the zipapp starts with bootstrap.py."""

import sys

from localdisk.cli import main

sys.exit(main())
