"""Many runs: sweeps, reports, plots, comparisons, benchmarks and the demo."""
