"""One training loop, the learners it drives, and the run directory that they leave."""
