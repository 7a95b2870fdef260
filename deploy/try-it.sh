#!/usr/bin/env bash
# A complete federation on this machine, on loopback: a coordinator behind its proxy with TLS, four enrolled hospitals
# with files of their own, one run with privacy, a report, and rows for the groups that hospitals lack.
#
#   bash deploy/try-it.sh [FOLDER]
#
# Ends everything that it started. PORT sets the proxy's port; the next ten are used as well.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-runs/try-it}")
port=${PORT:-18443}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
[ ! -e "$folder" ] || { echo "$folder is there already; give another folder" >&2; exit 2; }
mkdir -p "$folder"
started=$SECONDS
say() { printf '%4d s  %s\n' "$((SECONDS - started))" "$*"; }

daemons=()
finish() {
  [ "${#daemons[@]}" = 0 ] || kill "${daemons[@]}" 2>/dev/null || true
  wait
}
trap finish EXIT
trap 'exit 130' INT TERM

sites=(site-01 site-02 site-03 site-04)

say "four simulated hospitals write their tables"
"$python" -m simulations sites --out "$folder/tables" >"$folder/tables.log" 2>&1

say "the coordinator makes its authority, its certificate and the bundle"
"$python" -m server init "$folder/coordinator" --name localhost --listen "127.0.0.1:$port" \
  --superlink-port "$((port + 1))" >"$folder/coordinator.log"
"$python" -m server up "$folder/coordinator" >>"$folder/coordinator.log" 2>&1 &
daemons+=($!)

join() { # a hospital makes its keys, is let in, looks whether all is well, and approves the bundle
  local site=$1 number=$2 home="$folder/$1"
  mkdir -m 700 "$home"
  cp "$folder/tables/$site.csv" "$home/table.csv"
  cp "$folder/tables/schema.json" "$home/schema.json"
  cat >"$home/site.toml" <<END
[site]
name = "$site"
data = "table.csv"
schema_file = "schema.json"

[server]
address = "localhost:$port"

[daemon]
port = $((port + 1 + number))
END
  chmod 600 "$home/site.toml"
  "$python" -m client enroll "$home/site.toml" --patients 490
  cp "$folder/coordinator/pki/ca.crt" "$home/keys/ca.crt"
}

say "each hospital makes its keys and its private folder"
joining=()
for number in "${!sites[@]}"; do
  join "${sites[$number]}" "$((number + 1))" >"$folder/${sites[$number]}.log" 2>&1 &
  joining+=($!)
done
for each in "${joining[@]}"; do wait "$each"; done

say "the coordinator lets them in"
for site in "${sites[@]}"; do
  "$python" -m server site add "$folder/coordinator" "$site" "$folder/$site/keys/$site.csr" \
    --out "$folder/$site/keys/site.crt" >>"$folder/coordinator.log"
done

say "each hospital approves the bundle and starts its daemon"
for site in "${sites[@]}"; do
  "$python" -m client approve "$folder/$site/site.toml" "$folder/coordinator/mcrage.fab" --yes >>"$folder/$site.log"
  "$python" -m client run "$folder/$site/site.toml" >>"$folder/$site.log" 2>&1 &
  daemons+=($!)
done
"$python" -m client check "$folder/site-01/site.toml" | tee "$folder/check.txt" | grep -v '^ok' || true

say "a run with privacy: every hospital pays at most epsilon 3 for it"
"$python" -m server start "$folder/coordinator" first --wait \
  --set dp=true --set dp-epsilon=3.0 --set dp-sample-rate=0.5 --set dp-draws=8 --set dp-score-epsilon=0.5 \
  --set num-server-rounds=6 --set local-steps=2 --set width=64 --set depth=2 --set min-sites=4 \
  --set evaluate-every=6 --set round-timeout-seconds=60.0

say "what came of it"
"$python" -m server status "$folder/coordinator" | tee "$folder/status.txt"
"$python" -m server rebalance "$folder/coordinator" first
"$python" -m server report "$folder/coordinator" first
"$python" -m client audit verify "$folder/site-01/site.toml"
"$python" -m server doctor "localhost:$port" --ca "$folder/coordinator/pki/ca.crt" \
  --certificate "$folder/site-01/keys/site.crt" --key "$folder/site-01/keys/site.key" >"$folder/doctor.txt"
say "done: $folder/coordinator/runs/first/report.html"
