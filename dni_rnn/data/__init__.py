"""Data: streams of windows, labelled examples, and tasks found by name."""
