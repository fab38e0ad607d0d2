"""Start the packages: as local processes, on clusters, in sweeps and in benchmarks."""
