"""Training in several processes: batch rows shared among them, or decoupled parts of a net."""
