"""Sweeps: a sweep file is expanded into a manifest of runs, which are started on this machine or on Slurm."""
