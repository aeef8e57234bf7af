"""The commands of `dni-rnn`, one file each. Torch is imported only when a command runs that computes."""
