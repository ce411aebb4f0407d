"""Many runs: a sweep file becomes a manifest of runs, which a launcher starts here or hands to Slurm."""
