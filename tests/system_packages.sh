#!/usr/bin/env bash
# Installs the system packages that tests drive as real parts: a Redis server, ffmpeg, Chromium, mosquitto and Prometheus.
# Without the right to install, says exactly what to install; the tests that need a missing part are skipped with a reason.
set -u
missing=()
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing+=(redis-server)
command -v ffmpeg >/dev/null || missing+=(ffmpeg)
command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || missing+=(mosquitto)
command -v prometheus >/dev/null || missing+=(prometheus)
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null; then
  echo "tests want these programs, please install them: ${missing[*]}" >&2
  exit 0
fi
if [ "$(id -u)" -eq 0 ]; then sudo=(); elif sudo -n true 2>/dev/null; then sudo=(sudo -n); else
  echo "tests want: apt-get install ${missing[*]}   (no root here; the tests that need them will be skipped)" >&2
  exit 0
fi
echo "installing ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # do not start the installed servers: tests start their own
"${sudo[@]}" apt-get update -qq >/dev/null || true
for package in "${missing[@]}"; do # one by one: Ubuntu has no chromium package that works without snap
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
    echo "could not install $package; the tests that need it will be skipped" >&2
done
exit 0
