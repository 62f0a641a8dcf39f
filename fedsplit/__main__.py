"""`python -m fedsplit` is `fedsplit`."""

import sys

from fedsplit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
