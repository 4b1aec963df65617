#!/usr/bin/env bash
# Everything that needs a GPU, in steps of at most nine minutes, so that short allocations add up to one set of results.
#
#     tools/gpu.sh OUT                 does the next steps that are not done yet, as long as time is left
#     tools/gpu.sh OUT --dry-run       lists the steps, which are done, and their commands; writes nothing
#     tools/gpu.sh OUT --only PATTERN  only steps whose name matches the shell pattern
#     tools/gpu.sh OUT --done FILE     steps named in FILE, one a line, are done: where OUT is emptied between calls
#     tools/gpu.sh OUT --wheels DIR    first installs kitbench, and what it lacks from the wheels in DIR, without network
#     tools/gpu.sh OUT --smoke         each step as small as it can be, on any device: does all of it run?
#
# A finished step leaves one archive, OUT/STEP.tar.gz, of at most 16 MB. A failed step leaves OUT/STEP.failed.log and what
# it measured, OUT/STEP.failed.tar.gz, and is tried again behind all others. OUT/done.txt lists all steps that are done,
# those of --done included, those that failed, and the device: keep it, and give it to the next call, which must run on
# the same kind of device. The first step fails where no GPU is seen, and nothing is begun behind it.
#
# A machine with torch and triton, but without network, for example Python 3.12 on x86-64. Where there is a network:
#     pip wheel --no-deps -w WHEELS $(grep -E '^(fvcore|iopath)' tools/gpu-wheels.txt)
#     grep -vE '^(fvcore|iopath)' tools/gpu-wheels.txt | pip download --no-deps --only-binary=:all: -r /dev/stdin -d WHEELS \
#         --python-version 3.12 --implementation cp --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
#         --platform manylinux2014_x86_64
# and there, one call after another, each with the done.txt of the one before:
#     tools/gpu.sh OUT --wheels WHEELS                    machine, tests, the operators, a seed of training
#     tools/gpu.sh OUT --wheels WHEELS --done done.txt    what is left: the sweep, more seeds, other kinds of numbers
#
# Environment: KITBENCH_GPU_SECONDS  what a call may take (540); no step is begun that cannot end within it
#              KITBENCH_GPU_FILES    files a call may leave, done.txt included (8)
#              KITBENCH_GPU_STEPS    training steps of each run (500); the same for every method and seed
#              KITBENCH_GPU_METHODS  methods that are trained, side by side on the GPU (all six of the suite)
#              KITBENCH_COMMIT       the commit that records state, where the checkout was copied without its .git
#              KITBENCH_DATA         folder of data sets; without it the photographs that ship with scikit-image
#              PYTHON                the interpreter (python3)
#
# Afterwards: mkdir RUNS && for a in OUT/train-*.tar.gz; do tar xzf "$a" -C RUNS; done && python -m kitbench table RUNS
set -euo pipefail

usage() { sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; }

out="" dry="" only="*" smoke="" before="" wheels=""
while [ $# -gt 0 ]; do
    case "$1" in
    --dry-run) dry=1 ;;
    --smoke) smoke=1 ;;
    --only)
        shift
        only="${1:?--only takes a pattern}"
        ;;
    --done)
        shift
        before="${1:?--done takes a file}"
        ;;
    --wheels)
        shift
        wheels="${1:?--wheels takes a folder}"
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*)
        echo "gpu.sh: unknown option $1; see tools/gpu.sh --help" >&2
        exit 2
        ;;
    *) out="$1" ;;
    esac
    shift
done
if [ -z "$out" ]; then
    echo "gpu.sh: where to? tools/gpu.sh OUT" >&2
    exit 2
fi
[ "${out#/}" != "$out" ] || out="$PWD/$out"
for given in "$before" "$wheels"; do
    if [ -n "$given" ] && [ ! -e "$given" ]; then
        echo "gpu.sh: $given does not exist; give a file to --done and a folder to --wheels" >&2
        exit 2
    fi
done
[ -z "$before" ] || before="$(realpath "$before")"
[ -z "$wheels" ] || wheels="$(realpath "$wheels")"
cd "$(dirname "$0")/.."

export OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
limit="${KITBENCH_GPU_SECONDS:-540}"
files="${KITBENCH_GPU_FILES:-8}"
began=$SECONDS

if [ -n "$smoke" ]; then
    device=auto steps="${KITBENCH_GPU_STEPS:-4}" preset=smoke seeds=0
    sizes=64:128 cases="--sizes 64 --rounds 1" loop="--preset smoke --stretches 3 --methods conv"
    kinds="bfloat16 float32" required="" gpu="True"
else
    device=cuda steps="${KITBENCH_GPU_STEPS:-500}" preset=full seeds="0 1 2"
    sizes=64:4096 cases="--sizes 64,128,256,512,1024 --rounds 5" loop="--preset full --stretches 4 --workers 2"
    kinds="bfloat16 float32 tf32" required=--require-gpu gpu="torch.cuda.is_available()"
fi
loop_device="$device"
[ "$loop_device" != auto ] || loop_device=cpu

# What is done, in order: name, seconds without which it is not begun, seconds that it may take at most, command. A command
# runs in the checkout, with its results to go to the folder $work.
step_names=() step_least=() step_most=() step_commands=()
step() {
    step_names+=("$1") step_least+=("$2") step_most+=("$3") step_commands+=("$4")
}
operators() { # KIND DIM K; where some operators failed (exit code 3) the others are measured
    step "attention-$1-c$2-k$3" 150 400 "$python benchmarks/attention.py --device $loop_device --dtypes $1 --dims $2 --k $3 \
$cases --json \$work/attention.json || [ \$? = 3 ]"
}
methods="${KITBENCH_GPU_METHODS:-kit,global,window,local,kit-random,conv}"
training() { # SEED; the methods share the GPU. A call that is cut off goes on from the last checkpoint.
    step "train-$1" 120 540 "$python -m kitbench run --suite denoise --preset $preset --device $device --method $methods \
--seeds $1 --set recipe.steps=$steps --set recipe.warmup=$((steps / 20)) --set recipe.checkpoint_every=100 --jobs 6 \
--out \$work/runs"
}
seen="import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name()); assert $gpu, 'no GPU'"
step machine 20 60 "{ nvidia-smi || true; nproc; free -g; df -h /dev/shm || true; $python -m torch.utils.collect_env; \
git log -1 --format=%H || true; } > \$work/machine.txt 2>&1; $python -c \"$seen\""
# Tests compile every kernel and start the command line dozens of times: one after another they would not end in time.
# Warnings are no errors here: this machine's releases are its own. Name look-ups would wait for a network.
tests="-m pytest -q -n $(($(nproc) < 12 ? $(nproc) : 12)) -p no:cacheprovider -p no:benchmark -W default -m gpu $required \
--durations=20 --junitxml=\$work/tests.xml"
step tests-kernels 150 400 "$python $tests tests/attention"
step tests-commands 150 540 "GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo $python $tests tests/test_cuda.py \
tests/runs/test_train.py tests/cost tests/benchmarks/test_attention.py"
first="${kinds%% *}"
operators "$first" 32 4
training 0
step scale 150 540 "$python -m kitbench scale --device $device --sizes $sizes --out \$work/scale"
for seed in $seeds; do
    [ "$seed" = 0 ] || training "$seed"
done
for kind in $kinds; do
    [ "$kind" = "$first" ] || operators "$kind" 32 4
done
step loop 150 400 "$python benchmarks/loop.py --device $loop_device $loop --json \$work/loop.json"
step loop-contiguous 150 400 "$python benchmarks/loop.py --device $loop_device $loop --methods conv,kit \
--set recipe.channels_last=false --json \$work/loop.json"
for kind in $kinds; do
    operators "$kind" 64 4
    [ -n "$smoke" ] || { operators "$kind" 32 8 && operators "$kind" 64 8; }
done

# The results of a step as one archive. Weights are left out: no table, plot or report reads them.
pack() {
    local folder="$1/runs"
    [ -d "$folder" ] || folder="$1"
    cp "$1.log" "$folder/${2%.failed}.log"
    tar czf "$out/.$2.tmp" -C "$folder" --exclude='*.safetensors' --exclude=.lock --exclude=.launch .
    if [ "$(stat -c %s "$out/.$2.tmp")" -gt 16000000 ]; then
        echo "$2: its archive is larger than 16 MB" >>"$1.log"
        rm "$out/.$2.tmp"
        return 1
    fi
    mv "$out/.$2.tmp" "$out/$2.tar.gz"
}

ready() { "$python" -c 'import kitbench.runs.queue, kitbench.baselines' 2>&1; }
# Unfinished work stays here, so that on the same machine the next call goes on from its checkpoints.
scratch="${TMPDIR:-/tmp}/kitbench-gpu$(printf %s "$out" | tr / -)"
if [ -z "$dry" ] && [ -n "$wheels" ]; then
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
    if ! ready >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --upgrade --target "$scratch/site" "$wheels"/*.whl
        "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . || {
            # Where nothing can be installed, the checkout itself is found; baselines/ and datasets/ are in it by links.
            ln -sfn ../baselines kitbench/baselines && ln -sfn ../datasets kitbench/datasets
            export PYTHONPATH="$PWD:$PYTHONPATH"
        }
    fi
fi
if [ -z "$dry" ] && ! missing=$(ready); then
    echo "gpu.sh: kitbench is not installed for $python: ${missing##*$'\n'}" >&2
    echo "gpu.sh: pip install -e . there, or give a folder of wheels where it has no network: tools/gpu.sh OUT --wheels DIR" >&2
    exit 2
fi

left=0 done=0 failed=0
[ -n "$dry" ] || mkdir -p "$out"
[ -n "$dry" ] || mkdir -p "$scratch"
listed=$([ -n "$dry" ] || find "$out" -type f | wc -l) # files of earlier calls that are still here
said() { [ -n "$before" ] && grep -qxF "$1" "$before"; }
is_done() { [ -e "$out/$1.tar.gz" ] || said "$1"; }
has_failed() { ! is_done "$1" && { [ -e "$out/$1.failed.log" ] || said "failed $1"; }; }
list_done() {
    echo "# device $card"
    for name in "${step_names[@]}"; do
        ! is_done "$name" || echo "$name"
        ! has_failed "$name" || echo "failed $name"
    done
}
card="$device"
if [ -z "$dry" ]; then
    card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')
    other=$([ -z "$before" ] || sed -n 's/^# device //p' "$before")
    if [ -n "$other" ] && [ "$other" != "$card" ]; then
        echo "gpu.sh: $before is of $other, and this is $card: their runs cannot share a table; give another OUT" >&2
        exit 2
    fi
fi
order=() again=()
for number in "${!step_names[@]}"; do
    if has_failed "${step_names[$number]}"; then again+=("$number"); else order+=("$number"); fi
done
for number in "${order[@]}" "${again[@]}"; do
    name="${step_names[$number]}"
    # shellcheck disable=SC2053 # a pattern is wanted
    [[ $name == $only ]] || continue
    if is_done "$name"; then
        echo "$name: done before"
        continue
    fi
    if [ -n "$dry" ]; then
        echo "$name: at most ${step_most[$number]} s: ${step_commands[$number]}"
        continue
    fi
    rest=$((limit - SECONDS + began))
    # The first step of a call has all the time that there is.
    if [ "$(($(find "$out" -type f | wc -l) - listed + 3))" -gt "$files" ] ||
        { [ "$rest" -lt "${step_least[$number]}" ] && [ $((done + failed)) -gt 0 ]; }; then
        left=$((left + 1))
        continue
    fi
    work="$scratch/$name"
    mkdir -p "$work"
    start=$SECONDS code=0
    [ "$rest" -le "${step_most[$number]}" ] || rest="${step_most[$number]}"
    work="$work" timeout --signal=TERM --kill-after=15 "$((rest < 30 ? 30 : rest))" bash -c "${step_commands[$number]}" \
        >"$work.log" 2>&1 || code=$?
    if [ "$code" = 0 ] && pack "$work" "$name"; then
        rm -rf "$out/$name".failed.* "$work" "$work.log"
        done=$((done + 1))
        echo "$name: $((SECONDS - start)) s"
    else
        failed=$((failed + 1))
        tail -n 200 "$work.log" >"$out/$name.failed.log"
        [ -z "$(ls -A "$work")" ] || pack "$work" "$name.failed" || true
        echo "$name: failed with exit code $code after $((SECONDS - start)) s, see $out/$name.failed.log"
        if [ "$name" = machine ]; then
            tail -n 1 "$work.log"
            break
        fi
    fi
done
[ -n "$dry" ] || list_done >"$out/done.txt"
[ -n "$dry" ] || echo "$done done, $failed failed, $left left for the next call"
[ "$failed" = 0 ] || exit 3
