"""``python -m fusedops`` is the command line."""

import sys

from fusedops.cli import main

sys.exit(main())
