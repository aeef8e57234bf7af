"""`python -m dni_rnn` is `dni-rnn`."""

from dni_rnn.cli import script

script()
