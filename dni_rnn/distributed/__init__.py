"""Training in several processes: rows of a batch shared out, or parts of a net that do not wait."""
