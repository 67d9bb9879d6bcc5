"""What is run: scripts, figures and benchmarks."""
