"""Many runs: a sweep file becomes a manifest of runs, started here or handed to Slurm; and the plan of one run."""
