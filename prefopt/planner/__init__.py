"""Plan of one run before it starts: memory per GPU and backend, time per step, and the output of `--dry_run`."""
