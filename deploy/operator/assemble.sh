#!/bin/sh
# assemble.sh TARGET WHEEL: lay out TARGET as the operator's Python auto-instrumentation, with otel-correlation's WHEEL
# in it. PYTHON names the interpreter whose pip is used (python3).
set -eu
target=$1 wheel=$2
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

# The versions that the tests run with.
grep -oE '^[A-Za-z0-9._-]+==[^ ;]+' "$here/../../requirements/libraries.txt" > "$constraints"

# Wheels without compiled code only: one directory for every CPython from 3.11 on, glibc and musl, any processor. No
# dependencies: FastAPI, httpx and uvicorn are the application's, in the application's versions.
into() {
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --no-deps \
        --only-binary=:all: --platform any --implementation py --abi none --constraint "$constraints" --target "$@"
    rm -rf "$1/bin"
}
into "$target" --requirement "$here/packages.txt" "$wheel"
into "$target/fallback" --requirement "$here/fallback.txt"

cp "$here/sitecustomize.py" "$target/opentelemetry/instrumentation/auto_instrumentation/sitecustomize.py"
chmod -R a+rX "$target"
