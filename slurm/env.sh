# Setup of every job before Python starts. The job scripts source this file, or the file that PREFOPT_ENV names.
# Load modules here. For a container define a function, such as
#   python() { apptainer exec --nv image.sif python "$@"; }   # and put `apptainer exec --nv image.sif` behind srun
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch
