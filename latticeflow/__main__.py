"""`python -m latticeflow` is the command line."""

import sys

from latticeflow.cli import main

sys.exit(main())
