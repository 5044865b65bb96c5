"""``python -m lpcam``."""

import sys

from lpcam.cli import main

sys.exit(main())
