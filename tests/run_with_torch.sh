#!/usr/bin/env bash
# Runs pytest on a wheel under one version of torch ("newest", or such as 2.6.0), in a virtual environment of its own.
set -euo pipefail
version=$1 wheel=$2
environment=.venv-torch-$version
torch=torch
[ "$version" = newest ] || torch="torch==$version"

[ -d "$environment" ] || "${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" install --quiet --upgrade pip
"$environment/bin/pip" install --quiet --upgrade --group test "$torch" "$wheel[demo]"
"$environment/bin/pip" install --quiet --force-reinstall --no-deps "$wheel"
"$environment/bin/python" -c 'import torch; print("torch", torch.__version__)'
"$environment/bin/python" -m pytest --numprocesses=2 --dist=loadfile
