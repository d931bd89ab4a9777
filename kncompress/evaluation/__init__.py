"""What is done with models: benchmarks against rivals and the machine, a file for each part; text; task scores."""
