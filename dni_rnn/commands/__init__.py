"""What `dni-rnn` does, one file for each verb. Torch is imported only when a command runs that computes."""
