#!/bin/bash
# Many subjects on a Ray cluster: one job, whose 16 workers have a GPU each and take the next row as they become free.
# RAY_API_SERVER_ADDRESS=http://head:8265 recipes/cluster/ray.sh subjects.jsonl sd15/lora
set -u
manifest=$1 recipe=$2
data=/data # a file system that all nodes share and that knows locks: manifest, photos, recipes, runs, priors

# It has this package on each node: pip install 'personalize[ray]'. `ray job stop` stops it, and the same command goes on.
exec ray job submit -- personalize many "$data/$manifest" --recipe "$data/recipes/$recipe.toml" --runs "$data/runs" \
  --priors "$data/priors" --engine ray --workers 16 --gpus 1 --retry-failed
