"""A public demo page: what ``lpcam serve`` shows, behind a proxy and within limits.

Environment: ``PORT``, ``RUN`` (folder of the run that is shown), ``SPACE_HOST`` (the name under
which the proxy shows the page; without it only this machine may use it) and ``FRAMED_BY`` (origins
of pages that may show it in a frame, separated by spaces).
"""

from __future__ import annotations

import os

import uvicorn

from lpcam import RunFolder
from lpcam.explain.serve.app import Limits, application

LIMITS = Limits(size=8 * 2**20, seconds=20, waiting=8, side=1024)
MAPPED_SIDE = 512  #: Long side in pixels at which maps are computed: one takes a few seconds.


def main() -> None:
    """Serve the page until interrupted."""
    port, host = int(os.environ.get("PORT", "7860")), os.environ.get("SPACE_HOST")
    folder = RunFolder(os.environ.get("RUN", "run"))
    explainer = folder.explainer(device="cpu")
    explainer.maximum_side = MAPPED_SIDE
    app = application(
        explainer,
        name="demo",
        port=port,
        patch=folder.patch,
        limits=LIMITS,
        origins=[f"https://{host}"] if host else [],
        framed_by=os.environ.get("FRAMED_BY", "").split(),
    )
    address = "0.0.0.0" if host else "127.0.0.1"  # every interface only where a proxy is meant
    uvicorn.run(app, host=address, port=port, lifespan="off", ws="none", server_header=False)


if __name__ == "__main__":
    main()
