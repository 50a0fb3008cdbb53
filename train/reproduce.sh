#!/bin/sh
# Tunings, agents and docs/results.md from nothing; the test split is opened at the end, once. About 40
# minutes on two cores.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}
OUT=${OUT:-runs/results}
export OMP_NUM_THREADS=1 WANDB_MODE="${WANDB_MODE:-offline}"

for conditions in fix rand hidden drift; do
    for policy in balance balance_feedback; do
        "$PYTHON" -m train.tune --policy "$policy" --conditions "$conditions" --out policies/tunings \
            --n-windows 16000 --n-tunings 3 --population 16 --val-episodes 16 --jobs "$JOBS"
    done
done
for conditions in rand hidden drift; do
    for seed in 0 1 2 3 4; do
        echo "--conf-file train/experiments/$conditions.yml --seed $seed --out $OUT/${conditions}_$seed"
    done
done | xargs -P "$JOBS" -L 1 "$PYTHON" -m train.ppo
for agent in "$OUT"/*_[0-9]; do
    cp "$agent/best.json" "policies/agents/${agent##*/}.json"
    cp "$agent/best.safetensors" "policies/agents/${agent##*/}.safetensors"
done
"$PYTHON" -m train.results
