#!/bin/bash
# Many subjects on SLURM: an array of workers, a GPU and every 16th row each.
# sbatch recipes/cluster/slurm.sh subjects.jsonl sd15/lora
#SBATCH --job-name=personalize
#SBATCH --array=0-15
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -u
manifest=$1 recipe=$2 tries=3

for try in $(seq "$tries"); do
  srun personalize many "$manifest" --recipe "recipes/$recipe.toml" --runs runs --priors priors \
    --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --retry-failed
  status=$?
  case $status in
    0 | 2) exit "$status" ;;                                   # done; the manifest, the recipe or the base is wrong
    130 | 143) scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"; exit "$status" ;; # stopped: it goes on later
  esac                                                         # 1, 3: a fault, or rows failed: once more
done
exit "$status"
