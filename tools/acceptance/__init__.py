"""What tools.accept does, stage by stage. A stage is a function of a `Job` and the `Report` that it writes to."""
