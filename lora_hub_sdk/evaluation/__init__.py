"""Whether retrieval and composition help: mixed-task sets, metrics, the paper's systems, a runner and its report."""
