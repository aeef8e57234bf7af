"""Where windows and examples come from: streams, labelled examples, and tasks found by name."""
