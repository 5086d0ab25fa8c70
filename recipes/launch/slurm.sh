#!/bin/bash
# Two machines with 8 GPUs each under Slurm: sbatch recipes/launch/slurm.sh RECIPE.toml
# The models, the rows and the output lie where every machine sees them under the same name.
# Interrupted, or out of time? Submit it again, with as many machines as you have: it goes on.
#SBATCH --job-name=palinode
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=INT@120

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export ACCELERATE_USE_FSDP=true # leave it out where a GPU holds the whole model, 16 bytes a weight

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  --no-python palinode run "$1"
