"""``python -m lpcam``."""

from lpcam.cli.main import main

raise SystemExit(main())
