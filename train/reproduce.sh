#!/bin/sh
# Tunings, agents and the page that compares them, from nothing.
#
#   train/reproduce.sh         what ships: policies/tunings, policies/agents and docs/results.md, for which
#                              the test split is opened once. About an hour and a half on two cores.
#   train/reproduce.sh small   the same in small and on val, into runs/small: a trial of everything in about
#                              fifteen minutes. Nothing that ships changes.
set -eu
trap 'exit 130' INT # train.tune ends well after Ctrl-C; what would follow must not begin
CDPATH='' cd -- "$(dirname -- "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}
export OMP_NUM_THREADS=1 WANDB_MODE="${WANDB_MODE:-offline}"

case ${1:-full} in
    full)
        out=runs/results tunings=policies/tunings agents=policies/agents page=docs/results.md
        seeds="0 1 2 3 4" tune="" train="" compare=""
        ;;
    small)
        out=runs/small tunings=runs/small/tunings agents=runs/small page=runs/small/results.md
        seeds="0 1" tune="--n-windows 4000 --n-tunings 2" train="--n-windows 4096 --eval-every 2048"
        compare="--split val --episodes 6 --regret-windows 1"
        ;;
    *)
        echo "usage: train/reproduce.sh [small]" >&2
        exit 2
        ;;
esac

rm -rf "$out"
mkdir -p "$out"
for conditions in fix rand hidden drift; do
    for policy in balance balance_feedback; do
        # shellcheck disable=SC2086 # several words are several options
        "$PYTHON" -m train.tune --policy "$policy" --conditions "$conditions" --out "$tunings" \
            --val-episodes 16 --jobs "$JOBS" $tune
    done
done
for conditions in fix rand hidden drift; do
    for seed in $seeds; do
        echo "--conf-file train/experiments/$conditions.yml --base $tunings/balance_feedback_$conditions" \
            "--seed $seed --out $out/${conditions}_$seed $train"
    done
done | xargs -P "$JOBS" -L 1 "$PYTHON" -m train.ppo
if [ "$agents" != "$out" ]; then
    for agent in "$out"/*_[0-9]; do
        cp "$agent/best.json" "$agents/${agent##*/}.json"
        cp "$agent/best.safetensors" "$agents/${agent##*/}.safetensors"
    done
fi
# shellcheck disable=SC2086
"$PYTHON" -m train.results --agents "$agents" --tunings "$tunings" --out "$page" --jobs "$JOBS" $compare
