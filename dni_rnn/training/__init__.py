"""The training loop, its learners, and run directories."""
