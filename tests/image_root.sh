#!/usr/bin/env bash
# The server's image without an engine: built by the Dockerfile's own steps on a bookworm from debootstrap, started as
# `docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges` would, asked, measured, stopped.
# Needs root, debootstrap, Debian's packages and PyPI; $PYTHON is the Python that reads the Dockerfile.
#
#   tests/image_root.sh runs/demo/artifact [WORK]
set -euo pipefail
artifact=$(realpath "$1")
work=$(realpath -m "${2:-/tmp/kdexport-image}")
here=$(dirname "$(realpath "$0")")
python=${PYTHON:-$here/../.venv/bin/python}
url=http://127.0.0.1:8080
mkdir -p "$work"

# Stands for python:3.11-slim-bookworm: a `python` and a `pip`, without bytecode.
base=$work/base
if [ ! -e "$work/base.made" ]; then
  rm -rf "$base"
  # shellcheck disable=SC2016  # apt's variable, not the shell's
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)
  debootstrap --variant=minbase --include=ca-certificates,python3-pip,python3-venv bookworm "$base" "$mirror" \
    >"$work/base.log"
  ln -s /usr/bin/python3.11 "$base/usr/local/bin/python"
  find "$base" -name __pycache__ -prune -exec rm -r {} +
  rm -rf "$base"/var/lib/apt/lists/* "$base"/var/cache/apt/* "$base"/usr/share/{doc,man,locale}
  touch "$work/base.made"
fi

rm -rf "$work/image"
"$python" "$here/image.py" "$base" "$work/image" >"$work/build.log" 2>&1
root=$work/image/serve
mkdir -p "$root/models/model"
echo "base $(du -sm "$base" | cut -f1) MB, image $(du -sm "$root" | cut -f1) MB, of which ours $(du -sm "$root/opt" | cut -f1) MB"

# What an engine does: mounts and a network of its own (here with nothing but itself), a read-only root, process 1, a
# bare number for a user, no rights and none to gain.
inside=(chroot "$root" setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --no-new-privs sh)
unshare --mount --net --pid --fork sh -euc "
  ip link set lo up
  mount --bind '$root' '$root'
  mount --bind '$artifact' '$root/models/model'
  mount -o remount,bind,ro '$root/models/model'
  mount -o remount,bind,ro '$root'
  mount -t tmpfs -o mode=1777 tmpfs '$root/tmp'
  mount -t proc proc '$root/proc'
  mount --rbind /sys '$root/sys'
  exec ${inside[*]} /start.sh" >"$work/serve.log" 2>&1 &
engine=$!
server=
while [ -z "$server" ]; do server=$(pgrep -P $engine || true); done
trap 'kill -9 $server 2>/dev/null || true' EXIT
enter=(nsenter --target "$server" --mount --net --pid)

began=$(date +%s%N)
until "${enter[@]}" curl -sf "$url/v2/health/ready" >/dev/null 2>&1; do
  kill -0 "$server" || { cat "$work/serve.log"; exit 1; }
  sleep 0.02
done
echo "ready after $((($(date +%s%N) - began) / 1000000)) ms"

ask() {
  "${enter[@]}" curl -sf "$url/predict" -H 'content-type: application/json' -d '{"inputs": "What is the capital?"}'
}
ask | cut -c 1-200
for _ in $(seq 200); do ask >/dev/null; done
grep -E '^(Uid|CapEff|NoNewPrivs|VmHWM|VmRSS|Threads)' "/proc/$server/status"
"${enter[@]}" "${inside[@]}" /health.sh && echo "healthy"
for place in / /models/model /opt/kdexport /nowhere /tmp; do # asked as root: not even root can write
  "${enter[@]}" chroot "$root" touch "$place/x" 2>&1 && echo "$place can be written"
done || true
"${enter[@]}" "${inside[@]}" -c 'command -v cc' || echo "no compiler"

began=$(date +%s%N)
kill "$server"
code=0
wait $engine || code=$?
echo "SIGTERM: exit code $code after $((($(date +%s%N) - began) / 1000000)) ms"
