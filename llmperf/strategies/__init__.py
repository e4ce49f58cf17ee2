"""One file a strategy, each `run(model, workload, options) -> Trace`."""
