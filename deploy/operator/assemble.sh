#!/bin/sh
# assemble.sh TARGET WHEEL: lay out TARGET as the operator's Python auto-instrumentation, with otel-correlation's WHEEL
# in it. PYTHON names the interpreter whose pip is used (python3).
set -eu
target=$1 wheel=$2
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
pinned=$(mktemp)
trap 'rm -f "$pinned"' EXIT

# pinned_of NAMES: write the packages that NAMES lists with the versions that the tests run with and the hashes of their
# files, as requirements/libraries.txt has them. A name that is not there is an error.
pinned_of() {
    awk 'FILENAME == ARGV[1] { if ($0 !~ /^ *(#|$)/) wanted[$1] = 1; next }
         /^[^ #]/ { split($0, parts, "=="); taken = parts[1] in wanted; if (taken) delete wanted[parts[1]] }
         taken && !/^ *#/
         END { for (name in wanted) { print "no version of " name > "/dev/stderr"; failed = 1 } exit failed }
        ' "$1" "$here/../../requirements/libraries.txt" > "$pinned"
}

# Wheels without compiled code only: one directory for every CPython from 3.11 on, glibc and musl, any processor. No
# dependencies: FastAPI, httpx and uvicorn are the application's, in the application's versions.
into() {
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --no-deps \
        --only-binary=:all: --platform any --implementation py --abi none --target "$@"
    rm -rf "$1/bin"
}
pinned_of "$here/packages.txt"
into "$target" --require-hashes --requirement "$pinned"
into "$target" --no-index "$wheel"
pinned_of "$here/fallback.txt"
into "$target/fallback" --require-hashes --requirement "$pinned"

cp "$here/sitecustomize.py" "$target/opentelemetry/instrumentation/auto_instrumentation/sitecustomize.py"
chmod -R a+rX "$target"
