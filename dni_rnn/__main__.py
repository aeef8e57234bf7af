"""`python -m dni_rnn` is `dni-rnn`."""

import sys

from dni_rnn.cli import main

sys.exit(main())
