#!/bin/sh
# Makes the secrets of compose.yaml in ./secrets, once. Back them up: without master.key no device key can be read again.
# The folder is closed to others; the files in it are not, since each program in its container reads them as a user of its own.
set -eu
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "error: secrets is there already: nothing was changed" >&2
    exit 1
fi
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
mkdir -m 700 secrets
random >secrets/master.key
random >secrets/postgres_password
random >secrets/grafana_password
printf 'postgresql+psycopg://gateway:%s@postgres/registry' "$(cat secrets/postgres_password)" >secrets/registry_url
chmod 644 secrets/*
echo "Wrote master.key, postgres_password, grafana_password and registry_url to $(pwd)/secrets"
