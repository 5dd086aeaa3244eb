#!/bin/sh
# certificates.sh DIRECTORY [NAME...]: a private authority, and a certificate each for agents, routers and samplers,
# good for a year, in DIRECTORY/{agent,router,sampler}/{tls.crt,tls.key,ca.crt}. Each NAME is one more that a tier is
# reached by. Run again, it renews them under the same authority. For a cluster without cert-manager, which makes
# Secrets with the same three keys and renews them by itself. Keep DIRECTORY/authority.key away.
set -eu
directory=${1:?which directory? certificates.sh DIRECTORY [NAME...]}
shift
quiet() { # What openssl says matters only where it fails.
    said=$(openssl "$@" 2>&1) || {
        echo "certificates.sh: $said" >&2
        exit 1
    }
}
umask 077
mkdir -p "$directory"
cd "$directory"
[ -e authority.key ] || quiet req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
    -subj /CN=otel-correlation -keyout authority.key -out ca.crt
issue() { # tier, name...
    tier=$1
    shift
    names=$(printf ',DNS:%s' "$@")
    mkdir -p "$tier"
    printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "${names#,}" > "$tier/extensions"
    quiet req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$tier" \
        -keyout "$tier/tls.key" -out "$tier/request"
    quiet x509 -req -in "$tier/request" -CA ca.crt -CAkey authority.key -CAcreateserial -days 365 \
        -extfile "$tier/extensions" -out "$tier/tls.crt"
    rm "$tier/request" "$tier/extensions"
    cp ca.crt "$tier/ca.crt"
}
issue agent agent.observability-agents "$@"
issue router router.observability "$@"
issue sampler '*.sampler.observability' "$@"
