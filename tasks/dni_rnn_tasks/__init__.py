"""The tasks that ship with dni_rnn, one module each, found through entry points."""
