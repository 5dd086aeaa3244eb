#!/bin/sh
# certificates.sh DIRECTORY [NAME...]: a private authority, and a certificate each for agents, routers and samplers,
# good for a year, in DIRECTORY/{agent,router,sampler}/{tls.crt,tls.key,ca.crt}. Each NAME is one more that a tier is
# reached by. For a cluster without cert-manager; it makes Secrets with the same three keys, and renews them. Keep
# DIRECTORY/authority.key away.
set -eu
directory=$1
shift
umask 077
mkdir -p "$directory"
cd "$directory"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=otel-correlation \
    -keyout authority.key -out ca.crt 2> /dev/null
issue() { # tier, name...
    tier=$1
    shift
    names=$(printf ',DNS:%s' "$@")
    mkdir -p "$tier"
    printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "${names#,}" > "$tier/extensions"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$tier" \
        -keyout "$tier/tls.key" -out "$tier/request" 2> /dev/null
    openssl x509 -req -in "$tier/request" -CA ca.crt -CAkey authority.key -CAcreateserial -days 365 \
        -extfile "$tier/extensions" -out "$tier/tls.crt" 2> /dev/null
    rm "$tier/request" "$tier/extensions"
    cp ca.crt "$tier/ca.crt"
}
issue agent agent.observability-agents "$@"
issue router router.observability "$@"
issue sampler '*.sampler.observability' "$@"
