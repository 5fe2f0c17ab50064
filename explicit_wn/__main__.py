"""`python -m explicit_wn`: the norms in checkpoints, by their files."""

import signal
import sys

from .checkpoint.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was begun is removed
    sys.exit(main())
